"""Names stand beside their points and hide nothing."""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure

from dpc_jax.analysis import labels
from dpc_jax.training import methods


def drawn(anchors, obstacles=()):
  """{text: box in pixels} after placing, the axis, and lines to points."""
  figure = Figure(figsize=(5, 4))
  axis = figure.subplots()
  axis.set(xlim=(0, 1), ylim=(0, 1))
  figure.draw_without_rendering()
  boxes = [
    (*axis.transData.transform(box[:2]), *axis.transData.transform(box[2:]))
    for box in obstacles
  ]
  labels.place(axis, anchors, boxes)
  figure.draw_without_rendering()
  # Of an annotation with an arrow the extent holds the arrow; these have none.
  texts = {
    text.get_text(): np.array(text.get_window_extent().extents)
    for text in axis.texts
    if text.get_text()
  }
  leads = sum(not text.get_text() for text in axis.texts)
  return texts, axis, leads, boxes


def overlap(a, b):
  return np.all(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]) > 0)


def test_a_lone_name_stands_to_the_right():
  texts, axis, leads, _ = drawn({"dpc": [(0.5, 0.5)]})
  x, y = axis.transData.transform((0.5, 0.5))
  box = texts["dpc"]
  assert 0 < box[0] - x < 20 and box[1] < y < box[3]
  assert leads == 0


@pytest.mark.parametrize("x", [0.0, 0.5, 1.0])
def test_names_of_a_crowd_neither_overlap_nor_leave_the_axis(x):
  crowd = {f"method{i}": [(x, 0.5 + 0.005 * i)] for i in range(8)}
  bar = (x - 0.02, 0.4, x + 0.02, 0.6)
  texts, axis, leads, (obstacle,) = drawn(crowd, [bar])
  assert len(texts) == 8
  for a, b in itertools.combinations(texts.values(), 2):
    assert not overlap(a, b)
  inside = axis.get_window_extent().extents
  for box in texts.values():
    assert not overlap(box, np.array(obstacle))
    assert np.all(box[:2] >= inside[:2]) and np.all(box[2:] <= inside[2:])
  assert leads > 0


def test_a_name_takes_another_anchor_where_the_first_is_walled_in():
  wall = (0.0, 0.3, 1.0, 1.0)
  texts, axis, _, _ = drawn({"dpc": [(0.5, 0.8), (0.5, 0.1)]}, [wall])
  y = axis.transData.transform((0.5, 0.1))[1]
  assert texts["dpc"][1] < y < texts["dpc"][3]


def test_known_methods_look_the_same_whatever_they_are_shown_with():
  known = labels.looks(methods.names())
  for name in ("dpc", "adaptive", "uniform", "float"):
    assert labels.looks(["mine", name, "static6"])[name] == known[name]
  names = [name for name in methods.names() if name != "static<b>"]
  looks = labels.looks([*names, "static8"])
  # None took the place of an unknown one.
  assert set(looks) == set(labels._LOOKS)
  assert len({look[:2] for look in looks.values()}) == len(looks)
  assert len({(look.color, look.line) for look in looks.values()}) == len(looks)
  assert looks["uniform"].color == looks["uniform_log_midpoint"].color


def test_other_methods_take_what_is_left():
  looks = labels.looks(["mine", "dpc", "static6", "uniform"])
  assert list(looks) == ["mine", "dpc", "static6", "uniform"]
  assert len({look.color for look in looks.values()}) == 4
  many = labels.looks([*labels._LOOKS, *(f"m{i}" for i in range(20))])
  assert len({look[:2] for look in many.values()}) == len(many)
  assert len({(look.color, look.line) for look in many.values()}) == len(many)


def test_a_name_near_another_point_has_a_line():
  # To the right, where names go first, is the other one; so it is on all sides.
  around = {f"p{i}": [(0.5 + dx, 0.5 + dy)] for i, (dx, dy) in enumerate(_NEAR)}
  _, _, leads, _ = drawn({"dpc": [(0.5, 0.5)]} | around)
  assert leads >= 1
  _, _, leads, _ = drawn({"dpc": [(0.2, 0.5)], "cpt": [(0.8, 0.5)]})
  assert leads == 0


_NEAR = [(0.04, 0), (-0.04, 0), (0, 0.05), (0, -0.05)]


def test_a_line_has_its_color_and_crosses_nothing_if_it_can():
  figure = Figure(figsize=(5, 4))
  axis = figure.subplots()
  axis.set(xlim=(0, 1), ylim=(0, 1))
  figure.draw_without_rendering()
  # A block keeps the name away; a bar stands where it would go first.
  boxes, bar = [(0.42, 0.4, 0.58, 0.6)], (0.58, 0.3, 0.6, 0.7)
  taken = [
    (*axis.transData.transform(box[:2]), *axis.transData.transform(box[2:]))
    for box in [*boxes, bar]
  ]
  labels.place(axis, {"dpc": [(0.5, 0.5)]}, taken, colors={"dpc": "#0072B2"})
  (lead,) = (text for text in axis.texts if not text.get_text())
  assert lead.arrow_patch.get_edgecolor()[:3] == pytest.approx(
    (0, 0x72 / 255, 0xB2 / 255)
  )
  start, offset = axis.transData.transform(lead.xy), np.array(lead.xyann)
  ends = np.linspace(start, start + offset * figure.dpi / 72, 50)
  left, bottom, right, top = taken[-1]
  crossed = (
    (left < ends[:, 0])
    & (ends[:, 0] < right)
    & (bottom < ends[:, 1])
    & (ends[:, 1] < top)
  )
  assert not np.any(crossed)


def test_ranks_put_the_lowest_box_in_front():
  boxes = {
    "long": (0, 0, 2, 9),
    "short": (1, 4, 3, 6),
    "middle": (1, 5, 3, 8),
    "alone": (5, 0, 7, 20),
  }
  ranks = labels.ranks(boxes)
  assert ranks == {"short": 0, "middle": 1, "long": 2, "alone": 0}
  assert list(ranks) == ["short", "middle", "long", "alone"]
  assert labels.ranks({}) == {}


def test_a_legend_has_as_many_columns_as_fit():
  def columns(name):
    figure = Figure(figsize=(5, 4), layout="constrained")
    lines = figure.subplots().plot(np.zeros((2, 4)))
    legend = labels.legend(figure, lines, [name] * 4)
    assert len(figure.legends) == 1
    assert legend.get_window_extent().width <= figure.bbox.width
    return legend._ncols

  assert (columns("dpc"), columns("a name of a method")) == (4, 2)
