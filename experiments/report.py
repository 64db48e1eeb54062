r"""Writes the report of a finished run, or of a grid of them, without training.

  python -m experiments.report --workdir=runs/digits

The folder is one run's, of `experiments.train`, or a grid's, of
`experiments.compare`, which has METHOD/seedN below it: all runs in it are
compared, whichever commands trained them, and all must be of one recipe, but
for the method, the seed and what says only where a run lies or how it is
watched. Written there: `report.html`, one file for a browser, its pictures
inside; `report.md`; the pictures as PNG and SVG; and of a grid `results.json`.
"""

import json
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from configs import default
from dpc_jax.analysis import comparison, report
from dpc_jax.training import checks, config_precision, methods
from experiments import arguments, finished, mistakes, reporting

# Beginnings of the fields in which runs that are compared may differ: where a
# run lies, on which devices, how it is watched and what is kept of it. `steps`
# is what `epochs` comes to.
_FREE = (
  *("seed", "precision.method", "epochs", "log_every", "checkpoint_every"),
  *("keep_checkpoints", "keep_best", "max_skipped", "data.dir", "mesh."),
  "data.workers",
)
_OWN = "python -m experiments.report"


def main(argv: Sequence[str] | None = None) -> int:
  """Writes the report of `--workdir`; returns the exit code."""
  parser = arguments.Parser("experiments.report", __doc__)
  parser.add_argument(
    "--workdir",
    required=True,
    type=arguments.folder,
    metavar="DIR",
    help="a run's folder, or a grid's",
  )
  where = parser.parse_args(argv).workdir
  try:
    _write(where)
  except checks.ConfigError as error:
    return _fail(str(error))
  except OSError as error:
    name = error.filename or where
    return _fail(f"--workdir={where}: {name}: {error.strerror}")
  print("\n".join(reporting.written(where)))
  return 0


def _write(where: pathlib.Path) -> None:
  if not where.is_dir():
    what = "it is a file" if where.is_file() else "there is no such folder"
    raise checks.ConfigError(
      f"--workdir={where}: {what}; give a run's folder or a grid's"
    )
  if (where / "config.json").exists():
    of_run = finished.read_summary(where)
    if of_run is None:
      raise checks.ConfigError(
        f"--workdir={where}: the run is not finished; the command that began it"
        " goes on"
      )
    reporting.write_run(where, of_run, finished.read_config(where))
    return
  _write_grid(where)


def _write_grid(where: pathlib.Path) -> None:
  before: dict[str, Any] = {}
  if (where / "results.json").exists():
    before = finished.read_object(where / "results.json")
    _check_results(where, before)
  cells = _cells(where, list(before.get("runs", {})))
  runs: dict[str, dict[int, Any]] = {}
  failures = []
  said = {(f["method"], f["seed"]): f for f in before.get("failures", [])}
  for method, seed in cells:
    of_run = finished.read_summary(reporting.folder(where, method, seed))
    if of_run is not None:
      runs.setdefault(method, {})[seed] = of_run
      continue
    failure = said.get((method, seed), {"message": "not finished"})
    failures.append(comparison.Failure(method, seed, failure["message"]))
  if not runs:
    remedy = finished.did_you_mean(
      finished.grids_meant(where), "give a run's folder or a grid's"
    )
    raise checks.ConfigError(
      f"--workdir={where}: no finished run in it, as METHOD/seedN/summary.json"
      f" would be; {remedy}"
    )
  _check_alike(where, runs)
  configs = {
    (method, seed): finished.read_config(reporting.folder(where, method, seed))
    for method, by_seed in runs.items()
    for seed in by_seed
  }
  _check_configs(where, runs, configs)
  result = reporting.write_comparison(
    runs,
    failures,
    where,
    b_max=next(iter(configs.values()))["precision"]["b_max"],
    command=_what_trained(before, runs, failures),
  )
  print(report.short(result) + "\n")


def _what_trained(
  before: Mapping[str, Any],
  runs: comparison.Runs,
  failures: Sequence[comparison.Failure],
) -> str | None:
  """The command in results.json, if it made all that is there now.

  None where others have added or changed runs since, and where all that is
  known is this program, which trains nothing.
  """
  command = before.get("command")
  if command is None or command.split(" --")[0] == _OWN:
    return None
  failed = {(f["method"], f["seed"]) for f in before.get("failures", [])}
  # As a file has them: seeds are text there.
  found = json.loads(json.dumps(runs))
  if found != before.get("runs") or not failed.issuperset(
    (f.method, f.seed) for f in failures
  ):
    return None
  return command


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


def _check_configs(
  where: pathlib.Path,
  runs: comparison.Runs,
  configs: Mapping[tuple[str, int], Mapping[str, Any]],
) -> None:
  """Raises if they are of different recipes; names the first such field.

  Of `config.precision`, a field counts among the runs whose method reads it.
  What a config lacks has its default: it is of an older program.
  """
  defaults = dict(_flat(json.loads(json.dumps(default.get_config().to_dict()))))
  # Of text it says how the split is cut, of images nothing.
  metric = next(iter(next(iter(runs.values())).values()))["metric"]
  free = _FREE if metric == "perplexity" else (*_FREE, "eval_batch_size")
  first: dict[str, tuple[str, Any]] = {}
  for (method, seed), config in configs.items():
    precision = {**config["precision"], "method": runs[method][seed]["method"]}
    for name, value in (defaults | dict(_flat(config))).items():
      if name.startswith(free) or not _is_read(name, precision):
        continue
      run = f"{method}/seed{seed}"
      other, there = first.setdefault(name, (run, value))
      if there != value:
        raise checks.ConfigError(
          f"--workdir={where}: {other} has {name} = {there!r}, {run} has"
          f" {value!r}; compare such runs in folders of their own"
        )


def _flat(
  tree: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
  """Dotted fields and their values."""
  for name, value in tree.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def _is_read(name: str, precision: Mapping[str, Any]) -> bool:
  """Whether a field says anything of a run of such a `config.precision`."""
  method = precision["method"]
  # What savings are relative to.
  if not name.startswith("precision.") or name == "precision.b_max":
    return True
  if method == "float" or name.startswith(config_precision.unread(precision)):
    return False
  has_bounds = methods.has_bounds(method)
  has_equation = has_bounds and method not in ("cpt", "pfq")
  readers = {
    "b_min": has_bounds,
    "bounds": has_bounds,
    "delta": has_equation,
    "log_form": has_equation,
    "center": has_equation and not method.endswith("_log_midpoint"),
    "cycles": method in ("cpt", "dpc_cpt"),
    "seed": method == "random",
  }
  return readers.get(name.removeprefix("precision."), True)


def _check_results(where: pathlib.Path, before: dict[str, Any]) -> None:
  """Raises if what an earlier command said cannot be taken over."""
  failures = before.get("failures", [])
  fits = (
    isinstance(before.get("command"), str | None)
    and isinstance(before.get("runs", {}), dict)
    and isinstance(failures, list)
    and all(
      isinstance(failure, dict)
      and isinstance(failure.get("method"), str)
      and isinstance(failure.get("seed"), int)
      and isinstance(failure.get("message"), str)
      for failure in failures
    )
  )
  if not fits:
    raise checks.ConfigError(
      f"workdir = {where}: results.json is damaged; remove it, and this command"
      " writes it again"
    )


def _fail(text: str) -> int:
  print(f"error: {mistakes.one_line(text)}", file=sys.stderr)
  return 2


if __name__ == "__main__":
  sys.exit(main())
