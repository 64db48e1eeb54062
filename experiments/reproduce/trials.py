"""Runs of recipes, as a scale wants them."""

import contextlib
import dataclasses
import importlib
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from dpc_jax.analysis import comparison
from dpc_jax.data import prepared
from dpc_jax.training import config as config_lib
from experiments import grid, reporting
from experiments.reproduce import scales


class Stopped(Exception):
  """SIGTERM came: the run under way has saved, and nothing more begins."""


@dataclasses.dataclass(frozen=True)
class Context:
  """A command.

  Attributes:
    scale: of `scales.SCALES`.
    where: the folder of all that this scale runs and writes.
    data_dir: where the data sets lie; None as in `config.data.dir`.
    command: what was typed.
    is_stopping: of `termination.watch`.
  """

  scale: str
  where: pathlib.Path
  data_dir: str | None
  command: str
  is_stopping: Callable[[int], bool]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What came of a recipe.

  Attributes:
    runs: {method: {seed: summary}}.
    failures: of runs that were tried.
    reason: why none could be tried, one line; None if some were.
  """

  runs: Mapping[str, Mapping[int, Mapping[str, Any]]]
  failures: Sequence[comparison.Failure]
  reason: str | None

  def errors(self, recipe: str) -> list[str]:
    """Why not all of it was run, one line each."""
    lines = [
      f"{recipe}, {failure.method}, seed {failure.seed}, failed:"
      f" {failure.message}"
      for failure in self.failures
    ]
    if self.reason is not None:
      lines.append(f"{recipe}, not run: {self.reason}")
    return lines

  def environment(self) -> dict[str, Any]:
    """Device and versions of the first finished run; {} without one."""
    for by_seed in self.runs.values():
      for run in by_seed.values():
        return {name: run[name] for name in ("device", "versions")}
    return {}


def train(recipe: str, trial: scales.Trial, context: Context) -> Outcome:
  """Trains a recipe's runs that are not finished yet, in WHERE/RECIPE.

  Recipes whose figures mean something get a report of their own there; at the
  scale "smoke" the output goes to `log.txt` there.

  Args:
    recipe: of configs/.
    trial: what to run of it.
    context: of the command.

  Raises:
    Stopped: SIGTERM.
  """
  config = _config(recipe, trial, context.data_dir)
  where = context.where / recipe
  where.mkdir(parents=True, exist_ok=True)
  print(
    f"{recipe}: {', '.join(trial.methods)}"
    + (f", {trial.seeds} seeds each" if trial.seeds > 1 else ""),
    flush=True,
  )
  try:
    with contextlib.ExitStack() as stack:
      if context.scale == "smoke":
        log = stack.enter_context((where / "log.txt").open("a"))
        stack.enter_context(contextlib.redirect_stdout(log))
      cells = grid.cells(config, list(trial.methods), trial.seeds)
      outcome = grid.train(cells, where, context.is_stopping)
  except (config_lib.ConfigError, prepared.DataError) as error:
    reason = " ".join(str(error).split())
    print(f"  not run: {reason}", flush=True)
    return Outcome({}, [], reason)
  if outcome is None:
    raise Stopped
  runs, failures = outcome
  if any(runs.values()) and not trial.is_smoke:
    b_max = config.precision.b_max
    reporting.write_comparison(
      runs, failures, where, b_max=b_max, command=context.command
    )
    print(f"  report: {where / 'report.html'}", flush=True)
  return Outcome(runs, failures, None)


def _config(recipe, trial, data_dir) -> Any:
  module = importlib.import_module(f"configs.{recipe}")
  variant = ",smoke" if trial.is_smoke else ""
  config = module.get_config(trial.methods[0] + variant)
  config.update_from_flattened_dict(dict(trial.fields))
  if trial.is_smoke:
    # Its batch is small, whatever the machine.
    config.mesh.data = math.gcd(jax.device_count(), config.batch_size)
  if data_dir is not None:
    config.data.dir = data_dir
  return config
