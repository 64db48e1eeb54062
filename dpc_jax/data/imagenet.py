"""ImageNet: photos read, decoded, cropped and mirrored on the host, as needed.

Grain runs the work in threads of this process or in worker processes; neither
changes a pixel. A batch is a pure function of the seed and the global step, so
the step is all that a checkpoint has to remember of the input.
"""

import collections.abc
import contextlib
import dataclasses
import importlib
import os
import typing

import numpy as np

from dpc_jax.data import decode, parallel, pipeline, prepared, sources

NAME = "imagenet2012"

_CLASSES = 1000

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
# tfds' names. Its 'test' has no labels, so the official validation set is what
# the world reports on, and our 'test'.
_TFDS_SPLITS = {"train": "train", "test": "validation"}


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedSplit:
  """Encoded images with their labels, by random access; nothing is decoded.

  `split[i]` is (the bytes of a file, the label). Pickling carries no image of
  a prepared set, and threads may share a split.

  Attributes:
    records: random access to {'image': bytes, 'label': int}.
    rows: which of the records, in order, int32 (N,); None: all of them.
    record_set: what errors call the records: tfds' name of the split.
  """

  records: typing.Any
  rows: np.ndarray | None
  record_set: str

  def __len__(self) -> int:
    return len(self.records) if self.rows is None else len(self.rows)

  def __getitem__(self, index: int) -> tuple[bytes, int]:
    row = self.row(index)
    record = self.records[row]
    with decode.naming(NAME, self.record_set, row):
      return record["image"], decode.label(record["label"], _CLASSES)

  def row(self, index: int) -> int:
    """Returns the record's place in its own set.

    Raises:
      IndexError: an index outside 0..N-1.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"index {index} is out of range; use 0..{len(self) - 1}")
    return int(index if self.rows is None else self.rows[index])

  def split_off(self, count: int) -> "tuple[StreamedSplit, StreamedSplit]":
    """Returns the rest and `count` images, both in this split's own order.

    The images are the first of one fixed permutation, which does not look at
    classes: the labels alone would take reading all files (our decision).

    Args:
      count: from 0 to the number of images.
    """
    # RandomState's stream is frozen for good (NEP 19), Generator's is not.
    random = np.random.RandomState(sources.SPLIT_SEED)
    off = np.zeros(len(self), bool)
    off[random.permutation(len(self))[:count]] = True
    rows = np.arange(len(self), dtype=np.int32)
    if self.rows is not None:
      rows = self.rows
    return tuple(
      dataclasses.replace(self, rows=rows[keep]) for keep in (~off, off)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedImages:
  """ImageNet and what is needed to feed it to a network.

  Attributes:
    splits: 'train', 'test' and, where images are held out, 'validation'.
    num_classes: the number of labels.
    mean: per channel, of images scaled to [0, 1].
    std: per channel, of images scaled to [0, 1].
    class_names: one name per label: tfds has WordNet's, such as n01440764.
    image_size: rows and columns of a decoded image, S; another size is
      `dataclasses.replace(data, image_size=...)`.
    augment: False: crops and flips happen here, not on the device.
  """

  splits: dict[str, StreamedSplit]
  num_classes: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  class_names: tuple[str, ...]
  image_size: int = 224
  augment: bool = False

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(S, S, 3)."""
    return self.image_size, self.image_size, 3


def read(
  data_dir: str | os.PathLike[str] | None = None, *, fake: bool = False
) -> StreamedImages:
  """Opens ImageNet as tfds has prepared it; reads no image.

  Args:
    data_dir: the folder that holds tfds data sets, as in `sources.load`.
    fake: whether to make a few random images instead.

  Returns:
    'train' and 'test', which is the official validation set.

  Raises:
    ValueError, FileNotFoundError, ModuleNotFoundError: as `sources.load`.
  """
  prepared.require("PIL", f"data.name={NAME!r}")
  if fake:
    records = importlib.import_module("dpc_jax.data.fake").imagenet()
    class_names = tuple(str(label) for label in range(1000))
  else:
    version_dir = prepared.find(NAME, data_dir)
    names = tuple(_TFDS_SPLITS.values())
    builder = prepared.open_builder(NAME, version_dir, names)
    class_names = tuple(builder.info.features["label"].names)
    records = {
      name: prepared.Records(NAME, version_dir, name) for name in names
    }
  splits = {
    split: StreamedSplit(records=records[name], rows=None, record_set=name)
    for split, name in _TFDS_SPLITS.items()
  }
  return StreamedImages(
    splits=splits,
    num_classes=len(class_names),
    mean=_MEAN,
    std=_STD,
    class_names=class_names,
  )


