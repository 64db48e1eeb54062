"""Methods x seeds of one recipe, trained one run after the other."""

import copy
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections

from dpc_jax.analysis import comparison
from dpc_jax.data import prepared
from dpc_jax.training import config as config_lib
from dpc_jax.training import loop
from dpc_jax.training import workdir as workdir_lib
from experiments import reporting

# What one run may die of while the others can go on: a diverged loss and what
# XLA raises (RuntimeError), a full disk, memory, damaged data.
_RUN_ERRORS = (
  ArithmeticError,
  MemoryError,
  OSError,
  RuntimeError,
  config_lib.ConfigError,
  prepared.DataError,
)


class Cell(NamedTuple):
  """One run of the grid."""

  method: str
  seed: int
  config: ml_collections.ConfigDict


def cells(
  config: ml_collections.ConfigDict, names: list[str], seeds: int
) -> list[Cell]:
  """The runs in their order: all methods of a seed before the next seed.

  Args:
    config: of all runs but for `precision.method` and `seed`.
    names: of the methods; one that comes twice counts once.
    seeds: how many, from `config.seed` on.

  Raises:
    ConfigError: no method, or a mistake in any run's config: all are checked
      before the first is trained.
  """
  found = []
  for seed in range(config.seed, config.seed + seeds):
    for method in dict.fromkeys(names):
      of_run = copy.deepcopy(config)
      of_run.precision.method = method
      of_run.seed = seed
      config_lib.validate(of_run)
      found.append(Cell(method, seed, of_run))
  if not found:
    raise config_lib.ConfigError("--methods is empty: name at least one")
  return found


def train(
  cells: list[Cell],
  workdir: pathlib.Path,
  is_stopping: Callable[[int], bool] = lambda step: False,
) -> tuple[dict[str, dict[int, Any]], list[comparison.Failure]] | None:
  """Trains what is not finished yet, one run after the other.

  Args:
    cells: the runs.
    workdir: of the grid.
    is_stopping: of `termination.watch`, asked between runs.

  Returns:
    ({method: {seed: summary}}, failures); None if SIGTERM stopped the grid.

  Raises:
    ConfigError: of the first run, before it is trained: the mistake is the
      command's. Of a later run, or later, it is one of the failures.
  """
  runs: dict[str, dict[int, Any]] = {cell.method: {} for cell in cells}
  failures = []
  seconds = []
  for i, cell in enumerate(cells):
    if is_stopping(0):
      return None
    folder = _folder(workdir, cell)
    left = [c for c in cells[i:] if not _is_finished(_folder(workdir, c))]
    print(
      f"[{i + 1}/{len(cells)}] {cell.method}, seed {cell.seed}"
      f"{_time_left(seconds, len(left))}",
      flush=True,
    )
    trains, start = not _is_finished(folder), time.monotonic()
    try:
      summary = loop.train_and_evaluate(cell.config, folder)
    except _RUN_ERRORS as error:
      is_first = i == 0 and not (folder / "checkpoints").exists()
      is_busy = isinstance(error, workdir_lib.BusyError)
      if is_first and isinstance(error, config_lib.ConfigError) and not is_busy:
        raise
      failures.append(_failure(cell, error))
      continue
    if summary is None:
      return None
    runs[cell.method][cell.seed] = summary
    if trains:
      seconds.append(time.monotonic() - start)
  return runs, failures


def _folder(workdir: pathlib.Path, cell: Cell) -> pathlib.Path:
  return reporting.folder(workdir, cell.method, cell.seed)


def _is_finished(folder: pathlib.Path) -> bool:
  return (folder / "summary.json").exists()


def _time_left(seconds: list[float], runs: int) -> str:
  """What the runs still to do may take, once one has been trained."""
  if not seconds or not runs:
    return ""
  minutes = math.ceil(runs * sum(seconds) / len(seconds) / 60)
  hours = f"{minutes // 60} h " if minutes >= 60 else ""
  return f", {runs} to train, about {hours}{minutes % 60} min left"


def _failure(cell: Cell, error: Exception) -> comparison.Failure:
  """Says on stderr, in one line, what a run died of."""
  text = " ".join(str(error).split())
  if not isinstance(
    error,
    loop.DivergedError | config_lib.ConfigError | prepared.DataError,
  ):
    text = ": ".join(filter(None, (type(error).__name__, text)))
  print(
    f"error: {cell.method}, seed {cell.seed}: {text}",
    file=sys.stderr,
    flush=True,
  )
  return comparison.Failure(cell.method, cell.seed, text)
