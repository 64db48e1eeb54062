"""Quantized products: three ways, outputs and both gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.quant import grids, ops
from tests.quant import products, reference

WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)
SYMMETRIC_CASES = tuple(f"{name} symmetric" for name in ("batch", "depthwise"))


@pytest.mark.parametrize("name", [*products.CASES, *SYMMETRIC_CASES])
def test_every_width_three_ways(name):
  grid = products.SYMMETRIC if name in SYMMETRIC_CASES else products.NEAREST
  case = products.CASES[name.removesuffix(" symmetric")]
  x, w, g = products.arrays(case)
  kind = grid.weights.kind
  as_float = products.plain(case, x, w, g)
  errors = []
  for bits in WIDTHS:
    # Three widths that differ tell the operands apart.
    a, b = max(bits - 1, 2), min(bits + 1, 16)
    got = products.quantized(case, grid, products.widths(bits, a, b), x, w, g)
    want = case.expected(
      reference.quantize(x, a, kind),
      reference.quantize(w, bits, kind, case.weight_axes()),
      reference.quantize(g, b, kind, floor=None),
    )
    for ours, theirs in zip(got, want, strict=True):
      assert ours.shape == theirs.shape
      # At 16 bits a tie moves one operand by 1.5e-5 of its range.
      assert products.relative_error(ours, theirs) < (
        2e-6 if bits < 9 else 2e-5
      )
    errors.append(
      [
        products.relative_error(o, f)
        for o, f in zip(got, as_float, strict=True)
      ]
    )
  errors = np.array(errors)
  assert np.all(errors[-1] < 3e-4)
  assert np.all(errors[0] > 0.05)
  assert np.all(errors[4] < errors[1])


@pytest.mark.parametrize("name", ["dense", "batch", "einsum", "groups"])
def test_one_range_for_each_channel_of_every_operand(name):
  case = products.CASES[name]
  x, w, g = products.arrays(case)
  got = products.quantized(
    case, products.ALL_CHANNELS, products.widths(4, 3, 5), x, w, g
  )
  want = case.expected(
    reference.quantize(x, 3, "affine", (-1,)),
    reference.quantize(w, 4, "affine", case.weight_axes()),
    reference.quantize(g, 5, "affine", case.gradient_axes(), floor=None),
  )
  for ours, theirs in zip(got, want, strict=True):
    assert products.relative_error(ours, theirs) < 2e-6


@pytest.mark.parametrize(
  "name", [*products.CASES, "dense bfloat16", "conv bfloat16"]
)
def test_width_32_is_the_plain_product_bit_for_bit(name):
  case = products.CASES[name.split()[0]]
  dtype = jnp.bfloat16 if name.endswith("bfloat16") else jnp.float32
  x, w, g = products.arrays(case, dtype)
  want = products.plain(case, x, w, g)
  got = products.quantized(
    case, grids.Quantization(), products.widths(32), x, w, g, jax.random.key(0)
  )
  off = products.quantized(
    case, grids.Quantization(None, None, None), products.widths(8), x, w, g
  )
  for a, b, c in zip(want, got, off, strict=True):
    assert a.dtype == b.dtype == c.dtype == dtype
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, c)


@pytest.mark.parametrize("name", ["dense", "conv"])
def test_each_operand_left_in_float_by_itself(name):
  case = products.CASES[name]
  x, w, g = products.arrays(case)
  as_float = products.plain(case, x, w, g)
  # What a quantized operand changes, of (y, dx, dw).
  touches = {
    "weights": (True, True, False),
    "activations": (True, False, True),
    "gradients": (False, True, True),
  }
  for field, changed in touches.items():
    off = {f: None for f in touches if f != field}
    alone = grids.Quantization(gradients=grids.Grid())
    alone = products.quantized(
      case,
      grids.Quantization(
        **{f: getattr(alone, f) for f in touches if f == field} | off
      ),
      products.widths(4),
      x,
      w,
      g,
    )
    by_width = products.quantized(
      case,
      products.NEAREST,
      products.widths(32)._replace(**{field: jnp.int32(4)}),
      x,
      w,
      g,
    )
    for a, b, f, differs in zip(
      alone, by_width, as_float, changed, strict=True
    ):
      np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)
      assert np.array_equal(a, f) != differs


def identities():
  """A dense layer and a 1x1 convolution with dx = dw = the rounded g."""
  eye = jnp.eye(32)
  dense = products.Dot(
    "ni,io->no", (32, 32), (32, 32), (((1,), (0,)), ((), ()))
  )
  conv = products.Conv((1, 32, 1, 32), (1, 1, 32, 32))
  return [
    (dense, eye, eye),
    (conv, eye.reshape(conv.x), eye.reshape(conv.w)),
  ]


@pytest.mark.parametrize("index", [0, 1])
def test_the_gradient_is_rounded_once_and_feeds_both_products(index):
  case, x, w = identities()[index]
  g = jax.random.normal(jax.random.key(3), (32, 32))
  g = g.reshape(jax.eval_shape(case.plain, x, w).shape)
  keys = jax.random.split(jax.random.key(0), 3)
  seen = []
  for bits, key in ((2, keys[0]), (4, keys[0]), (4, keys[1])):
    _, dx, dw = products.quantized(
      case, grids.Quantization(), products.widths(32, 32, bits), x, w, g, key
    )
    rounded = np.ravel(dx)
    np.testing.assert_array_equal(rounded, np.ravel(dw))
    levels = np.unique(rounded)
    # Two computations of one level may differ in their last bit.
    assert np.sum(np.diff(levels) > 1e-5) + 1 <= 2**bits
    step = reference.step_size(g, bits).item()
    assert np.all(np.abs(rounded - np.ravel(g)) < step * 1.0001)
    nearest = np.ravel(reference.quantize(g, bits, floor=None))
    assert 0.1 < np.mean(np.abs(rounded - nearest) > step / 2) < 0.4
    seen.append(rounded)
  assert not np.array_equal(seen[1], seen[2])
  # Without a key it is rounded to nearest.
  _, dx, dw = products.quantized(
    case, grids.Quantization(), products.widths(32, 32, 4), x, w, g
  )
  nearest = np.ravel(reference.quantize(g, 4, floor=None))
  np.testing.assert_allclose(np.ravel(dx), nearest, atol=1e-6)
  np.testing.assert_array_equal(np.ravel(dx), np.ravel(dw))


def test_the_three_operands_get_noise_of_their_own():
  case, x, w = identities()[0]
  noisy = grids.Grid(rounding="stochastic")
  values = jax.random.normal(jax.random.key(3), (32, 32))
  quantization = grids.Quantization(noisy, noisy, noisy)
  key = jax.random.key(0)
  rounded_x, _, _ = products.quantized(
    case, quantization, products.widths(32, 3, 32), values, w, values, key
  )
  rounded_w, _, _ = products.quantized(
    case, quantization, products.widths(3, 32, 32), x, values, values, key
  )
  _, rounded_g, _ = products.quantized(
    case, quantization, products.widths(32, 32, 3), x, w, values, key
  )
  pairs = (
    (rounded_x, rounded_w),
    (rounded_x, rounded_g),
    (rounded_w, rounded_g),
  )
  for a, b in pairs:
    assert 0.2 < np.mean(np.abs(a - b) > 0.1) < 0.45


@pytest.mark.parametrize("name", ["dense", "conv"])
def test_a_scaled_cotangent_scales_both_gradients_exactly(name):
  case = products.CASES[name]
  x, w, g = products.arrays(case)
  for bits in (2, 5, 8, 16):
    for key in (None, jax.random.key(1)):
      run = functools.partial(
        products.quantized,
        case,
        grids.Quantization(),
        products.widths(4, 4, bits),
        x,
        w,
      )
      _, dx, dw = run(g, key)
      _, small_dx, small_dw = run(g * 2.0**-20, key)
      np.testing.assert_array_equal(small_dx, dx * 2.0**-20)
      np.testing.assert_array_equal(small_dw, dw * 2.0**-20)


def test_widths_that_are_none():
  case = products.CASES["dense"]
  x, w, g = products.arrays(case)
  for field, bad in (("weights", 0), ("activations", 1), ("gradients", 17)):
    with pytest.raises(ValueError, match=f"{field} = {bad} is not a bit-width"):
      case.quantized(
        x,
        w,
        bits=products.widths(8)._replace(**{field: bad}),
        quantization=products.NEAREST,
      )
    y, dx, dw = products.quantized(
      case,
      products.NEAREST,
      products.widths(8)._replace(**{field: jnp.int32(bad)}),
      x,
      w,
      g,
    )
    assert np.all(np.isnan(y if field != "gradients" else dx))
    assert np.all(np.isnan(dw)) or field == "weights"


def test_bfloat16_is_composed_of_fake_quantized_operands():
  for name in ("dense", "conv"):
    case = products.CASES[name]
    x, w, g = products.arrays(case, jnp.bfloat16)
    for bits in (2, 5, 8):
      got = products.quantized(
        case, products.NEAREST, products.widths(bits), x, w, g
      )
      want = products.plain(
        case,
        grids.fake_quantize(x, bits, products.NEAREST.activations),
        grids.fake_quantize(
          w, bits, products.NEAREST.weights, axis=case.weight_axes()
        ),
        grids.fake_quantize(g, bits, products.NEAREST.gradients, floor=None),
      )
      for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b)


def test_a_wider_result_of_bfloat16_operands():
  case = products.CASES["dense"]
  x, w, _ = products.arrays(case, jnp.bfloat16)

  def product(x, w, bits):
    return ops.dot_general(
      x,
      w,
      case.numbers,
      bits=bits,
      quantization=products.NEAREST,
      preferred_element_type=jnp.float32,
    )

  y, vjp = jax.vjp(
    jax.jit(lambda x, w: product(x, w, products.widths(4))), x, w
  )
  assert y.dtype == jnp.float32
  dx, dw = vjp(jnp.ones_like(y))
  assert dx.dtype == dw.dtype == jnp.bfloat16


def test_limits_serve_instead_of_the_own_range():
  case = products.CASES["dense"]
  x, w, _ = products.arrays(case)
  limits = grids.Range(jnp.float32(-0.5), jnp.float32(0.75))

  @jax.jit
  def product(x):
    return case.quantized(
      x,
      w,
      bits=products.widths(32, 3),
      quantization=products.NEAREST,
      limits=limits,
    )

  step = 1.25 / 7
  on_grid = np.rint((np.clip(x, -0.5, 0.75) + 0.5) / step) * step - 0.5
  want = np.einsum(case.subscripts, on_grid, w)
  assert products.relative_error(product(x), want) < 1e-6
  for bad in (np.nan, np.inf):
    assert np.all(np.isnan(product(x.at[0, 0, 0].set(bad))))


@pytest.mark.parametrize("name", ["dense", "einsum", "conv"])
def test_limits_of_the_second_operand(name):
  case = products.CASES[name]
  x, w, _ = products.arrays(case)
  limits = grids.Range(jnp.float32(-0.3), jnp.float32(0.4))

  @jax.jit
  def product(w):
    return case.quantized(
      x,
      w,
      bits=products.widths(3, 32),
      quantization=products.NEAREST,
      rhs_limits=limits,
    )

  step = 0.7 / 7
  on_grid = np.rint((np.clip(w, -0.3, 0.4) + 0.3) / step) * step - 0.3
  want = case.plain(x, jnp.asarray(on_grid, jnp.float32))
  assert products.relative_error(product(w), want) < 2e-6
  # Per channel, as the weights' grid of NEAREST: one bad value, its channel.
  bad = product(w.at[(0,) * w.ndim].set(np.nan))
  assert 0 < np.mean(np.isnan(bad)) < 1


def test_channels_are_those_that_the_dimension_numbers_name():
  case = products.CASES["conv"]
  x, w, g = products.arrays(case)
  want = products.quantized(
    case, products.ALL_CHANNELS, products.widths(4), x, w, g
  )

  @jax.jit
  def channels_first(x, w, g):
    y, vjp = jax.vjp(
      lambda x, w: ops.conv_general_dilated(
        x,
        w,
        (1, 1),
        (case.padding,) * 2,
        bits=products.widths(4),
        quantization=products.ALL_CHANNELS,
      ),
      x,
      w,
    )
    return y, *vjp(g)

  first = (0, 3, 1, 2)
  y, dx, dw = channels_first(
    x.transpose(first), w.transpose(3, 2, 0, 1), g.transpose(first)
  )
  last = (0, 2, 3, 1)
  got = y.transpose(last), dx.transpose(last), dw.transpose(2, 3, 1, 0)
  for a, b in zip(got, want, strict=True):
    assert products.relative_error(a, b) < 1e-6


def test_einsum_with_an_ellipsis_and_spaces():
  x = jax.random.normal(jax.random.key(0), (2, 3, 4))
  w = jax.random.normal(jax.random.key(1), (4, 5))

  @functools.partial(jax.jit, static_argnums=0)
  def run(subscripts, w):
    y, vjp = jax.vjp(
      lambda w: ops.einsum(
        subscripts,
        x,
        w,
        bits=products.widths(4),
        quantization=products.ALL_CHANNELS,
      ),
      w,
    )
    return y, vjp(jnp.sin(y))

  dots, named = run("... i, i o -> ... o", w), run("abi,io->abo", w)
  jax.tree.map(np.testing.assert_array_equal, dots, named)


def test_vmap_over_widths_and_examples():
  case = products.CASES["dense"]
  x, w, g = products.arrays(case)
  bits = products.widths(jnp.array([2, 8, 32]))
  stacked = jax.vmap(
    lambda b, x: products.quantized(case, products.NEAREST, b, x, w, g),
    in_axes=(0, None),
  )(bits, x)
  for i, b in enumerate((2, 8, 32)):
    one = products.quantized(
      case, products.NEAREST, products.widths(b), x, w, g
    )
    for rows, row in zip(stacked, one, strict=True):
      np.testing.assert_allclose(rows[i], row, rtol=1e-6, atol=1e-6)
