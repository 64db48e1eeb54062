"""Runs of recipes, as a scale wants them."""

import contextlib
import dataclasses
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from dpc_jax.analysis import comparison
from dpc_jax.training import config as config_lib
from experiments import grid, mistakes, reporting
from experiments.reproduce import recipes, scales


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
    problem: why none could be tried, or there is no report, one line; None if
      there is nothing of the kind.
  """

  runs: Mapping[str, Mapping[int, Mapping[str, Any]]]
  failures: Sequence[comparison.Failure]
  problem: str | None

  def errors(self, recipe: str) -> list[str]:
    """Why not all of it was done, one line each."""
    lines = [
      f"{recipe}, {failure.method}, seed {failure.seed}, failed:"
      f" {failure.message}"
      for failure in self.failures
    ]
    if self.problem is not None:
      lines.append(f"{recipe}, {self.problem}")
    return lines

  def environments(self) -> list[dict[str, Any]]:
    """Devices and versions of the finished runs."""
    return [
      {name: run[name] for name in ("device", "versions")}
      for by_seed in self.runs.values()
      for run in by_seed.values()
    ]


def train(
  recipe: str,
  trial: scales.Trial,
  context: Context,
  has_report: bool = True,
) -> Outcome:
  """Trains a recipe's runs that are not finished yet, in WHERE/RECIPE.

  At the scale "smoke" they are all made anew, since it is there to see that
  they work, and what they print goes to `log.txt` there.

  Args:
    recipe: of configs/.
    trial: what to run of it.
    context: of the command.
    has_report: whether the recipe gets a report of its own there; a smoke run
      has none.

  Raises:
    Stopped: SIGTERM.
  """
  where = context.where / recipe
  if context.scale == "smoke" and where.exists():
    shutil.rmtree(where)
  where.mkdir(parents=True, exist_ok=True)
  print(
    f"  {recipe}: {', '.join(trial.methods)}"
    + (f", {trial.seeds} seeds each" if trial.seeds > 1 else ""),
    flush=True,
  )
  try:
    config = _config(recipe, trial, context.data_dir)
    with contextlib.ExitStack() as stack:
      if context.scale == "smoke":
        log = stack.enter_context((where / "log.txt").open("a"))
        stack.enter_context(contextlib.redirect_stdout(log))
      cells = grid.cells(config, list(trial.methods), trial.seeds)
      outcome = grid.train(cells, where, context.is_stopping)
  except config_lib.ConfigError as error:
    return Outcome({}, [], f"not run: {mistakes.one_line(str(error))}")
  if outcome is None:
    raise Stopped
  runs, failures = outcome
  problem = None
  if has_report and any(runs.values()) and not trial.is_smoke:
    problem = _report(runs, failures, where, config, context)
  return Outcome(runs, failures, problem)


def _report(runs, failures, where, config, context) -> str | None:
  """Writes the recipe's own; what is in its way, or None."""
  try:
    reporting.write_comparison(
      runs,
      failures,
      where,
      b_max=config.precision.b_max,
      command=context.command,
    )
  except (config_lib.ConfigError, OSError) as error:
    return f"no report: {mistakes.one_line(str(error))}"
  print(f"  report: {where / 'report.html'}", flush=True)
  return None


def _config(recipe, trial, data_dir) -> Any:
  variant = ",smoke" if trial.is_smoke else ""
  config = recipes.get_config(recipe, trial.methods[0] + variant)
  config.update_from_flattened_dict(dict(trial.fields))
  # All devices that the batch can be split over.
  config.mesh.data = math.gcd(jax.device_count(), config.batch_size)
  if data_dir is not None:
    config.data.dir = data_dir
  return config
