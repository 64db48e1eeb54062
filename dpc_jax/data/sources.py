"""Labeled image sets, whole in memory: scikit-learn's digits and CIFAR.

The reading path never imports TensorFlow and never opens a connection:
`tensorflow_datasets` files in array_record format are read in place and
decoded by Pillow, 60,000 CIFAR images in about seven seconds.
"""

import collections.abc
import dataclasses
import functools
import importlib
import io
import json
import os
import pathlib
import re
import types
import typing

import numpy as np

# CPT's preprocessing uses these for both CIFAR sets (its modules/data.py).
_CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
_CIFAR_STD = (0.2023, 0.1994, 0.2010)

# One seed for every split that this module makes, whatever the run's seed is.
_SPLIT_SEED = 1910355
_DIGITS_TEST_COUNT = 360
_RECORDS_PER_READ = 2048
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")

_PACKAGES = {
  "array_record": "array-record",
  "grain": "grain",
  "PIL": "Pillow",
  "sklearn": "scikit-learn",
  "tensorflow_datasets": "tensorflow-datasets",
}


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
) -> ImageData:
  """Loads an image set into memory.

  Held-out images leave 'train' for 'validation'. They are the first `holdout`
  of one fixed stratified permutation (our decision): the same images in every
  run, which is why no seed is asked for; classes in the training images'
  proportions, to within one image; a smaller hold-out is a subset of a larger
  one. Both splits keep the set's own order. `mean` and `std` do not depend on
  `holdout`.

  Args:
    name: one of `known()`.
    data_dir: the folder that holds tfds data sets, as `DIR/cifar10/3.0.2`;
      None takes TFDS_DATA_DIR or else tfds' default, ~/tensorflow_datasets.
      The digits come with scikit-learn and do not look at it.
    holdout: how many training images become 'validation', from 0 to one less
      than there are.

  Returns:
    The splits and their description.

  Raises:
    ValueError: an unknown name, a hold-out out of range, or a data set that is
      damaged or in another format than array_record.
    FileNotFoundError: the data set, or a part of it, is not in the folder.
    ModuleNotFoundError: a package that reads this set is not installed.
  """
  if name not in _READERS:
    raise ValueError(
      f"data.name={name!r} is unknown; choose one of {', '.join(known())}"
    )
  if holdout < 0:
    raise ValueError(f"data.holdout={holdout} is negative; 0 holds out none")
  data = _READERS[name](data_dir)
  if not holdout:
    return data
  available = len(data.splits["train"])
  if holdout >= available:
    raise ValueError(
      f"data.holdout={holdout} leaves no training image; "
      f"use at most {available - 1}"
    )
  train, validation = _split_off(data.splits["train"], holdout)
  splits = {
    "train": train,
    "validation": validation,
    "test": data.splits["test"],
  }
  return dataclasses.replace(data, splits=splits)


def known() -> tuple[str, ...]:
  """Returns the names that `load` accepts, sorted."""
  return tuple(sorted(_READERS))


def require(module: str, user: str) -> types.ModuleType:
  """Imports an optional package, at the time of its first use.

  Args:
    module: the dotted name of the module.
    user: what needs it, the first words of the error.

  Returns:
    The module.

  Raises:
    ModuleNotFoundError: in one line, with the command that installs it.
  """
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    missing = error.name or module
    root = missing.split(".")[0]
    raise ModuleNotFoundError(
      f"{user} needs the package {root}, which is not installed: "
      f"pip install {_PACKAGES.get(root, root)}",
      name=missing,
    ) from error


def _stratified_order(labels: np.ndarray) -> np.ndarray:
  """Returns a fixed permutation whose every prefix has the classes' shares.

  The images of each class, in random order, are spread evenly over [0, 1);
  sorted by that place, a prefix is within one image of each class's share.
  """
  # RandomState's stream is frozen for good (NEP 19), Generator's is not: these
  # splits must not change with the installed NumPy.
  shuffled = np.random.RandomState(_SPLIT_SEED).permutation(len(labels))
  places = np.empty(len(labels), np.float64)
  for label in np.unique(labels):
    members = np.flatnonzero(labels[shuffled] == label)
    places[members] = (np.arange(len(members)) + 0.5) / len(members)
  return shuffled[np.argsort(places, kind="stable")]


def _split_off(split: Split, count: int) -> tuple[Split, Split]:
  """Returns the rest and `count` images, both in the split's own order."""
  off = np.zeros(len(split), bool)
  off[_stratified_order(split.labels)[:count]] = True
  return tuple(
    Split(images=split.images[rows], labels=split.labels[rows])
    for rows in (~off, off)
  )


def _read_digits(data_dir: str | os.PathLike[str] | None) -> ImageData:
  """Reads scikit-learn's 1,797 digits, 8x8, one channel.

  The values 0..16 become 0..240, exactly 15 times as much: the step that fits
  a byte (our decision). The set comes without a split; ours is fixed and
  stratified: 1,437 for training, 360 for test. Mean and std are those of the
  1,437.
  """
  del data_dir
  datasets = require("sklearn.datasets", "data.name='digits'")
  digits = datasets.load_digits()
  whole = Split(
    images=np.rint(digits.images * 15).astype(np.uint8)[..., np.newaxis],
    labels=digits.target.astype(np.int32),
  )
  train, test = _split_off(whole, _DIGITS_TEST_COUNT)
  scaled = train.images.astype(np.float64) / 255
  return ImageData(
    splits={"train": train, "test": test},
    num_classes=10,
    image_shape=(8, 8, 1),
    mean=(float(scaled.mean()),),
    std=(float(scaled.std()),),
    class_names=tuple(str(name) for name in digits.target_names),
    augment=False,
  )


