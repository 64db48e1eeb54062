"""Encoded photos into squares of pixels: the ImageNet recipe, on the host.

Pillow decodes and resizes, without Python's lock, so threads run side by side.
Pixels do not depend on threads or processes: what is random here is a function
of the uniform numbers that the caller draws.
"""

import collections.abc
import contextlib
import importlib
import io
import math
import numbers
import struct
import typing

import numpy as np

from dpc_jax.data import prepared

SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
_TRIES = 10
# One for the flip; area, ratio, row and column of each try.
UNIFORMS = 1 + 4 * _TRIES

_FORMATS = ("JPEG", "PNG")
# What Pillow raises on bytes that are no image, or a damaged one, beside its
# own DecompressionBombError.
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error)


class DamagedImageError(prepared.DataError):
  """Bytes that are not an image, or a damaged one."""


@contextlib.contextmanager
def naming(
  name: str, record_set: str, row: int
) -> collections.abc.Iterator[None]:
  """Names the image in the error over a damaged one.

  Args:
    name: of the data set.
    record_set: tfds' name of the split.
    row: the image's place in it.

  Yields:
    Nothing: decode inside the `with`.

  Raises:
    prepared.DataError: in place of a DamagedImageError, in one line.
  """
  try:
    yield
  except DamagedImageError as error:
    raise prepared.DataError(
      f"data.name={name!r}: image {row} of tfds' split {record_set!r} cannot "
      f"be decoded ({error}); prepare the data set anew"
    ) from error


def crop_box(
  width: int, height: int, uniforms: np.ndarray
) -> tuple[int, int, int, int]:
  """Returns the box of a random-resized crop, as torchvision draws it.

  The area is uniform over `SCALE` times the image's, the logarithm of
  width / height uniform over that of `RATIO`, the place uniform over the
  whole pixels where the box fits. Ten tries; then the center of the image,
  cut to the nearest ratio that is allowed.

  Args:
    width: of the image, in pixels.
    height: of the image, in pixels.
    uniforms: float64 in [0, 1), (40,): area, ratio, row and column of each
      try.

  Returns:
    left, upper, right, lower, with the right and the lower edge outside.
  """
  log_ratio = math.log(RATIO[0]), math.log(RATIO[1])
  for area, ratio, row, column in uniforms.reshape(_TRIES, 4).tolist():
    target = width * height * (SCALE[0] + area * (SCALE[1] - SCALE[0]))
    aspect = math.exp(log_ratio[0] + ratio * (log_ratio[1] - log_ratio[0]))
    w = round(math.sqrt(target * aspect))
    h = round(math.sqrt(target / aspect))
    if 0 < w <= width and 0 < h <= height:
      left = int(column * (width - w + 1))
      upper = int(row * (height - h + 1))
      return left, upper, left + w, upper + h
  return _center_box(width, height)


def train_image(
  encoded: bytes, *, image_size: int, uniforms: np.ndarray
) -> np.ndarray:
  """Decodes an image, crops and resizes it at random, mirrors half of them.

  Bilinear with antialiasing. Decoding is at full resolution (our decision):
  the reduced decoding that JPEG offers would serve crops of at least twice
  `image_size` alone, which are few, and it changes their pixels.

  Args:
    encoded: a file that Pillow reads: JPEG or PNG, of any color space.
    image_size: rows and columns of the result, S.
    uniforms: float64 in [0, 1), (UNIFORMS,): the flip, then the crop.

  Returns:
    uint8, (S, S, 3), RGB.

  Raises:
    DamagedImageError: the bytes are not an image, or a damaged one.
  """
  image = _decode(encoded)
  box = crop_box(*image.size, uniforms[1:])
  pixels = np.asarray(_resize(image, (image_size, image_size), box))
  # The copy is contiguous, and writable.
  return (pixels[:, ::-1] if uniforms[0] < 0.5 else pixels).copy()


def eval_image(encoded: bytes, *, image_size: int) -> np.ndarray:
  """Decodes an image, resizes its short side, and cuts the center out.

  As torchvision's Resize and CenterCrop: the short side becomes
  round(image_size * 256 / 224), the long side keeps the shape, rounded down.

  Args:
    encoded: a file that Pillow reads: JPEG or PNG, of any color space.
    image_size: rows and columns of the result, S.

  Returns:
    uint8, (S, S, 3), RGB.

  Raises:
    DamagedImageError: the bytes are not an image, or a damaged one.
  """
  image = _decode(encoded)
  short = round(image_size * 256 / 224)
  width, height = (short * side // min(image.size) for side in image.size)
  resized = _resize(image, (width, height), None)
  left = round((width - image_size) / 2)
  upper = round((height - image_size) / 2)
  box = left, upper, left + image_size, upper + image_size
  return np.array(resized.crop(box))


def whole_image(encoded: bytes, shape: tuple[int, int, int]) -> np.ndarray:
  """Decodes an image whose size is known.

  Args:
    encoded: a file that Pillow reads: JPEG or PNG, of any color space.
    shape: (H, W, 3).

  Returns:
    uint8, (H, W, 3), RGB.

  Raises:
    DamagedImageError: the bytes are not an image of this size, or a damaged
      one.
  """
  image = _decode(encoded)
  height, width, _ = shape
  if image.size != (width, height):
    raise DamagedImageError(
      f"{image.width}x{image.height} pixels instead of {width}x{height}"
    )
  return np.asarray(image)


def label(value: typing.Any, num_classes: int) -> int:
  """Returns the label of a record.

  Raises:
    DamagedImageError: it is none of 0..num_classes - 1.
  """
  if isinstance(value, numbers.Integral) and 0 <= value < num_classes:
    return int(value)
  raise DamagedImageError(
    f"its label is {value!r}, none of 0..{num_classes - 1}"
  )


def _decode(encoded: bytes) -> typing.Any:
  pillow = importlib.import_module("PIL.Image")
  if not isinstance(encoded, bytes):
    raise DamagedImageError(f"{type(encoded).__name__} instead of bytes")
  try:
    # No other formats: Pillow has EPS drawn by another program, Ghostscript.
    image = pillow.open(io.BytesIO(encoded), formats=_FORMATS)
    # Grayscale, CMYK and palettes too. A rotation in the Exif data is left
    # alone, as everywhere else with ImageNet.
    return image.convert("RGB")
  except pillow.UnidentifiedImageError as error:  # its text is an address
    raise DamagedImageError("not a JPEG or PNG file") from error
  except (*_PILLOW_ERRORS, pillow.DecompressionBombError) as error:
    raise DamagedImageError(" ".join(str(error).split())) from error


def _resize(
  image: typing.Any,
  size: tuple[int, int],
  box: tuple[int, int, int, int] | None,
) -> typing.Any:
  pillow = importlib.import_module("PIL.Image")
  return image.resize(size, pillow.Resampling.BILINEAR, box=box)


def _center_box(width: int, height: int) -> tuple[int, int, int, int]:
  ratio = width / height
  w, h = width, height
  if ratio < RATIO[0]:
    h = round(width / RATIO[0])
  elif ratio > RATIO[1]:
    w = round(height * RATIO[1])
  left, upper = (width - w) // 2, (height - h) // 2
  return left, upper, left + w, upper + h
