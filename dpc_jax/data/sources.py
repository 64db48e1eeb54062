"""Data sets by name: images, in memory or streamed, and text.

The reading path never imports TensorFlow and never opens a connection:
`tensorflow_datasets` files in array_record format are read in place. Small
images are decoded here, all at once and by Pillow: 60,000 of CIFAR in about
seven seconds. ImageNet's are decoded as they are needed, and text has its own
home: `imagenet` and `corpus`, imported when they are asked for.
"""

import collections.abc
import dataclasses
import difflib
import functools
import importlib
import os
import typing

import numpy as np

from dpc_jax.data import decode, prepared, text_files

if typing.TYPE_CHECKING:
  from dpc_jax.data import corpus, imagenet

# One seed for every split that this package makes, whatever the run's seed is.
SPLIT_SEED = 1910355

# CPT's preprocessing uses these for both CIFAR sets (its modules/data.py).
_CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
_CIFAR_STD = (0.2023, 0.1994, 0.2010)

_DIGITS_TEST_COUNT = 360


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """Images with their labels, in a fixed order.

  Attributes:
    images: uint8, (N, H, W, C), raw values.
    labels: int32, (N,), in [0, num_classes).
  """

  images: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  def split_off(self, count: int) -> "tuple[Split, Split]":
    """Returns the rest and `count` images, both in this split's own order.

    The images are the first of one fixed stratified permutation, so that their
    classes have this split's proportions, to within one image.

    Args:
      count: from 0 to the number of images.
    """
    off = np.zeros(len(self), bool)
    off[_stratified_order(self.labels)[:count]] = True
    return tuple(
      Split(images=self.images[rows], labels=self.labels[rows])
      for rows in (~off, off)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData:
  """An image set and what is needed to feed it to a network.

  Attributes:
    splits: 'train', 'test' and, where images are held out, 'validation'.
    num_classes: the number of labels.
    image_shape: (H, W, C).
    mean: per channel, of images scaled to [0, 1].
    std: per channel, of images scaled to [0, 1].
    class_names: one name per label.
    augment: whether random crops and flips suit these images by default.
  """

  splits: dict[str, Split]
  num_classes: int
  image_shape: tuple[int, int, int]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  class_names: tuple[str, ...]
  augment: bool


def load(
  name: str,
  *,
  data_dir: str | os.PathLike[str] | None = None,
  holdout: int = 0,
  train_size: int | None = None,
  fake: bool = False,
) -> "ImageData | imagenet.StreamedImages | corpus.TextData":
  """Loads a data set: small images into memory, ImageNet as a stream, or text.

  Held-out images leave 'train' for 'validation'. They are the first `holdout`
  of one fixed permutation (our decision): the same images in every run, which
  is why no seed is asked for; a smaller hold-out is a subset of a larger one.
  In memory the permutation is stratified: classes in the training images'
  proportions, to within one image. ImageNet's is not, because the labels alone
  would take reading all of it. Both splits keep the set's own order. `mean`
  and `std` do not depend on `holdout`. Text brings its own 'validation'.
  `train_size` then takes as many of the rest, by the same rule.

  Args:
    name: one of `known()`.
    data_dir: the folder that holds tfds data sets, as `DIR/cifar10/3.0.2`;
      None takes TFDS_DATA_DIR or else tfds' default, ~/tensorflow_datasets.
      The digits come with scikit-learn and do not look at it.
    holdout: how many training images become 'validation', from 0 to one less
      than there are; 0 for text.
    train_size: how many of the other training images are trained on; None: all.
    fake: whether to make random data on the spot, in the set's form, small,
      and with classes that can be learned: for trying a program without the
      files. It passes through the same decoding.

  Returns:
    The splits and their description.

  Raises:
    ValueError: an unknown name, a hold-out out of range, or a data set that is
      damaged (`prepared.DataError` if by an image or a shard) or in another
      format than array_record.
    FileNotFoundError: the data set, or a part of it, is not in the folder.
    ModuleNotFoundError: a package that reads this set is not installed.
  """
  if name not in known():
    close = difflib.get_close_matches(name.lower(), known(), n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(
      f"data.name={name!r} is unknown; {meant}choose one of"
      f" {', '.join(known())}"
    )
  if holdout < 0:
    raise ValueError(f"data.holdout={holdout} is negative; 0 holds out none")
  if name in text_files.CORPORA:
    if train_size is not None:
      raise ValueError(
        f"data.train_size={train_size}: text is read whole; leave it out"
      )
    return _load_text(name, data_dir, holdout, fake)
  data = _READERS[name](data_dir, fake)
  if holdout:
    data = _hold_out(data, holdout)
  return data if train_size is None else _subset(data, train_size)


def known() -> tuple[str, ...]:
  """Returns the names that `load` accepts, sorted."""
  return tuple(sorted((*_READERS, *text_files.CORPORA)))


def _hold_out(data: typing.Any, count: int) -> typing.Any:
  """Returns image data whose 'validation' was a part of 'train'."""
  available = len(data.splits["train"])
  if count >= available:
    raise ValueError(
      f"data.holdout={count} leaves no training image; "
      f"use at most {available - 1}"
    )
  train, validation = data.splits["train"].split_off(count)
  splits = {
    "train": train,
    "validation": validation,
    "test": data.splits["test"],
  }
  return dataclasses.replace(data, splits=splits)


def _subset(data: typing.Any, count: int) -> typing.Any:
  """Returns image data with `count` training images."""
  available = len(data.splits["train"])
  if not 1 <= count <= available:
    raise ValueError(
      f"data.train_size={count}: there are {available} training images; use"
      f" 1..{available}, or leave it out"
    )
  if count == available:
    return data
  _, train = data.splits["train"].split_off(count)
  return dataclasses.replace(data, splits=data.splits | {"train": train})


def _stratified_order(labels: np.ndarray) -> np.ndarray:
  """Returns a fixed permutation whose every prefix has the classes' shares.

  The images of each class, in random order, are spread evenly over [0, 1);
  sorted by that place, a prefix is within one image of each class's share.
  """
  # RandomState's stream is frozen for good (NEP 19), Generator's is not: these
  # splits must not change with the installed NumPy.
  shuffled = np.random.RandomState(SPLIT_SEED).permutation(len(labels))
  places = np.empty(len(labels), np.float64)
  for label in np.unique(labels):
    members = np.flatnonzero(labels[shuffled] == label)
    places[members] = (np.arange(len(members)) + 0.5) / len(members)
  return shuffled[np.argsort(places, kind="stable")]


def _read_digits(
  data_dir: str | os.PathLike[str] | None, fake: bool
) -> ImageData:
  """Reads scikit-learn's 1,797 digits, 8x8, one channel.

  The values 0..16 become 0..240, exactly 15 times as much: the step that fits
  a byte (our decision). The set comes without a split; ours is fixed and
  stratified: 1,437 for training, 360 for test. Mean and std are those of the
  1,437.
  """
  del data_dir
  if fake:
    train, test = (Split(*part) for part in _fake().digits())
  else:
    datasets = prepared.require("sklearn.datasets", "data.name='digits'")
    digits = datasets.load_digits()
    whole = Split(
      images=np.rint(digits.images * 15).astype(np.uint8)[..., np.newaxis],
      labels=digits.target.astype(np.int32),
    )
    train, test = whole.split_off(_DIGITS_TEST_COUNT)
  scaled = train.images.astype(np.float64) / 255
  return ImageData(
    splits={"train": train, "test": test},
    num_classes=10,
    image_shape=(8, 8, 1),
    mean=(float(scaled.mean()),),
    std=(float(scaled.std()),),
    class_names=tuple(str(digit) for digit in range(10)),
    augment=False,
  )


def _read_cifar(
  data_dir: str | os.PathLike[str] | None,
  fake: bool,
  *,
  name: str,
  num_classes: int,
) -> ImageData:
  """Reads a CIFAR set that tfds has prepared, official split and order."""
  prepared.require("PIL", f"data.name={name!r}")
  if fake:
    records = _fake().cifar(num_classes)
    class_names = tuple(str(label) for label in range(num_classes))
  else:
    version_dir = prepared.find(name, data_dir)
    builder = prepared.open_builder(name, version_dir, ("train", "test"))
    class_names = tuple(builder.info.features["label"].names)
    records = {
      split: prepared.Records(name, version_dir, split)
      for split in ("train", "test")
    }
  shape = (32, 32, 3)
  return ImageData(
    splits={
      split: _decode(name, split, part, shape, num_classes)
      for split, part in records.items()
    },
    num_classes=num_classes,
    image_shape=shape,
    mean=_CIFAR_MEAN,
    std=_CIFAR_STD,
    class_names=class_names,
    augment=True,
  )


def _read_imagenet(
  data_dir: str | os.PathLike[str] | None, fake: bool
) -> "imagenet.StreamedImages":
  return importlib.import_module("dpc_jax.data.imagenet").read(
    data_dir, fake=fake
  )


def _load_text(
  name: str,
  data_dir: str | os.PathLike[str] | None,
  holdout: int,
  fake: bool,
) -> "corpus.TextData":
  if holdout:
    raise ValueError(
      f"data.holdout={holdout}: {name} brings its own validation split; use 0"
    )
  return importlib.import_module("dpc_jax.data.corpus").load(
    name, data_dir=data_dir, fake=fake
  )


def _fake() -> typing.Any:
  return importlib.import_module("dpc_jax.data.fake")


def _decode(
  name: str,
  record_set: str,
  records: collections.abc.Sequence,
  shape: tuple[int, int, int],
  num_classes: int,
) -> Split:
  """Decodes all images of a split into one array.

  Two threads were slower than one: images this small spend their time under
  Python's lock.
  """
  images = np.empty((len(records), *shape), np.uint8)
  labels = np.empty(len(records), np.int32)
  for row, record in enumerate(prepared.in_order(records)):
    with decode.naming(name, record_set, row):
      images[row] = decode.whole_image(record["image"], shape)
      labels[row] = decode.label(record["label"], num_classes)
  return Split(images=images, labels=labels)


_READERS = {
  "cifar10": functools.partial(_read_cifar, name="cifar10", num_classes=10),
  "cifar100": functools.partial(_read_cifar, name="cifar100", num_classes=100),
  "digits": _read_digits,
  "imagenet2012": _read_imagenet,
}
