"""Names beside points, so that none hides another or a point."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Where a name may stand: distances in points (1/72 inch) and directions. Near
# and to the right comes first.
_DISTANCES = (9, 14, 20, 28, 38, 50, 64, 80, 100)
_DIRECTIONS = (0, 30, -30, 60, -60, 90, -90, 180, 150, -150, 120, -120)
# Up to here (points) the first anchor is better than another one.
_NEAR = 28
# A name this far off (points) gets a thin line to its point.
_FAR = 18


def place(
  axis: Any,
  anchors: Mapping[str, Sequence[tuple[float, float]]],
  obstacles: Sequence[tuple[float, float, float, float]],
  fontsize: float = 10,
) -> None:
  """Writes each text beside one of its anchors, at the nearest free place.

  Greedy, long texts first. A place is free where the text overlaps no obstacle
  and no text before it and stays inside the axis; without one, the place with
  the least overlap is taken. A text that ends up far off gets a thin line to
  its anchor.

  Args:
    axis: a matplotlib axis whose limits and layout are final; the figure must
      have been drawn once.
    anchors: {text: (x, y) in data coordinates}, one for a point, several for a
      line that may be named anywhere along it.
    obstacles: boxes to keep free: left, bottom, right, top in pixels.
    fontsize: of the texts, in points.
  """
  from matplotlib import patheffects

  pixels = axis.figure.dpi / 72
  taken = [np.array(box) for box in obstacles]
  for text in sorted(anchors, key=len, reverse=True):
    note = axis.annotate(
      text,
      anchors[text][0],
      (0, 0),
      textcoords="offset points",
      fontsize=fontsize,
      ha="center",
      va="center",
      zorder=5,
      path_effects=[patheffects.withStroke(linewidth=2, foreground="white")],
    )
    size = note.get_window_extent()
    half = np.array([size.width, size.height]) / 2
    note.xy, offset, box = _best_place(axis, anchors[text], half, taken)
    note.set_position(tuple(offset))
    taken.append(box)
    end = np.clip(0, offset - half / pixels, offset + half / pixels)
    if np.hypot(*end) > _FAR:
      _lead(axis, note.xy, end)
      start = axis.transData.transform(note.xy)
      for part in np.linspace(0.2, 1, 20):
        point = start + part * end * pixels
        taken.append(np.concatenate([point - pixels, point + pixels]))


def _best_place(axis, anchors, half, taken):
  """Anchor, offset (points), box (pixels) of a text of half size (pixels)."""
  pixels = axis.figure.dpi / 72
  inside = np.array(axis.get_window_extent().extents)
  best = None
  for anchor, offset in _places(anchors, half / pixels):
    middle = axis.transData.transform(anchor) + offset * pixels
    box = np.concatenate([middle - half, middle + half])
    outside = 4 * np.prod(half) - _overlap(box, inside)
    # To be cut off is worse than to be crossed.
    cost = 4 * outside + sum(_overlap(box, other) for other in taken)
    if best is None or cost < best[0] - 1e-6:
      best = (cost, anchor, offset, box)
    if cost <= 1e-6:
      break
  return best[1:]


def _places(anchors, half):
  """Anchors, and the offset in points of the center of a text of half size.

  Near the first anchor, then further off and near the others.
  """
  near = [(d, anchors[0]) for d in _DISTANCES if d <= _NEAR]
  for distance, anchor in near + list(itertools.product(_DISTANCES, anchors)):
    for degrees in _DIRECTIONS:
      angle = np.radians(degrees)
      way = np.array([np.cos(angle), np.sin(angle)])
      # The side of the text, not its center, is at the distance.
      yield anchor, distance * way + half * np.clip(way / 0.85, -1, 1)


def _lead(axis, anchor, end) -> None:
  axis.annotate(
    "",
    anchor,
    tuple(end),
    textcoords="offset points",
    arrowprops={
      "arrowstyle": "-",
      "color": "#777777",
      "linewidth": 0.6,
      "shrinkA": 1,
      "shrinkB": 4,
    },
    zorder=1,
  )


def _overlap(a, b) -> float:
  sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
  return float(np.prod(np.maximum(sides, 0)))
