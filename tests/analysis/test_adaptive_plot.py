"""The picture of an adaptive run shows its signals, moves and bits."""

import numpy as np
import pytest
from PIL import Image

from dpc_jax.analysis import adaptive_plot


def move(step, path, old, new, reason="noisy"):
  widths = (None if old is None else [old, old, 8], [new, new, 8])
  return {
    "step": step,
    "path": path,
    "old": widths[0],
    "new": widths[1],
    "reason": reason,
  }


SIGNALS = [
  {"step": 10 * i, "signals": {"a": z, "blocks": [0.0, None]}}
  for i, z in enumerate((0.1, 2.0, -2.0), 1)
]
MOVES = [
  move(0, "a", None, 5),
  move(0, "blocks", None, [4, 6]),
  move(20, "a", 5, 6),
  move(20, "blocks", [4, 6], [3, 6], "over budget (0)"),
  move(30, "a", 6, 5, "stable"),
]


def draw(path, signals=SIGNALS, moves=MOVES, layers=("blocks", "a")):
  adaptive_plot.bits_over_time(signals, moves, layers, path)
  with Image.open(path) as image:
    return np.asarray(image.convert("RGB")).astype(int)


def test_bits_hold_from_the_step_of_a_move():
  steps = [10, 20, 30]
  assert adaptive_plot._bits("a", None, {"a": 5}, MOVES, steps) == [5, 6, 5]
  first = {"blocks": [4, 6]}
  assert adaptive_plot._bits("blocks", 0, first, MOVES, steps) == [4, 3, 3]
  assert adaptive_plot._bits("blocks", 1, first, MOVES, steps) == [6, 6, 6]


@pytest.mark.parametrize(
  ("reason", "i", "forced"),
  [
    ("over budget", None, True),
    ("noisy", None, False),
    ("noisy (1), over budget (0, 12)", 0, True),
    ("noisy (1), over budget (0, 12)", 1, False),
    ("noisy (1), over budget (0, 12)", 12, True),
    ("noisy (0)", 0, False),
  ],
)
def test_a_budgets_moves_are_told_apart(reason, i, forced):
  assert adaptive_plot._is_forced(reason, i) is forced


def test_moves_are_drawn_where_they_happen():
  drawn = []

  class Axis:
    def plot(self, x, y, marker, color, **rest):
      drawn.append((x, y, marker, color))

  rows = [("blocks", 0), ("blocks", 1), ("a", None)]
  adaptive_plot._draw_moves(Axis(), rows, MOVES, [10, 20, 30])
  assert drawn == [
    (1, 0, "X", "black"),
    (1, 2, "^", "black"),
    (2, 2, "v", "black"),
  ]


def test_signals_are_drawn(tmp_path):
  whole = draw(tmp_path / "whole.png")
  calm = [{**s, "signals": {**s["signals"], "a": 0.0}} for s in SIGNALS]
  assert np.any(whole != draw(tmp_path / "calm.png", signals=calm))


@pytest.fixture
def figure(monkeypatch):
  figures = []
  monkeypatch.setattr(
    adaptive_plot.pictures, "save", lambda f, path, dpi: figures.append(f)
  )
  adaptive_plot.bits_over_time(SIGNALS, MOVES, ("blocks", "a"), "x.png")
  return figures[0]


def test_the_legend_says_what_a_mark_means(figure):
  (legend,) = figure.legends
  means = {
    text.get_text(): handle.get_marker()
    for text, handle in zip(
      legend.get_texts(), legend.legend_handles, strict=True
    )
  }
  assert means == {
    "gains a bit": "^",
    "loses a bit": "v",
    "gives one to the budget": "X",
  }


def test_bits_have_whole_numbers_on_their_scale(figure):
  (scale,) = (
    axis for axis in figure.axes if axis.get_ylabel().startswith("bits")
  )
  np.testing.assert_array_equal(scale.get_yticks(), [3, 4, 5, 6])


def test_what_cannot_be_drawn_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no decision yet"):
    draw(tmp_path / "a.png", signals=[])
  with pytest.raises(ValueError, match="no first widths"):
    draw(tmp_path / "a.png", moves=MOVES[2:])
