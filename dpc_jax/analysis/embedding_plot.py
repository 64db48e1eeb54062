"""The picture of embeddings: one panel for each run, classes in one legend."""

import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Paul Tol's "muted" scheme, safe for color-blind readers, and black.
COLORS = (
  "#332288",
  "#CC6677",
  "#117733",
  "#DDCC77",
  "#88CCEE",
  "#AA4499",
  "#44AA99",
  "#882255",
  "#999933",
  "#000000",
)
MARKERS = ("o", "^", "s", "v", "D")
# More classes have no legend, and colors and markers that come again.
_MOST_NAMED = 20
_WIDTH, _HEIGHT = 3.6, 4.95  # of a panel, in inches


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
) -> None:
  """Draws the maps side by side, up to three in a row.

  Below all of them stands what the brackets in their lines mean.

  A class has the same color and marker in all of them. Axes have no ticks:
  distances between clusters of t-SNE are not to be read.

  Args:
    panels: at least one.
    class_names: one for each label.
    paths: files to write, PNG or SVG by their suffix.
  """
  import matplotlib
  from matplotlib.figure import Figure

  columns = len(panels) if len(panels) <= 3 else math.ceil(len(panels) / 2)
  columns = min(columns, 3)
  rows = math.ceil(len(panels) / columns)
  figure = Figure(
    figsize=(_WIDTH * columns, _HEIGHT * rows + 0.3), layout="compressed"
  )
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for axis, panel in zip(axes, panels, strict=False):
    _draw_panel(axis, panel, class_names)
  for axis in axes[len(panels) :]:
    axis.set_axis_off()
  if len(class_names) <= _MOST_NAMED:
    handles = [_handle(i) for i in range(len(class_names))]
    figure.legend(
      handles,
      class_names,
      loc="outside upper center",
      ncols=min(len(class_names), 10 if _are_short(class_names) else 5),
      frameon=False,
      fontsize=11,
      handletextpad=0.1,
      columnspacing=0.9,
    )
  figure.supxlabel("in brackets: 95 % intervals over the examples", fontsize=9)
  # Text that stays text can be read, searched and set in another font; a fixed
  # salt and no date give the same file for the same numbers.
  with matplotlib.rc_context(
    {"svg.fonttype": "none", "svg.hashsalt": "embeddings"}
  ):
    for path in map(pathlib.Path, paths):
      metadata = {"Date": None} if path.suffix == ".svg" else None
      figure.savefig(path, dpi=200, metadata=metadata, bbox_inches="tight")


def _draw_panel(axis, panel, class_names) -> None:
  # Points of a picture with few of them can be seen one by one.
  size = float(np.clip(9000 / len(panel.points), 5, 22))
  strays = _strays(panel.points, panel.labels)
  # Strays on top: among the points of another class they would be hidden.
  for rows, edge in ((~strays, 0.2), (strays, 0.6)):
    for i in np.unique(panel.labels[rows]):
      axis.scatter(
        *panel.points[rows & (panel.labels == i)].T,
        s=size,
        edgecolors="white",
        linewidths=edge,
        rasterized=True,
        **_look(i),
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


def _strays(points, labels) -> np.ndarray:
  """Whether a point is nearer to another class's center than to its own."""
  names, places = np.unique(labels, return_inverse=True)
  centers = [np.median(points[labels == name], axis=0) for name in names]
  distances = np.stack(
    [np.linalg.norm(points - center, axis=1) for center in centers], 1
  )
  return distances.argmin(1) != places


def _look(i) -> dict[str, str]:
  """Color and marker of a class; a color comes again with another marker."""
  return {
    "color": COLORS[i % len(COLORS)],
    "marker": MARKERS[(i + i // len(COLORS)) % len(MARKERS)],
  }


def _handle(i):
  from matplotlib.lines import Line2D

  return Line2D([], [], linestyle="none", markersize=7, **_look(i))


def _are_short(names) -> bool:
  return max(map(len, names)) <= 3
