"""Calls of the devices: how many steps each takes, and the batches for them.

With `config.steps_per_call` n, one call takes up to n steps: a small model's
step is over before the host has asked for the next one.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dpc_jax.training import (
  build,
  config_precision,
  sharding,
  stacked,
  tasks,
)


def end(config: ml_collections.ConfigDict, step: int) -> int:
  """The step at which the call that begins at `step` ends.

  That is `steps_per_call` later, or at the next step after which the host has
  something to do, whichever comes first: a log, an evaluation, a save, the
  search for bounds, the end of the run. All of these keep their steps.

  Args:
    config: resolved.
    step: the number of steps done, less than `config.steps`.
  """
  ends = [step + config.steps_per_call, config.steps]
  for every in (config.log_every, config.eval_every, config.checkpoint_every):
    ends.append(step - step % every + every)
  at = config.precision.bounds_step
  if config_precision.finds_bounds(config) and step < at:
    ends.append(at)
  return min(ends)


class Batches:
  """The global batches of a run, on its devices, call by call."""

  def __init__(self, parts: build.Parts, start: int):
    """Begins with the batch of step `start`; copies a resident split over."""
    self._mesh, self._size = parts.mesh, parts.config.steps_per_call
    resident = parts.feed.resident
    self._arrays = None
    if resident is None:
      self._rows = parts.feed.train(start, parts.config.steps)
      return
    self._rows = _numbers(resident.indices, start, parts.config.steps)
    self._arrays = stacked.put_everywhere(resident.arrays, parts.mesh)
    split = sharding.batch if self._size == 1 else stacked.batches
    self._gather = jax.jit(_gather, out_shardings=split(parts.mesh))

  def take(self, count: int) -> tasks.Batch:
    """Returns the batches of the next `count` steps, 1..steps_per_call.

    Where `steps_per_call` is 1 that is one batch, else all of them along a new
    leading axis of length `steps_per_call`, what is past `count` to be ignored.
    """
    rows = [next(self._rows) for _ in range(count)]
    if self._size == 1:
      batch = sharding.put_batch(rows[0], self._mesh)
    else:
      rows += rows[-1:] * (self._size - count)
      several = jax.tree.map(lambda *x: np.stack(x), *rows)
      batch = stacked.put(several, self._mesh)
    if self._arrays is None:
      return batch
    return self._gather(self._arrays, batch["row"])

  def close(self) -> None:
    """Closes the reader of the data."""
    self._rows.close()


def run(
  programs: build.Programs, state: Any, batch: tasks.Batch, count: int
) -> tuple[Any, tasks.Metrics]:
  """(state, metrics) after `count` steps on what `Batches.take` returned."""
  if programs.train_steps is None:
    return programs.train_step(state, batch)
  return programs.train_steps(state, batch, np.int32(count))


def per_step(
  pending: Iterable[tuple[tasks.Metrics, int]],
) -> list[tasks.Metrics]:
  """The metrics of each step of some calls, on the host; waits for them.

  Args:
    pending: (metrics that `run` returned, its `count`) of each call.
  """
  pending = list(pending)
  found = jax.device_get([metrics for metrics, _ in pending])
  steps = []
  for metrics, (_, count) in zip(found, pending, strict=True):
    if np.ndim(metrics.loss) == 0:
      steps.append(metrics)
      continue
    for i in range(count):
      steps.append(jax.tree.map(lambda x, i=i: x[i], metrics))
  return steps


def _numbers(indices, start, stop) -> Iterator[dict[str, np.ndarray]]:
  for step in range(start, stop):
    yield {"row": indices(step)}


def _gather(arrays, rows):
  return jax.tree.map(lambda x: jnp.take(x, rows, 0, mode="clip"), arrays)
