"""Images on the device, inside the step: random crops, flips, normalization.

Pure functions of arrays. A batch sharded over devices stays where it is, and
gets the same values bit for bit as on one device.
"""

import jax
import jax.numpy as jnp
import jax.typing


def normalize(
  images: jax.Array,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
  """Computes (images / 255 - mean) / std, in float32.

  Args:
    images: uint8, (B, H, W, C).
    mean: C values, of images scaled to [0, 1].
    std: C values, of images scaled to [0, 1].
    dtype: of the result; it is rounded once, at the end.

  Returns:
    (B, H, W, C), of `dtype`.

  Raises:
    ValueError: images that are not uint8, or other than C values.
  """
  if images.dtype != jnp.uint8:
    raise ValueError(f"images are {images.dtype}; normalize takes raw uint8")
  channels = images.shape[-1]
  if len(mean) != channels or len(std) != channels:
    raise ValueError(
      f"mean={mean} and std={std} need one value for each of the "
      f"{channels} channels"
    )
  shape = (1,) * (images.ndim - 1) + (channels,)
  mean_array = jnp.asarray(mean, jnp.float32).reshape(shape)
  std_array = jnp.asarray(std, jnp.float32).reshape(shape)
  scaled = images.astype(jnp.float32) / 255
  return ((scaled - mean_array) / std_array).astype(dtype)


def augment(key: jax.Array, images: jax.Array, *, pad: int = 4) -> jax.Array:
  """Crops each image at random after zero padding and mirrors half of them.

  The CIFAR recipe, as torchvision's RandomCrop(H, padding=pad) followed by
  RandomHorizontalFlip(): raw values are padded, so the border is black before
  it is normalized. The offsets are uniform over 0..2*pad, both included.

  What happens to an image depends on the key and on its position in the global
  batch alone, not on the batch size or the devices: JAX's default generator
  (threefry, `jax_threefry_partitionable`) draws by position.

  Args:
    key: of this step; every step needs its own.
    images: (B, H, W, C), raw values.
    pad: rows and columns of zeros on each side; 0 leaves the flip alone.

  Returns:
    Images like the given ones.

  Raises:
    ValueError: a negative pad.
  """
  if pad < 0:
    raise ValueError(f"pad={pad} is negative; 0 turns the crop off")
  batch, height, width, _ = images.shape
  row_key, column_key, flip_key = jax.random.split(key, 3)
  row_offsets = jax.random.randint(row_key, (batch, 1), 0, 2 * pad + 1)
  column_offsets = jax.random.randint(column_key, (batch, 1), 0, 2 * pad + 1)
  flips = jax.random.bernoulli(flip_key, 0.5, (batch, 1))
  ahead = jnp.arange(width)[jnp.newaxis]
  columns = column_offsets + jnp.where(flips, width - 1 - ahead, ahead)
  rows = row_offsets + jnp.arange(height)[jnp.newaxis]
  border = ((0, 0), (pad, pad), (pad, pad), (0, 0))
  padded = jnp.pad(images, border)
  # Two gathers along one axis each: on a CPU as fast as any way we tried (one
  # gather or dynamic_slice per image are close, one-hot products 6 times and
  # selects 60 times slower), and the partitioner keeps them on their shard.
  cropped = jnp.take_along_axis(
    padded, rows[:, :, None, None], axis=1, mode="promise_in_bounds"
  )
  return jnp.take_along_axis(
    cropped, columns[:, None, :, None], axis=2, mode="promise_in_bounds"
  )
