"""Products with quantized operands, forward and backward.

For a bilinear product P, quantizers Q_x, Q_w, Q_g and the output gradient g:

    y  = P(Q_x(x), Q_w(w))
    g' = Q_g(g)                        quantized once, used twice
    dx = dP/dx (Q_w(w)) applied to g'  straight through Q_x, no clip mask
    dw = dP/dw (Q_x(x)) applied to g'  straight through Q_w

as in CPT. A width of 32 leaves its operand as it is, bit for bit. Widths,
ranges and keys are data and get no gradient. Reverse mode only. With another
`Quantization.backend` than "simulated", products are those of the codes (see
`dpc_jax.quant.integer`); its `input_gradient` may round another g' for dx.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dpc_jax.quant import bilinear, grids, integer, spans


class _Spec(NamedTuple):
  """What is static about a product: itself, grids, dtypes, channel axes."""

  bilinear: bilinear.Bilinear
  quantization: grids.Quantization
  dtypes: tuple[Any, Any]
  activation_axes: tuple[int, ...]
  weight_axes: tuple[int, ...]
  gradient_axes: tuple[int, ...]
  keep_zeros: bool = False

  @property
  def product(self) -> bilinear.Product:
    return self.bilinear.product


class PreviousGradient(NamedTuple):
  """What a product takes of the step before, and gives to the next one.

  Attributes:
    limits: range of the output gradient's grid, () each; where it is empty,
      not finite or wider than float32, each row has its own.
    probe: float32 (rows of the output, 2), of any value. Its cotangent, as of
      a differentiable input, is the gradient's own range, `packed`.
  """

  limits: spans.Range
  probe: jax.Array


def packed(limits: spans.Range) -> jax.Array:
  """(rows, 2), -lo and hi of each row: a maximum over rows joins them."""
  lo, hi = (end.reshape(-1) for end in limits)
  ends = jnp.stack([-lo, hi], axis=-1)
  # A maximum over devices may overlook NaN: a CPU's does.
  return jnp.where(jnp.isnan(ends), jnp.inf, ends)


def dot_general(
  lhs: jax.Array,
  rhs: jax.Array,
  dimension_numbers: Any,
  *,
  bits: grids.LayerBits,
  quantization: grids.Quantization,
  limits: spans.Range | None = None,
  rhs_limits: spans.Range | None = None,
  gradient: PreviousGradient | None = None,
  key: jax.Array | None = None,
  name: str = "",
  precision: lax.PrecisionLike = None,
  preferred_element_type: Any = None,
) -> jax.Array:
  """`lax.dot_general` with quantized operands.

  Args:
    lhs: the activations. Their channels are the last axis.
    rhs: the weights. Their channels are the axes that are not contracted.
    dimension_numbers: as in `lax.dot_general`.
    bits: three widths, () int each; traced or not.
    quantization: the three grids.
    limits: range of the grid of `lhs`; None takes its own. Where the own range
      is not finite, the result is NaN in any case, unless it is a
      `spans.CheckedRange`, which is taken as it is.
    rhs_limits: likewise for `rhs`: a running range, where it is no kernel.
    gradient: None takes the output gradient's own range; else it is quantized
      over the previous one, and a row that is not finite is NaN. Without a
      grid of gradients it has no effect, and its probe the cotangent 0.
    key: PRNG key of stochastic rounding; None rounds to nearest.
    name: of the layer, for the errors of `quant.integer`.
    precision: as in `lax.dot_general`.
    preferred_element_type: as in `lax.dot_general`.

  Raises:
    ValueError: a concrete width that is none, or wider than storage_bits; of
      an integer backend, what it cannot multiply exactly.
  """
  (_, contracted), _ = dimension_numbers
  kept = tuple(a for a in range(rhs.ndim) if a not in contracted)
  product = functools.partial(
    lax.dot_general,
    dimension_numbers=dimension_numbers,
    precision=precision,
    preferred_element_type=preferred_element_type,
  )
  free = len(kept) - len(dimension_numbers[1][1])
  ranks = lhs.ndim, rhs.ndim
  spec = _Spec(
    bilinear.of_dot_general(product, name, ranks, dimension_numbers),
    quantization,
    (lhs.dtype, rhs.dtype),
    activation_axes=(-1,),
    weight_axes=kept,
    gradient_axes=tuple(range(-free, 0)),
  )
  return _quantized_product(
    spec, lhs, rhs, bits, (limits, rhs_limits), key, gradient
  )


def conv_general_dilated(
  lhs: jax.Array,
  rhs: jax.Array,
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  *,
  bits: grids.LayerBits,
  quantization: grids.Quantization,
  limits: spans.Range | None = None,
  rhs_limits: spans.Range | None = None,
  gradient: PreviousGradient | None = None,
  key: jax.Array | None = None,
  name: str = "",
  dimension_numbers: Any = None,
  **kwargs: Any,
) -> jax.Array:
  """`lax.conv_general_dilated` with quantized operands.

  Stride, padding, dilation and groups (depthwise included) are those of
  `lax.conv_general_dilated`, and further keywords go to it. Channels are the
  feature axes that `dimension_numbers` names. Padding adds
  zeros after quantization, as in CPT: they need not lie on the grid. The
  other arguments, and errors, are those of `dot_general` above.
  """
  numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
  product = functools.partial(
    lax.conv_general_dilated,
    window_strides=window_strides,
    padding=padding,
    dimension_numbers=numbers,
    **kwargs,
  )
  groups = {k: v for k, v in kwargs.items() if k.endswith("_group_count")}
  spec = _Spec(
    bilinear.of_conv(product, name, numbers, **groups),
    quantization,
    (lhs.dtype, rhs.dtype),
    activation_axes=(numbers.lhs_spec[1],),
    weight_axes=(numbers.rhs_spec[0],),
    gradient_axes=(numbers.out_spec[1],),
  )
  return _quantized_product(
    spec, lhs, rhs, bits, (limits, rhs_limits), key, gradient
  )


def einsum(
  subscripts: str,
  lhs: jax.Array,
  rhs: jax.Array,
  *,
  bits: grids.LayerBits,
  quantization: grids.Quantization,
  limits: spans.Range | None = None,
  rhs_limits: spans.Range | None = None,
  gradient: PreviousGradient | None = None,
  key: jax.Array | None = None,
  name: str = "",
  keep_zeros: bool = False,
  **kwargs: Any,
) -> jax.Array:
  """`jnp.einsum` of two operands, both quantized.

  The channels of `rhs` are its axes that appear in the output. `subscripts`
  must have an explicit "->" and no ellipsis in the second operand. With
  `keep_zeros`, elements of the output gradient that are exactly 0, as behind a
  mask, stay 0, though an affine grid has no such level. Other arguments and
  errors as in `dot_general` above; keywords go to `jnp.einsum`.
  """
  subscripts = bilinear.explicit(subscripts, lhs.ndim)
  operands, output = subscripts.split("->")
  axes_of_rhs = operands.split(",")[1]
  kept = tuple(i for i, c in enumerate(axes_of_rhs) if c in output)
  free = tuple(i for i, c in enumerate(output) if c in axes_of_rhs)
  product = functools.partial(jnp.einsum, subscripts, **kwargs)
  spec = _Spec(
    bilinear.of_einsum(product, name, subscripts),
    quantization,
    (lhs.dtype, rhs.dtype),
    activation_axes=(-1,),
    weight_axes=kept,
    gradient_axes=free,
    keep_zeros=keep_zeros,
  )
  return _quantized_product(
    spec, lhs, rhs, bits, (limits, rhs_limits), key, gradient
  )


def _quantized_product(spec, x, w, bits, limits, key, gradient):
  quantization = spec.quantization
  widest = quantization.storage_bits
  for name, width in zip(grids.LayerBits._fields, bits, strict=True):
    grids.check_width(width, name)
    has_grid = getattr(quantization, name) is not None
    is_stored = name != "gradients" or quantization.backend != "simulated"
    if widest is not None and has_grid and is_stored:
      check_storage(width, widest, name)
  limits = (
    _span(x, quantization.activations, spec.activation_axes, limits[0]),
    _span(w, quantization.weights, spec.weight_axes, limits[1]),
  )
  bits = grids.LayerBits(*(jnp.asarray(b, jnp.int32) for b in bits))
  return _product(spec, x, w, bits, limits, key, gradient)


def operand_range(
  x: jax.Array, grid: grids.Grid, axes: tuple[int, ...] = (-1,)
) -> spans.Range:
  """Range of an operand, without gradient; its channels are `axes`."""
  return spans.value_range(lax.stop_gradient(x), grids.channel_axes(grid, axes))


def _span(x, grid, axes, limits):
  """The range that an operand's grid spans, None without a grid."""
  if grid is None:
    return None
  if isinstance(limits, spans.CheckedRange):
    return limits
  own = operand_range(x, grid, axes)
  return own if limits is None else spans.guarded(limits, own)


