"""Values of the grids, nearest rounding, edge cases."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.quant import grids
from tests.quant import reference

WIDTHS = range(2, 17)
KINDS = ("affine", "symmetric")
GRIDS = tuple(
  grids.Grid(kind=kind, granularity=granularity)
  for kind, granularity in itertools.product(KINDS, grids.GRANULARITIES)
)


@functools.partial(jax.jit, static_argnums=2, static_argnames=("axis", "floor"))
def fake_quantize(x, bits, grid, *, axis=None, floor=grids.STEP_FLOOR):
  return grids.fake_quantize(x, bits, grid, axis=axis, floor=floor)


def normal(*shape, dtype=np.float32, seed=0):
  values = np.random.default_rng(seed).normal(0.3, 1.0, shape)
  return jnp.asarray(values.astype(np.float32), dtype)


def bits_of(x):
  x = np.asarray(x)
  return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_width_against_the_reference(grid):
  x = normal(3, 3, 8, 16)
  kept = None if grid.granularity == "tensor" else (-1,)
  for bits in WIDTHS:
    got = np.asarray(fake_quantize(x, bits, grid), np.float64)
    want = reference.quantize(x, bits, grid.kind, kept)
    step = reference.step_size(x, bits, grid.kind, kept)
    # At a wide width a value may sit on a tie within float32 round-off.
    moved = np.abs(got - want) > step / 2
    assert np.sum(moved) <= 2 + 0.02 * x.size * 2.0 ** (bits - 16)
    assert np.all(np.abs(got - want)[~moved] < 1e-6)
    assert np.all(np.abs(got - want) < step * 1.01 + 1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_level_count_that_fits_the_width(grid):
  x = normal(512, 2)
  for bits in WIDTHS:
    y = np.asarray(fake_quantize(x, bits, grid))
    columns = y.T if grid.granularity == "channel" else [y]
    for column in columns:
      levels = 2**bits - (grid.kind == "symmetric")
      assert len(np.unique(column)) <= levels
    if bits <= 3:
      assert len(np.unique(columns[0])) >= levels - 1


@pytest.mark.parametrize("kind", KINDS)
def test_ties_go_to_even_codes(kind):
  grid = grids.Grid(kind=kind)
  for bits in (2, 3, 8):
    if kind == "affine":
      top = 2**bits - 1
      ties = np.arange(top) + 0.5
      x = np.concatenate([[0, top], ties]).astype(np.float32)
    else:
      top = 2 ** (bits - 1) - 1
      ties = np.arange(-top, top) + 0.5
      x = np.concatenate([[-top, top], ties]).astype(np.float32)
    got = np.asarray(fake_quantize(jnp.asarray(x), bits, grid))
    np.testing.assert_array_equal(got, np.rint(x))
    assert np.all(got[2:] % 2 == 0)


def test_axes_that_keep_a_range():
  x = normal(4, 6, 5)
  grid = grids.Grid(granularity="channel")
  for axis in (0, 1, -1, (0, 2), None):
    kept = (-1,) if axis is None else axis
    kept = (kept,) if isinstance(kept, int) else kept
    want = reference.quantize(x, 3, "affine", kept)
    got = fake_quantize(x, 3, grid, axis=axis)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_quantizing_again_changes_nothing_but_round_off(grid):
  x = normal(64, 8)
  for bits in WIDTHS:
    once = fake_quantize(x, bits, grid)
    twice = fake_quantize(once, bits, grid)
    np.testing.assert_allclose(twice, once, rtol=0, atol=6e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_gradient_is_the_identity(grid, dtype):
  x = normal(16, 4, dtype=dtype)
  cotangent = normal(16, 4, dtype=dtype, seed=1)

  @jax.jit
  def gradient(x, bits):
    y, vjp = jax.vjp(lambda x: grids.fake_quantize(x, bits, grid), x)
    tangent = jax.jvp(
      lambda x: grids.fake_quantize(x, bits, grid), (x,), (cotangent,)
    )[1]
    return y, vjp(cotangent)[0], tangent

  for bits in (2, 8, 16, 32):
    y, reverse, forward = gradient(x, bits)
    assert y.dtype == dtype
    np.testing.assert_array_equal(bits_of(reverse), bits_of(cotangent))
    np.testing.assert_array_equal(bits_of(forward), bits_of(cotangent))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_width_32_is_the_input_bit_for_bit(grid, dtype):
  x = np.array(normal(7, 3, dtype=dtype))
  payload = {2: 0x7FC5, 4: 0x7FC01234}[x.dtype.itemsize]
  bits_of(x)[0, 0] = payload
  x[1] = -0.0
  x[2, 0], x[2, 1], x[2, 2] = np.inf, -np.inf, 1e-40
  for same in (
    fake_quantize(jnp.asarray(x), 32, grid),
    grids.fake_quantize(jnp.asarray(x), 32, grid),
  ):
    same, want = np.asarray(same), x
    if dtype == jnp.bfloat16:
      # XLA selects in float32 on a CPU: a NaN stays one, without its payload.
      assert np.isnan(same[0, 0])
      same, want = same[1:], want[1:]
    np.testing.assert_array_equal(bits_of(same), bits_of(want))


@pytest.mark.parametrize("floor", [grids.STEP_FLOOR, None])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_degenerate_tensors_are_finite(grid, floor):
  tensors = {
    "zero": np.zeros((4, 3)),
    "constant": np.full((4, 3), 0.7),
    "negative": np.full((4, 3), -1e-3),
    "denormal": np.linspace(-1e-40, 1e-40, 12).reshape(4, 3),
    "tiny": np.linspace(1e-37, 2e-37, 12).reshape(4, 3),
  }
  for bits, (name, x) in itertools.product((2, 5, 8, 16), tensors.items()):
    x = x.astype(np.float32)
    y = np.asarray(fake_quantize(jnp.asarray(x), bits, grid, floor=floor))
    assert np.all(np.isfinite(y)), name
    limit = np.max(np.abs(x)) * 1.0001 + (0 if floor is None else 1e-8)
    assert np.all(np.abs(y) <= limit), name
    if grid.kind == "affine" and name in ("zero", "constant", "negative"):
      np.testing.assert_array_equal(y, x)
  for value in (0.0, -2.5, 1e-40):
    one = jnp.full((1, 1), value, jnp.float32)
    for bits in (2, 16):
      got = fake_quantize(one, bits, grid, floor=floor)
      np.testing.assert_allclose(got, one, rtol=1e-6, atol=1e-37)
      scalar = grids.fake_quantize(jnp.float32(value), bits, grids.Grid())
      assert np.isfinite(scalar) and scalar.shape == ()


@pytest.mark.parametrize("with_limits", [False, True])
@pytest.mark.parametrize("with_storage", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_is_not_finite_never_becomes_a_number(
  grid, with_storage, with_limits
):
  @jax.jit
  def values(x, bits):
    own = grids.value_range(x, grids.channel_axes(grid, None))
    limits = grids.Range(jnp.full_like(own.lo, -1), jnp.full_like(own.hi, 1))
    limits = grids.guarded(limits, own) if with_limits else own
    if not with_storage:
      return grids.fake_quantize(
        x, bits, grid, limits=limits if with_limits else None
      )
    codes = grids.encode(x, bits, grid, limits, max_width=8)
    return grids.decode(grids.storage_codes(codes, grid), x.dtype)

  for bad, bits in itertools.product((np.nan, np.inf, -np.inf), (2, 5, 8)):
    for dtype in (jnp.float32, jnp.bfloat16):
      x = normal(8, 3, dtype=dtype).at[2, 1].set(bad)
      y = np.asarray(values(x, bits), np.float32)
      assert np.isnan(y[2, 1])
      others = y[:, [0, 2]]
      if grid.granularity == "tensor":
        assert np.all(np.isnan(others))
      else:
        assert np.all(np.isfinite(others))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_widths_that_are_none(grid):
  x = normal(4, 3)
  for bits in (-3, 0, 1, 17, 31, 33, 2**31 - 1):
    assert np.all(np.isnan(fake_quantize(x, jnp.int32(bits), grid)))
    with pytest.raises(ValueError, match=f"bits = {bits} is not a bit-width"):
      grids.fake_quantize(x, bits, grid)
  for bits in (4.0, True, "8", np.float32(8)):
    with pytest.raises(ValueError, match="is not a bit-width"):
      grids.fake_quantize(x, bits, grid)


def test_a_vector_of_widths_by_vmap():
  x = normal(32)
  widths = jnp.arange(2, 17)
  grid = grids.Grid()
  got = jax.jit(
    jax.vmap(lambda bits: grids.fake_quantize(x, bits, grid)),
  )(widths)
  for row, bits in zip(got, WIDTHS, strict=True):
    np.testing.assert_array_equal(row, fake_quantize(x, bits, grid))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_without_a_floor_a_power_of_two_scales_exactly(grid):
  x = normal(64, 4)
  for bits in (2, 3, 8, 16):
    y = fake_quantize(x, bits, grid, floor=None)
    small = fake_quantize(x * 2.0**-20, bits, grid, floor=None)
    np.testing.assert_array_equal(small, y * 2.0**-20)
    large = fake_quantize(x * 2.0**20, bits, grid, floor=None)
    np.testing.assert_array_equal(large, y * 2.0**20)
  # The floor of weights and activations is another rule.
  tiny = x * 2.0**-40
  assert not np.array_equal(
    fake_quantize(tiny, 8, grid), fake_quantize(x, 8, grid) * 2.0**-40
  )


def test_limits_from_elsewhere_clip():
  x = jnp.linspace(-2.0, 2.0, 41)
  limits = grids.Range(jnp.float32(-0.5), jnp.float32(1.0))
  y = jax.jit(lambda x: grids.fake_quantize(x, 4, grids.Grid(), limits=limits))(
    x
  )
  np.testing.assert_allclose(
    y, np.rint((np.clip(x, -0.5, 1) + 0.5) / 0.1) * 0.1 - 0.5, atol=1e-6
  )
  slope = jax.grad(
    lambda x: grids.fake_quantize(x, 4, grids.Grid(), limits=limits).sum()
  )(x)
  np.testing.assert_array_equal(slope, 1.0)


def test_bfloat16_is_the_float32_grid_rounded_once():
  x = normal(64, 4, dtype=jnp.bfloat16)
  for grid, bits in itertools.product(GRIDS, (2, 4, 8, 12)):
    want = fake_quantize(x.astype(jnp.float32), bits, grid)
    got = fake_quantize(x, bits, grid)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
      bits_of(got), bits_of(want.astype(jnp.bfloat16))
    )


def test_user_errors():
  x = normal(4, 3)
  with pytest.raises(ValueError, match=r"x.dtype = int32: pass a floating"):
    grids.fake_quantize(jnp.arange(3), 8, grids.Grid())
  with pytest.raises(ValueError, match="key = None: stochastic rounding"):
    grids.fake_quantize(x, 8, grids.Grid(rounding="stochastic"))
  for field in ("kind", "granularity", "rounding"):
    with pytest.raises(ValueError, match=rf"Grid.{field} = 'odd': use one of"):
      grids.Grid(**{field: "odd"})
  with pytest.raises(ValueError, match=r"Quantization.storage_bits = 4: use"):
    grids.Quantization(storage_bits=4)
  with pytest.raises(ValueError, match=r"Quantization.weights = 'int8': use"):
    grids.Quantization(weights="int8")


def test_static_and_hashable():
  assert hash(grids.Quantization()) == hash(grids.Quantization())
  assert grids.Quantization().is_stochastic
  assert not grids.Quantization(gradients=None).is_stochastic


def test_layer_bits_of_one_width():
  assert grids.as_layer_bits(4) == (4, 4, 8)
  assert grids.as_layer_bits(32) == (32, 32, 32)
  assert grids.as_layer_bits((4, 5, 6)) == (4, 5, 6)
  assert all(isinstance(b, int) for b in grids.as_layer_bits(4))
  stacked = grids.as_layer_bits(np.array([4, 32]))
  np.testing.assert_array_equal(stacked.gradients, [8, 32])
  traced = jax.jit(grids.as_layer_bits)
  for bits in (4, 32):
    assert traced(bits) == grids.as_layer_bits(bits)
  with pytest.raises(ValueError, match="gradients = 1 is not a bit-width"):
    grids.as_layer_bits((4, 4, 1))
  with pytest.raises(ValueError, match="must be one width or three"):
    grids.as_layer_bits((4, 4))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_storage_codes_decode_to_the_same_values(dtype):
  x = normal(64, 4, dtype=dtype)
  for grid in GRIDS:
    own = grids.value_range(x, grids.channel_axes(grid, None))

    @jax.jit
    def values(x, bits, grid=grid, own=own):
      codes = grids.encode(x, bits, grid, own, max_width=8)
      stored = grids.storage_codes(codes, grid)
      return grids.decode(codes, dtype), grids.decode(stored, dtype), stored

    for bits in range(2, 9):
      float_codes, integer_codes, stored = values(x, bits)
      # The compiler may join a product and a sum in one and not the other.
      np.testing.assert_allclose(
        np.float32(float_codes),
        np.float32(integer_codes),
        rtol=0,
        atol=5e-7 if dtype == jnp.float32 else 2e-2,
      )
      codes = np.asarray(stored.codes, np.int32)
      if grid.kind == "affine":
        assert stored.codes.dtype == jnp.uint8
        assert codes.min() == 0 and codes.max() == 2**bits - 1
      else:
        assert stored.codes.dtype == jnp.int8
        assert np.abs(codes).max() == 2 ** (bits - 1) - 1
    for bits in (9, 16, 32):
      assert np.all(np.isnan(values(x, bits)[1]))


def test_a_constant_width_equals_a_traced_one():
  x = jax.random.normal(jax.random.key(0), (10_000,))
  traced = jax.jit(lambda x, b: grids.fake_quantize(x, b, grids.Grid()))
  for bits in range(2, 9):
    constant = jax.jit(
      lambda x, b=bits: grids.fake_quantize(x, b, grids.Grid())
    )
    np.testing.assert_array_equal(constant(x), traced(x, bits))
