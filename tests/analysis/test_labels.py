"""Names stand beside their points and hide nothing."""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure

from dpc_jax.analysis import labels


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
