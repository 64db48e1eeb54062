"""What several models share: constructors of layers, checks of arguments."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpc_jax.quant import grids, layers


def dense(
  quantization: grids.Quantization | None, **options: Any
) -> Callable[..., nn.Module]:
  """Constructor of a dense layer: `QuantDense`, or `nn.Dense` for None.

  Args:
    quantization: the grids.
    **options: attributes of the layer.
  """
  if quantization is None:
    return functools.partial(nn.Dense, **options)
  return functools.partial(
    layers.QuantDense, quantization=quantization, **options
  )


def convolution(
  quantization: grids.Quantization | None, **options: Any
) -> Callable[..., nn.Module]:
  """Constructor of a convolution: `QuantConv`, or `nn.Conv` for None.

  Args:
    quantization: the grids.
    **options: attributes of the layer.
  """
  if quantization is None:
    return functools.partial(nn.Conv, **options)
  return functools.partial(
    layers.QuantConv, quantization=quantization, **options
  )


def check_rates(**rates: float) -> None:
  """Raises ValueError for a share of dropped values outside [0, 1)."""
  for name, rate in rates.items():
    if not 0 <= rate < 1:
      raise ValueError(f"{name} = {rate}: must be in [0, 1)")


def check_tokens(tokens: jax.Array, targets: jax.Array | None) -> None:
  """Raises ValueError unless tokens and targets are words (batch, steps).

  Values are not looked at: they may be traced.
  """
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(
      f"tokens: {tokens.dtype} of shape {tokens.shape}; pass integers of shape"
      " (batch, steps)"
    )
  if targets is not None and targets.shape != tokens.shape:
    raise ValueError(
      f"targets: shape {targets.shape}; must be {tokens.shape}, as tokens"
    )


def negatives_past_the_end(words: jax.Array, num_classes: int) -> jax.Array:
  """Words as int32, each negative one replaced by `num_classes`.

  A lookup past the end gives NaN, but a negative place counts from the end.
  """
  return jnp.where(words < 0, num_classes, words.astype(jnp.int32))
