"""Plots of runs: safe for color-blind readers, legible at half width."""

import itertools
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from dpc_jax.analysis import labels, phrases, pictures

# Okabe and Ito's colors, in the order in which they stay apart best.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
# Up to so many layers have their names on the axis.
_NAMED_LAYERS = 24
# Costlier methods, in units of the cost, are lines across the plot.
_FAR_COST = 2.0
# Costs closer than that must not look far apart.
_LEAST_RANGE = 0.1
# Nor accuracies: single images of a small test set must not fill the axis. The
# part of the largest value that it spans at least (our decision).
LEAST_SPAN = 0.05
# What a bar and a point hide on either side, in inches.
_BAR, _POINT = 0.035, 0.07


def bits_per_layer(
  runs: Mapping[str, Mapping[str, Sequence[Any]]],
  capacities: Mapping[str, int],
  path: str | pathlib.Path,
  *,
  by_size: bool = False,
  moved: Collection[str] = (),
) -> None:
  """Draws the widths of every layer above its number of weights.

  Those of the weights and, where all are alike, of the input activations.

  Args:
    runs: {method: {layer path: (weights, activations, gradients)}}; a run
      without a layer, such as a float one, shows nothing there. Lists of
      widths, of stacked layers, are drawn one by one.
    capacities: {layer path: N_k}, in the network's order.
    path: the PNG to write; the SVG lies beside it.
    by_size: whether layers stand from the smallest N_k to the largest, equal
      ones in the network's order, with a line through the widths of a run;
      else in the network's order.
    moved: the methods of which these widths are but the last; the legend says
      so.
  """
  # Late and local: `import dpc_jax` must not load matplotlib, and a figure of
  # its own leaves the user's backend alone.
  from matplotlib.figure import Figure

  names, sizes = _unstacked(capacities, runs)
  if by_size:
    order = np.argsort(sizes, kind="stable")
    names, sizes = [names[i] for i in order], [sizes[i] for i in order]
  x = np.arange(len(names))
  room = max(0.34, 0.075 * len(runs))  # of a layer, in inches
  figure = Figure(
    figsize=(max(6.0, min(14.0, room * len(x) + 2.5)), 4.8),
    layout="constrained",
  )
  top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
  drawn = {}
  for method, bits in runs.items():
    widths = [_width(bits, name) for name in names]
    if not np.all(np.isnan(widths)):
      drawn[method] = widths
  _draw_widths(top, x, drawn, labels.looks(runs), by_size, moved)
  shown = [layer for bits in runs.values() for layer in bits.values()]
  top.set_ylabel(phrases.bits(shown, "\n"))
  if len(drawn) <= 4:
    top.legend(loc="lower left", ncols=max(len(drawn), 1), frameon=False)
  else:
    labels.legend(figure, *top.get_legend_handles_labels())
  _draw_sizes(bottom, x, sizes)
  if len(x) <= _NAMED_LAYERS:
    bottom.set_xticks(x, names, rotation=40, ha="right", fontsize=8)
  ends = "the fewest weights to the most" if by_size else "input to output"
  if by_size or len(x) > _NAMED_LAYERS:
    bottom.set_xlabel(f"layers, from {ends}")
  for axis in (top, bottom):
    axis.spines[["top", "right"]].set_visible(False)
  pictures.save(figure, path)


