"""The picture of embeddings: one panel for each run, classes in one legend."""

import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpc_jax.analysis import pictures, plots

# Paul Tol's "muted" scheme, safe for color-blind readers, and black; in an
# order in which two that share a marker, the i-th and the (i + 5)-th, are far
# apart for any reader: 50 and more in CIELAB, in normal vision, deuteranopia
# and protanopia.
COLORS = (
  "#332288",
  "#117733",
  "#AA4499",
  "#DDCC77",
  "#CC6677",
  "#44AA99",
  "#88CCEE",
  "#999933",
  "#882255",
  "#000000",
)
MARKERS = ("o", "^", "s", "v", "D")
# More classes have no legend.
_MOST_NAMED = 20
_WIDTH, _HEIGHT = 3.6, 4.95  # of a panel, in inches
_LINE = 0.25  # of the legend, or below all panels
_LETTERS = 56  # of a line below a panel's width


class Panel(NamedTuple):
  """A run's map.

  Attributes:
    name: above it.
    points: float (N, 2).
    labels: int (N,), places in the classes' names.
    text: lines below it.
  """

  name: str
  points: np.ndarray
  labels: np.ndarray
  text: Sequence[str]


def draw(
  panels: Sequence[Panel],
  class_names: Sequence[str],
  paths: Sequence[str | pathlib.Path],
  *,
  caption: str | None = None,
) -> None:
  """Draws the maps side by side, up to three in a row.

  A class has the same color and marker in all of them; more than 20 have no
  legend. Axes have no ticks: distances between clusters of t-SNE are not to be
  read. Below all of them stand the caption, whether points lie on top and looks
  come again, and what the brackets in the panels' lines mean.

  Args:
    panels: at least one.
    class_names: one for each label.
    paths: files to write, PNG or SVG by their suffix.
    caption: of all panels, such as `parameters` of the maps; None is without.

  Raises:
    OSError: a file cannot be written.
    ValueError: a file of another kind.
  """
  from matplotlib.figure import Figure

  columns = len(panels) if len(panels) <= 3 else math.ceil(len(panels) / 2)
  columns = min(columns, 3)
  rows = math.ceil(len(panels) / columns)
  text = _below(panels, len(class_names), caption, _LETTERS * columns)
  names = class_names if len(class_names) <= _MOST_NAMED else []
  in_row = 10 if columns > 1 and max(map(len, class_names)) <= 3 else 5
  lines = text.count("\n") + math.ceil(len(names) / in_row)
  # Too high leaves an empty margin, which is trimmed.
  figure = Figure(
    figsize=(_WIDTH * columns, _HEIGHT * rows + 0.3 + _LINE * lines),
    layout="compressed",
  )
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for axis, panel in zip(axes, panels, strict=False):
    _draw_panel(axis, panel, class_names)
  for axis in axes[len(panels) :]:
    axis.set_axis_off()
  if names:
    figure.legend(
      [_handle(i) for i in range(len(names))],
      names,
      loc="outside upper center",
      ncols=min(len(names), in_row),
      frameon=False,
      fontsize=11,
      handletextpad=0.1,
      columnspacing=0.9,
    )
  figure.supxlabel(text, fontsize=9)
  for path in map(pathlib.Path, paths):
    pictures.save(figure, path, 200, suffixes=[path.suffix], is_trimmed=True)


def parameters(result: Mapping[str, Any]) -> str:
  """A caption: what t-SNE and the nearest neighbors were told.

  Args:
    result: what `embeddings.json` holds: perplexity, seed, pictured, examples
      and neighbors.
  """
  pictured, examples = result["pictured"], result["examples"]
  points = f"{pictured:,} points"
  if pictured < examples:
    points += f" of {examples:,} examples, the numbers of all"
  return (
    f"t-SNE: perplexity {result['perplexity']:g}, seed {result['seed']},"
    f" {points}; k-NN: k = {result['neighbors']}"
  )


def _below(panels, class_count, caption, width) -> str:
  """The lines below all panels: the caption, and what else a reader needs."""
  sentences = []
  if any(np.any(_misplaced(p.points, p.labels)) for p in panels):
    sentences.append("points amid another class are drawn on top")
  looks = len(COLORS) * len(MARKERS)
  if class_count > looks:
    sentences.append(
      f"{class_count} classes share {looks} combinations of color and marker"
    )
  # A space that no line is broken at.
  sentences.append("in brackets: 95\u00a0% intervals over the examples")
  parts = (caption, "; ".join(sentences))
  return "\n".join(textwrap.fill(part, width) for part in parts if part)


def _draw_panel(axis, panel, class_names) -> None:
  # Points of a picture with few of them can be seen one by one.
  size = float(np.clip(9000 / len(panel.points), 5, 22))
  misplaced = _misplaced(panel.points, panel.labels)
  # On top: among the points of another class they would be hidden.
  for rows, edge in ((~misplaced, 0.2), (misplaced, 0.6)):
    for i in np.unique(panel.labels[rows]):
      axis.scatter(
        *panel.points[rows & (panel.labels == i)].T,
        s=size,
        edgecolors="white",
        linewidths=edge,
        rasterized=True,
        **plots.look(i, COLORS, MARKERS),
      )
  axis.set_title(panel.name, fontsize=13)
  axis.set_xlabel("\n".join(panel.text), fontsize=11, linespacing=1.35)
  axis.set_xticks([])
  axis.set_yticks([])
  # A square around the points: one unit is as long along both axes.
  low, high = panel.points.min(0), panel.points.max(0)
  half = 0.53 * max(high - low)
  for set_limits, middle in zip(
    (axis.set_xlim, axis.set_ylim), (low + high) / 2, strict=True
  ):
    set_limits(middle - half, middle + half)
  axis.set_box_aspect(1)
  for spine in axis.spines.values():
    spine.set_color("#999999")


def _misplaced(points, labels) -> np.ndarray:
  """Whether a point is nearer to another class's center than to its own."""
  names, places = np.unique(labels, return_inverse=True)
  centers = [np.median(points[labels == name], axis=0) for name in names]
  distances = np.stack(
    [np.linalg.norm(points - center, axis=1) for center in centers], 1
  )
  return distances.argmin(1) != places


def _handle(i):
  from matplotlib.lines import Line2D

  look = plots.look(i, COLORS, MARKERS)
  return Line2D([], [], linestyle="none", markersize=7, **look)
