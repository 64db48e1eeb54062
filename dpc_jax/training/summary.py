"""`summary.json`: what a finished run has to say."""

import importlib.metadata
import json
import pathlib
import platform
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dpc_jax.cost import bitops
from dpc_jax.training import (
  auto_bounds,
  build,
  checks,
  config_precision,
  methods,
)
from dpc_jax.training import config as config_lib
from dpc_jax.training import metrics as metrics_lib

# Moves of one step that the console names.
_MOVES_SHOWN = 6
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def run_cost(
  parts: build.Parts, cost: bitops.RunCost, steps: int
) -> bitops.RunBitops:
  """Cost of a run's first `steps` steps, beside static B_max and float32."""
  return bitops.run_bitops(
    parts.costs,
    cost,
    steps=steps,
    batch_size=parts.config.batch_size,
    static_bits=parts.static_bits,
  )


def summarize(
  parts: build.Parts,
  cost: bitops.RunCost,
  bits: dict[str, Any],
  lines: list[dict[str, Any]],
) -> dict[str, Any]:
  """The summary of a finished run, without its times.

  Args:
    parts: of the run.
    cost: of its final state.
    bits: of its last step.
    lines: of `metrics.jsonl`.

  Returns:
    `metric` is "accuracy" or "perplexity"; `test_METRIC` is the last one,
    `best_test_METRIC` the best of all evaluations; with a validation split,
    `validation_METRIC` is the last one and `test_METRIC_at_best_validation` the
    honest choice of a checkpoint. `test_examples` counts images or tokens.
    `gbitops` is the run's cost / 1e9; the savings are fractions of the cost of
    static B_max and of float32.
  """
  config = parts.config
  run = run_cost(parts, cost, config.steps)
  metric = parts.task.metric
  best = max if metric == "accuracy" else min
  test = [line for line in lines if line["split"] == "test"]
  summary = {
    "method": config.precision.method,
    "model": config.model.name,
    "dataset": config.data.name + (" (fake)" if config.data.fake else ""),
    "seed": config.seed,
    "steps": config.steps,
    "metric": metric,
    f"test_{metric}": test[-1][metric],
    "test_examples": len(parts.data.splits["test"]),
    f"best_test_{metric}": best(line[metric] for line in test),
  }
  return (
    summary
    | _at_best_validation(metric, lines)
    | {
      "gbitops": run.total / 1e9,
      "saving_vs_static": run.saving_vs_static,
      "saving_vs_float": run.saving_vs_float,
      "mean_bits": run.mean_bits,
      "bits": {
        path: [np.asarray(width).tolist() for width in layer]
        for path, layer in bits.items()
      },
      "layers": {
        path: {"weights": c.weights, "macs": c.macs, "layers": c.layers}
        for path, c in parts.costs.items()
      },
      "float_layers": list(run.float_layers),
      "config_hash": config_lib.config_hash(config),
    }
  )


def _at_best_validation(metric, lines) -> dict[str, float]:
  """What the validation split says; {} without one."""
  validation = [line for line in lines if line["split"] == "validation"]
  if not validation:
    return {}
  best = max if metric == "accuracy" else min
  chosen = best(validation, key=lambda line: line[metric])
  at_best = next(
    line
    for line in lines
    if line["split"] == "test" and line["step"] == chosen["step"]
  )
  return {
    f"validation_{metric}": validation[-1][metric],
    f"best_validation_{metric}": chosen[metric],
    f"test_{metric}_at_best_validation": at_best[metric],
  }


def bounds(config: Any, workdir: pathlib.Path) -> dict[str, int]:
  """b_min and b_max of the run; {} of a method without bounds."""
  if not methods.has_bounds(config.precision.method):
    return {}
  found = config.precision
  if config_precision.finds_bounds(config):
    found = auto_bounds.read(workdir)
  return {name: found[name] for name in ("b_min", "b_max")}


def test_text(summary: dict[str, Any]) -> str:
  """The final test metric in words."""
  metric = summary["metric"]
  digits = 4 if metric == "accuracy" else 2
  return f"test {metric} {summary[f'test_{metric}']:.{digits}f}"


def environment(mesh: Mesh) -> dict[str, Any]:
  """The devices of a run, and the versions that it ran with."""
  kind = mesh.devices.flat[0].device_kind
  return {
    "device": f"{mesh.devices.size} x {kind}",
    "versions": {
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in _PACKAGES},
    },
  }


def read(workdir: pathlib.Path) -> dict[str, Any] | None:
  """The summary of a finished run, or None.

  Raises:
    ConfigError: it is damaged.
  """
  path = workdir / "summary.json"
  if not path.exists():
    return None
  try:
    summary = json.loads(path.read_bytes())
  except ValueError:
    summary = None
  if not isinstance(summary, dict):
    raise checks.ConfigError(
      f"workdir = {workdir}: summary.json is damaged; remove it, and the run"
      " goes on from its last checkpoint"
    )
  return summary


def write(workdir: pathlib.Path, summary: dict[str, Any]) -> None:
  """Writes the summary, whole or not at all."""
  temporary = workdir / "summary.tmp"
  temporary.write_text(json.dumps(summary, indent=2) + "\n")
  temporary.replace(workdir / "summary.json")


def layer_table(parts: build.Parts, bits: dict[str, Any]) -> str:
  """A text table of the layers: N_k, MACs, widths (weights/activations/...)."""
  rows = [("layer", "N_k", "MACs", "bits w/a/g")]
  for path, cost in parts.costs.items():
    widths = "float"
    if path in bits:
      widths = "/".join(str(np.asarray(w).tolist()) for w in bits[path])
    rows.append((path, f"{cost.weights:,}", f"{cost.macs:,}", widths))
  sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join(
    f"{r[0]:<{sizes[0]}}  {r[1]:>{sizes[1]}}  {r[2]:>{sizes[2]}}  {r[3]}"
    for r in rows
  )


def moves_text(lines: list[dict[str, Any]]) -> list[str]:
  """Moves of `bits.jsonl` in words, a line for each step that has any."""
  texts = {}
  for line in lines:
    old, new = line["old"], line["new"]
    # Of the operands the first that moves: the weights may be set.
    i = next((i for i in range(3) if old[i] != new[i]), 0)
    signal = line.get("signal")
    why = line["reason"]
    if isinstance(signal, float):
      why += f" {signal:+.2f}"
    texts.setdefault(line["step"], []).append(
      f"{line['path']} {old[i]}->{new[i]} ({why})"
    )
  return [
    f"bits from step {step}: {', '.join(moves[:_MOVES_SHOWN])}"
    + (
      f" and {len(moves) - _MOVES_SHOWN} more, in bits.jsonl"
      if len(moves) > _MOVES_SHOWN
      else ""
    )
    for step, moves in texts.items()
  ]


def read_lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of `metrics.jsonl`."""
  return metrics_lib.read_lines(workdir / "metrics.jsonl")
