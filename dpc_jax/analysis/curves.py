"""Training curves of a grid of runs: loss and test metric while it goes."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from dpc_jax.analysis import labels, pictures, plots

# {method: {seed: lines of `metrics.jsonl`}}.
Lines = Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]

# A run that ends beyond it, in static runs, does not stretch the axis of cost.
_FAR_COST = 2.0
# Positive values, but for accuracies, that span more than this factor have a
# logarithmic axis.
_WIDE = 30.0


class Curve(NamedTuple):
  """One method over its seeds, at the points that all of them have.

  Attributes:
    x: ascending.
    mean: over seeds.
    low: the lowest of the seeds.
    high: the highest.
  """

  x: np.ndarray
  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray


def curve(
  by_seed: Mapping[int, Sequence[Mapping[str, Any]]],
  split: str,
  field: str,
  *,
  against: Literal["steps", "cost"] = "steps",
  steps: int = 1,
) -> Curve | None:
  """Mean, lowest and highest value over seeds, of the steps all have logged.

  Args:
    by_seed: {seed: lines of `metrics.jsonl`}.
    split: "train", "validation" or "test".
    field: of the lines, such as "loss".
    against: what x is: steps, or the cost so far (mean over seeds) in units of
      a whole run at static B_max: relative_cost * step / steps.
    steps: of a whole run.

  Returns:
    The curve, or None without a common point.
  """
  of_seeds = [
    {
      line["step"]: line
      for line in lines
      if line["split"] == split and field in line
    }
    for lines in by_seed.values()
  ]
  if not of_seeds:
    return None
  common = sorted(set.intersection(*map(set, of_seeds)))
  if not common:
    return None
  values = np.array(
    [[lines[step][field] for step in common] for lines in of_seeds]
  )
  x = np.array(common, float)
  if against == "cost":
    ratios = [
      [lines[step]["relative_cost"] for step in common] for lines in of_seeds
    ]
    x = np.mean(ratios, 0) * x / steps
  return Curve(x, values.mean(0), values.min(0), values.max(0))


def has_any(lines: Lines) -> bool:
  """Whether there is a loss or a test to draw."""
  return any(
    curve(by_seed, split, "loss") is not None
    for by_seed in lines.values()
    for split in ("train", "test")
  )


def training_curves(
  lines: Lines,
  path: str | pathlib.Path,
  *,
  metric: str,
  against: Literal["steps", "cost"] = "steps",
  steps: int = 1,
  unit: str = "static 8/8",
) -> None:
  """Draws training loss above test metric, a line and a band per method.

  Lines are means over seeds, bands reach from the lowest to the highest seed.
  A loss or a perplexity that falls or rises by more than a factor of 30 has a
  logarithmic axis; one of accuracies is linear and spans 0.05 or more.
  Against cost, a method that ends at more than twice the unit, such as float,
  is a horizontal line at its last mean: on the axis it would leave one corner
  to all others.

  Args:
    lines: {method: {seed: lines of `metrics.jsonl`}}; a method without any is
      left out.
    path: the PNG to write; the SVG lies beside it.
    metric: "accuracy" or "perplexity".
    against: "steps", or "cost" as in `curve`.
    steps: of a whole run.
    unit: of the cost, in words.

  Raises:
    ValueError: nothing to draw.
  """
  from matplotlib.figure import Figure  # late and local, as in `plots`

  if not has_any(lines):
    raise ValueError("lines: no loss in any of them; nothing to draw")
  figure = Figure(figsize=(5.6, 5.6), layout="constrained")
  axes = figure.subplots(2, 1, sharex=True)
  handles: dict[str, Any] = {}
  for axis, split, field in zip(
    axes, ("train", "test"), ("loss", metric), strict=True
  ):
    curves = {
      method: curve(by_seed, split, field, against=against, steps=steps)
      for method, by_seed in lines.items()
    }
    far = _far(curves) if against == "cost" else ()
    handles |= _draw(axis, curves, far, with_markers=split == "test")
    _style(
      axis,
      [c for k, c in curves.items() if c is not None and k not in far],
      is_accuracy=field == "accuracy",
    )
  axes[0].set_ylabel("training loss", fontsize=11)
  axes[1].set_ylabel(f"test {metric}", fontsize=11)
  axes[1].set_xlabel(
    "step" if against == "steps" else f"cost so far, in runs of {unit}",
    fontsize=11,
  )
  axes[1].set_xlim(left=0)
  labels.legend(figure, [*handles.values()], [*handles], fontsize=10)
  pictures.save(figure, path, dpi=200)


def _far(curves) -> list[str]:
  """Methods that cost far more; none where all do."""
  ends = {method: c.x[-1] for method, c in curves.items() if c is not None}
  far = [method for method, end in ends.items() if end > _FAR_COST]
  return far if len(far) < len(ends) else []


def _draw(axis, curves, far, with_markers) -> dict[str, Any]:
  """{label: line} of what was drawn."""
  drawn = {}
  looks = labels.looks(curves)
  for method, c in curves.items():
    if c is None:
      continue
    color, marker, line = looks[method]
    if method in far:
      label = f"{method}, end at {c.x[-1]:.1f} x the cost"
      drawn[label] = axis.axhline(
        c.mean[-1], color=color, linestyle=(0, (1, 1.5)), linewidth=1.5
      )
      continue
    if len(c.x) == 1:
      # A band of no width would not be seen.
      axis.vlines(c.x, c.low, c.high, color=color, linewidth=1.3)
    elif np.any(c.low < c.high):
      axis.fill_between(
        c.x, c.low, c.high, color=color, alpha=0.18, linewidth=0
      )
    (drawn[method],) = axis.plot(
      c.x,
      c.mean,
      color=color,
      linestyle=line,
      linewidth=1.7,
      marker=marker if with_markers or len(c.x) == 1 else None,
      markersize=5,
      markevery=max(1, len(c.x) // 12),
    )
  return drawn


def _style(axis, curves, is_accuracy) -> None:
  """The vertical axis that the values of the curves need."""
  axis.grid(alpha=0.3)
  axis.spines[["top", "right"]].set_visible(False)
  if is_accuracy:
    plots.end_axis(axis, 1.0)
    return
  values = np.concatenate([[*c.low, *c.high] for c in curves] or [[1.0]])
  values = values[np.isfinite(values)]
  if len(values) and values.min() > 0 and values.max() > _WIDE * values.min():
    axis.set_yscale("log")
