"""Plots of runs: safe for color-blind readers, legible at half width."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Okabe and Ito's colors, in the order in which they stay apart best.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
# Up to so many layers have their names on the axis.
_NAMED_LAYERS = 24


def bits_per_layer(
  runs: Mapping[str, Mapping[str, Sequence[Any]]],
  capacities: Mapping[str, int],
  path: str | pathlib.Path,
) -> None:
  """Draws the weights' width of every layer above its number of weights.

  Args:
    runs: {label: {layer path: (weights, activations, gradients)}}; a run
      without a layer, such as a float one, shows nothing there. Lists of
      widths, of stacked layers, are drawn one by one.
    capacities: {layer path: N_k}, in the network's order.
    path: the PNG to write.
  """
  # Late and local: `import dpc_jax` must not load matplotlib, and a figure of
  # its own leaves the user's backend alone.
  from matplotlib.figure import Figure

  names, sizes = _unstacked(capacities, runs)
  x = np.arange(len(names))
  figure = Figure(
    figsize=(max(6.0, min(14.0, 0.34 * len(x) + 2.5)), 4.8),
    layout="constrained",
  )
  top, bottom = figure.subplots(
    2, 1, sharex=True, height_ratios=(3, 2), squeeze=True
  )
  widest = 0
  # Labels that share a width would hide each other: shift them sideways.
  shifts = 0.16 * (np.arange(len(runs)) - (len(runs) - 1) / 2)
  for i, (label, bits) in enumerate(runs.items()):
    widths = np.array([_width(bits, name) for name in names])
    if np.all(np.isnan(widths)):
      continue
    widest = max(widest, np.nanmax(widths))
    top.plot(
      x + shifts[i],
      widths,
      linestyle="none",
      marker=MARKERS[i % len(MARKERS)],
      color=COLORS[i % len(COLORS)],
      markersize=7 if len(x) <= _NAMED_LAYERS else 4,
      label=label,
    )
  top.set_ylabel("bits of the weights")
  top.set_ylim(0, widest + 1)
  top.yaxis.get_major_locator().set_params(integer=True)
  top.grid(axis="y", alpha=0.3)
  top.legend(loc="lower left", ncols=len(runs), frameon=False)
  _draw_sizes(bottom, x, sizes)
  if len(x) <= _NAMED_LAYERS:
    bottom.set_xticks(x, names, rotation=40, ha="right", fontsize=8)
  else:
    bottom.set_xlabel("layer, from input to output")
  for axis in (top, bottom):
    axis.spines[["top", "right"]].set_visible(False)
  figure.savefig(path, dpi=150)


def _draw_sizes(axis, x, sizes):
  """Bars of N_k; attention products have no weights and no bar."""
  axis.bar(x, sizes, color="#999999", width=0.7)
  axis.set_yscale("log")
  axis.set_ylabel("weights, $N_k$")
  weighty = [size for size in sizes if size > 0]
  if weighty:
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
