"""Batches of an in-memory split: shuffled, sharded by process, resumable.

Grain decides which images a step sees; NumPy gathers them. No state moves: a
batch is a pure function of the seed and the global step, so the step is all
that a checkpoint has to remember of the input.
"""

import collections.abc
import typing

import jax
import numpy as np

from dpc_jax.data import prepared, sources

_MAX_SEED = 2**32


class TrainBatches:
  """Endless shuffled batches of a split, by random access.

  The split is reshuffled for every epoch. Nothing is dropped: a batch may end
  one epoch and begin the next, and every epoch shows every image once.

  Process p of n gets the contiguous rows [p*B/n, (p+1)*B/n) of the global
  batch (our decision, over every n-th row): what
  `jax.make_array_from_process_local_data` assembles from them is then the
  same global batch for any number of processes, on a mesh that lists devices
  process by process.

  Attributes:
    batch_size: rows of the global batch, B.
    local_batch_size: rows of this process, B/n.
  """

  def __init__(
    self,
    split: sources.Split,
    *,
    batch_size: int,
    seed: int,
    process_index: int | None = None,
    process_count: int | None = None,
  ):
    """Prepares the order; reads no image.

    Args:
      split: the images, at least one.
      batch_size: rows of the global batch, a multiple of `process_count`.
      seed: of the order, in [0, 2**32).
      process_index: None takes `jax.process_index()`.
      process_count: None takes `jax.process_count()`.

    Raises:
      ValueError: an argument outside these ranges.
      ModuleNotFoundError: grain is not installed.
    """
    self.local_batch_size, self._first_row = local_rows(
      split, batch_size, process_index, process_count
    )
    self.batch_size = batch_size
    self._split = split
    self._order = shuffled(len(split), seed)

  def indices(self, step: int) -> np.ndarray:
    """Returns this process's rows of the split at a step, int32 (B/n,).

    For a split that lives on the device: only these cross over, not the images.

    Args:
      step: the global step, from 0.

    Raises:
      ValueError: a negative step.
    """
    # A Python int: a long run outgrows an int32 step times the batch size.
    (step,) = steps(step, int(step) + 1)
    start = step * self.batch_size + self._first_row
    rows = range(start, start + self.local_batch_size)
    return np.array([self._order[row] for row in rows], np.int32)

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """Returns this process's part of the batch of a step.

    Args:
      step: the global step, from 0.

    Returns:
      'image', uint8 (B/n, H, W, C), and 'label', int32 (B/n,).

    Raises:
      ValueError: a negative step.
    """
    rows = self.indices(step)
    return {
      "image": self._split.images[rows],
      "label": self._split.labels[rows],
    }

  def iterate(
    self, start: int, stop: int
  ) -> collections.abc.Iterator[dict[str, np.ndarray]]:
    """Iterates over `batch(step)` of the steps from `start` to `stop` - 1.

    Args:
      start: the first global step, from 0.
      stop: the step after the last one, at least `start`.

    Returns:
      A generator of batches.

    Raises:
      ValueError: at the call, for steps out of range.
    """
    return (self.batch(step) for step in steps(start, stop))


def eval_batches(
  split: sources.Split,
  *,
  batch_size: int,
  process_index: int | None = None,
  process_count: int | None = None,
) -> collections.abc.Iterator[dict[str, np.ndarray]]:
  """Iterates once over a split, in order, in batches of one shape.

  Every process yields ceil(N / B) batches, and gets the same contiguous rows
  of each global batch as in training. The last batch is filled up with zero
  images of label 0 and mask 0: sums weighted by the mask are exact.

  Args:
    split: the images, at least one.
    batch_size: rows of the global batch, a multiple of `process_count`.
    process_index: None takes `jax.process_index()`.
    process_count: None takes `jax.process_count()`.

  Returns:
    A generator of 'image', uint8 (B/n, H, W, C), 'label', int32 (B/n,), and
    'mask', float32 (B/n,), 1 for an image and 0 for filling.

  Raises:
    ValueError: at the call, for an argument outside these ranges.
  """
  local_size, first_row = local_rows(
    split, batch_size, process_index, process_count
  )
  starts = range(first_row, first_row + len(split), batch_size)
  return (_padded_rows(split, start, local_size) for start in starts)


def _padded_rows(
  split: sources.Split, start: int, count: int
) -> dict[str, np.ndarray]:
  images = split.images[start : start + count]
  labels = split.labels[start : start + count]
  filling = count - len(labels)
  return {
    "image": np.pad(images, ((0, filling), (0, 0), (0, 0), (0, 0))),
    "label": np.pad(labels, (0, filling)),
    "mask": np.pad(np.ones(len(labels), np.float32), (0, filling)),
  }


def shuffled(count: int, seed: int) -> typing.Any:
  """Returns an endless order of `count` images, another for every epoch.

  Args:
    count: of the images, at least one.
    seed: in [0, 2**32).

  Returns:
    A grain MapDataset: `order[row]` is the image of a row of the run.

  Raises:
    ValueError: a seed outside this range.
    ModuleNotFoundError: grain is not installed.
  """
  if not 0 <= seed < _MAX_SEED:
    raise ValueError(f"seed={seed} is out of range; use 0..{_MAX_SEED - 1}")
  grain = prepared.require("grain", "training input")
  return grain.MapDataset.range(count).shuffle(seed=seed).repeat()


def steps(start: int, stop: int) -> range:
  """Returns the steps from `start` to `stop` - 1, as Python integers.

  Args:
    start: the first global step, from 0.
    stop: the step after the last one, at least `start`.

  Raises:
    ValueError: steps outside these ranges.
  """
  if start < 0:
    raise ValueError(f"step={start} is negative; the first step is 0")
  if stop < start:
    raise ValueError(f"stop={stop} lies before start={start}")
  return range(int(start), int(stop))


def process(index: int | None, count: int | None) -> tuple[int, int]:
  """Returns this process's index and the number of processes.

  Args:
    index: None takes `jax.process_index()`.
    count: None takes `jax.process_count()`.

  Raises:
    ValueError: an index outside 0..count-1.
  """
  index = jax.process_index() if index is None else index
  count = jax.process_count() if count is None else count
  if not 0 <= index < count:
    raise ValueError(
      f"process_index={index} is out of range; use 0..{count - 1}"
    )
  return index, count


def local_rows(
  split: collections.abc.Sized,
  batch_size: int,
  process_index: int | None,
  process_count: int | None,
) -> tuple[int, int]:
  """Returns the rows per process and the first row of this one.

  Args:
    split: the examples, at least one.
    batch_size: rows of the global batch, a multiple of `process_count`.
    process_index: None takes `jax.process_index()`.
    process_count: None takes `jax.process_count()`.

  Raises:
    ValueError: an argument outside these ranges.
  """
  index, count = process(process_index, process_count)
  if not len(split):
    raise ValueError("the split is empty; give it at least one example")
  if batch_size < 1 or batch_size % count:
    raise ValueError(
      f"batch_size={batch_size} does not divide over {count} "
      f"process{'es' if count > 1 else ''}; use a positive multiple of {count}"
    )
  return batch_size // count, index * (batch_size // count)
