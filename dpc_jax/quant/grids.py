"""Uniform quantization grids: range -> scale -> codes -> values.

A grid of width b has integer codes: 0 .. 2^b - 1 (affine), or
-(2^(b-1) - 1) .. 2^(b-1) - 1 (symmetric), over the range of the tensor or of
each channel; `fake_quantize` has the formulas. The affine grid with
nearest-even rounding is that of CPT (Fu et al., ICLR 2021), so that numbers
compare. Widths are 2..16; 32 stands for "not quantized" and gives the input
bit for bit. A width may be traced: it is data, and changing it compiles
nothing anew.

    >>> x = jnp.array([-1.0, -0.4, 0.1, 2.0])
    >>> print(fake_quantize(x, 2, Grid()))
    [-1.  0.  0.  2.]
    >>> print(jax.grad(lambda x: fake_quantize(x, 2, Grid()).sum())(x))
    [1. 1. 1. 1.]
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dpc_jax.quant import noise, spans, widths

# Other rooms take these from here; this one says `spans` and `widths` too.
Range = spans.Range
value_range = spans.value_range
guarded = spans.guarded
LayerBits = widths.LayerBits
as_layer_bits = widths.as_layer_bits
check_width = widths.check_width

MIN_WIDTH = widths.MIN_WIDTH
MAX_WIDTH = widths.MAX_WIDTH
FLOAT_WIDTH = widths.FLOAT_WIDTH
DEFAULT_GRADIENT_WIDTH = widths.DEFAULT_GRADIENT_WIDTH
# CPT's smallest step of weights and activations.
STEP_FLOOR = 1e-8

KINDS = ("affine", "symmetric")
GRANULARITIES = ("tensor", "channel")
ROUNDINGS = ("nearest", "stochastic")
RANGES = ("batch", "delayed")
BACKENDS = ("simulated", "int8", "bf16_codes", "auto")
INPUT_GRADIENTS = ("exact", "scaled")
# Name scope of products that a plain product does not have: of ones, for the
# offset of an affine grid. Costs do not count them.
OFFSET_SCOPE = "offset_of_codes"


def _check_choice(owner: str, field: str, value: Any, known: Any) -> None:
  if value not in known:
    raise ValueError(f"{owner}.{field} = {value!r}: use one of {known}")


@dataclasses.dataclass(frozen=True)
class Grid:
  """The kind of grid of one operand; static and hashable.

  Attributes:
    kind: "affine", from the smallest to the largest value, or "symmetric"
      about 0 (formulas: `fake_quantize`).
    granularity: "tensor", one range, or "channel", one range per output
      channel of a kernel (per feature of an activation or gradient).
    rounding: "nearest" (ties to even) or "stochastic" (unbiased).
  """

  kind: str = "affine"
  granularity: str = "tensor"
  rounding: str = "nearest"

  def __post_init__(self):
    _check_choice("Grid", "kind", self.kind, KINDS)
    _check_choice("Grid", "granularity", self.granularity, GRANULARITIES)
    _check_choice("Grid", "rounding", self.rounding, ROUNDINGS)


@dataclasses.dataclass(frozen=True)
class Quantization:
  """How a layer quantizes its three operands; static and hashable.

  The defaults are CPT's quantizer: weights per output channel, activations per
  tensor, gradients per tensor with stochastic rounding, all affine.

  Attributes:
    weights: grid of the kernel; None leaves it in float.
    activations: grid of the layer's input; None leaves it in float. Give an
      operand without a grid the width 32: costs are counted by widths.
    gradients: grid of the gradient at the layer's output; None leaves it in
      float.
    storage_bits: None keeps what the backward pass needs in float; 8 keeps
      8-bit integer codes with their scale and offset. With 8, a wider width
      (32 included) is refused where it is concrete and gives NaN where it is
      traced, since a dtype cannot follow a traced width.
    ranges: in training, the range that activations and gradients are quantized
      over: that of the "batch", or "delayed", that of the step before, so that
      devices that share the rows of a batch (a mesh's data and fsdp, not its
      tensor) agree on ranges once a step and not in every layer (see
      `dpc_jax.quant.delayed`, which such a step needs). Not with a range per
      channel of theirs. Evaluation is the same with both.
    backend: what multiplies: "simulated", float products of the decoded
      values; "int8" or "bf16_codes", products of the codes themselves (see
      `dpc_jax.quant.integer`); "auto", what was measured to be fastest on this
      kind of device. All but "simulated" need storage_bits=8, grids of weights
      and activations, one range per tensor for activations and gradients, and
      ranges "batch"; the gradient's width is then at most 8 too.
    input_gradient: "exact" contracts the layer's one quantized gradient with
      the weights. With one scale per output channel those scales sit inside
      of that sum, and the product stays in float. "scaled" takes them to the
      gradient: g * scale is quantized once more, over one range, with noise
      of its own, and contracted with the weights' codes (our decision; the
      weight gradient is the same in both). It needs storage_bits=8, ranges
      "batch", a grid of the gradients, and symmetric weights where they have a
      range per channel. Where they have one range the two are the same.
  """

  weights: Grid | None = Grid(granularity="channel")
  activations: Grid | None = Grid()
  gradients: Grid | None = Grid(rounding="stochastic")
  storage_bits: int | None = None
  ranges: str = "batch"
  backend: str = "simulated"
  input_gradient: str = "exact"

  def __post_init__(self):
    for field in LayerBits._fields:
      if not isinstance(getattr(self, field), Grid | None):
        raise ValueError(
          f"Quantization.{field} = {getattr(self, field)!r}: use a Grid, or"
          " None for float"
        )
    _check_choice("Quantization", "storage_bits", self.storage_bits, (None, 8))
    _check_choice("Quantization", "ranges", self.ranges, RANGES)
    for field in ("activations", "gradients"):
      grid = getattr(self, field)
      by_channel = grid is not None and grid.granularity == "channel"
      if self.ranges == "delayed" and by_channel:
        raise ValueError(
          f"Quantization.{field} = {grid!r}: ranges = 'delayed' has one range"
          " per tensor; use granularity 'tensor', or ranges = 'batch'"
        )
    _check_choice("Quantization", "backend", self.backend, BACKENDS)
    _check_choice(
      "Quantization", "input_gradient", self.input_gradient, INPUT_GRADIENTS
    )
    for field in ("backend", "input_gradient"):
      self._check_codes(field)

  def _check_codes(self, choice):
    """Raises ValueError where `choice` multiplies codes that are not there."""
    value = getattr(self, choice)
    if value in ("simulated", "exact"):
      return
    by_channel = {
      field: grid is not None and grid.granularity == "channel"
      for field, grid in zip(LayerBits._fields, self.operands, strict=True)
    }
    needs = [
      ("storage_bits", self.storage_bits == 8, "needs 8"),
      ("ranges", self.ranges == "batch", "needs 'batch'"),
    ]
    if choice == "backend":
      for field in ("weights", "activations"):
        needs.append((field, getattr(self, field) is not None, "needs a Grid"))
      for field in ("activations", "gradients"):
        remedy = "needs granularity 'tensor'"
        needs.append((field, not by_channel[field], remedy))
    else:
      needs.append(("gradients", self.gradients is not None, "needs a Grid"))
      is_met = not by_channel["weights"] or self.weights.kind == "symmetric"
      needs.append(("weights", is_met, "needs kind 'symmetric'"))
    for field, is_met, remedy in needs:
      if not is_met:
        raise ValueError(
          f"Quantization.{field} = {getattr(self, field)!r}: {choice} ="
          f" {value!r} {remedy}"
        )

  @property
  def is_stochastic(self) -> bool:
    """Whether any operand is rounded stochastically."""
    return any(g and g.rounding == "stochastic" for g in self.operands)

  @property
  def operands(self) -> tuple[Grid | None, Grid | None, Grid | None]:
    """The three grids, in the order of `LayerBits`."""
    return self.weights, self.activations, self.gradients


class Quantized(NamedTuple):
  """A tensor on a grid: values = codes * scale + offset.

  Attributes:
    codes: integers, in float32 or in the 8-bit dtype of `storage_codes`.
    scale: float32 step, broadcastable to `codes`.
    offset: float32 value of code 0; None for a symmetric grid.
  """

  codes: jax.Array
  scale: jax.Array
  offset: jax.Array | None


def encode(
  x: jax.Array,
  bits: jax.Array | int,
  grid: Grid,
  limits: spans.Range,
  *,
  key: jax.Array | None = None,
  floor: float | None = STEP_FLOOR,
  max_width: int = MAX_WIDTH,
) -> Quantized:
  """Rounds `x` to the codes of a grid over `limits`; codes are float32.

  Args:
    x: floating-point tensor; computed in float32 whatever its dtype.
    bits: width, () int; traced or not. Outside 2..max_width the scale, and so
      every value, is NaN.
    grid: kind and rounding; its granularity is that of `limits`.
    limits: range that the grid spans; values outside are clipped.
    key: PRNG key for stochastic rounding; None rounds to nearest.
    floor: smallest step; None (gradients) takes any positive step, and 1 where
      the range is empty: a floor would take levels away from small gradients.
    max_width: widest width that is allowed; 32 is allowed with 16 alone, and
      its codes, those of 16 bits, are for the caller to leave out.
  """
  bits = jnp.asarray(bits, jnp.int32)
  width = jnp.clip(bits, MIN_WIDTH, max_width)
  if grid.kind == "affine":
    top = (jnp.int32(1) << width) - 1
    bottom = jnp.zeros_like(top)
    offset = limits.lo
    span = limits.hi - limits.lo
  else:
    top = (jnp.int32(1) << (width - 1)) - 1
    bottom = -top
    offset = None
    span = jnp.maximum(jnp.abs(limits.lo), jnp.abs(limits.hi))
  top, bottom = top.astype(jnp.float32), bottom.astype(jnp.float32)
  # Without it XLA turns a division by a constant into a product with its
  # reciprocal, and a constant width would differ from a traced one.
  top = lax.optimization_barrier(top)
  scale = span / top
  if floor is None:
    scale = jnp.where(scale == 0, 1.0, scale)
  else:
    scale = jnp.maximum(scale, floor)
  valid = bits == width
  if max_width == MAX_WIDTH:
    valid |= bits == FLOAT_WIDTH
  scale = jnp.where(valid, scale, jnp.nan)

  x32 = x.astype(jnp.float32)
  steps = (x32 if offset is None else x32 - offset) / scale
  if grid.rounding == "nearest" or key is None:
    codes = jnp.round(steps)
  else:
    lower = jnp.floor(steps)
    codes = lower + (
      noise.uniform(key, x.shape) < _up(x, steps, lower, scale, offset)
    )
  return Quantized(jnp.clip(codes, bottom, top), scale, offset)


def _up(x, steps, lower, scale, offset):
  """Probability of rounding up that makes the value unbiased in x's dtype."""
  if x.dtype == jnp.float32:
    return steps - lower
  # In a narrower dtype the neighbors are not the exact grid points: take the
  # probability between the values that decode will really return.
  below, above = (
    decode(Quantized(c, scale, offset), x.dtype).astype(jnp.float32)
    for c in (lower, lower + 1)
  )
  gap = above - below
  return jnp.where(
    gap > 0, (x.astype(jnp.float32) - below) / jnp.where(gap > 0, gap, 1), 0
  )


