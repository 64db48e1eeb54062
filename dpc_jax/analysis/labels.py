"""What tells methods apart: a look of their own, and names beside points."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Look(NamedTuple):
  """How a method is drawn, in every picture."""

  color: str
  marker: str
  line: str | tuple[int, tuple[int, ...]]


# Okabe and Ito's colors, but for the yellow, which is too pale on white.
_BLACK, _BLUE, _RED = "#000000", "#0072B2", "#D55E00"
_GREEN, _PINK, _ORANGE = "#009E73", "#CC79A7", "#E69F00"
_SKY = "#56B4E9"
# Relatives share a color.
_LOOKS = {
  "float": Look(_BLACK, "*", "--"),
  "static8": Look(_BLACK, "s", "-"),
  "dpc": Look(_BLUE, "o", "-"),
  "dpc_log_midpoint": Look(_BLUE, "D", "--"),
  "adaptive": Look(_GREEN, "P", "-"),
  "adaptive_reversed": Look(_GREEN, "X", "--"),
  "cpt": Look(_PINK, "<", "-"),
  "dpc_cpt": Look(_PINK, ">", "--"),
  "pfq": Look(_RED, "p", "-"),
  "uniform": Look(_ORANGE, "^", "-"),
  "uniform_log_midpoint": Look(_ORANGE, "v", "--"),
  "reversed": Look(_SKY, "d", "-"),
  "random": Look(_SKY, "h", "--"),
}
# Of other methods, the first that serve least.
_COLORS = (_RED, _SKY, _PINK, _GREEN, _ORANGE, _BLUE, "#999999", "#8C510A")
_MARKERS = ("s", "D", "v", "o", "^", "P", "X", "<", ">", "d", "p", "h")
_LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))

# Where a name may stand: distances in points (1/72 inch) and directions. Near
# and to the right comes first.
_DISTANCES = (9, 14, 20, 28, 38, 50, 64, 80, 100)
_DIRECTIONS = (
  *(0, 30, -30, 60, -60, 90, -90, 180, 150, -150, 120, -120),
  *(15, -15, 45, -45, 75, -75, 165, -165, 135, -135, 105, -105),
)
# Up to here (points) the first anchor is better than another one.
_NEAR = 28
# A name this far off (points) gets a line to its point, and so does one that
# lies less than so many times as far from another's.
_FAR = 15
_CLEAR = 2
# Of the name's cost, in square pixels: each point of its line (of 20) that
# crosses anything.
_CROSSED = 40


def looks(methods: Iterable[str]) -> dict[str, Look]:
  """How each of the methods of a report is drawn, in their order.

  The methods of this package look the same everywhere, whatever they are shown
  with. Others, such as static6, take what is left: the color that serves least,
  with a marker and a line that it does not have yet, up to six lines and twelve
  markers of each. They are alike in all pictures of the same methods.

  Args:
    methods: their names, as in `config.precision.method`.

  Returns:
    {method: its look}.
  """
  methods = list(methods)
  found = {name: _LOOKS[name] for name in methods if name in _LOOKS}
  for name in methods:
    if name not in found:
      found[name] = _unused(list(found.values()))
  return {name: found[name] for name in methods}


def _unused(taken: Sequence[Look]) -> Look:
  colors = [look.color for look in taken]
  color = min(_COLORS, key=colors.count)
  theirs = [look for look in taken if look.color == color]

  def least(values, field):
    here, anywhere = (
      [getattr(look, field) for look in some] for some in (theirs, taken)
    )
    return min(values, key=lambda v: (here.count(v), anywhere.count(v)))

  lines = [look.line for look in theirs]
  return Look(color, least(_MARKERS, "marker"), min(_LINES, key=lines.count))


def ranks(boxes: Mapping[str, Sequence[float]]) -> dict[str, int]:
  """How far behind each of some boxes is drawn, that they all may be seen.

  The lowest box is the foremost, 0; another is one behind the last of those
  before it that it shares any area with, so that alone it is 0, too.

  Args:
    boxes: {name: left, bottom, right, top}.

  Returns:
    {name: rank}, from the foremost on.
  """
  found: dict[str, int] = {}
  for name in sorted(boxes, key=lambda k: boxes[k][3] - boxes[k][1]):
    box = np.asarray(boxes[name])
    hidden = [
      rank
      for other, rank in found.items()
      if _overlap(box, np.array([boxes[other]])) > 0
    ]
    found[name] = max(hidden, default=-1) + 1
  return found


def legend(
  figure: Any, handles: Sequence[Any], names: Sequence[str], **options: Any
) -> Any:
  """Names what is drawn, above all axes, in four columns or as many as fit.

  Args:
    figure: a matplotlib figure with all drawn, in constrained layout.
    handles: of what is named.
    names: of each of them.
    **options: others of matplotlib's legend.

  Returns:
    The legend.
  """
  options = {"loc": "outside upper center", "frameon": False} | options
  for columns in (4, 3, 2, 1):
    found = figure.legend(handles, names, ncols=columns, **options)
    figure.draw_without_rendering()
    if found.get_window_extent().width <= figure.bbox.width or columns == 1:
      break
    found.remove()
  return found


def place(
  axis: Any,
  anchors: Mapping[str, Sequence[tuple[float, float]]],
  obstacles: Sequence[tuple[float, float, float, float]],
  fontsize: float = 10,
  colors: Mapping[str, str] | None = None,
) -> None:
  """Writes each text beside one of its anchors, at the nearest free place.

  Greedy, long texts first. A place is free where the text overlaps no obstacle
  and no text before it, stays inside the axis, and its line, if any, crosses
  nothing; without one, the place with the least overlap is taken. A text that
  ends up far off, or near the anchor of another one, has a line to its own.

  Args:
    axis: a matplotlib axis whose limits and layout are final; the figure must
      have been drawn once.
    anchors: {text: (x, y) in data coordinates}, one for a point, several for a
      line that may be named anywhere along it.
    obstacles: boxes to keep free: left, bottom, right, top in pixels.
    fontsize: of the texts, in points.
    colors: {text: color of its line}; gray without.
  """
  from matplotlib import patheffects

  taken = np.array(obstacles, float).reshape(-1, 4)
  names = np.empty((0, 4))
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
    others = [k[0] for t, k in anchors.items() if t != text and len(k) == 1]
    best = _best_place(axis, anchors[text], half, taken, names, others)
    note.xy, offset, box, line = best
    note.set_position(tuple(offset))
    names = np.concatenate([names, box[None]])
    if line is not None:
      end = (line[-1] - axis.transData.transform(note.xy)) / _pixels(axis)
      _lead(axis, note.xy, end, (colors or {}).get(text, "#777777"))
      width = _pixels(axis)
      taken = np.concatenate([taken, np.hstack([line - width, line + width])])


def _pixels(axis) -> float:
  """Of a point, which is 1/72 inch."""
  return axis.figure.dpi / 72


def _best_place(axis, anchors, half, taken, names, others):
  """Where a text of half size (pixels) goes.

  Returns:
    (anchor, offset in points, box in pixels, points of its line in pixels or
    None without a line).
  """
  pixels = _pixels(axis)
  inside = np.array([axis.get_window_extent().extents])
  others = axis.transData.transform(np.reshape(others, (-1, 2)))
  best = None
  for anchor, offset in _places(anchors, half / pixels):
    start = axis.transData.transform(anchor)
    middle = start + offset * pixels
    box = np.concatenate([middle - half, middle + half])
    outside = 4 * np.prod(half) - _overlap(box, inside)
    # To be cut off is worse than to be crossed; one text on another is worst.
    cost = 4 * outside + _overlap(box, taken) + 20 * _overlap(box, names)
    away = _away(start[None], box) / pixels
    line = None
    is_far = away > _FAR
    if is_far or np.any(_away(others, box) < _CLEAR * away * pixels):
      end = np.clip(start, box[:2], box[2:])
      line = start + np.linspace(0, 1, 21)[1:, None] * (end - start)
      # A line as short as this is hardly seen.
      crossed = _crossings(line, start, np.concatenate([taken, names]), pixels)
      cost += _CROSSED * (crossed + (not is_far))
    if best is None or cost < best[0] - 1e-6:
      best = (cost, anchor, offset, box, line)
    if cost <= 1e-6:
      break
  return best[1:]


def _away(points, box) -> Any:
  """The least distance of any of the points to a box; inf without points."""
  gaps = np.maximum(np.maximum(box[:2] - points, points - box[2:]), 0)
  return np.min(np.hypot(*gaps.T), initial=np.inf)


def _crossings(line, start, boxes, pixels) -> int:
  """Points of a line within a box, its own marker's at `start` left out."""
  points = line[np.hypot(*(line - start).T) > 8 * pixels]
  within = np.all(points[:, None] > boxes[:, :2], -1) & np.all(
    points[:, None] < boxes[:, 2:], -1
  )
  return int(np.sum(within))


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


def _lead(axis, anchor, end, color) -> None:
  axis.annotate(
    "",
    anchor,
    tuple(end),
    textcoords="offset points",
    arrowprops={
      "arrowstyle": "-",
      "color": color,
      "linewidth": 1.0,
      "shrinkA": 1,
      "shrinkB": 3,
    },
    zorder=1,
  )


def _overlap(box, others) -> float:
  """Of a box and some others, their shared areas summed."""
  sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(
    box[:2], others[:, :2]
  )
  return float(np.sum(np.prod(np.maximum(sides, 0), axis=1)))
