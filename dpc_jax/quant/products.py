"""A quantized product of two activations: attention's, and its kin."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpc_jax.quant import grids, layers, ops, ranges, spans


class QuantProduct(nn.Module):
  """`jnp.einsum` of two activations, quantized forward and backward.

  It has no weights. Both operands lie on the *activations* grid, always with
  one range per tensor (an axis of a product may be as long as the text, which
  a running range for each of its places could not follow). In the collection
  `precision`, `weights` is the width of the second operand and `activations`
  that of the first; `quant_stats` holds `lo`, `hi` of the first operand,
  `rhs_lo`, `rhs_hi` of the second and their common `count`. The output's
  gradient is quantized once, by the gradients grid, per tensor too, and feeds
  the gradients of both operands. Where it is exactly 0, as behind a mask, it
  stays 0: rounding noise there would leak between positions that a mask keeps
  apart (our decision; at 8 bits such places would make two fifths of the noise
  of a causal attention over 128 tokens). An affine grid has no such level, so
  that an integer `Quantization.backend` then multiplies codes in the forward
  product alone; with symmetric gradients, in all three.

  Training or not, the RNG stream `quant` and the errors are as in
  `QuantDense`. In training the range is that of the whole batch, positions
  that a mask or the loss ignores included, as in BatchNorm's statistics. In
  evaluation, once a batch was counted, the running range alone decides: of
  finite operands no element is rounded by the others, so that a causal model
  stays causal, and the rows of a batch independent.

  Attributes:
    subscripts: as in `jnp.einsum`, two operands with an explicit "->" and no
      ellipsis in the second.
    quantization: the grids of activations and gradients; its grid of weights
      serves nothing here. Without a grid of activations both operands stay in
      float, and their widths start at 32 instead of 8. None is `jnp.einsum`
      itself, without the two collections.
    non_negative: True says that the first operand is nowhere below 0, as
      probabilities are: its range starts at 0, and zeros stay exact zeros.
  """

  subscripts: str
  quantization: grids.Quantization | None = grids.Quantization()
  non_negative: bool = False

  @nn.compact
  def __call__(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Multiplies `lhs` with `rhs`, floating point, as `subscripts` say."""
    if self.quantization is None:
      return jnp.einsum(self.subscripts, lhs, rhs)
    quantization = _of_activations(self.quantization)

    def measure(range_of):
      found = {"": range_of(lhs), "rhs_": range_of(rhs)}
      if self.non_negative:
        lo, hi = found[""]
        found[""] = spans.Range(jnp.minimum(lo, 0), hi)
      return found

    run = functools.partial(
      ops.einsum,
      self.subscripts,
      lhs,
      rhs,
      bits=layers.layer_widths(self, quantization),
      quantization=quantization,
      key=layers.noise_key(self, quantization),
      name=ranges.layer_path(self),
      keep_zeros=True,
    )
    found = ranges.layer_ranges(self, quantization, measure, run)
    return run(
      limits=found.limits.get(""),
      rhs_limits=found.limits.get("rhs_"),
      gradient=found.gradient,
    )


def _of_activations(quantization: grids.Quantization) -> grids.Quantization:
  """The grids of a product, per tensor: that of activations for both."""
  activations, gradients = (
    grid and dataclasses.replace(grid, granularity="tensor")
    for grid in (quantization.activations, quantization.gradients)
  )
  return dataclasses.replace(
    quantization,
    weights=activations,
    activations=activations,
    gradients=gradients,
  )