class TrainBatches:
  """Endless shuffled batches of a streamed split, by random access.

  The order is that of `pipeline.TrainBatches`: reshuffled for every epoch,
  nothing dropped, contiguous rows of the global batch for every process. What
  happens to an image depends on the seed and on its row in the run, step *
  batch_size + place in the batch, alone: not on processes, threads or workers.

  Attributes:
    batch_size: rows of the global batch, B.
    local_batch_size: rows of this process, B/n.
  """

  def __init__(
    self,
    split: StreamedSplit,
    *,
    batch_size: int,
    seed: int,
    image_size: int = 224,
    workers: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
  ):
    """Prepares the order; reads no image.

    Args:
      split: the images, at least one.
      batch_size: rows of the global batch, a multiple of `process_count`.
      seed: of the order, the crops and the flips, in [0, 2**32).
      image_size: rows and columns of a decoded image, S, at least 1.
      workers: of `iterate`: how many processes decode, at least 1; None: up
        to 16 threads of this process do, one for each of its cores.
      process_index: None takes `jax.process_index()`.
      process_count: None takes `jax.process_count()`.

    Raises:
      ValueError: an argument outside these ranges, or too little shared memory
        for the workers.
      ModuleNotFoundError: grain is not installed.
    """
    size, first_row = pipeline.local_rows(
      split, batch_size, process_index, process_count
    )
    _check_size(image_size)
    parallel.check_workers(workers, size * 3 * image_size**2)
    self.batch_size = batch_size
    self.local_batch_size = size
    self._workers = workers
    rows = _Rows(batch_size, size, first_row)
    order = pipeline.shuffled(len(split), seed)
    self._example = _TrainExample(split, rows, image_size, order, seed)

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """Returns this process's part of the batch of a step.

    Args:
      step: the global step, from 0.

    Returns:
      'image', uint8 (B/n, S, S, 3), and 'label', int32 (B/n,).

    Raises:
      ValueError: a negative step.
      prepared.DataError: a damaged image, by split and index, or shard.
    """
    return self._batches(step, int(step) + 1)[0]

  def iterate(
    self, start: int, stop: int
  ) -> collections.abc.Iterator[dict[str, np.ndarray]]:
    """Iterates over the batches of some steps, decoded ahead in parallel.

    Bit for bit `batch(step)` for every step. Worker processes start anew at
    every call and hold up to four batches each in shared memory; they import
    this package, and so the main program, which must stand behind `if
    __name__ == "__main__":`, but leave accelerators alone.

    Args:
      start: the first global step, from 0.
      stop: the step after the last one, at least `start`.

    Returns:
      A generator of batches; closing it stops the workers.

    Raises:
      ValueError: at the call, for steps out of range.
      prepared.DataError: later, for a damaged image, by split and index, or
        shard.
    """
    return parallel.run(self._batches(start, stop), self._workers)

  def _batches(self, start: int, stop: int) -> typing.Any:
    """The batches of some steps as a grain MapDataset."""
    steps = pipeline.steps(start, stop)
    grain = prepared.require("grain", "training input")
    size = self.local_batch_size
    rows = grain.MapDataset.range(steps.start * size, steps.stop * size)
    return rows.map(self._example).batch(size)


