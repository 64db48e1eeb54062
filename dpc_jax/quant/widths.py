"""Bit-widths of a layer: three numbers, checked where they are concrete."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MIN_WIDTH = 2
MAX_WIDTH = 16
FLOAT_WIDTH = 32
# Of the gradient where one width is given for a whole layer.
DEFAULT_GRADIENT_WIDTH = 8


class LayerBits(NamedTuple):
  """Bit-widths of one layer: ints, or int32 arrays of shape () or (layers,).

  Attributes:
    weights: width of the kernel (of an attention product: of the second
      operand).
    activations: width of the layer's input.
    gradients: width of the gradient at the layer's output.
  """

  weights: Any
  activations: Any
  gradients: Any


def as_layer_bits(bits: "int | LayerBits | Sequence[int]") -> LayerBits:
  """Returns `bits` as LayerBits: b means (b, b, 8), and 32 (32, 32, 32).

  Args:
    bits: an int, a LayerBits, or three widths in its order. Leaves may be
      arrays or tracers; only concrete ones are checked.

  Raises:
    ValueError: a width outside 2..16 and 32, or not three of them.
  """
  if isinstance(bits, (tuple, list)):
    if len(bits) != 3:
      raise ValueError(
        f"bits = {bits!r} must be one width or three: weights, activations,"
        " gradients"
      )
    layer = LayerBits(*bits)
  else:
    check_width(bits)
    layer = LayerBits(bits, bits, _gradient_width(bits))
  for name, width in zip(LayerBits._fields, layer, strict=True):
    check_width(width, name)
  return layer


def _gradient_width(bits):
  """8, or 32 where `bits` is 32; an int of an int, else an array."""
  if isinstance(bits, int | np.integer):
    return FLOAT_WIDTH if bits == FLOAT_WIDTH else DEFAULT_GRADIENT_WIDTH
  xp = jnp if isinstance(bits, jax.Array) else np
  return xp.where(
    xp.asarray(bits) == FLOAT_WIDTH,
    np.int32(FLOAT_WIDTH),
    np.int32(DEFAULT_GRADIENT_WIDTH),
  )


def check_width(bits: Any, name: str = "bits") -> None:
  """Raises ValueError if a concrete width is not in 2..16 or 32.

  A traced width cannot be read; the grid of one that is out of range is NaN.
  """
  if isinstance(bits, jax.core.Tracer):
    return
  values = np.asarray(bits)
  if values.dtype.kind not in "iu" or not np.all(
    ((values >= MIN_WIDTH) & (values <= MAX_WIDTH)) | (values == FLOAT_WIDTH)
  ):
    raise ValueError(
      f"{name} = {bits!r} is not a bit-width: use an int in {MIN_WIDTH}.."
      f"{MAX_WIDTH}, or {FLOAT_WIDTH} for no quantization"
    )
