"""Flax Linen layers with quantized products, and no policy.

A layer is its Flax parent with another product. Beside `params` it owns

    precision    weights, activations, gradients: int32, the three widths
    quant_stats  lo, hi, count: running range of its input (float32, float32,
                 int32), the exponential average of the batches' ranges

Both are collections of arrays: bits are data, and changing them compiles
nothing anew. Rounding noise comes from the RNG stream `quant`.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpc_jax.quant import grids, ops

# Weight of the past in the running range (CPT's value).
RANGE_DECAY = 0.9
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
  `quant`, stochastic grids round to nearest.

  The gradient passes straight through both quantizers (see
  `dpc_jax.quant.ops`); widths and ranges get none.

  Attributes:
    quantization: the grids of weights, activations and gradients; None gives
      `nn.Dense` itself, without the two collections. An operand whose own grid
      is None stays in float whatever its width; it starts at 32 instead of 8,
      and should keep 32, which is what its cost is counted at.

  Raises:
    ValueError: `apply` without the collection `precision` or `quant_stats`; a
      concrete width that is none; `dot_general` or `dot_general_cls` set.
  """

  quantization: grids.Quantization | None = grids.Quantization()

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the layer to `inputs` (..., features in)."""
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
    with quantized_products(self, self.quantization):
      return super().__call__(inputs)


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
        f"{layer_path(module) or type(module).__name__}: {attribute} is set,"
        " but the product of a quantized layer is its own; leave it None"
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
  bits = layer_widths(module, quantization)
  running = None
  if quantization.activations is not None:
    batch = {"": ops.operand_range(x, quantization.activations)}
    running = running_ranges(module, batch)
  return product(
    x,
    kernel,
    *args,
    bits=bits,
    quantization=quantization,
    # The product finds the range of the batch by itself.
    limits=None if running is None else running[""],
    key=noise_key(module, quantization),
    **kwargs,
  )


def layer_path(module: nn.Module) -> str:
  """The layer path of a bound module: '/'-joined names, '' at the root."""
  return "/".join(module.path)


def _variable(module, collection, name, shape, value, dtype):
  # Mutable is not enough: widths made up in `apply` would be a silent reset.
  if not (
    (module.is_initializing() and module.is_mutable_collection(collection))
    or module.has_variable(collection, name)
  ):
    raise ValueError(
      f"{layer_path(module) or type(module).__name__}: no collection"
      f" {collection!r} in apply's variables; pass all that init returned, not"
      " params alone, and name it in the variable_axes of an nn.scan or nn.vmap"
    )
  return module.variable(collection, name, jnp.full, shape, value, dtype)


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
      _variable(
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


def running_ranges(
  module: nn.Module, batch: dict[str, grids.Range]
) -> dict[str, grids.Range] | None:
  """Ranges that serve in place of the batch's own, one for each operand.

  Where `quant_stats` is mutable (training), updates the running ranges and
  returns None: the batch's own serve. `init` does not count its batch.

  Args:
    module: a bound module, inside its compact call.
    batch: {prefix: range of this batch}, prefix "" for the first operand; the
      running range is in the variables `<prefix>lo` and `<prefix>hi`, and
      `count` is that of all operands.

  Returns:
    In evaluation, the running ranges, or those of `batch` while no batch was
    counted; in training None.

  Raises:
    ValueError: `apply` without the collection.
  """
  running = {
    prefix: grids.Range(
      *(
        _variable(
          module, "quant_stats", prefix + field, own.lo.shape, 0, jnp.float32
        )
        for field in grids.Range._fields
      )
    )
    for prefix, own in batch.items()
  }
  count = _variable(module, "quant_stats", "count", (), 0, jnp.int32)
  is_first = count.value == 0
  if not module.is_mutable_collection("quant_stats"):
    return {
      prefix: grids.Range(
        *(
          jnp.where(is_first, new, old.value)
          for old, new in zip(running[prefix], own, strict=True)
        )
      )
      for prefix, own in batch.items()
    }
  if not module.is_initializing():
    for prefix, own in batch.items():
      for old, new in zip(running[prefix], own, strict=True):
        average = RANGE_DECAY * old.value + (1 - RANGE_DECAY) * new
        old.value = jnp.where(is_first, new, average)
    count.value = count.value + 1
  return None


def noise_key(
  module: nn.Module, quantization: grids.Quantization
) -> jax.Array | None:
  """Key of stochastic rounding; None where nothing is, or without a stream."""
  if quantization.is_stochastic and module.has_rng("quant"):
    return module.make_rng("quant")
  return None
