"""Training curves are means over seeds at the steps that all have."""

import numpy as np
import pytest

from dpc_jax.analysis import curves, labels, pictures


def line(step, split="train", **values):
  return {"step": step, "split": split, "relative_cost": 0.5, **values}


def run(shift=0.0, cost=0.5, steps=(10, 20, 40)):
  lines = [
    line(step, loss=1 / step + shift, relative_cost=cost) for step in steps
  ]
  return lines + [
    line(step, "test", loss=1.0, accuracy=0.9 + shift, relative_cost=cost)
    for step in steps
  ]


@pytest.fixture
def drawn(monkeypatch):
  """Draws without a file; returns the figure."""
  figures = []
  monkeypatch.setattr(
    pictures, "save", lambda figure, path, dpi=0: figures.append(figure)
  )

  def call(lines, **arguments):
    curves.training_curves(lines, "x.png", **{"metric": "accuracy"} | arguments)
    return figures[-1]

  return call


def test_mean_and_extremes_over_seeds():
  found = curves.curve({0: run(), 1: run(0.03), 2: run(0.09)}, "train", "loss")
  np.testing.assert_allclose(found.x, [10, 20, 40])
  np.testing.assert_allclose(found.mean, 1 / found.x + 0.04)
  np.testing.assert_allclose(found.low, 1 / found.x)
  np.testing.assert_allclose(found.high, 1 / found.x + 0.09)


def test_a_step_that_a_seed_lacks_is_left_out():
  by_seed = {0: run(), 1: run(steps=(10, 40))}
  np.testing.assert_allclose(curves.curve(by_seed, "train", "loss").x, [10, 40])
  assert curves.curve({0: run(), 1: run(steps=(5,))}, "train", "loss") is None
  assert curves.curve({0: run(), 1: []}, "train", "loss") is None
  assert curves.curve({}, "train", "loss") is None


def test_cost_counts_static_runs():
  by_seed = {0: run(cost=0.5), 1: run(cost=0.7)}
  found = curves.curve(by_seed, "test", "accuracy", against="cost", steps=40)
  np.testing.assert_allclose(found.x, [0.15, 0.3, 0.6])


def test_each_method_has_a_line_in_both_parts_and_a_band_over_seeds(drawn):
  figure = drawn({"static8": {0: run()}, "dpc": {0: run(), 1: run(0.01)}})
  for axis in figure.axes:
    assert len(axis.lines) == 2
    assert len(axis.collections) == 1
    colors = {line.get_color() for line in axis.lines}
    assert len(colors) == 2
  (band,) = figure.axes[1].collections
  heights = band.get_paths()[0].vertices[:, 1]
  assert (heights.min(), heights.max()) == pytest.approx((0.9, 0.91))
  (legend,) = figure.legends
  assert [t.get_text() for t in legend.get_texts()] == ["static8", "dpc"]
  assert not any(axis.get_title() for axis in figure.axes)


def test_a_single_evaluation_has_a_bar_for_a_band(drawn):
  lines = {seed: run(seed / 100, steps=(9,)) for seed in range(3)}
  (bar,) = drawn({"dpc": lines}).axes[1].collections
  ((bottom, top),) = bar.get_segments()
  assert (bottom[1], top[1]) == pytest.approx((0.9, 0.92))


def test_what_costs_far_more_is_a_level_line(drawn):
  lines = {"float": {0: run(cost=15.0)}, "dpc": {0: run(cost=0.5)}}
  figure = drawn(lines, against="cost", steps=40)
  assert figure.axes[1].get_xlim()[1] < 1
  texts = [t.get_text() for t in figure.legends[0].get_texts()]
  assert texts == ["float, end at 15.0 x the cost", "dpc"]
  level = figure.axes[1].lines[0].get_ydata()
  np.testing.assert_allclose(level, 0.9)
  # Against steps it is a method as any other.
  figure = drawn(lines)
  assert len(figure.axes[0].lines[0].get_xdata()) == 3
  # Alone it has the axis.
  figure = drawn({"float": lines["float"]}, against="cost", steps=40)
  assert figure.axes[1].get_xlim()[1] > 15


@pytest.mark.parametrize(("last", "scale"), [(0.5, "linear"), (0.01, "log")])
def test_a_loss_of_many_magnitudes_has_a_logarithmic_axis(drawn, last, scale):
  lines = [line(1, loss=2.0), line(2, loss=last)]
  figure = drawn({"dpc": {0: lines}})
  assert figure.axes[0].get_yscale() == scale


def test_an_axis_of_accuracies_is_linear_and_spans_more_than_an_image(drawn):
  def tests(*accuracies):
    return [
      line(i, "test", accuracy=a, perplexity=2 / a, loss=1.0)
      for i, a in enumerate(accuracies, 1)
    ]

  of_chance = {"dpc": {0: tests(0.02, 0.7)}}
  assert drawn(of_chance).axes[1].get_yscale() == "linear"
  figure = drawn(of_chance, metric="perplexity")
  assert figure.axes[1].get_yscale() == "log"
  # Three of 360 images.
  for last in (0.9806, 1.0):
    axis = drawn({"dpc": {0: tests(last - 3 / 360, last)}}).axes[1]
    bottom, top = axis.get_ylim()
    assert 0.0499 < top - bottom < 0.0525
    assert bottom < last - 3 / 360 and last < top < 1.003
  # A wide one stays as it is.
  bottom, top = drawn(of_chance).axes[1].get_ylim()
  assert top - bottom == pytest.approx(1.1 * 0.68)


def test_a_level_line_does_not_make_an_axis_logarithmic(drawn):
  far = [line(i, loss=loss, relative_cost=15.0) for i, loss in ((1, 9), (2, 2))]
  near = [line(1, loss=0.3), line(2, loss=0.2)]
  lines = {"float": {0: far}, "dpc": {0: near}}
  figure = drawn(lines, against="cost", steps=2)
  assert figure.axes[0].get_yscale() == "linear"
  assert drawn(lines).axes[0].get_yscale() == "log"


def test_axes_say_what_they_are(drawn):
  lines = {"dpc": {0: run()}}
  for against, x in (
    ("steps", "step"),
    ("cost", "cost so far, in runs of uniform 6/6"),
  ):
    top, bottom = drawn(
      lines, against=against, steps=40, unit="uniform 6/6"
    ).axes
    assert top.get_ylabel() == "training loss"
    assert (bottom.get_xlabel(), bottom.get_ylabel()) == (x, "test accuracy")


def test_many_methods_share_no_color_and_style(drawn):
  figure = drawn({f"m{i}": {0: run()} for i in range(13)})
  looks = {
    (line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines
  }
  assert len(looks) == 13


def test_methods_look_as_in_other_pictures(drawn):
  lines = {"mine": {0: run()}, "dpc": {0: run()}, "uniform": {0: run()}}
  found = [
    (line.get_color(), line.get_marker(), line.get_linestyle())
    for line in drawn(lines).axes[1].lines
  ]
  assert found == [tuple(look) for look in labels.looks(lines).values()]


def test_nothing_to_draw(tmp_path):
  lines = {"dpc": {0: [], 1: []}}
  assert not curves.has_any(lines)
  with pytest.raises(ValueError, match="nothing to draw"):
    curves.training_curves(lines, tmp_path / "a.png", metric="accuracy")


def test_both_files_are_written(tmp_path):
  curves.training_curves(
    {"dpc": {0: run()}}, tmp_path / "a.png", metric="accuracy"
  )
  assert {p.name for p in tmp_path.iterdir()} == {"a.png", "a.svg"}
