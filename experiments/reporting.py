"""The files that tell of finished runs: pictures, reports, figures."""

import dataclasses
import fnmatch
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpc_jax.analysis import (
  adaptive_plot,
  comparison,
  curves,
  html,
  phrases,
  pictures,
  plots,
  report,
  run_report,
)
from experiments import finished

_AGAINST = {
  "curves": ("steps", "Loss and test metric against steps"),
  "curves_cost": ("cost", "Loss and test metric against cost"),
}
_PICTURES = {
  "pareto.png": "test metric and cost of the methods",
  "curves.png": "loss and test metric against steps",
  "curves_cost.png": "loss and test metric against cost",
  "bits.png": "bits and N_k per layer",
  "moves*.png": "how bits moved, and by which signals, if any",
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
  command: str | None,
) -> comparison.Comparison:
  """Writes report.md, report.html, results.json and the pictures of a grid.

  Args:
    runs: {method: {seed: summary}}, at least one run; the runs' own folders are
      read for curves and moves.
    failures: the cells that did not finish.
    grid: its folder.
    b_max: the width of the static reference.
    command: what trained the runs, as it was typed; None if that is not known.

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
  lines, decided = _read_logs(runs, grid)
  moved = [k for k in runs if adaptive_plot.has_moved(decided[k][1])]
  _draw_bits(first, grid, moved)
  _draw_pareto(result, grid)
  drawn = _draw_curves(
    lines,
    grid,
    metric=result.metric,
    steps=next(iter(first.values()))["steps"],
    b_max=b_max,
  )
  for method, by_seed in runs.items():
    drawn |= _draw_moves(
      *decided[method],
      first[method],
      grid / f"moves_{method}.png",
      f" of {method}, seed {min(by_seed)}",
    )
  text = report.comparison(
    result,
    runs,
    command=command,
    failures=failures,
    pictures=drawn,
    moved=moved,
  )
  _write_report(grid, text)
  _write_results(grid, result, runs, failures, command)
  return result


def _read_logs(runs, grid):
  """Of all runs what they logged, of first seeds what they decided.

  A damaged log is found here, before anything is drawn.
  """
  lines = {
    method: {
      seed: finished.read_metrics(folder(grid, method, seed))
      for seed in by_seed
    }
    for method, by_seed in runs.items()
  }
  decided = {
    method: finished.read_decisions(folder(grid, method, min(by_seed)))
    for method, by_seed in runs.items()
  }
  return lines, decided


def _write_results(grid, result, runs, failures, command) -> None:
  figures = {
    "command": command,
    "runs": runs,
    "failures": [dataclasses.asdict(failure) for failure in failures],
    "statistics": dataclasses.asdict(result),
  }
  text = json.dumps(figures, indent=2, allow_nan=False) + "\n"
  write_text(grid / "results.json", text)


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
  lines = finished.read_metrics(run)
  signals, moves = finished.read_decisions(run)
  drawn = {}
  moved = [method] if adaptive_plot.has_moved(moves) else []
  if _draw_bits({method: of_run}, run, moved):
    drawn["bits.png"] = "Bits and weights per layer"
  drawn |= _draw_curves(
    {method: {seed: lines}},
    run,
    metric=of_run["metric"],
    steps=of_run["steps"],
    b_max=b_max,
  )
  drawn |= _draw_moves(signals, moves, of_run, run / "moves.png")
  text = run_report.run(
    of_run,
    config,
    moves,
    workdir=str(run),
    b_max=b_max,
    pictures=drawn,
  )
  _write_report(run, text)


def written(where: pathlib.Path) -> list[str]:
  """Lines that name the files of a report, as far as they are there.

  Of the pictures, those that the report shows: the folder may have others.
  """
  lines = ["written:"]
  for name, what in (
    ("report.html", "all of it, to be read in a browser; one file"),
    ("report.md", "the same as text"),
  ):
    if (where / name).exists():
      lines.append(f"  {where / name}  {what}")
  shown = _shown(where)
  for pattern, what in _PICTURES.items():
    lines += [
      f"  {where / name}  {what}" for name in fnmatch.filter(shown, pattern)
    ]
  if (where / "results.json").exists():
    what = "the summaries of the runs, and the statistics"
    lines.append(f"  {where / 'results.json'}  {what}")
  if shown:
    lines.append("  (each picture as .svg, too)")
  return lines


def _shown(where) -> list[str]:
  """Pictures of `report.md`, sorted; [] without one."""
  path = where / "report.md"
  if not path.is_file():
    return []
  text = path.read_text(encoding="utf-8", errors="replace")
  return sorted(set(re.findall(r"\]\(([^()\s/]+\.png)\)", text)))


def _draw_bits(first, where, moved) -> bool:
  """The widths of every method's first seed; whether there are any."""
  layers = next(iter(first.values()))["layers"]
  capacities = {
    name: cost["weights"]
    for name, cost in layers.items()
    if any(name in run["bits"] for run in first.values())
  }
  if capacities:
    bits = {method: run["bits"] for method, run in first.items()}
    plots.bits_per_layer(
      bits, capacities, where / "bits.png", by_size=True, moved=moved
    )
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


def _draw_moves(signals, moves, of_run, path, of="") -> dict[str, str]:
  """{file: what it shows}; {} of a run without signals whose bits stay."""
  layers, steps = list(of_run["layers"]), of_run["steps"]
  if signals:
    adaptive_plot.bits_over_time(signals, moves, layers, path, steps=steps)
    return {path.name: phrases.SIGNALS + of}
  if adaptive_plot.has_moved(moves):
    adaptive_plot.bits_alone(moves, layers, path, steps=steps)
    return {path.name: phrases.BITS + of}
  return {}


def _write_report(where, text) -> None:
  """And removes the pictures that only the report before shows."""
  before = _shown(where)
  write_text(where / "report.md", text)
  write_text(where / "report.html", html.page(text, where))
  for name in set(before).difference(_shown(where)):
    # Somebody may have added one of another name to the text.
    if any(fnmatch.fnmatch(name, pattern) for pattern in _PICTURES):
      for suffix in pictures.SUFFIXES:
        (where / name).with_suffix(suffix).unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file whole or not at all, whatever another process writes there.

  Raises:
    OSError: it cannot be written.
  """
  temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
  try:
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)