def check_storage(width: Any, storage_bits: int, name: str) -> None:
  """Raises ValueError if a concrete width does not fit the stored codes."""
  if isinstance(width, jax.core.Tracer):
    return
  if np.any(np.asarray(width) > storage_bits):
    raise ValueError(
      f"{name} = {width} does not fit storage_bits = {storage_bits}: use"
      f" widths up to {storage_bits}, or storage_bits=None"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(spec, x, w, bits, limits, key, gradient):
  return _forward(spec, x, w, bits, limits, key, gradient)[0]


def _forward(spec, x, w, bits, limits, key, gradient):
  quantization = spec.quantization
  x_limits, w_limits = limits
  qx = _quantize(
    x,
    bits.activations,
    quantization.activations,
    x_limits,
    key,
    1,
    quantization,
  )
  qw = _quantize(
    w, bits.weights, quantization.weights, w_limits, key, 2, quantization
  )
  backend = integer.resolve(quantization.backend)
  if backend is None:
    y = spec.product(_values(qx, spec.dtypes[0]), _values(qw, spec.dtypes[1]))
  else:
    dtype = jax.eval_shape(spec.product, x, w).dtype
    y = integer.forward(spec.bilinear, backend, qx, qw).astype(dtype)
  return y, (qx, qw, bits.gradients, key, gradient)


def _backward(spec, residuals, g):
  qx, qw, gradient_bits, key, previous = residuals
  if spec.quantization.storage_bits is not None:
    # Else a compiler may see that the forward pass decoded the same codes, and
    # keep the float tensors instead. (On a CPU: see `remat.compiler_options`.)
    qx, qw, g = lax.optimization_barrier((qx, qw, g))
  grid = spec.quantization.gradients
  backend = integer.resolve(spec.quantization.backend)
  if grid is None or (spec.keep_zeros and grid.kind == "affine"):
    backend = None  # no codes, or zeros that lie on no level
  qg = g
  if grid is None:
    previous = None  # no range was found: a probe has no cotangent
  else:
    if previous is None:
      axes = grids.channel_axes(grid, spec.gradient_axes)
      limits = spans.value_range(g, axes)
    else:
      own = spans.row_range(g)
      limits = spans.guarded(spans.widened(previous.limits, own), own)
      # In place of a gradient of the probe, which has no effect.
      previous = PreviousGradient(None, packed(own))
    qg = _round_gradient(spec, backend, g, gradient_bits, limits, key)
  x_dtype, w_dtype = spec.dtypes
  x, w = _values(qx, x_dtype), _values(qw, w_dtype)
  if backend is None:
    (dw,) = jax.linear_transpose(lambda v: spec.product(x, v), w)(qg)
  else:
    dw = integer.weight_gradient(spec.bilinear, backend, qx, qg, w.shape)
  if _is_scaled(spec, qw):
    scaled = g.astype(jnp.float32) * spec.bilinear.along_output(
      qw.scale, g.ndim
    )
    noise = None if key is None else jax.random.fold_in(key, 3)
    limits = spans.value_range(scaled)
    qg = _round_gradient(spec, backend, scaled, gradient_bits, limits, noise)
    qw = qw._replace(scale=jnp.float32(1))
    w = _values(qw, w_dtype)
  if backend is None or qw.scale.size > 1:
    values = _values(qg, g.dtype)
    (dx,) = jax.linear_transpose(lambda v: spec.product(v, w), x)(values)
  else:
    dx = integer.input_gradient(spec.bilinear, backend, qw, qg, x.shape)
  return dx.astype(x_dtype), dw.astype(w_dtype), None, None, None, previous


def _round_gradient(spec, backend, g, bits, limits, key):
  """Values on the grid of gradients, or 8-bit codes for an integer backend."""
  grid = spec.quantization.gradients
  widest = grids.MAX_WIDTH if backend is None else integer.WIDEST
  quantized = grids.encode(
    g, bits, grid, limits, key=key, floor=None, max_width=widest
  )
  if backend is not None:
    return integer.signed_codes(quantized, bits)
  values = _select(bits, g, quantized)
  return jnp.where(g == 0, g, values) if spec.keep_zeros else values


def _is_scaled(spec, qw):
  """Whether the weights' scales go to the gradient, for the input gradient."""
  is_scaled = spec.quantization.input_gradient == "scaled"
  return is_scaled and isinstance(qw, grids.Quantized) and qw.scale.size > 1


_product.defvjp(_forward, _backward)


def _quantize(x, bits, grid, limits, key, stream, quantization):
  """Float values on the grid, or 8-bit codes with scale and offset."""
  if grid is None:
    return x
  if key is not None:
    key = (
      None if grid.rounding == "nearest" else jax.random.fold_in(key, stream)
    )
  storage = quantization.storage_bits
  max_width = grids.MAX_WIDTH if storage is None else storage
  quantized = grids.encode(x, bits, grid, limits, key=key, max_width=max_width)
  if storage is None:
    return _select(bits, x, quantized)
  if integer.resolve(quantization.backend) is not None:
    return integer.signed_codes(quantized, bits)
  return grids.storage_codes(quantized, grid)


def _select(bits, x, quantized):
  return jnp.where(
    bits == grids.FLOAT_WIDTH, x, grids.decode(quantized, x.dtype)
  )


def _values(operand, dtype):
  if isinstance(operand, grids.Quantized):
    return grids.decode(operand, dtype)
  return operand.astype(dtype)