def _read_cifar(
  data_dir: str | os.PathLike[str] | None, *, name: str
) -> ImageData:
  """Reads a CIFAR set that tfds has prepared, official split and order."""
  version_dir = _find_version_dir(name, data_dir)
  user = f"data.name={name!r}"
  tfds = require("tensorflow_datasets", user)
  for module in ("array_record", "PIL"):
    require(module, user)
  # From its directory, not by name: this builder cannot download.
  builder = tfds.builder_from_directory(version_dir)
  _check_files(builder, name, version_dir)
  features = builder.info.features
  shape = tuple(features["image"].shape)
  decoders = {"image": tfds.decode.SkipDecoding()}
  try:
    splits = {
      split: _decode(builder.as_data_source(split, decoders=decoders), shape)
      for split in ("train", "test")
    }
  except RuntimeError as error:  # array_record's, for a damaged file
    raise ValueError(
      f"{user}: a file in {version_dir} is damaged "
      f"({str(error).split(';')[0]}); remove that folder and "
      f"{_how_to_get(name, version_dir.parents[1])}"
    ) from error
  return ImageData(
    splits=splits,
    num_classes=features["label"].num_classes,
    image_shape=shape,
    mean=_CIFAR_MEAN,
    std=_CIFAR_STD,
    class_names=tuple(features["label"].names),
    augment=True,
  )


def _decode(
  source: collections.abc.Sequence, shape: tuple[int, int, int]
) -> Split:
  """Decodes a data source of encoded images into one array.

  Records are read in blocks, 4 times as fast as one by one. Two threads were
  slower than one: images this small spend their time under Python's lock.
  """
  pillow = importlib.import_module("PIL.Image")
  images = np.empty((len(source), *shape), np.uint8)
  labels = np.empty(len(source), np.int32)
  for start in range(0, len(source), _RECORDS_PER_READ):
    rows = range(start, min(start + _RECORDS_PER_READ, len(source)))
    for row, record in zip(rows, source.__getitems__(list(rows)), strict=True):
      images[row] = np.asarray(pillow.open(io.BytesIO(record["image"])))
      labels[row] = record["label"]
  return Split(images=images, labels=labels)


def _find_version_dir(
  name: str, data_dir: str | os.PathLike[str] | None
) -> pathlib.Path:
  """Returns the newest version of a data set, before tfds is even imported."""
  origin, folder = next(
    (origin, folder)
    for origin, folder in (
      ("data.dir", data_dir),
      ("TFDS_DATA_DIR", os.environ.get("TFDS_DATA_DIR")),
      ("tfds' default", "~/tensorflow_datasets"),
    )
    if folder
  )
  if "://" in str(folder):
    raise ValueError(
      f"{origin}={folder} is not a local folder; copy {name} to one"
    )
  root = pathlib.Path(folder).expanduser().absolute()
  found = {}
  for info in (root / name).glob("*/dataset_info.json"):
    version = _VERSION.fullmatch(info.parent.name)
    if version:
      found[tuple(int(part) for part in version.groups())] = info.parent
  if not found:
    raise FileNotFoundError(
      f"data.name={name!r}: no prepared {name} in {root} ({origin}); "
      f"{_how_to_get(name, root)}"
    )
  newest = found[max(found)]
  _check_json(newest / "dataset_info.json", name, root)
  _check_json(newest / "features.json", name, root)
  return newest


def _check_json(path: pathlib.Path, name: str, root: pathlib.Path) -> None:
  remedy = f"remove {path.parent} and {_how_to_get(name, root)}"
  if not path.is_file():
    raise FileNotFoundError(f"data.name={name!r}: {path} is missing; {remedy}")
  try:
    json.loads(path.read_text("utf-8"))
  except ValueError as error:
    raise ValueError(
      f"data.name={name!r}: {path} is not JSON; {remedy}"
    ) from error


def _check_files(
  builder: typing.Any, name: str, version_dir: pathlib.Path
) -> None:
  """Checks format and presence of every file that the splits need."""
  formats = {item.value for item in builder.info.available_file_formats()}
  if "array_record" not in formats:
    raise ValueError(
      f"data.name={name!r}: {version_dir} is in {'/'.join(sorted(formats))} "
      "format, which cannot be read here; beside it, in another folder DIR, "
      f"{_how_to_get(name, 'DIR')}"
    )
  builder.info.set_file_format(
    "array_record", override=True, override_if_initialized=True
  )
  # tfds takes an incomplete folder for a prepared one, so it has to go.
  remedy = (
    f"remove {version_dir} and {_how_to_get(name, version_dir.parents[1])}"
  )
  for split in ("train", "test"):
    if split not in builder.info.splits:
      raise FileNotFoundError(
        f"data.name={name!r}: {version_dir} has no split {split!r}; {remedy}"
      )
    for path in builder.info.splits[split].filepaths:
      if not os.path.isfile(path):
        raise FileNotFoundError(
          f"data.name={name!r}: {path} is missing; {remedy}"
        )


def _how_to_get(name: str, folder: str | os.PathLike[str]) -> str:
  return (
    "prepare it once, which needs TensorFlow: python -c "
    f"\"import tensorflow_datasets as tfds; tfds.builder('{name}', "
    f"file_format='array_record', data_dir='{folder}')"
    '.download_and_prepare()" and point --config.data.dir or TFDS_DATA_DIR '
    "to that folder"
  )


_READERS = {
  "cifar10": functools.partial(_read_cifar, name="cifar10"),
  "cifar100": functools.partial(_read_cifar, name="cifar100"),
  "digits": _read_digits,
}
