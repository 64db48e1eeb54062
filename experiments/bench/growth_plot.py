"""The picture of how time and memory grow."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from dpc_jax.analysis import labels, pictures, plots
from experiments.bench import growth_fit

_ROWS = {"milliseconds": "step, ms", "temporary_mib": "temporaries, MiB"}
_COLUMNS = {
  growth_fit.BATCH: "batch",
  growth_fit.DEPTH: "layers, at the multiply-accumulates of an image",
}


def draw(results: Mapping[str, Any], path: str | pathlib.Path) -> None:
  """Draws the points and, through them, the fitted lines.

  Args:
    results: see `growth.measure`.
    path: the PNG to write; the SVG lies beside it.
  """
  from matplotlib import ticker
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8.4, 6.2), layout="constrained")
  axes = figure.subplots(2, 2, sharex="col")
  for column, (along, name) in enumerate(_COLUMNS.items()):
    line = growth_fit.along(results["points"], along)
    fits = results["fits"][along]
    for row, (field, unit) in enumerate(_ROWS.items()):
      axis = axes[row, column]
      _draw_panel(axis, line, along, field, fits)
      axis.set_ylabel(unit)
      axis.yaxis.set_major_formatter("{x:g}")
      # Between powers of ten, where there is no room for more.
      axis.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
      axis.yaxis.set_minor_formatter("{x:g}")
    axes[1, column].set_xlabel(name)
    # Sizes of one line are few: name each.
    x = [point[along] for point in line]
    texts = [_size(point, along) for point in line]
    axes[1, column].set_xticks(x, texts)
    axes[1, column].xaxis.set_minor_locator(ticker.NullLocator())
  labels.legend(figure, *axes[0, 0].get_legend_handles_labels())
  pictures.save(figure, path)


def _draw_panel(axis, line, along, field, fits) -> None:
  axis.set_xscale("log")
  axis.set_yscale("log")
  x = np.array([point[along] for point in line], float)
  names = list(line[0]["variants"]) if line else []
  for i, label in enumerate(names):
    y = np.array([point["variants"][label][field] for point in line])
    look = plots.look(i)
    axis.plot(x, y, linestyle="none", markersize=6, label=label, **look)
    if fits is None:
      continue
    exponent = fits[field][label]["exponent"]
    # The least-squares line goes through the mean of the logarithms.
    offset = np.mean(np.log(y)) - exponent * np.mean(np.log(x))
    axis.plot(x, np.exp(offset) * x**exponent, color=look["color"], lw=1)
    axis.annotate(
      f"exponent {exponent:.2f}",
      # Below the lines, which rise.
      (0.97, 0.04 + 0.085 * (len(names) - 1 - i)),
      xycoords="axes fraction",
      ha="right",
      color=look["color"],
      fontsize=9,
    )
  axis.grid(alpha=0.3)
  axis.spines[["top", "right"]].set_visible(False)


def _size(point, along) -> str:
  if along == growth_fit.BATCH:
    return f"{point['batch']}"
  return f"{point['depth']}\n{point['macs'] / 1e6:.0f} M"
