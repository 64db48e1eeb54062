"""Products of integer codes: the backends "int8" and "bf16_codes".

An operand on a grid is c * s + o, codes c of 8 bits, a scale s and an offset o
(0 on a symmetric grid). For a product P, linear in both operands, and scales
outside of its sums,

    P(x, w) = s_x s_w P(c_x, c_w) + o_x s_w P(1_x, c_w)
              + s_x o_w P(c_x, 1_w) + o_x o_w P(1_x, 1_w)

where 1_x and 1_w are tensors of ones: what a padding adds is 0 in the codes
and in the ones, as in the product of values. The products of ones are small:
axes along which they are constant have length 1. A symmetric grid has none.

    int8         int8 codes, sums in int32
    bf16_codes   bfloat16 codes, which hold 8 bits exactly, sums in float32 (on
                 a CPU float32 codes: the same numbers)

Widths 2..8 are all the same program. Affine codes 0..2^b - 1 are shifted by
2^(b-1) into int8, and the offset with them.

P and both of its transposes are traced with float32 shapes, and their
operations bound anew with codes, so that stride, padding, dilation, groups and
batch axes are those of the product itself:

    forward          x and w, the scales of w per tensor or per channel
    weight gradient  x and g'
    input gradient   w and g', where w has one scale. With one per channel they
                     lie inside of the sum: there it is the product of decoded
                     values, unless Quantization(input_gradient="scaled")

A gradient that keeps its zeros off an affine grid (`ops.einsum`) is multiplied
decoded too, as is all that belongs to a gradient without a grid.

Sums are exact, or exact in parts that are added in float32 (see
`dpc_jax.quant.sums`). The result is computed in float32, and differs from that
of the decoded values by its rounding: by nothing where scales are powers of two
and sums below 2^24.

A range that is not finite makes all of the result NaN that its scale reaches.
"""

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp

from dpc_jax.quant import bilinear, grids, sums

BACKENDS = {
  "int8": sums.Backend("int8", jnp.int8, jnp.int32, 2**31 - 1),
  "bf16_codes": sums.Backend("bf16_codes", jnp.bfloat16, jnp.float32, 2**24),
}
WIDEST = 8  # of codes in int8
# What "auto" takes, by platform, where it was measured; elsewhere "simulated".
FASTEST = {"cpu": "simulated"}
# Largest absolute codes: of a symmetric grid, and of a shifted affine one.
_SYMMETRIC_PEAK = 127
_AFFINE_PEAK = 128
# Operations that move codes or add zeros, and change none.
_MOVES = (
  "broadcast_in_dim",
  "pad",
  "reshape",
  "rev",
  "slice",
  "squeeze",
  "transpose",
)


def resolve(backend: str) -> sums.Backend | None:
  """The backend of that name; None is the product of decoded values.

  "auto" takes what `FASTEST` has for JAX's default platform. Measured is the
  CPU alone: elsewhere it is "simulated", as long as nobody has measured.
  """
  if backend == "auto":
    backend = FASTEST.get(jax.default_backend(), "simulated")
  found = BACKENDS.get(backend)
  if backend == "bf16_codes" and jax.default_backend() == "cpu":
    # XLA has no such product there for every layout.
    found = found._replace(codes=jnp.float32)
  return found


def signed_codes(
  quantized: grids.Quantized, bits: jax.Array
) -> grids.Quantized:
  """The same values with int8 codes; the width is 2..8, or the scale NaN."""
  codes, scale, offset = quantized
  if offset is not None:
    # Half of the levels, and no fixed number: at few bits the sums of codes far
    # from 0 would drown the product in their rounding.
    width = jnp.clip(bits, grids.MIN_WIDTH, WIDEST)
    half = (jnp.int32(1) << (width - 1)).astype(jnp.float32)
    codes, offset = codes - half, offset + half * scale
  return grids.Quantized(codes.astype(jnp.int8), scale, offset)


def forward(
  product: bilinear.Bilinear,
  backend: sums.Backend,
  x: grids.Quantized,
  w: grids.Quantized,
) -> jax.Array:
  """P(x, w), float32, of codes as `signed_codes` gives them.

  Args:
    product: P.
    backend: what multiplies.
    x: codes with one scale.
    w: codes with one scale, or one per channel.

  Raises:
    ValueError: x with several scales; sums that cannot be exact.
  """
  shapes = x.codes.shape, w.codes.shape
  rank = len(product.output(*shapes).shape)
  scale, offset = (
    None if part is None else product.along_output(part, rank)
    for part in (w.scale, w.offset)
  )
  run = _runner(
    product, backend, shapes, None, ((product.x_free, ()), ((), product.w_free))
  )
  x = _one_scale(product.name, x)
  return _multiply(run, x, w._replace(scale=scale, offset=offset))


def weight_gradient(
  product: bilinear.Bilinear,
  backend: sums.Backend,
  x: grids.Quantized,
  g: grids.Quantized,
  w_shape: tuple[int, ...],
) -> jax.Array:
  """The gradient of P by w, float32; x and g with one scale each.

  Raises:
    ValueError: several scales; sums that cannot be exact.
  """
  shapes = x.codes.shape, w_shape
  return _transposed(product, backend, shapes, 1, ((), product.w_free), x, g)


