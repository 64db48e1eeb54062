"""The sketch of a tensor: linear, and its norm the tensor's on average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.policy import sketch

# sqrt(2 / 1024).
STATED = 0.0442

_sketch = jax.jit(sketch.sketch, static_argnums=1)
_sketches = jax.jit(jax.vmap(sketch.sketch))


def _normal(seed, *shape):
  rng = np.random.default_rng(seed)
  return rng.standard_normal(shape).astype(np.float32)


def _gaussian():
  return [_normal(0, 256, 96, 128)]


def _one_column():
  """Of kernels of several shapes: in each the entries meet in other ways."""
  tensors = [
    np.zeros((64, *shape), np.float32)
    for shape in ((96, 128), (150, 100), (512, 64), (288, 80))
  ]
  for batch in tensors:
    batch[np.arange(64), :, np.arange(64)] = 1
  return tensors


def _one_row():
  tensors = np.zeros((128, 16, 1500), np.float32)
  tensors[np.arange(128), np.arange(128) % 16] = _normal(1, 128, 1500)
  return [tensors]


def _low_rank():
  return [np.matmul(_normal(2, 256, 96, 2), _normal(3, 256, 2, 128))]


def _errors(batches):
  """Relative errors of the squared norms, float64."""
  errors = []
  for tensors in batches:
    sums = np.asarray(_sketches(tensors), np.float64)
    exact = np.sum(np.asarray(tensors, np.float64) ** 2, axis=(1, 2))
    errors.append(np.sum(sums**2, axis=1) / exact - 1)
  return np.concatenate(errors)


@pytest.mark.parametrize("make", [_gaussian, _one_column, _one_row, _low_rank])
def test_relative_error_of_the_squared_norm(make):
  errors = _errors(make())
  # 256 errors tell their spread to 4.4 %, and their mean to 1/16 of it.
  assert errors.std() < 1.1 * STATED
  assert abs(errors.mean()) < 3 * STATED / 16
  # It is no more exact than it says: nothing leaks the norm.
  assert errors.std() > (0.8 if make is _gaussian else 0.3) * STATED


@pytest.mark.parametrize("shape", [(1,), (7, 11), (32, 32)])
def test_exact_up_to_1024_entries(shape):
  x = _normal(4, *shape)
  got = _sketch(x)
  assert got.shape == (sketch.SIZE,)
  assert got.dtype == jnp.float32
  # The entries themselves, but for signs and places.
  kept = np.sort(np.abs(np.asarray(got)))[-x.size :]
  np.testing.assert_array_equal(kept, np.sort(np.abs(x.ravel())))
  assert np.count_nonzero(got) == x.size


def test_rows_have_signs_and_turns_of_their_own():
  tensors = np.zeros((6, 6, 1024), np.float32)
  tensors[np.arange(6), np.arange(6)] = np.arange(1, 1025)
  rows = np.asarray(_sketches(tensors))
  turns = [int(np.flatnonzero(np.abs(row) == 1)[0]) for row in rows]
  assert len(set(turns)) == 6
  signs = []
  for row, turn in zip(rows, turns, strict=True):
    back = np.roll(row, -turn)
    np.testing.assert_array_equal(np.abs(back), np.arange(1, 1025))
    signs.append(np.sign(back))
  # +-1 of 1,024 fair coins sum to 32 on average.
  agree = np.array(signs) @ np.array(signs).T
  assert np.abs(np.sum(signs, axis=1)).max() < 4 * 32
  assert np.abs(agree - 1024 * np.eye(6)).max() < 4 * 32


def test_linear():
  x, y = _normal(5, 50, 90), _normal(6, 50, 90)
  apart = 2 * _sketch(x) - 3 * _sketch(y)
  np.testing.assert_allclose(_sketch(2 * x - 3 * y), apart, atol=1e-4)
  assert not np.any(_sketch(0 * x))
  # Powers of 2 are exact.
  np.testing.assert_array_equal(_sketch(x / 8), _sketch(x) / 8)


@pytest.mark.parametrize("stack", [(3,), (2, 3)])
def test_leading_axes_are_kept(stack):
  x = _normal(7, *stack, 40, 70)
  got = _sketch(x, len(stack))
  assert got.shape == (*stack, sketch.SIZE)
  for place in np.ndindex(*stack):
    np.testing.assert_allclose(got[place], _sketch(x[place]), atol=1e-6)


def test_one_sketch_for_all_runs():
  # The default generator plays no part, nor does the shape.
  x = _normal(8, 3, 3, 16, 32)
  expected = _sketch(x)
  with jax.default_prng_impl("rbg"):
    again = jax.jit(sketch.sketch)(x)
  np.testing.assert_array_equal(again, expected)
  np.testing.assert_array_equal(_sketch(x.reshape(9, -1)), expected)
  # A state on disk has sums of these signs and turns.
  first = _sketch(np.arange(5000, dtype=np.float32))[:3]
  np.testing.assert_array_equal(first, [-6282.0, 6283.0, -2940.0])
