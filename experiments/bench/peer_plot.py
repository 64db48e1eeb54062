"""The picture of the measurements beside other libraries."""

import pathlib
from collections.abc import Mapping
from typing import Any

from dpc_jax.analysis import labels, pictures, plots

# {what is drawn: (title, whether its axis is logarithmic)}
_PANELS = {
  "ratio": ("step / float", True),
  "compile_ratio": ("compile / float", False),
  "temporary_ratio": ("temporaries / float", False),
  "seconds": ("seconds for changes", True),
}


def draw(networks: Mapping[str, Any], path: str | pathlib.Path) -> None:
  """Draws every row of every network in four panels.

  A row that a library cannot do has no point; where it can in no network, its
  name is gray.

  Args:
    networks: {name: {"rows": see `peer_rows.measure`}}, at least one, all with
      the same rows.
    path: the PNG to write; the SVG lies beside it.
  """
  from matplotlib.figure import Figure

  rows = list(next(iter(networks.values()))["rows"])
  figure = Figure(figsize=(11.0, 1.6 + 0.34 * len(rows)), layout="constrained")
  axes = figure.subplots(1, len(_PANELS), sharey=True)
  places = {label: i for i, label in enumerate(rows)}
  shifts = 0.5 / max(len(networks), 1)
  for k, (name, network) in enumerate(networks.items()):
    look = plots.look(k)
    aside = shifts * (k - (len(networks) - 1) / 2)
    for axis, panel in zip(axes, _PANELS, strict=True):
      points = _points(network["rows"], panel, places, aside)
      axis.plot(
        [x for x, _, _ in points],
        [y for _, y, _ in points],
        linestyle="none",
        label=name,
        markersize=6,
        **look,
      )
      for _, y, ends in points:
        axis.plot(ends, [y, y], color=look["color"], linewidth=1.2)
  for axis, (title, is_log) in zip(axes, _PANELS.values(), strict=True):
    _dress(axis, title, is_log)
  axes[0].set_yticks(range(len(rows)), rows)
  axes[0].invert_yaxis()
  for text, label in zip(axes[0].get_yticklabels(), rows, strict=True):
    if all(n["rows"][label]["cannot"] is not None for n in networks.values()):
      text.set_color("#999999")
      axes[0].text(
        0.03,
        places[label],
        "cannot",
        color="#999999",
        va="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        transform=axes[0].get_yaxis_transform(),
      )
  labels.legend(figure, *axes[0].get_legend_handles_labels())
  pictures.save(figure, path)


def _points(rows, panel, places, aside):
  """(value, place, ends of its bar) of the rows that have one."""
  found = []
  for label, row in rows.items():
    if row["cannot"] is not None:
      continue
    value = row.get(panel)
    if panel == "seconds":
      value = (row["changes"] or {}).get("seconds")
    if value is None:
      continue
    ends = row["ratio_quartiles"] if panel == "ratio" else [value, value]
    found.append((value, places[label] + aside, ends))
  return found


def _dress(axis, title, is_log) -> None:
  axis.set_title(title, fontsize=10)
  if is_log:
    from matplotlib import ticker

    axis.set_xscale("log")
    low, high = axis.get_xlim()
    # Few powers of ten leave room for numbers between them.
    subs = (1, 2, 5) if high < 100 * low else (1,)
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.xaxis.set_major_formatter("{x:g}")
  else:
    axis.set_xlim(left=0)
  if title.endswith("float"):
    axis.axvline(1, color="#777777", linewidth=1, linestyle="--", zorder=0)
  axis.grid(axis="x", alpha=0.3)
  axis.spines[["top", "right"]].set_visible(False)
