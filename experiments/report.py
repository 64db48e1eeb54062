r"""Writes the report of a finished run, or of a grid of them, without training.

  python -m experiments.report --workdir=runs/digits

The folder is one run's, of `experiments.train`, or a grid's, of
`experiments.compare`, which has METHOD/seedN below it: all runs in it are
compared, whichever commands trained them. Written there: `report.html`, one
file for a browser, its pictures inside; `report.md`; the pictures as PNG and
SVG; and of a grid `results.json`.
"""

import json
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from dpc_jax.analysis import comparison, report
from dpc_jax.training import checks, summary
from experiments import arguments, reporting


def main(argv: Sequence[str] | None = None) -> int:
  """Writes the report of `--workdir`; returns the exit code."""
  parser = arguments.Parser("experiments.report", __doc__)
  parser.add_argument(
    "--workdir",
    required=True,
    type=pathlib.Path,
    metavar="DIR",
    help="a run's folder, or a grid's",
  )
  where = parser.parse_args(argv).workdir.expanduser()
  try:
    _write(where)
  except checks.ConfigError as error:
    return _fail(str(error))
  except KeyError as error:
    return _fail(
      f"--workdir={where}: its files lack the field {error}; they are not of"
      " this version, or damaged: train anew in another folder"
    )
  except OSError as error:
    name = error.filename or where
    return _fail(f"--workdir={where}: {name}: {error.strerror}")
  print("\n".join(reporting.written(where)))
  return 0


def _write(where: pathlib.Path) -> None:
  if not where.is_dir():
    raise checks.ConfigError(
      f"--workdir={where}: there is no such folder; give a run's or a grid's"
    )
  if (where / "config.json").exists():
    of_run = summary.read(where)
    if of_run is None:
      raise checks.ConfigError(
        f"--workdir={where}: the run is not finished; the command that began it"
        " goes on"
      )
    reporting.write_run(where, of_run, _read(where / "config.json"))
    return
  _write_grid(where)


def _write_grid(where: pathlib.Path) -> None:
  before: dict[str, Any] = {}
  if (where / "results.json").exists():
    before = _read(where / "results.json")
  cells = _cells(where, list(before.get("runs", {})))
  runs: dict[str, dict[int, Any]] = {}
  failures = []
  said = {(f["method"], f["seed"]): f for f in before.get("failures", [])}
  for method, seed in cells:
    of_run = summary.read(reporting.folder(where, method, seed))
    if of_run is not None:
      runs.setdefault(method, {})[seed] = of_run
      continue
    failure = said.get((method, seed), {"message": "not finished"})
    failures.append(comparison.Failure(method, seed, failure["message"]))
  if not runs:
    raise checks.ConfigError(
      f"--workdir={where}: no finished run in it, as METHOD/seedN/summary.json"
      " would be; give a run's folder or a grid's"
    )
  _check_alike(where, runs)
  first, by_seed = next(iter(runs.items()))
  config = _read(reporting.folder(where, first, min(by_seed)) / "config.json")
  result = reporting.write_comparison(
    runs,
    failures,
    where,
    b_max=config["precision"]["b_max"],
    command=before.get(
      "command",
      shlex.join(["python", "-m", "experiments.report", *_flag(where)]),
    ),
  )
  print(report.short(result) + "\n")


def _flag(where: pathlib.Path) -> list[str]:
  return [f"--workdir={where}"]


def _cells(where: pathlib.Path, order: list[str]) -> list[tuple[str, int]]:
  """Methods and seeds of the grid's runs, begun ones too.

  The methods of `order` come first and in that order, then the others.
  """
  found = []
  for path in where.glob("*/seed*/config.json"):
    match = re.fullmatch(r"seed(\d+)", path.parent.name)
    if match:
      found.append((path.parent.parent.name, int(match[1])))
  rank = {method: i for i, method in enumerate(order)}
  return sorted(found, key=lambda c: (rank.get(c[0], len(rank)), *c))


def _check_alike(where: pathlib.Path, runs: comparison.Runs) -> None:
  """Raises if they are not runs of one comparison."""
  for name in ("model", "dataset", "steps", "metric"):
    values = {
      str(run[name]): None
      for by_seed in runs.values()
      for run in by_seed.values()
    }
    if len(values) > 1:
      raise checks.ConfigError(
        f"--workdir={where}: runs of different {name}: {', '.join(values)};"
        " compare such runs in folders of their own"
      )


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    found = json.loads(path.read_bytes())
  except ValueError:
    found = None
  if not isinstance(found, dict):
    raise checks.ConfigError(
      f"workdir = {path.parent}: {path.name} is damaged; remove it, and the"
      " command that trained there writes it again"
    )
  return found


def _fail(text: str) -> int:
  print(f"error: {' '.join(text.split())}", file=sys.stderr)
  return 2


if __name__ == "__main__":
  sys.exit(main())