def input_gradient(
  product: bilinear.Bilinear,
  backend: sums.Backend,
  w: grids.Quantized,
  g: grids.Quantized,
  x_shape: tuple[int, ...],
) -> jax.Array:
  """The gradient of P by x, float32; w and g with one scale each.

  Raises:
    ValueError: several scales; sums that cannot be exact.
  """
  shapes = x_shape, w.codes.shape
  return _transposed(product, backend, shapes, 0, (product.x_free, ()), w, g)


def _transposed(product, backend, shapes, into, shrink, operand, g):
  """The gradient of P by x (`into` 0) or w (1), of the other operand and g.

  `shrink` has the axes of x and of w that have length 1 where g is ones.
  """
  shrinks = ((product.x_shared, product.w_shared), shrink)
  run = _runner(product, backend, shapes, into, shrinks)
  return _multiply(run, *(_one_scale(product.name, q) for q in (operand, g)))


def _runner(product, backend, shapes, into, shrinks):
  """(term, term) -> the traced product of them, float32.

  Of a term of ones (peak 1) only the value is needed. `shrinks` has, for each
  term, the axes of x and of w that have length 1 where it is ones.
  """

  def run(*terms):
    axes = [], []
    for term, shrink in zip(terms, shrinks, strict=True):
      if term.peak == 1:
        for found, more in zip(axes, shrink, strict=True):
          found.extend(more)
    traced = product.trace(*map(_shrunk, shapes, axes), into)
    terms = [
      sums.Term(jnp.broadcast_to(codes, variable.aval.shape), peak)
      for (codes, peak), variable in zip(
        terms, traced.jaxpr.invars, strict=True
      )
    ]
    name = product.name or "a product"
    terms = [t._replace(codes=t.codes.astype(backend.codes)) for t in terms]
    (total,) = _evaluate(traced, name, backend, terms)
    return total.codes.astype(jnp.float32)

  return run


def _one_scale(name, quantized):
  if quantized.scale.size != 1:
    raise ValueError(
      f"{name or 'a product'}: limits of shape {quantized.scale.shape}; a"
      " backend of integer codes takes one range, of shape ()"
    )
  offset = quantized.offset
  return quantized._replace(
    scale=quantized.scale.reshape(()),
    offset=None if offset is None else offset.reshape(()),
  )


def _multiply(run, a, b):
  """The sum of the module's docstring, of what `run` returns for two terms."""
  (a_codes, a_scale, a_offset), (b_codes, b_scale, b_offset) = a, b
  a_codes, b_codes = sums.Term(a_codes, _peak(a)), sums.Term(b_codes, _peak(b))
  a_scale, b_scale = _finite(a_scale), _finite(b_scale)
  # Of a known constant XLA would evaluate whole products when it compiles.
  ones = sums.Term((a_scale.reshape(-1)[0] != 0).astype(jnp.int8), 1)
  # In steps: the product of two small scales may be no normal number.
  total = run(a_codes, b_codes) * a_scale * b_scale
  with jax.named_scope(grids.OFFSET_SCOPE):
    if a_offset is not None:
      total += run(ones, b_codes) * a_offset * b_scale
    if b_offset is not None:
      total += run(a_codes, ones) * a_scale * b_offset
    if a_offset is not None and b_offset is not None:
      total += run(ones, ones) * a_offset * b_offset
  return total


def _peak(quantized):
  return _SYMMETRIC_PEAK if quantized.offset is None else _AFFINE_PEAK


def _finite(scale):
  return jnp.where(jnp.isfinite(scale), scale, jnp.nan)


def _shrunk(shape, axes):
  return tuple(1 if i in axes else n for i, n in enumerate(shape))


def _evaluate(traced, name, backend, arguments):
  """Runs a traced product with `sums.Term`s in place of float arrays."""
  jaxpr = traced.jaxpr
  terms = dict(zip(jaxpr.invars, arguments, strict=True))

  def read(variable):
    if not isinstance(variable, jex_core.Literal):
      return terms[variable]
    # The only constants of a linear map are zeros, of a pad.
    return sums.Term(jnp.asarray(variable.val, backend.codes), 0)

  for eqn in jaxpr.eqns:
    inputs = [read(variable) for variable in eqn.invars]
    kind = eqn.primitive.name
    if kind == "dot_general":
      numbers = eqn.params["dimension_numbers"]
      outputs = [sums.dot_general(name, backend, numbers, *inputs)]
    elif kind == "conv_general_dilated":
      spatial = eqn.params["dimension_numbers"].out_spec[2:]
      places = tuple(eqn.outvars[0].aval.shape[axis] for axis in spatial)
      outputs = [
        sums.conv_general_dilated(name, backend, eqn.params, places, *inputs)
      ]
    elif kind == "jit":
      outputs = _evaluate(eqn.params["jaxpr"], name, backend, inputs)
    elif kind == "convert_element_type":
      outputs = inputs
    elif kind in _MOVES:
      moved = eqn.primitive.bind(*(t.codes for t in inputs), **eqn.params)
      outputs = [sums.Term(moved, max(t.peak for t in inputs))]
    else:
      raise ValueError(
        f"{name}: backend = {backend.name!r} has no {kind!r}; leave what is no"
        " product out of the einsum, or use backend 'simulated'"
      )
    terms.update(zip(eqn.outvars, outputs, strict=True))
  return [read(variable) for variable in jaxpr.outvars]
