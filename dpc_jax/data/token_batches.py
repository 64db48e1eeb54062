"""Batches of running text for truncated back-propagation through time.

A split of N tokens is read as N pairs: the target is a token, the input is the
token before it, and the first token's input is `eos` (our decision: so every
token is scored, and the sum of losses over N is the split's exact loss). The
pairs are cut into B contiguous rows of S = ceil(N / B), and the rows into
windows of T. What fills up the ends, of the last window and of the last rows,
has mask 0 and is text all the same: the pairs that follow in the split, and
after its last one those from its beginning (our decision: a range measured
over a batch then sees ordinary words in ordinary places, not one word many
times).
"""

import collections.abc
import math

import numpy as np

from dpc_jax.data import pipeline


class TrainBatches:
  """Endless batches of a split: its windows in order, again in every epoch.

  Row b of the global batch of step t follows row b of step t - 1, so that a
  recurrent state may be carried from batch to batch; `reset` says where it
  may not. A batch is a pure function of the step: nothing is drawn, and the
  step is all that a checkpoint has to remember.

  Process p of n gets the contiguous rows [p*B/n, (p+1)*B/n) of the batch.

  Attributes:
    batch_size: rows of the global batch, B.
    local_batch_size: rows of this process, B/n.
    unroll: pairs of a row and step, T.
    windows: steps of an epoch, ceil(S / T).
  """

  def __init__(
    self,
    tokens: np.ndarray,
    *,
    batch_size: int,
    unroll: int,
    eos: int,
    process_index: int | None = None,
    process_count: int | None = None,
  ):
    """Keeps the tokens, as they are.

    Args:
      tokens: int32 (N,), N at least `batch_size`.
      batch_size: rows of the global batch, a multiple of `process_count`.
      unroll: pairs of a row and step, at least 1.
      eos: the token that stands before the first one, `TextData.eos`.
      process_index: None takes `jax.process_index()`.
      process_count: None takes `jax.process_count()`.

    Raises:
      ValueError: an argument outside these ranges.
    """
    _check(tokens, "batch_size", batch_size, unroll, eos)
    self.local_batch_size, self._first_row = pipeline.local_rows(
      tokens, batch_size, process_index, process_count
    )
    self.batch_size = batch_size
    self.unroll = unroll
    self._tokens = tokens
    self._eos = eos
    self._row_length = -(-len(tokens) // batch_size)
    self.windows = -(-self._row_length // unroll)

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """Returns this process's part of the batch of a step.

    Args:
      step: the global step, from 0.

    Returns:
      'tokens' and 'targets', int32 (B/n, T), 'mask', float32 (B/n, T), 1 for
      a pair of the split and 0 for filling, and 'reset', bool (B/n,), True in
      the first window of an epoch: there the recurrent state starts anew.

    Raises:
      ValueError: a negative step.
    """
    (step,) = pipeline.steps(step, int(step) + 1)
    return _window(
      self._tokens,
      self._eos,
      self._row_length,
      range(self._first_row, self._first_row + self.local_batch_size),
      step % self.windows,
      self.unroll,
    )

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
    return (self.batch(step) for step in pipeline.steps(start, stop))


def eval_batches(
  tokens: np.ndarray,
  *,
  rows: int,
  unroll: int,
  eos: int,
  multiple: int = 1,
  process_index: int | None = None,
  process_count: int | None = None,
) -> collections.abc.Iterator[dict[str, np.ndarray]]:
  """Iterates once over a split, in batches of one shape.

  Every token is a target exactly once: the sums of losses and of `mask` over
  the batches and processes give the split's exact loss. Rows of filling alone
  (mask 0) make the batch divide over devices; what the other rows hold depends
  on `rows` and `unroll` only, so neither devices nor processes change the
  result. `rows` does: the first pairs of a row have no context before them.
  One row gives each token all the context there is.

  Args:
    tokens: int32 (N,), N at least `rows`.
    rows: contiguous parts that the split is cut into.
    unroll: pairs of a row and batch, at least 1.
    eos: the token that stands before the first one, `TextData.eos`.
    multiple: the global batch has the smallest multiple of it, and of
      `process_count`, that `rows` fits into, R.
    process_index: None takes `jax.process_index()`.
    process_count: None takes `jax.process_count()`.

  Returns:
    A generator of dicts as `TrainBatches.batch` returns, of R/n rows.

  Raises:
    ValueError: at the call, for an argument outside these ranges.
  """
  _check(tokens, "rows", rows, unroll, eos)
  index, count = pipeline.process(process_index, process_count)
  if multiple < 1:
    raise ValueError(f"multiple={multiple} is below 1; 1 adds no rows")
  block = math.lcm(multiple, count)
  local_rows = -(-rows // block) * block // count
  row_length = -(-len(tokens) // rows)
  mine = range(index * local_rows, (index + 1) * local_rows)
  return (
    _window(tokens, eos, row_length, mine, window, unroll)
    for window in range(-(-row_length // unroll))
  )


def _window(
  tokens: np.ndarray,
  eos: int,
  row_length: int,
  rows: range,
  window: int,
  unroll: int,
) -> dict[str, np.ndarray]:
  """Returns one window of some rows; rows past the end are filling alone."""
  offsets = window * unroll + np.arange(unroll)
  starts = np.array(rows, np.int64) * row_length
  places = starts[:, np.newaxis] + offsets[np.newaxis]
  valid = (offsets < row_length)[np.newaxis] & (places < len(tokens))
  places %= len(tokens)
  inputs = np.where(places > 0, tokens[places - 1], eos)
  return {
    "tokens": inputs.astype(np.int32),
    "targets": tokens[places],
    "mask": valid.astype(np.float32),
    "reset": np.full(len(rows), window == 0),
  }


def _check(
  tokens: np.ndarray, field: str, rows: int, unroll: int, eos: int
) -> None:
  if tokens.ndim != 1 or tokens.dtype != np.int32:
    raise ValueError(
      f"tokens are {tokens.dtype} of shape {tokens.shape}; they must be int32 "
      "of shape (N,)"
    )
  if not len(tokens):
    raise ValueError("the split has no tokens; give it at least one")
  if not 1 <= rows <= len(tokens):
    raise ValueError(
      f"{field}={rows} is out of range for {len(tokens)} tokens; use "
      f"1..{len(tokens)}"
    )
  if unroll < 1:
    raise ValueError(f"unroll={unroll} is below 1; use at least 1")
  if eos < 0:
    raise ValueError(f"eos={eos} is negative; pass TextData.eos")
