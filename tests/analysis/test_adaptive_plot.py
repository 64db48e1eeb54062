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
  first = {"a": 5, "blocks": [4, 6]}
  changes = adaptive_plot._changes(MOVES, 0)

  def bits(*row, steps=(10, 20, 30)):
    return adaptive_plot._bits(row, first, changes, steps)

  assert bits("a", None) == [5, 6, 5]
  assert bits("a", None, steps=(0, 19, 25, 40)) == [5, 5, 6, 5]
  assert bits("blocks", 0) == [4, 3, 3]
  assert bits("blocks", 1) == [6, 6, 6]


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
def figures(monkeypatch):
  """What would have been saved."""
  found = []
  monkeypatch.setattr(
    adaptive_plot.pictures, "save", lambda f, path, dpi: found.append(f)
  )
  return found


@pytest.fixture
def figure(figures):
  adaptive_plot.bits_over_time(SIGNALS, MOVES, ("blocks", "a"), "x.png")
  return figures[0]


def test_the_legend_says_what_a_mark_means(figure):
  (legend,) = figure.legends
  means = {
    text.get_text(): getattr(handle, "get_marker", lambda: None)()
    for text, handle in zip(
      legend.get_texts(), legend.legend_handles, strict=True
    )
  }
  assert means == {
    "gains a bit": "^",
    "loses a bit": "v",
    "gives one to the budget": "X",
    "not known": None,
  }


def test_bits_have_whole_numbers_on_their_scale(figure):
  (scale,) = (
    axis for axis in figure.axes if axis.get_ylabel().startswith("bits")
  )
  np.testing.assert_array_equal(scale.get_yticks(), [3, 4, 5, 6])


def test_decisions_without_a_line_are_columns_too(figures):
  # Of 20..40 the second is not known; the run ends at 70.
  signals = [line(20, a=0.5), line(40, a=-0.5)]
  moves = [move(0, "a", None, 5), move(50, "a", 5, 6)]
  adaptive_plot.bits_over_time(signals, moves, ["a"], "x.png", steps=70)
  top, bottom = figures[-1].axes[:2]
  np.testing.assert_array_equal(top.images[0].get_array().mask, [[0, 0, 1]])
  signals.insert(0, line(10, a=None))
  adaptive_plot.bits_over_time(signals, moves, ["a"], "x.png", steps=70)
  top, bottom = figures[-1].axes[:2]
  z = np.ma.filled(top.images[0].get_array(), np.nan)
  np.testing.assert_array_equal(z, [[np.nan, 0.5, np.nan, -0.5, *[np.nan] * 2]])
  bits = bottom.images[0].get_array()
  np.testing.assert_array_equal(bits, [[5, 5, 5, 5, 6, 6]])
  ticks = [text.get_text() for text in bottom.get_xticklabels()]
  assert ticks == ["10", "20", "30", "40", "50", "60"]
  # Hatched where nothing is drawn.
  assert top.patch.get_hatch()


def line(step, **signals):
  return {"step": step, "signals": signals}


def test_without_unknown_signals_the_legend_names_none(figures):
  signals = [line(10, a=0.5), line(20, a=-0.5)]
  moves = [move(0, "a", None, 5)]
  adaptive_plot.bits_over_time(signals, moves, ["a"], "x.png")
  (legend,) = figures[-1].legends
  assert "not known" not in [text.get_text() for text in legend.get_texts()]


def test_bits_alone_are_a_map_over_the_steps(figures):
  adaptive_plot.bits_alone(MOVES, ("blocks", "a"), "x.png", steps=50)
  axis, scale = figures[-1].axes
  (grid,) = axis.collections
  np.testing.assert_array_equal(
    grid.get_array(), [[4, 3, 3], [6, 6, 6], [5, 6, 5]]
  )
  np.testing.assert_array_equal(
    grid.get_coordinates()[0, :, 0], [0, 20, 30, 50]
  )
  names = [text.get_text() for text in axis.get_yticklabels()]
  assert names == ["blocks[0]", "blocks[1]", "a"]
  # The first layer is above.
  assert axis.get_ylim()[0] > axis.get_ylim()[1]
  assert scale.get_ylabel() == "bits of weights\nand activations"
  written = sorted(text.get_text() for text in axis.texts)
  assert written == ["3", "4", "5", "5", "6", "6"]


def cycle(count):
  moves = [move(0, "a", None, 3)]
  return moves + [
    move(i, "a", 3 + (i - 1) % 2, 3 + i % 2) for i in range(1, count)
  ]


def test_many_moves_have_their_beginning_in_a_map_of_its_own(figures):
  adaptive_plot.bits_alone(cycle(200), ["a"], "x.png", steps=200)
  whole, begin = figures[-1].axes[:2]
  assert (whole.get_xlim(), begin.get_xlim()) == ((0, 200), (0, 24))
  assert len(begin.texts) == 24 and not whole.texts
  assert begin.get_xlabel() == "step, the first 24 alone"
  adaptive_plot.bits_alone(cycle(30), ["a"], "x.png", steps=200)
  assert len(figures[-1].axes) == 2  # a map and its scale
  # More moves than dots.
  adaptive_plot.bits_alone(cycle(5_000), ["a"], "x.png", steps=5_000)
  assert figures[-1].axes[0].collections[0].get_array().shape == (1, 1_000)


def test_where_weights_are_set_the_activations_are_drawn(figures):
  def widths(step, old, new):
    return {
      "step": step,
      "path": "a",
      "old": old and [8, old, 8],
      "new": [8, new, 8],
      "reason": "cpt",
    }

  moves = [widths(0, None, 4), widths(10, 4, 7)]
  adaptive_plot.bits_alone(moves, ["a"], "x.png", steps=20)
  axis, scale = figures[-1].axes
  np.testing.assert_array_equal(axis.collections[0].get_array(), [[4, 7]])
  assert scale.get_ylabel() == "bits of activations"
  assert adaptive_plot.has_moved(moves)
  assert not adaptive_plot.has_moved(moves[:1])
  with pytest.raises(ValueError, match="no bits that moved"):
    adaptive_plot.bits_alone(moves[:1], ["a"], "x.png", steps=20)


def test_what_cannot_be_drawn_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no decision yet"):
    draw(tmp_path / "a.png", signals=[])
  with pytest.raises(ValueError, match="no first widths"):
    draw(tmp_path / "a.png", moves=MOVES[2:])
