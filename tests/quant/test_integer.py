"""Products of codes: exact in integers, close to those of decoded values."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.quant import bilinear, grids, integer, layers, ops, sums
from tests.quant import products, reference

STEP = 2.0**-5
KEY = jax.random.key(1)


def quantization(kind="symmetric", granularity="tensor", **more):
  return grids.Quantization(
    grids.Grid(kind, granularity),
    grids.Grid(kind),
    grids.Grid(kind, rounding="stochastic"),
    **{"storage_bits": 8, "backend": "int8"} | more,
  )


def compiled(case, quantized):
  """(bits, x, w, g, key) -> output, gradients; built as the fixture says."""

  @jax.jit
  def run(bits, x, w, g, key=None):
    product = functools.partial(
      case.quantized, bits=bits, quantization=quantized, key=key
    )
    y, vjp = jax.vjp(product, x, w)
    return y, *vjp(g)

  return run


def on_grid(shape, bits, kind, seed):
  """Multiples of 2^-5 which are the levels of their own grid."""
  random = np.random.default_rng(seed)
  top = 2 ** (bits - 1) - 1 if kind == "symmetric" else 2**bits - 1
  bottom = -top if kind == "symmetric" else 0
  codes = random.integers(bottom, top + 1, shape)
  codes.flat[:2] = bottom, top
  # The range of an affine grid need not begin at 0, nor be centered.
  shift = 0 if kind == "symmetric" else -(top // 3)
  return jnp.asarray((codes + shift) * STEP, jnp.float32)


def exact_arrays(case, bits, kind):
  x, w = jnp.zeros(case.x), jnp.zeros(case.w)
  shapes = case.w, case.x, jax.eval_shape(case.plain, x, w).shape
  w, x, g = (
    on_grid(shape, width, kind, i)
    for i, (shape, width) in enumerate(zip(shapes, bits, strict=True))
  )
  return x, w, g


def assert_exact(case, quantized, kind):
  bits = grids.LayerBits(8, 7, 6)
  arrays = exact_arrays(case, bits, kind)
  # Exact in float64, and no more digits than float32 has.
  want = case.expected(*(np.float64(v) for v in arrays))
  got = compiled(case, quantized)(products.widths(*bits), *arrays)
  for ours, theirs in zip(got, want, strict=True):
    np.testing.assert_array_equal(ours, theirs.astype(np.float32))
    np.testing.assert_array_equal(np.float64(ours), theirs)


EXACT = [
  *(("symmetric", name, "int8") for name in products.CASES),
  *(("affine", name, "int8") for name in ("batch", "stride", "groups")),
  ("symmetric", "dense", "bf16_codes"),
  ("affine", "conv", "bf16_codes"),
]


@pytest.mark.usefixtures("fast_compiler")
@pytest.mark.parametrize(("kind", "name", "backend"), EXACT)
def test_integers_are_exact(kind, name, backend):
  assert_exact(products.CASES[name], quantization(kind, backend=backend), kind)


def shorten(monkeypatch, longest, name="int8"):
  short = integer.BACKENDS[name]._replace(largest=longest * 128 * 128)
  monkeypatch.setitem(integer.BACKENDS, name, short)


@pytest.mark.usefixtures("fast_compiler")
@pytest.mark.parametrize(
  ("name", "longest"), [("dense", 4), ("conv", 27), ("groups", 27)]
)
def test_sums_in_parts_are_exact_too(name, longest, monkeypatch):
  shorten(monkeypatch, longest)
  monkeypatch.setattr(sums, "UNROLLED", 1)
  monkeypatch.setattr(sums, "TOGETHER", 60)
  loops = []
  loop = jax.lax.fori_loop
  monkeypatch.setattr(
    jax.lax, "fori_loop", lambda *args: loops.append(args) or loop(*args)
  )
  case = products.CASES[name]
  case = case._replace(x=(4, *case.x[1:]))
  assert_exact(case, quantization("affine"), "affine")
  assert loops


def test_the_longest_sums_do_not_overflow():
  # 127 * 127 * 140,000 is more than 2^31, and 127 * 127 * 1,100 than 2^24.
  for name, length in (("int8", 140_000), ("bf16_codes", 1_100)):
    backend = integer.resolve(name)
    term = sums.Term(jnp.full((1, length), 127, backend.codes), 127)
    numbers = (((1,), (1,)), ((), ()))
    assert 127 * 127 * length > backend.largest
    total = sums.dot_general("", backend, numbers, term, term).codes
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, 127.0 * 127 * length, rtol=2e-7)
    # What fits is left in one piece.
    fits = backend.largest // (127 * 127)
    term = sums.Term(term.codes[:, :fits], 127)
    whole = sums.dot_general("", backend, numbers, term, term).codes
    assert whole.dtype == backend.sums
    assert whole.item() == 127 * 127 * fits


def test_what_cannot_be_split_is_refused_by_name(monkeypatch):
  shorten(monkeypatch, 20)
  layer = layers.QuantConv(
    9,
    (3, 3),
    feature_group_count=3,
    quantization=quantization("affine", "channel"),
  )

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      return layer.copy(name="stem")(x)

  x = jnp.ones((2, 6, 5, 6))
  variables = jax.eval_shape(Net().init, jax.random.key(0), x)

  def loss(variables, x):
    return Net().apply(variables, x).sum()

  # Forward 9 * 2 products fit, in the weights' gradient 2 * 6 * 5 are split,
  # and in the input's, where 9 * 3 would not fit, are values.
  jax.eval_shape(jax.grad(loss, allow_int=True), variables, x)
  shorten(monkeypatch, 17)
  with pytest.raises(ValueError) as caught:
    jax.eval_shape(loss, variables, x)
  assert str(caught.value) == (
    "stem: sums of 18 products of codes up to 128 and 128 are not exact with"
    " backend = 'int8', and cannot be split into parts that are; use a smaller"
    " batch or image, or backend 'simulated'"
  )


@pytest.mark.usefixtures("fast_compiler")
@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("groups", {"kind": "affine", "granularity": "channel"}),
    ("conv", {"granularity": "channel", "input_gradient": "scaled"}),
    ("batch", {"kind": "affine", "backend": "bf16_codes"}),
  ],
)
def test_three_ways_at_every_width(name, options):
  case = products.CASES[name]
  arrays = products.arrays(case)
  as_float = products.plain(case, *arrays)
  ours = quantization(**options)
  of_codes = compiled(case, ours)
  of_values = compiled(case, dataclasses.replace(ours, backend="simulated"))
  errors = []
  for bits in (2, 5, 8):
    widths = products.widths(bits, max(2, bits - 1), bits)
    got = of_codes(widths, *arrays, KEY)
    want = of_values(widths, *arrays, KEY)
    for a, b in zip(got, want, strict=True):
      assert a.dtype == b.dtype
      assert products.relative_error(a, b) < 2e-6
    errors.append([*map(products.relative_error, got, as_float)])
  errors = np.array(errors)
  assert np.all(errors[0] > errors[1]) and np.all(errors[1] > errors[2])
  assert np.all(errors[2] < 0.1)
  # Bits are data.
  assert of_codes._cache_size() == of_values._cache_size() == 1


@pytest.mark.usefixtures("fast_compiler")
def test_the_scaled_input_gradient():
  case = products.CASES["dense"]
  x, w, g = products.arrays(case)
  quantized = quantization(
    granularity="channel", backend="simulated", input_gradient="scaled"
  )
  bits = products.widths(4, 4, 5)
  scaled = compiled(case, quantized)
  y, dx, dw = scaled(bits, x, w, g)
  scale = np.abs(np.asarray(w)).max(0) / 7
  codes = reference.quantize(w, 4, "symmetric", (1,)) / scale
  scaled_g = np.asarray(g) * scale
  scaled_g = reference.quantize(scaled_g, 5, "symmetric", floor=None)
  want = np.einsum("nho,io->nhi", scaled_g, codes)
  assert products.relative_error(dx, want) < 2e-6
  # Nothing else moved.
  exact = compiled(case, dataclasses.replace(quantized, input_gradient="exact"))
  others = exact(bits, x, w, g)
  np.testing.assert_array_equal(y, others[0])
  np.testing.assert_array_equal(dw, others[2])
  assert products.relative_error(dx, others[1]) > 1e-3


@pytest.mark.usefixtures("fast_compiler")
def test_the_scaled_input_gradient_has_noise_of_its_own():
  eye = jnp.eye(32)
  case = products.Dot("ni,io->no", (32, 32), (32, 32), (((1,), (0,)), ((), ())))
  g = products.arrays(case)[2]
  quantized = quantization(granularity="channel", input_gradient="scaled")
  # Of the identity dx and dw are the gradient as it was rounded for each.
  _, dx, dw = compiled(case, quantized)(products.widths(4), eye, eye, g, KEY)
  step = np.abs(np.asarray(g)).max() / 7
  for rounded in (dx, dw):
    np.testing.assert_allclose(
      rounded / step, np.rint(rounded / step), atol=1e-4
    )
    assert np.all(np.abs(rounded - g) < step * 1.0001)
  assert 0.2 < np.mean(np.abs(dx - dw) > step / 2) < 0.45


def test_what_is_no_product_of_codes_is_refused():
  x, w = jnp.ones((2, 3)), jnp.ones((3, 4))

  def product(subscripts, limits=None):
    return jax.eval_shape(
      lambda x, w: ops.einsum(
        subscripts,
        x,
        w,
        bits=products.widths(8),
        quantization=quantization(),
        limits=limits,
        name="mix",
      ),
      x,
      w,
    )

  assert product("...b, bc -> ...c").shape == (2, 4)
  with pytest.raises(
    ValueError, match=r"^mix: backend = 'int8' has no 'reduce"
  ):
    product("ab,bc->c")
  rows = grids.Range(jnp.zeros((2, 1)), jnp.ones((2, 1)))
  with pytest.raises(ValueError, match=r"^mix: limits of shape \(2, 1\)"):
    product("ab,bc->ac", rows)


def test_scales_of_the_weights_along_the_output():
  random = np.random.default_rng(0)
  x, w = jnp.ones((2, 3)), random.normal(size=(4, 1, 5))
  product = bilinear.of_einsum(None, "", "ab,cbd->adc")
  want = np.einsum("ab,cbd->adc", x[:1, :1], w)
  np.testing.assert_array_equal(product.along_output(w, 3), want)
  numbers = (((2,), (1,)), ((0,), (3,)))  # "bac,dceb->bade", b a batch
  product = bilinear.of_dot_general(None, "", (3, 4), numbers)
  w = random.normal(size=(4, 1, 5, 2))
  want = np.einsum("bac,dceb->bade", np.ones((2, 1, 1)), w)
  np.testing.assert_array_equal(product.along_output(w, 4), want)
  numbers = jax.lax.conv_dimension_numbers(
    (1, 3, 8, 8), (5, 3, 2, 2), ("NCHW", "OIHW", "NCHW")
  )
  w = random.normal(size=(5, 1, 1, 1))
  along = bilinear.of_conv(None, "", numbers).along_output(w, 4)
  np.testing.assert_array_equal(along, w.reshape(1, 5, 1, 1))


def test_a_scale_that_is_not_finite_is_nan():
  product = products.CASES["dense"]
  of_codes = bilinear.of_dot_general(product.plain, "", (3, 2), product.numbers)
  for bad in (jnp.inf, jnp.nan):
    x = grids.Quantized(jnp.ones(product.x, jnp.int8), jnp.float32(bad), None)
    w = grids.Quantized(jnp.ones(product.w, jnp.int8), jnp.float32(1), None)
    y = integer.forward(of_codes, integer.resolve("int8"), x, w)
    assert np.all(np.isnan(y))


@pytest.mark.usefixtures("fast_compiler")
def test_what_is_not_finite_or_too_wide_is_nan():
  case = products.CASES["dense"]
  x, w, g = products.arrays(case)
  run = compiled(case, quantization("affine", "channel"))
  bits = products.widths(8)
  for bad in (np.nan, np.inf):
    y, _, dw = run(bits, x.at[0, 0, 0].set(bad), w, g)
    assert np.all(np.isnan(y)) and np.all(np.isnan(dw))
    y, _, dw = run(bits, x, w.at[0, 1].set(bad), g)
    assert np.all(np.isnan(y), (0, 1)).tolist() == [0, 1, 0, 0, 0]
    _, dx, dw = run(bits, x, w, g.at[0, 0, 0].set(bad))
    assert np.all(np.isnan(dx)) and np.all(np.isnan(dw))
  for field in bits._fields:
    y, dx, dw = run(bits._replace(**{field: jnp.int32(9)}), x, w, g)
    assert np.all(np.isnan(dx if field == "gradients" else y))
    wide = grids.LayerBits(8, 8, 8)._replace(**{field: 9})
    with pytest.raises(ValueError, match=f"{field} = 9 does not fit"):
      case.quantized(x, w, bits=wide, quantization=quantization())