def decode(quantized: Quantized, dtype: Any) -> jax.Array:
  """Values of the codes, computed in float32, returned in `dtype`."""
  values = quantized.codes.astype(jnp.float32) * quantized.scale
  if quantized.offset is not None:
    values = values + quantized.offset
  return values.astype(dtype)


def storage_codes(quantized: Quantized, grid: Grid) -> Quantized:
  """The same codes in 8 bits: uint8 (affine) or int8 (symmetric)."""
  dtype = jnp.uint8 if grid.kind == "affine" else jnp.int8
  return quantized._replace(codes=quantized.codes.astype(dtype))


@jax.custom_jvp
def _straight_through(x, value):
  del x
  return value


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
  return primals[1], tangents[0]


def fake_quantize(
  x: jax.Array,
  bits: jax.Array | int,
  grid: Grid,
  *,
  axis: int | Sequence[int] | None = None,
  key: jax.Array | None = None,
  limits: spans.Range | None = None,
  floor: float | None = STEP_FLOOR,
) -> jax.Array:
  """Rounds `x` to a uniform grid, with a straight-through gradient.

  With lo and hi the smallest and largest value of `x` (or of a channel):

      affine     s = (hi - lo) / (2^bits - 1)         2^bits levels
                 round((x - lo) / s) * s + lo
      symmetric  s = max|x| / (2^(bits-1) - 1)        2^bits - 1 levels
                 round(x / s) * s

  where s is at least `floor`, and round is nearest-even or stochastic. The
  derivative with respect to `x` is the identity, without a clip mask; `bits`,
  `key` and `limits` get none.

  Args:
    x: floating-point tensor of any shape. All-zero, constant, one-element and
      denormal tensors give finite values; NaN or inf anywhere in a range,
      or a range wider than float32, gives NaN over that range.
    bits: width, 2..16, or 32 to return `x` bit for bit; may be traced.
    grid: kind, granularity, rounding.
    axis: the channel axis or axes, for granularity "channel" ("tensor" has
      one range whatever it is); None is the last one, where Flax kernels keep
      their output channels.
    key: PRNG key, required for stochastic rounding.
    limits: range of the grid; None takes that of `x`.
    floor: smallest step; None takes any positive step, and 1 for an empty
      range: the rule for gradients.

  Returns:
    The values, in x's shape and dtype.

  Raises:
    ValueError: a concrete width outside 2..16 and 32; stochastic rounding
      without a key; an integer `x`; an axis that `x` does not have.
  """
  check_width(bits)
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"x.dtype = {x.dtype}: pass a floating-point array")
  if grid.rounding == "stochastic" and key is None:
    raise ValueError("key = None: stochastic rounding needs a PRNG key")
  frozen = lax.stop_gradient(x)
  own = spans.value_range(frozen, _checked_axes(x, grid, axis))
  limits = own if limits is None else spans.guarded(limits, own)
  quantized = encode(frozen, bits, grid, limits, key=key, floor=floor)
  value = jnp.where(
    jnp.asarray(bits) == FLOAT_WIDTH, frozen, decode(quantized, x.dtype)
  )
  return _straight_through(x, value)


def _checked_axes(x, grid, axis) -> tuple[int, ...] | None:
  axes = channel_axes(grid, axis)
  if any(not -x.ndim <= a < x.ndim for a in axes or ()):
    raise ValueError(
      f"axis = {axis}: x has shape {x.shape}; name one of its {x.ndim} axes"
    )
  return axes


def channel_axes(
  grid: Grid, axis: int | Sequence[int] | None
) -> tuple[int, ...] | None:
  """Axes that keep a range of their own: None for granularity "tensor"."""
  if grid.granularity == "tensor":
    return None
  if axis is None:
    return (-1,)
  return (axis,) if isinstance(axis, int) else tuple(axis)
