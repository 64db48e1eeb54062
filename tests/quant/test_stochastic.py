"""Stochastic rounding: neighbors only, unbiased at every width; its noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dpc_jax.quant import grids, noise

DTYPES = (jnp.float32, jnp.bfloat16)
KINDS = ("affine", "symmetric")
KEYS = 2048


@functools.partial(jax.jit, static_argnums=2)
def rounded(x, bits, grid, keys):
  """Float32 values, one row for each key."""
  return jax.vmap(
    lambda key: grids.fake_quantize(x, bits, grid, key=key, floor=None)
  )(keys).astype(jnp.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_neighbors_only_and_unbiased_at_every_width(kind, dtype):
  grid = grids.Grid(kind=kind, rounding="stochastic")
  values = np.random.default_rng(0).normal(0.2, 1, 384).astype(np.float32)
  x = jnp.asarray(values, dtype)
  x32 = np.asarray(x, np.float64)
  span = np.ptp(x32) if kind == "affine" else np.abs(x32).max()
  keys = jax.random.split(jax.random.key(7), KEYS)
  for bits in range(2, 17):
    y = np.asarray(rounded(x, bits, grid, keys), np.float64)
    below, above = y.min(0), y.max(0)
    assert np.all((y == below) | (y == above))
    step = span / (2 ** (bits - (kind == "symmetric")) - 1)
    ulp = np.maximum(np.abs(below), np.abs(above)) * float(jnp.finfo(dtype).eps)
    assert np.all(above - below <= step + 2 * ulp + 1e-6)
    assert np.all((below <= x32 + 1e-6) | (above == below))
    assert np.all((above >= x32 - 1e-6) | (above == below))

    variance = np.var(y, axis=0)
    error = np.mean(y, axis=0) - x32
    # The normal law needs some draws on either side.
    often = variance * KEYS > 50 * (above - below) ** 2
    often &= above > below
    if not np.any(often):
      # A bfloat16 holds at most 8 bits: the finest grids pass it unchanged.
      assert dtype == jnp.bfloat16 and bits > 12
      np.testing.assert_allclose(error, 0, atol=step)
      continue
    z = error[often] / np.sqrt(variance[often] / KEYS)
    total = np.sum(error[often]) / np.sqrt(np.sum(variance[often]) / KEYS)
    assert np.abs(total) < 4.5, (bits, total)
    assert np.max(np.abs(z)) < 5.5, bits
    assert np.mean(z**2) < 1 + 6 * np.sqrt(2 / z.size), bits


def test_half_the_draws_differ_between_keys_and_none_within_one():
  x = jnp.asarray(np.random.default_rng(0).normal(size=4096), jnp.float32)
  grid = grids.Grid(rounding="stochastic")
  keys = jnp.stack([jax.random.key(0), jax.random.key(0), jax.random.key(1)])
  first, again, other = rounded(x, 4, grid, keys)
  np.testing.assert_array_equal(first, again)
  assert 0.25 < np.mean(first != other) < 0.4


def test_without_a_floor_the_same_noise_scales_exactly():
  x = jnp.asarray(np.random.default_rng(0).normal(size=512), jnp.float32)
  grid = grids.Grid(rounding="stochastic")
  keys = jax.random.split(jax.random.key(0), 2)
  for bits in (2, 5, 8, 16):
    large, small = (rounded(v, bits, grid, keys) for v in (x, x * 2.0**-20))
    np.testing.assert_array_equal(small, large * 2.0**-20)


def test_degenerate_tensors_are_finite():
  keys = jax.random.split(jax.random.key(0), 2)
  for kind, dtype in ((k, d) for k in KINDS for d in DTYPES):
    grid = grids.Grid(kind=kind, rounding="stochastic")
    for value in (0.0, 0.7, -1e-3):
      x = jnp.full(12, value, dtype)
      y = np.asarray(rounded(x, 3, grid, keys))
      np.testing.assert_allclose(y, value, rtol=1e-2)
    bad = jnp.linspace(0, 1, 12).astype(dtype).at[3].set(jnp.inf)
    assert np.all(np.isnan(rounded(bad, 3, grid, keys)))


@functools.partial(jax.jit, static_argnums=1)
def uniform(key, shape):
  return noise.uniform(key, shape)


def key_of(kind, seed):
  return {
    "raw": jax.random.PRNGKey,
    "typed": jax.random.key,
    "rbg": functools.partial(jax.random.key, impl="rbg"),
  }[kind](seed)


@pytest.mark.parametrize("kind", ["raw", "typed", "rbg"])
def test_noise_is_uniform(kind):
  u = np.asarray(uniform(key_of(kind, 3), (1024, 1024)), np.float64)
  assert u.dtype == np.float64 and u.min() >= 0 and u.max() < 1
  np.testing.assert_array_equal(u * 2**24, np.rint(u * 2**24))
  n = u.size
  assert abs(u.mean() - 1 / 2) < 5 / np.sqrt(12 * n)
  assert abs(u.var() - 1 / 12) < 5 / np.sqrt(180 * n)
  for digits in (u, (u * 256) % 1, (u * 65536) % 1):
    counts = np.bincount((digits * 256).astype(int).ravel(), minlength=256)
    chi_square = np.sum((counts - n / 256) ** 2) / (n / 256)
    assert abs(chi_square - 255) < 5 * np.sqrt(2 * 255)


@pytest.mark.parametrize("kind", ["raw", "typed", "rbg"])
def test_noise_of_neighbors_and_of_keys_is_uncorrelated(kind):
  shape = (512, 512)

  def centered(seed_or_key):
    key = key_of(kind, seed_or_key)
    return np.asarray(uniform(key, shape), np.float64) - 0.5

  base = centered(0)
  pairs = {
    f"lag {lag}": (base.ravel()[:-lag], base.ravel()[lag:])
    for lag in (1, 2, 3, 4, 8, 16, 32, 64, 512, 1024)
  }
  pairs |= {
    f"seed {seed}": (base.ravel(), centered(seed).ravel())
    for seed in (1, 2, 3, 4, 256, 65536, 2**31 - 1)
  }
  for seed in (1, 2, 3):
    # One key's stream must not be another's, moved by a few elements.
    other = centered(seed).ravel()
    pairs[f"seed {seed} ahead"] = (base.ravel()[seed:], other[:-seed])
    pairs[f"seed {seed} behind"] = (base.ravel()[:-seed], other[seed:])
  for stream in (1, 2):
    folded = jax.random.fold_in(key_of(kind, 0), stream)
    other = np.asarray(uniform(folded, shape), np.float64) - 0.5
    pairs[f"fold_in {stream}"] = (base.ravel(), other.ravel())
  for name, (a, b) in pairs.items():
    # Also of the squares: a linear test alone misses mirrored streams.
    for f, unit in ((lambda v: v, 1 / 12), (lambda v: v**2 - 1 / 12, 1 / 180)):
      correlation = np.mean(f(a) * f(b)) / unit
      assert abs(correlation) < 5 / np.sqrt(a.size), name


def test_both_words_of_a_key_count():
  streams = [
    np.asarray(uniform(jnp.array(words, jnp.uint32), (4096,)))
    for words in ((5, 7), (6, 7), (5, 8), (7, 5), (2**31, 7))
  ]
  for i, a in enumerate(streams):
    for b in streams[:i]:
      assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(a.size)


def test_noise_of_any_shape_and_kind_of_key():
  for shape in ((), (1,), (0, 3), (2, 3, 4)):
    assert uniform(jax.random.key(0), shape).shape == shape
  np.testing.assert_array_equal(
    uniform(jax.random.key(5), (7,)), uniform(jax.random.PRNGKey(5), (7,))
  )
  # The number of an element is its place in C order.
  np.testing.assert_array_equal(
    uniform(jax.random.key(5), (12,)),
    np.ravel(uniform(jax.random.key(5), (3, 4))),
  )


def test_sharded_over_8_devices_it_is_the_same_bit_for_bit():
  mesh = jax.make_mesh((4, 2), ("data", "model"))
  x = np.random.default_rng(0).normal(size=(16, 5, 8)).astype(np.float32)
  grid = grids.Grid(rounding="stochastic")
  key = jax.random.key(1)

  def function(x):
    values = grids.fake_quantize(x, 5, grid, key=key)
    return noise.uniform(key, x.shape), values

  one = jax.jit(function)(x)
  for spec in (("data",), ("data", None, "model"), (("data", "model"),)):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    eight = jax.jit(function, out_shardings=sharding)(
      jax.device_put(x, sharding)
    )
    for a, b in zip(one, eight, strict=True):
      assert b.sharding == sharding
      np.testing.assert_array_equal(a, b)
