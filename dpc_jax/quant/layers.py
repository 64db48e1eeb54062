"""Flax Linen layers with quantized products, and no policy.

A layer is its Flax parent with another product. Beside `params` it owns

    precision    weights, activations, gradients: int32, the three widths
    quant_stats  lo, hi, count: running range of its input (float32, float32,
                 int32), the exponential average of the batches' ranges

Both are collections of arrays: bits are data, and changing them compiles
nothing anew. Rounding noise comes from the RNG stream `quant`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpc_jax.quant import grids, ops, ranges

INITIAL_WIDTH = 8


class QuantDense(nn.Dense):
  """`nn.Dense` whose product is quantized, forward and backward.

  Attributes, parameter names, initial values and, at width 32, results are
  those of `nn.Dense`, so float checkpoints load both ways. Name the layers of
  a model: the names that Flax makes up hold the class (`QuantDense_0`).

  Training or not is told by the collections: where `quant_stats` is mutable
  in `apply`, the input is quantized over the range of the batch, which also
  updates the running range (decay 0.9; the first batch sets it: our decision,
  CPT starts at 0); otherwise over the running range, or over the batch's
  while no batch was counted. `init` counts no batch. Without the RNG stream
  `quant`, stochastic grids round to nearest. `Quantization(ranges="delayed")`
  takes the ranges of the step before: see `dpc_jax.quant.delayed`.

  The gradient passes straight through both quantizers (see
  `dpc_jax.quant.ops`); widths and ranges get none.

  Attributes:
    quantization: the grids of weights, activations and gradients; None gives
      `nn.Dense` itself, without the two collections. An operand whose own grid
      is None stays in float whatever its width; it starts at 32 instead of 8,
      and should keep 32, which is what its cost is counted at.

  Raises:
    ValueError: `apply` without the collection `precision` or `quant_stats`; a
      concrete width that is none; `dot_general` or `dot_general_cls` set; with
      an integer `Quantization.backend`, sums of codes that cannot be exact
      (`dpc_jax.quant.integer`), by the layer's path.
  """

  quantization: grids.Quantization | None = grids.Quantization()

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the layer to `inputs` (..., features in)."""
    _check_axes(self, inputs, 1)
    with quantized_products(self, self.quantization):
      return super().__call__(inputs)


class QuantConv(nn.Conv):
  """`nn.Conv` whose product is quantized, forward and backward.

  Strides, padding, dilation and groups (depthwise included) are those of
  `nn.Conv`; for everything else see `QuantDense`.

  Attributes:
    quantization: the grids of weights, activations and gradients; None gives
      `nn.Conv` itself, without the two collections.

  Raises:
    ValueError: as `QuantDense`, for `conv_general_dilated` and its `_cls`.
  """

  quantization: grids.Quantization | None = grids.Quantization()

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the layer to `inputs` (..., spatial..., features in)."""
    _check_axes(self, inputs, len(self.kernel_size) + 1)
    with quantized_products(self, self.quantization):
      return super().__call__(inputs)


def _check_axes(module, inputs, least) -> None:
  shape = jnp.shape(inputs)
  if len(shape) < least:
    name = ranges.layer_path(module) or type(module).__name__
    raise ValueError(
      f"{name}: inputs have shape {shape}; pass at least {least} axes"
    )


@contextlib.contextmanager
def quantized_products(
  module: nn.Module, quantization: grids.Quantization | None
) -> Iterator[None]:
  """Within it, a Flax linear layer's product is the quantized one.

  It goes through the attribute that Flax provides for another product,
  `dot_general` or `conv_general_dilated`, and restores it.

  Args:
    module: a bound `nn.Dense`, `nn.DenseGeneral` or `nn.Conv`, inside its
      compact call.
    quantization: None changes nothing.
  """
  if quantization is None:
    yield
    return
  if isinstance(module, nn.Conv):
    name, product = "conv_general_dilated", ops.conv_general_dilated
  else:
    name, product = "dot_general", ops.dot_general
  for attribute in (name, f"{name}_cls"):
    if getattr(module, attribute) is not None:
      raise ValueError(
        f"{ranges.layer_path(module) or type(module).__name__}: {attribute} is"
        " set, but the product of a quantized layer is its own; leave it None"
      )

  def quantized(x, kernel, *args, **kwargs):
    return call_product(product, module, quantization, x, kernel, args, kwargs)

  # Flax freezes a bound module's attributes; this one lives for the call only.
  object.__setattr__(module, name, quantized)
  try:
    yield
  finally:
    object.__setattr__(module, name, None)


def call_product(
  product: Callable[..., jax.Array],
  module: nn.Module,
  quantization: grids.Quantization,
  x: jax.Array,
  kernel: jax.Array,
  args: tuple[Any, ...],
  kwargs: dict[str, Any],
) -> jax.Array:
  """Calls a product of `ops` with the widths, range and key of `module`."""
  run = functools.partial(
    product,
    x,
    kernel,
    *args,
    bits=layer_widths(module, quantization),
    quantization=quantization,
    key=noise_key(module, quantization),
    name=ranges.layer_path(module),
    **kwargs,
  )
  found = ranges.layer_ranges(
    module, quantization, lambda range_of: {"": range_of(x)}, run
  )
  return run(limits=found.limits.get(""), gradient=found.gradient)


def layer_widths(
  module: nn.Module, quantization: grids.Quantization
) -> grids.LayerBits:
  """The module's widths, int32 () each, out of the collection `precision`.

  Initially 8, and 32 for an operand without a grid.

  Raises:
    ValueError: `apply` without the collection.
  """
  return grids.LayerBits(
    *(
      ranges.variable(
        module,
        "precision",
        field,
        (),
        grids.FLOAT_WIDTH
        if getattr(quantization, field) is None
        else INITIAL_WIDTH,
        jnp.int32,
      ).value
      for field in grids.LayerBits._fields
    )
  )


def noise_key(
  module: nn.Module, quantization: grids.Quantization
) -> jax.Array | None:
  """Key of stochastic rounding; None where nothing is, or without a stream."""
  if quantization.is_stochastic and module.has_rng("quant"):
    return module.make_rng("quant")
  return None
