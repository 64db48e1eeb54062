"""The files that tell of finished runs: pictures, reports, figures."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dpc_jax.analysis import (
  adaptive_plot,
  comparison,
  curves,
  html,
  plots,
  report,
  run_report,
)
from dpc_jax.training import bits_log, summary
from dpc_jax.training import metrics as metrics_lib

_AGAINST = {
  "curves": ("steps", "Loss and test metric against steps"),
  "curves_cost": ("cost", "Loss and test metric against cost"),
}


def folder(grid: pathlib.Path, method: str, seed: int) -> pathlib.Path:
  """Of one run of a grid."""
  return grid / method / f"seed{seed}"


def write_comparison(
  runs: comparison.Runs,
  failures: Sequence[comparison.Failure],
  grid: pathlib.Path,
  *,
  b_max: int,
  command: str,
) -> comparison.Comparison:
  """Writes report.md, report.html, results.json and the pictures of a grid.

  Args:
    runs: {method: {seed: summary}}, at least one run; the runs' own folders are
      read for curves and moves.
    failures: the cells that did not finish.
    grid: its folder.
    b_max: the width of the static reference.
    command: what was typed.

  Returns:
    The figures and verdicts.

  Raises:
    OSError: a file cannot be written.
    ConfigError: a run's log is damaged.
    ValueError: runs of different metrics.
  """
  runs = {method: by_seed for method, by_seed in runs.items() if by_seed}
  result = comparison.compare(runs, b_max=b_max)
  first = {method: by_seed[min(by_seed)] for method, by_seed in runs.items()}
  _draw_bits(first, grid)
  _draw_pareto(result, grid)
  drawn = _draw_curves(
    {
      method: {
        seed: summary.read_lines(folder(grid, method, seed)) for seed in by_seed
      }
      for method, by_seed in runs.items()
    },
    grid,
    metric=result.metric,
    steps=next(iter(first.values()))["steps"],
    b_max=b_max,
  )
  for method, by_seed in runs.items():
    seed = min(by_seed)
    drawn |= _draw_moves(
      folder(grid, method, seed),
      first[method],
      grid / f"moves_{method}.png",
      f"Signals and bits of {method}, seed {seed}",
    )
  text = report.comparison(
    result, runs, command=command, failures=failures, pictures=drawn
  )
  _write_report(grid, text)
  _write_results(grid, result, runs, failures, command)
  return result


def _write_results(grid, result, runs, failures, command) -> None:
  figures = {
    "command": command,
    "runs": runs,
    "failures": [dataclasses.asdict(failure) for failure in failures],
    "statistics": dataclasses.asdict(result),
  }
  text = json.dumps(figures, indent=2, allow_nan=False) + "\n"
  _write(grid / "results.json", text)


def write_run(
  run: pathlib.Path, of_run: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
  """Writes report.md, report.html and the pictures of one run.

  Args:
    run: its folder.
    of_run: its summary.
    config: the resolved one.

  Raises:
    OSError: a file cannot be written.
    ConfigError: a log is damaged.
  """
  b_max = config["precision"]["b_max"]
  method, seed = of_run["method"], of_run["seed"]
  drawn = {}
  if _draw_bits({method: of_run}, run):
    drawn["bits.png"] = "Bits and weights per layer"
  drawn |= _draw_curves(
    {method: {seed: summary.read_lines(run)}},
    run,
    metric=of_run["metric"],
    steps=of_run["steps"],
    b_max=b_max,
  )
  drawn |= _draw_moves(run, of_run, run / "moves.png", "Signals and bits")
  text = run_report.run(
    of_run,
    config,
    metrics_lib.read_lines(run / "bits.jsonl"),
    workdir=str(run),
    b_max=b_max,
    pictures=drawn,
  )
  _write_report(run, text)


def written(where: pathlib.Path) -> list[str]:
  """Lines that name the files of a report, as far as they are there."""
  lines = ["written:"]
  for name, what in (
    ("report.html", "all of it, to be read in a browser; one file"),
    ("report.md", "the same as text"),
    ("pareto.png", "test metric and cost of the methods"),
    ("curves.png", "loss and test metric against steps"),
    ("curves_cost.png", "loss and test metric against cost"),
    ("bits.png", "bits and N_k per layer"),
    ("moves*.png", "how bits moved, and why"),
    ("results.json", "the summaries of the runs, and the statistics"),
  ):
    lines += [f"  {path}  {what}" for path in sorted(where.glob(name))]
  if any(where.glob("*.svg")):
    lines.append("  (each picture as .svg, too)")
  return lines


def _draw_bits(first, where) -> bool:
  """The widths of every method's first seed; whether there are any."""
  layers = next(iter(first.values()))["layers"]
  capacities = {
    name: cost["weights"]
    for name, cost in layers.items()
    if any(name in run["bits"] for run in first.values())
  }
  if capacities:
    bits = {method: run["bits"] for method, run in first.items()}
    plots.bits_per_layer(bits, capacities, where / "bits.png")
  return bool(capacities)


def _draw_pareto(result, where) -> None:
  points = {
    m.method: (m.relative_to_static, m.final.mean, m.final.low, m.final.high)
    for m in result.methods
  }
  plots.pareto(
    points,
    result.frontier,
    where / "pareto.png",
    metric=f"final test {result.metric}",
    unit=f"static {result.b_max}/{result.b_max}",
    highest=1.0 if result.metric == "accuracy" else None,
  )


def _draw_curves(lines, where, *, metric, steps, b_max) -> dict[str, str]:
  """{file: what it shows}; {} of runs that have logged nothing."""
  if not curves.has_any(lines):
    return {}
  drawn = {}
  for name, (against, what) in _AGAINST.items():
    curves.training_curves(
      lines,
      where / f"{name}.png",
      metric=metric,
      against=against,
      steps=steps,
      unit=f"static {b_max}/{b_max}",
    )
    drawn[f"{name}.png"] = what
  return drawn


def _draw_moves(run, of_run, path, what) -> dict[str, str]:
  """{file: what it shows}; {} of a run that decides by no signal."""
  signals = metrics_lib.read_lines(run / bits_log.SIGNALS)
  if not signals:
    return {}
  adaptive_plot.bits_over_time(
    signals,
    metrics_lib.read_lines(run / "bits.jsonl"),
    list(of_run["layers"]),
    path,
  )
  return {path.name: what}


def _write_report(where, text) -> None:
  _write(where / "report.md", text)
  _write(where / "report.html", html.page(text, where))


def _write(path: pathlib.Path, text: str) -> None:
  """Whole or not at all, whatever another process writes there."""
  temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
  try:
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)