def eval_batches(
  split: StreamedSplit,
  *,
  batch_size: int,
  image_size: int = 224,
  process_index: int | None = None,
  process_count: int | None = None,
) -> collections.abc.Iterator[dict[str, np.ndarray]]:
  """Iterates once over a split, in order, in batches of one shape.

  The short side becomes round(image_size * 256 / 224) and the center is cut
  out, as in torchvision. Every process yields ceil(N / B) batches, and gets
  the same contiguous rows of each global batch as in training. The last batch
  is filled up with zero images of label 0 and mask 0: sums weighted by the
  mask are exact. Up to 16 threads of this process decode, one for each of its
  cores: worker processes would start anew for every split and evaluation.

  Args:
    split: the images, at least one.
    batch_size: rows of the global batch, a multiple of `process_count`.
    image_size: rows and columns of a decoded image, S, at least 1.
    process_index: None takes `jax.process_index()`.
    process_count: None takes `jax.process_count()`.

  Returns:
    A generator of 'image', uint8 (B/n, S, S, 3), 'label', int32 (B/n,), and
    'mask', float32 (B/n,), 1 for an image and 0 for filling.

  Raises:
    ValueError: at the call, for an argument outside these ranges.
    prepared.DataError: later, for a damaged image, by split and index, or
      shard.
    ModuleNotFoundError: grain is not installed.
  """
  size, first_row = pipeline.local_rows(
    split, batch_size, process_index, process_count
  )
  _check_size(image_size)
  grain = prepared.require("grain", "evaluation input")
  rows = _Rows(batch_size, size, first_row)
  example = _EvalExample(split, rows, image_size)
  count = -(-len(split) // batch_size) * size
  return parallel.run(grain.MapDataset.range(count).map(example).batch(size))


@dataclasses.dataclass(frozen=True)
class _Rows:
  """Which rows of the global batches are this process's."""

  batch_size: int
  size: int
  first: int

  def global_row(self, local_row: int) -> int:
    """Returns a row's place in the whole run."""
    step, place = divmod(local_row, self.size)
    return step * self.batch_size + self.first + place


@dataclasses.dataclass(frozen=True, eq=False)
class _Example:
  """One image, as a function of this process's row; grain pickles it."""

  split: StreamedSplit
  rows: _Rows
  image_size: int

  def naming(self, index: int) -> contextlib.AbstractContextManager[None]:
    """Names the image in the error over a damaged one."""
    return decode.naming(NAME, self.split.record_set, self.split.row(index))


@dataclasses.dataclass(frozen=True, eq=False)
class _TrainExample(_Example):
  order: typing.Any
  seed: int

  def __call__(self, local_row: int) -> dict[str, typing.Any]:
    row = self.rows.global_row(int(local_row))
    index = int(self.order[row])
    encoded, label = self.split[index]
    with self.naming(index):
      image = decode.train_image(
        encoded,
        image_size=self.image_size,
        uniforms=_uniforms(self.seed, row),
      )
    return {"image": image, "label": np.int32(label)}


class _EvalExample(_Example):
  def __call__(self, local_row: int) -> dict[str, typing.Any]:
    index = self.rows.global_row(int(local_row))
    if index >= len(self.split):
      filling = np.zeros((self.image_size, self.image_size, 3), np.uint8)
      return {
        "image": filling,
        "label": np.int32(0),
        "mask": np.float32(0),
      }
    encoded, label = self.split[index]
    with self.naming(index):
      image = decode.eval_image(encoded, image_size=self.image_size)
    return {
      "image": image,
      "label": np.int32(label),
      "mask": np.float32(1),
    }


def _uniforms(seed: int, row: int) -> np.ndarray:
  """Returns the random numbers of a row of the run, float64 in [0, 1).

  From the bits of a counter-based generator with this seed and row as its key:
  NumPy freezes those (NEP 19), and no state has to be kept or skipped.
  """
  bits = np.random.Philox(key=seed << 64 | row).random_raw(decode.UNIFORMS)
  return (bits >> np.uint64(11)) * 2.0**-53


def _check_size(image_size: int) -> None:
  if image_size < 1:
    raise ValueError(f"image_size={image_size} is out of range; use at least 1")
