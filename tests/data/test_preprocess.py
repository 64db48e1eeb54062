"""Preprocessing on the device: values, distributions, shardings."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.data import preprocess

COLLECTIVES = "all-gather|all-to-all|all-reduce|collective-permute"


def _marked(count: int, height: int = 8, width: int = 6) -> np.ndarray:
  """Images whose pixels tell where they come from; none is black."""
  rows, columns = np.mgrid[1 : height + 1, 1 : width + 1]
  ids = np.arange(count) % 251 + 1
  image = np.stack([rows, columns, np.zeros_like(rows)], axis=-1)
  images = np.repeat(image[None], count, axis=0).astype(np.uint8)
  images[..., 2] = ids[:, None, None]
  return images


def _crops(image: np.ndarray, pad: int) -> dict[bytes, tuple[int, int, bool]]:
  """Every crop of the padded image, mirrored or not, by its bytes."""
  height, width, _ = image.shape
  padded = np.zeros((height + 2 * pad, width + 2 * pad, 3), np.uint8)
  padded[pad : pad + height, pad : pad + width] = image
  crops = {}
  for row in range(2 * pad + 1):
    for column in range(2 * pad + 1):
      crop = padded[row : row + height, column : column + width]
      crops[crop.tobytes()] = row, column, False
      crops[crop[:, ::-1].tobytes()] = row, column, True
  return crops


def test_augment_gives_uniform_crops_and_half_the_flips():
  image = _marked(1)
  count = 16_200  # 100 of each crop
  images = np.repeat(image, count, axis=0)
  outputs = np.asarray(preprocess.augment(jax.random.key(0), images))
  assert outputs.shape == images.shape
  assert outputs.dtype == np.uint8
  crops = _crops(image[0], 4)
  assert len(crops) == 162
  found = [crops[output.tobytes()] for output in outputs]
  counts = np.zeros((9, 9, 2))
  np.add.at(counts, tuple(np.array(found).T), 1)
  # Each of these statistics exceeds mean + 5 sigma once in a million keys.
  for table in (
    counts,
    counts.sum(axis=(1, 2)),
    counts.sum(axis=(0, 2)),
    counts.sum(axis=(0, 1)),
  ):
    expected = count / table.size
    chi_squared = ((table - expected) ** 2 / expected).sum()
    freedom = table.size - 1
    assert chi_squared < freedom + 5 * np.sqrt(2 * freedom) + 5


def test_augment_keeps_each_image_in_its_place():
  images = _marked(200)
  outputs = np.asarray(preprocess.augment(jax.random.key(1), images))
  for image, output in zip(images, outputs, strict=True):
    assert output.tobytes() in _crops(image, 4)


def test_augment_without_padding_only_mirrors():
  images = _marked(100)
  outputs = np.asarray(preprocess.augment(jax.random.key(2), images, pad=0))
  axes = (1, 2, 3)
  kept = (outputs == images).all(axis=axes)
  mirrored = (outputs == images[:, :, ::-1]).all(axis=axes)
  assert (kept ^ mirrored).all()
  assert 0 < kept.sum() < 100


def test_augment_follows_key_and_position_alone():
  images = _marked(64)
  key = jax.random.key(3)
  whole = np.asarray(preprocess.augment(key, images))
  again = np.asarray(jax.jit(preprocess.augment)(key, images))
  np.testing.assert_array_equal(whole, again)
  part = np.asarray(preprocess.augment(key, images[:10]))
  np.testing.assert_array_equal(whole[:10], part)
  other = np.asarray(preprocess.augment(jax.random.key(4), images))
  assert (whole != other).any(axis=(1, 2, 3)).mean() > 0.9


def test_augment_refuses_a_negative_pad():
  with pytest.raises(ValueError, match="pad=-1 "):
    preprocess.augment(jax.random.key(0), _marked(2), pad=-1)


def _prepare(key, images):
  images = preprocess.augment(key, images)
  return preprocess.normalize(images, (0.49, 0.48, 0.45), (0.2, 0.19, 0.21))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_batch_stays_in_place_bit_for_bit(kind):
  if jax.device_count() < 8:
    pytest.skip(f"needs 8 devices, has {jax.device_count()}")
  axis_type = getattr(jax.sharding.AxisType, kind)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
  spec = jax.sharding.PartitionSpec
  by_batch = jax.sharding.NamedSharding(mesh, spec("data"))
  everywhere = jax.sharding.NamedSharding(mesh, spec())
  images = np.random.default_rng(0).integers(
    0, 256, (128, 32, 32, 3), dtype=np.uint8
  )
  key = jax.random.key(5)
  arguments = jax.device_put(key, everywhere), jax.device_put(images, by_batch)
  sharded = jax.jit(_prepare).lower(*arguments).compile()
  assert not re.findall(COLLECTIVES, sharded.as_text())
  outputs = sharded(*arguments)
  assert outputs.sharding.is_equivalent_to(by_batch, 4)
  device = jax.devices()[0]
  single = jax.jit(_prepare)(
    jax.device_put(key, device), jax.device_put(images, device)
  )
  np.testing.assert_array_equal(np.asarray(outputs), np.asarray(single))


def test_normalize_matches_float64():
  images = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
  images = np.concatenate([images, images[::-1]], axis=-1)
  mean, std = (0.4914, 0.25), (0.2023, 0.5)
  outputs = preprocess.normalize(images, mean, std)
  assert outputs.dtype == jnp.float32
  expected = (images / 255.0 - np.array(mean)) / np.array(std)
  np.testing.assert_allclose(outputs, expected, rtol=1e-6, atol=1e-6)


def test_normalize_rounds_once_to_the_asked_dtype():
  images = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
  wide = preprocess.normalize(images, (0.5,), (0.3,))
  narrow = preprocess.normalize(images, (0.5,), (0.3,), dtype=jnp.bfloat16)
  assert narrow.dtype == jnp.bfloat16
  np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


def test_normalize_names_what_does_not_fit():
  images = np.zeros((1, 2, 2, 3), np.uint8)
  with pytest.raises(ValueError, match="images are float32"):
    preprocess.normalize(images.astype(np.float32), (0.5,) * 3, (0.5,) * 3)
  for mean, std in (((0.5,), (0.5,) * 3), ((0.5,) * 3, (0.5,))):
    with pytest.raises(ValueError, match="3 channels"):
      preprocess.normalize(images, mean, std)