def look(
  i: int, colors: Sequence[str] = COLORS, markers: Sequence[str] = MARKERS
) -> dict[str, str]:
  """Color and marker of the i-th run; a color comes again with another one.

  All combinations come before one comes again if the number of markers divides
  that of colors.
  """
  return {
    "color": colors[i % len(colors)],
    "marker": markers[(i + i // len(colors)) % len(markers)],
  }


def _draw_widths(axis, x, drawn, looks, is_joined, moved):
  # Markers at the same width would hide each other: shift them sideways.
  shift = min(0.24, 0.8 / max(len(drawn), 1))
  shifts = shift * (np.arange(len(drawn)) - (len(drawn) - 1) / 2)
  is_small = len(x) > _NAMED_LAYERS or len(drawn) > 6
  for (method, widths), aside in zip(drawn.items(), shifts, strict=True):
    axis.plot(
      x + aside,
      widths,
      color=looks[method].color,
      marker=looks[method].marker,
      linestyle=looks[method].line if is_joined else "none",
      linewidth=0.8,
      markersize=4 if is_small else 7,
      label=f"{method}, at the end" if method in moved else method,
    )
  widest = max(map(np.nanmax, drawn.values()), default=0)
  axis.set_ylim(0, widest + 1)
  axis.yaxis.get_major_locator().set_params(integer=True)
  axis.grid(axis="y", alpha=0.3)


def _draw_sizes(axis, x, sizes):
  """Bars of N_k; attention products have no weights and no bar."""
  axis.bar(x, sizes, color="#999999", width=0.7)
  axis.set_yscale("log")
  axis.set_ylabel("weights, $N_k$")
  weighty = [size for size in sizes if size > 0]
  if weighty:
    if max(weighty) > 10 * min(weighty):
      axis.yaxis.set_minor_formatter("")
    # Room below the smallest layer, or its bar would have no height.
    axis.set_ylim(bottom=min(weighty) / 3)


def _unstacked(capacities, runs):
  """Names and sizes of single layers; a stacked one gives `path[i]` each."""
  names, sizes = [], []
  for path, size in capacities.items():
    depths = [
      np.size(bits[path][0])
      for bits in runs.values()
      if path in bits and np.ndim(bits[path][0])
    ]
    count = max(depths, default=0)
    names += [f"{path}[{i}]" for i in range(count)] or [path]
    sizes += [size] * max(count, 1)
  return names, sizes


def _width(bits, name):
  if name in bits:
    return float(np.max(bits[name][0]))
  path, _, index = name.rpartition("[")
  if path in bits:
    return float(np.ravel(bits[path][0])[int(index[:-1])])
  return np.nan


def pareto(
  points: Mapping[str, tuple[float, float, float | None, float | None]],
  frontier: Collection[str],
  path: str | pathlib.Path,
  *,
  metric: str,
  unit: str = "static 8/8",
  highest: float | None = None,
) -> None:
  """Draws a test metric against cost, each method with its name beside it.

  Methods on the frontier are filled and joined by a line. No point is moved:
  bars and points behind others are broader and larger than these. A method that
  costs more than twice the unit, such as float, is a horizontal line with its
  cost in words: on the axis it would leave one corner to all others.

  Args:
    points: {method: (cost, mean, low, high)}, at least one: cost in `unit`,
      and the ends of the mean's interval, None where there is none.
    frontier: the methods that no other one beats.
    path: the PNG to write; the SVG lies beside it.
    metric: names the vertical axis.
    unit: of the cost.
    highest: the metric's largest value, 1 for an accuracy: the axis ends there
      and spans 5 % of it or more; None has none.
  """
  from matplotlib.figure import Figure

  far = {k: point for k, point in points.items() if point[0] > _FAR_COST}
  near = {k: point for k, point in points.items() if k not in far}
  if not near:
    near, far = far, near
  figure = Figure(figsize=(5.6, 4.2), layout="constrained")
  axis = figure.subplots()
  axis.set_xlabel(f"BitOPs of the run, relative to {unit}", fontsize=11)
  axis.set_ylabel(metric, fontsize=11)
  axis.grid(alpha=0.3)
  axis.spines[["top", "right"]].set_visible(False)
  looks = labels.looks(points)
  for k, (_, mean, _, _) in far.items():
    axis.axhline(mean, color=looks[k].color, linestyle=":", linewidth=1.5)
  _fit(axis, near)
  if highest is not None:
    end_axis(axis, highest)
  figure.draw_without_rendering()
  # What is drawn now was placed by the limits.
  figure.set_layout_engine("none")
  _draw_methods(axis, near, frontier, looks)
  along = np.linspace(*axis.get_xlim(), 9)[::-1]
  anchors = {k: [(cost, mean)] for k, (cost, mean, _, _) in near.items()} | {
    f"{k}, {cost:.1f} x the cost": [(place, mean) for place in along]
    for k, (cost, mean, _, _) in far.items()
  }
  labels.place(
    axis,
    anchors,
    _obstacles(axis, near, far, frontier),
    colors={k: looks[k].color for k in near},
  )
  pictures.save(figure, path, dpi=200)


def end_axis(axis: Any, highest: float, least: float = LEAST_SPAN) -> None:
  """Fits the vertical axis to a metric whose largest value is known.

  Args:
    axis: linear, with all drawn.
    highest: the largest value, 1 for an accuracy; the axis ends just above it.
    least: the part of it that the axis spans at least.
  """
  bottom, top = axis.get_ylim()
  missing = max(least * highest - (top - bottom), 0)
  bottom, top = bottom - missing / 2, top + missing / 2
  if top > highest:
    bottom = min(bottom, highest - least * highest)
    top = min(top, highest + 0.04 * (highest - bottom))
  axis.set_ylim(bottom, top)


def _fit(axis, points) -> None:
  costs = [point[0] for point in points.values()]
  for cost, *values in points.values():
    axis.update_datalim([(cost, y) for y in values if y is not None])
  axis.margins(y=0.12)
  middle = (min(costs) + max(costs)) / 2
  span = max(1.35 * np.ptp(costs), _LEAST_RANGE)
  # Cheap methods crowd: there is more room for their names on the left.
  axis.set_xlim(middle - 0.55 * span, middle + 0.45 * span)


def _draw_methods(axis, points, frontier, looks) -> None:
  axis.autoscale(False)
  dots = axis.figure.dpi
  bars, marks = {}, {}
  for k, (cost, mean, *ends) in points.items():
    x, y = axis.transData.transform((cost, mean))
    marks[k] = np.array([x, y, x, y]) + _POINT * dots * np.array([-1, -1, 1, 1])
    if None not in ends:
      (_, low), (_, high) = axis.transData.transform([(cost, e) for e in ends])
      bars[k] = np.array([x - _BAR * dots, low, x + _BAR * dots, high])
  for k, rank in labels.ranks(bars).items():
    cost, _, *ends = points[k]
    look = {"color": looks[k].color, "zorder": 2 - rank / 100}
    rank = min(rank, 3)  # or a crowd would be one block
    axis.plot([cost] * 2, ends, "-", lw=1.3 + 2 * rank, **look)
    axis.plot([cost] * 2, ends, "_", ms=7 + 4 * rank, **look)
  for k, rank in labels.ranks(marks).items():
    axis.plot(
      *points[k][:2],
      marker=looks[k].marker,
      color=looks[k].color,
      markerfacecolor=looks[k].color if k in frontier else "white",
      markeredgewidth=1.6,
      markersize=8 + 3.5 * rank,
      zorder=3 - rank / 100,
    )
  best = sorted(points[k][:2] for k in points if k in frontier)
  if best:
    axis.plot(*zip(*best, strict=True), "--", color="#777777", lw=1, zorder=0)


def _obstacles(axis, near, far, frontier):
  """Boxes, in pixels, that the names keep free: points, bars, lines."""
  pixels = axis.figure.dpi / 72
  corners = []
  for cost, mean, low, high in near.values():
    corners.append((cost, mean, mean, 6))
    if low is not None:
      corners.append((cost, low, high, 3))
  left, bottom, right, top = axis.get_window_extent().extents
  boxes = []
  for place, low, high, pad in corners:
    (a, b), (_, c) = axis.transData.transform([(place, low), (place, high)])
    pad = pad * pixels
    boxes.append((a - pad, max(b - pad, bottom), a + pad, min(c + pad, top)))
  for _, mean, _, _ in far.values():
    y = axis.transData.transform((0, mean))[1]
    boxes.append((left, y - pixels, right, y + pixels))
  best = np.array(sorted(near[k][:2] for k in near if k in frontier))
  for start, end in itertools.pairwise(best):
    line = np.linspace(start, end, 40)
    for a, b in axis.transData.transform(line):
      boxes.append((a - pixels, b - pixels, a + pixels, b + pixels))
  return boxes


def similarity_per_width(
  layers: Mapping[str, Mapping[int, float]],
  thresholds: Sequence[float],
  bounds: Sequence[int | None],
  path: str | pathlib.Path,
) -> None:
  """Draws how alike quantized and full-precision weights are, per width.

  The axis is logarithmic in 1 - similarity, so that 0.99 and 0.9999 are as far
  apart as 0.9 and 0.99 twice; a similarity of 1 lies at its upper end.

  Args:
    layers: {layer: {width: cosine similarity}}, at least one, all of the same
      widths.
    thresholds: tau_min and tau_max.
    bounds: B_min and B_max; None draws none, where no width was enough.
    path: the PNG to write; the SVG lies beside it.
  """
  from matplotlib import ticker
  from matplotlib.figure import Figure

  widths = np.array(sorted(next(iter(layers.values()))))
  gaps = 1 - np.array([[row[w] for w in widths] for row in layers.values()])
  drawn = np.append(gaps, 1 - np.array(thresholds))
  lowest = min(drawn[drawn > 0], default=1e-6) / 3
  highest = max(*drawn, 10 * lowest) * 3
  gaps, mean = np.maximum(gaps, lowest), np.maximum(gaps.mean(0), lowest)
  figure = Figure(figsize=(7.0, 4.8), layout="constrained")
  axis = figure.subplots()
  for i, row in enumerate(gaps):
    label = f"layers ({len(gaps)})" if i == 0 else None
    axis.plot(widths, row, color="#999999", lw=0.7, alpha=0.6, label=label)
  axis.plot(widths, gaps.max(0), "v", color=COLORS[1], ms=6, label="worst")
  axis.plot(widths, mean, "o-", color=COLORS[0], lw=2.5, ms=6, label="mean")
  axis.set_xlim(widths[0] - 0.35, widths[-1] + 0.35)
  _draw_bounds(axis, thresholds, bounds, lowest, last=widths[-1])
  axis.set_yscale("log")
  axis.set_ylim(highest, lowest)
  axis.set_xticks(widths)
  axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 5), numticks=20))
  axis.yaxis.set_minor_locator(ticker.NullLocator())
  axis.yaxis.set_major_formatter(lambda gap, _: f"{1 - gap:.10g}")
  axis.set_xlabel("bits of the weights")
  axis.set_ylabel("cosine similarity (log axis of 1 - similarity)")
  axis.grid(axis="y", alpha=0.3)
  axis.spines[["top", "right"]].set_visible(False)
  figure.legend(loc="outside upper center", ncols=3, frameon=False)
  pictures.save(figure, path)


def _draw_bounds(axis, thresholds, bounds, lowest, last):
  """Lines of the thresholds and of the widths chosen; `last` is the widest."""
  for name, tau, bound, x, align in zip(
    ("min", "max"),
    thresholds,
    bounds,
    axis.get_xlim()[::-1],
    ("right", "left"),
    strict=True,
  ):
    level = max(1 - tau, lowest)
    axis.axhline(level, color="black", lw=1, ls="--")
    axis.annotate(
      rf"$\tau_{{\mathrm{{{name}}}}}$ = {tau:g}",
      (x, level),
      (-4 if align == "right" else 4, 3),
      textcoords="offset points",
      ha=align,
      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0},
    )
    if bound is None:
      continue
    axis.axvline(bound, color=COLORS[2], lw=1.5, ls=":")
    # Beside its line and inside; equal bounds one above the other.
    is_last = bound == last
    axis.annotate(
      rf"$B_{{\mathrm{{{name}}}}}$ = {bound}",
      (bound, 0),
      (-6 if is_last else 6, 6 if name == "min" else 20),
      xycoords=axis.get_xaxis_transform(),
      textcoords="offset points",
      ha="right" if is_last else "left",
      color=COLORS[2],
    )
