r"""Trains one recipe with several methods and seeds, and compares them.

  python -m experiments.compare --config=configs/digits_resnet8.py \
    --methods=static8,dpc --seeds=5 --workdir=runs/digits

Every run has its own folder, WORKDIR/METHOD/seedN. The same command goes on
where it was stopped; finished runs are not trained again, and one that fails
does not keep the others from running. Several commands may share a workdir: a
run that another one is at is left to it. When all is done, a command that names
all methods writes the joint report.

Beside the runs: `report.html`, one file for a browser; `report.md`; the
pictures as PNG and SVG; and all summaries and statistics in `results.json`.
`experiments.report` writes them anew without training.
"""

import pathlib
import shlex
import sys
from typing import Any

from absl import flags

from dpc_jax.analysis import comparison, report
from dpc_jax.training import methods, termination
from experiments import cli, grid, reporting

_METHODS = flags.DEFINE_list(
  "methods",
  ["static8", "dpc"],
  f"Methods to train: {', '.join(methods.names())}, with <b> as in static8.",
)
_SEEDS = flags.DEFINE_integer(
  "seeds",
  1,
  "Seeds per method, config.seed and those after it; an interval needs two,"
  " a claim more.",
  lower_bound=1,
)


def main() -> int | None:
  """Trains the grid of `--methods` and `--seeds`, reports, returns the code."""
  workdir = pathlib.Path(cli.FLAGS.workdir).expanduser()
  cells = grid.cells(cli.FLAGS.config, _METHODS.value, _SEEDS.value)
  with termination.watch() as is_stopping:
    outcome = grid.train(cells, workdir, is_stopping)
  if outcome is None:
    return None
  runs, failures = outcome
  if any(runs.values()):
    _report(runs, failures, workdir)
  if failures:
    print(
      f"error: {len(failures)} of {len(cells)} runs failed; the same command"
      " tries them again",
      file=sys.stderr,
    )
  return 1 if failures else 0


def _report(
  runs: dict[str, dict[int, Any]],
  failures: list[comparison.Failure],
  workdir: pathlib.Path,
) -> None:
  """Writes the report, the pictures and the figures; prints the short table."""
  command = " ".join(
    ["python -m experiments.compare", *map(shlex.quote, sys.argv[1:])]
  )
  result = reporting.write_comparison(
    runs,
    failures,
    workdir,
    b_max=cli.FLAGS.config.precision.b_max,
    command=command,
  )
  runs = {method: by_seed for method, by_seed in runs.items() if by_seed}
  first = next(iter(next(iter(runs.values())).values()))
  print(f"\n{first['model']} on {first['dataset']}, {first['steps']} steps\n")
  print(report.short(result) + "\n")
  print("\n".join(reporting.written(workdir)))
  for method in runs:
    print(
      f"  {workdir / method}/seed*/  metrics.jsonl, bits.jsonl, checkpoints/,"
      " TensorBoard events"
    )


if __name__ == "__main__":
  cli.define_config()
  sys.exit(cli.run(main, sys.argv))
