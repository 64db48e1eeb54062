"""Random images in the form of the real sets, for runs without their files.

Every class has a coarse pattern of colors, the same in a mirror, and every
image noise over it: a network learns them in a few steps. All is fixed: the
same images in every run and with every NumPy.
"""

import collections.abc
import importlib
import io
import typing

import numpy as np

_TRAIN, _TEST = 512, 128
_IMAGENET_TRAIN, _IMAGENET_TEST = 64, 30  # the last batch is not full
_IMAGENET_CLASSES, _IMAGENET_USED = 1000, 8
_SEEDS = {"patterns": 20, "train": 21, "test": 22}
_CELLS = 4  # rows and columns of a pattern
_NOISE = 20.0  # standard deviation, in levels of 255


class Records(collections.abc.Sequence):
  """Encoded images in memory, with the access of `prepared.Records`."""

  def __init__(self, records: collections.abc.Iterable[dict[str, typing.Any]]):
    """Takes {'image': bytes, 'label': int} of every image."""
    self._records = tuple(records)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, typing.Any]:
    return self._records[index]

  def __getitems__(
    self, indices: collections.abc.Sequence[int]
  ) -> list[dict[str, typing.Any]]:
    """Returns several images."""
    return [self._records[index] for index in indices]


def digits() -> list[tuple[np.ndarray, np.ndarray]]:
  """Returns images, uint8 (N, 8, 8, 1), and labels of 'train' and 'test'."""
  parts = []
  for split, count in (("train", _TRAIN), ("test", _TEST)):
    random, labels = _labels(split, count, 10)
    images = [_image(random, label, (8, 8), 1) for label in labels]
    parts.append((np.stack(images), labels))
  return parts


def cifar(num_classes: int) -> dict[str, Records]:
  """Returns 'train' and 'test' of 32x32 images, encoded as PNG."""
  splits = {}
  for split, count in (("train", _TRAIN), ("test", _TEST)):
    random, labels = _labels(split, count, num_classes)
    splits[split] = Records(
      _record(_image(random, label, (32, 32), 3), label, "PNG")
      for label in labels
    )
  return splits


def imagenet() -> dict[str, Records]:
  """Returns 'train' and 'validation' of JPEG files of many sizes.

  As in the real set, one in eight is grayscale, some stand upright, and one is
  in CMYK. Eight of the 1,000 classes occur.
  """
  splits = {}
  for split, seed, count in (
    ("train", "train", _IMAGENET_TRAIN),
    ("validation", "test", _IMAGENET_TEST),
  ):
    random, labels = _labels(seed, count, _IMAGENET_USED)
    records = []
    for i, label in enumerate(labels * (_IMAGENET_CLASSES // _IMAGENET_USED)):
      height, width = random.randint(48, 97, 2)
      channels = 4 if i == 4 else 1 if i % 8 == 3 else 3
      image = _image(random, label, (height, width), channels)
      records.append(_record(image, label, "JPEG"))
    splits[split] = Records(records)
  return splits


def _labels(
  split: str, count: int, num_classes: int
) -> tuple[np.random.RandomState, np.ndarray]:
  random = np.random.RandomState(_SEEDS[split])
  labels = random.permutation(np.arange(count) % num_classes)
  return random, labels.astype(np.int32)


def _image(
  random: np.random.RandomState,
  label: int,
  size: tuple[int, int],
  channels: int,
) -> np.ndarray:
  """Returns an image of a class, uint8, (H, W, channels)."""
  pattern = _pattern(int(label), channels)
  rows, columns = (np.arange(side) * _CELLS // side for side in size)
  clean = pattern[rows][:, columns]
  noisy = clean + _NOISE * random.standard_normal(clean.shape)
  return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def _pattern(label: int, channels: int) -> np.ndarray:
  random = np.random.RandomState([_SEEDS["patterns"], label])
  half = random.uniform(20, 235, (_CELLS, _CELLS // 2, 4))
  return np.concatenate([half, half[:, ::-1]], axis=1)[..., :channels]


def _record(
  image: np.ndarray, label: int, file_format: str
) -> dict[str, typing.Any]:
  pillow = importlib.import_module("PIL.Image")
  encoded = io.BytesIO()
  mode = {1: "L", 3: "RGB", 4: "CMYK"}[image.shape[-1]]
  picture = pillow.frombytes(mode, image.shape[1::-1], image.tobytes())
  picture.save(encoded, file_format)
  return {"image": encoded.getvalue(), "label": int(label)}
