"""The pictures show what they are given."""

import numpy as np
import pytest
from PIL import Image

from dpc_jax.analysis import labels, plots

CAPACITIES = {"stem": 144, "conv": 2304, "big": 36864}
# Axes and texts are black, and so are static bits.
ORANGE, BLUE, SKY = (
  labels.looks([method])[method].color
  for method in ("uniform", "dpc", "reversed")
)


def pixels(path, color):
  with Image.open(path) as image:
    rgb = np.asarray(image.convert("RGB")).astype(int)
  wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
  return np.argwhere(np.abs(rgb - wanted).max(-1) < 8)


def markers(path, color, count):
  """Centers (x, y) of the markers of a color, the legend's left out."""
  found = pixels(path, color)[:, ::-1]
  labels = [[found[0]]]
  for point in found[np.argsort(found[:, 0])]:
    group = min(labels, key=lambda g: np.abs(np.mean(g, 0) - point).max())
    if np.abs(np.mean(group, 0) - point).max() < 15:
      group.append(point)
    else:
      labels.append([point])
  centers = np.array([np.mean(g, 0) for g in labels if len(g) > 20])
  assert len(centers) == count + 1, "the layers and the legend"
  legend = np.argmax(centers[:, 1])
  return np.delete(centers, legend, 0)[
    np.argsort(np.delete(centers, legend, 0)[:, 0])
  ]


def test_bits_per_layer_draws_widths_above_sizes(tmp_path):
  path = tmp_path / "bits.png"
  widths = {"stem": 8, "conv": 6, "big": 3}
  runs = {
    "uniform": dict.fromkeys(CAPACITIES, (8, 8, 8)),
    "dpc": {name: (w, w, 8) for name, w in widths.items()},
  }
  plots.bits_per_layer(runs, CAPACITIES, path)
  static = markers(path, ORANGE, 3)
  dpc = markers(path, BLUE, 3)
  # Heights are widths, to a straight line: 8, 6, 3 from left to right.
  y = dpc[:, 1]
  assert y[0] == pytest.approx(static[0, 1], abs=3)
  assert (y[2] - y[0]) / (y[1] - y[0]) == pytest.approx(5 / 2, rel=0.05)
  np.testing.assert_allclose(static[:, 1], static[0, 1], atol=3)
  # Side by side, not one on the other.
  assert np.all(dpc[:, 0] - static[:, 0] > 5)
  # The bars below, on a logarithmic axis: sizes grow by 16 and by 16.
  bars = pixels(path, "#999999")
  heights = []
  for x in (static[:, 0] + dpc[:, 0]) / 2:
    heights.append(np.sum(bars[:, 1] == round(x)))
  rises = np.diff(heights)
  assert rises[0] > 10
  assert rises[0] == pytest.approx(rises[1], abs=4)


@pytest.mark.parametrize("count", [1, 110])
def test_any_number_of_layers(tmp_path, count):
  capacities = {f"layer{i}": i + 1 for i in range(count)}
  runs = {"dpc": dict.fromkeys(capacities, (5, 5, 8))}
  plots.bits_per_layer(runs, capacities, tmp_path / "bits.png")
  assert len(pixels(tmp_path / "bits.png", BLUE)) > 10 * count


def test_stacked_layers_are_drawn_one_by_one():
  runs = {"dpc": {"block/conv": ([3, 4, 5], [3, 4, 5], [8, 8, 8])}}
  names, sizes = plots._unstacked({"block/conv": 9, "head": 4}, runs)
  assert names == ["block/conv[0]", "block/conv[1]", "block/conv[2]", "head"]
  assert sizes == [9, 9, 9, 4]
  assert plots._width(runs["dpc"], "block/conv[1]") == 4
  assert np.isnan(plots._width(runs["dpc"], "head"))


@pytest.fixture
def figures(monkeypatch):
  """What would have been saved."""
  found = []
  monkeypatch.setattr(
    plots.pictures, "save", lambda figure, *_, **__: found.append(figure)
  )
  return found


def test_a_float_run_leaves_no_marker(figures):
  runs = {"float": {}, "dpc": dict.fromkeys(CAPACITIES, (5, 5, 8))}
  plots.bits_per_layer(runs, CAPACITIES, "x.png")
  assert [line.get_label() for line in figures[0].axes[0].lines] == ["dpc"]


def test_layers_by_size_keep_the_order_of_equal_ones(figures):
  capacities = {"big": 36, "first": 9, "product": 0, "second": 9}
  runs = {"dpc": {k: (8 - i, 8, 8) for i, k in enumerate(capacities)}}
  plots.bits_per_layer(runs, capacities, "x.png", by_size=True)
  top, bottom = figures[-1].axes
  names = [label.get_text() for label in bottom.get_xticklabels()]
  assert names == ["product", "first", "second", "big"]
  assert top.lines[0].get_ydata().tolist() == [6, 7, 5, 8]
  assert top.lines[0].get_linestyle() == "-"
  assert [bar.get_height() for bar in bottom.patches] == [0, 9, 9, 36]
  assert "fewest weights to the most" in bottom.get_xlabel()
  plots.bits_per_layer(runs, capacities, "x.png")
  top, bottom = figures[-1].axes
  names = [label.get_text() for label in bottom.get_xticklabels()]
  assert names == list(capacities) and bottom.get_xlabel() == ""
  assert top.lines[0].get_linestyle() == "None"


def test_bits_that_moved_and_whose_they_are(figures):
  runs = {
    "cpt": dict.fromkeys(CAPACITIES, (5, 5, 8)),
    "dpc": dict.fromkeys(CAPACITIES, (4, 4, 8)),
  }
  plots.bits_per_layer(runs, CAPACITIES, "x.png", moved=["cpt"])
  axis = figures[-1].axes[0]
  names = [text.get_text() for text in axis.get_legend().get_texts()]
  assert names == ["cpt, at the end", "dpc"]
  assert axis.get_ylabel() == "bits of weights\nand activations"
  runs["dpc"]["stem"] = (4, 8, 8)
  plots.bits_per_layer(runs, CAPACITIES, "x.png")
  assert figures[-1].axes[0].get_ylabel() == "bits of weights"


def test_a_float_run_takes_no_room_beside_a_tick(figures):
  def draw(*widths):
    runs = {f"dpc{b}": dict.fromkeys(CAPACITIES, (b, b, 8)) for b in widths}
    plots.bits_per_layer({"float": {}} | runs, CAPACITIES, "x.png")
    return [line.get_xdata() for line in figures[-1].axes[0].lines]

  np.testing.assert_allclose(draw(5), [[0, 1, 2]])
  np.testing.assert_allclose(np.mean(draw(5, 3), 0), [0, 1, 2])


def test_similarity_is_drawn_on_an_axis_that_keeps_its_nines_apart(tmp_path):
  path = tmp_path / "bounds.png"
  # 1 - similarity of the mean is 0.1, 0.01, 0.001: a straight line.
  layers = {
    "good": {2: 0.92, 3: 0.992, 4: 0.9992},
    "bad": {2: 0.88, 3: 0.988, 4: 0.9988},
  }
  plots.similarity_per_width(layers, (0.95, 0.995), (3, 4), path)
  # The legend stands above the axes, apart from what is drawn in them.
  with Image.open(path) as image:
    top = image.height // 12
  mean = pixels(path, plots.COLORS[0])
  mean = mean[mean[:, 0] > top]
  left, right = mean[np.argmin(mean[:, 1])], mean[np.argmax(mean[:, 1])]
  # Similarity grows upwards.
  assert left[0] - right[0] > 200
  middle = mean[np.abs(mean[:, 1] - (left[1] + right[1]) / 2) < 2]
  assert np.mean(middle[:, 0]) == pytest.approx((left[0] + right[0]) / 2, abs=4)
  # The worst below the mean; the bounds' lines at widths 3 and 4.
  worst = pixels(path, plots.COLORS[1])
  worst = worst[worst[:, 0] > top]
  assert np.mean(worst[:, 0]) > np.mean(mean[:, 0]) + 5
  lines = pixels(path, plots.COLORS[2])
  columns = np.bincount(lines[:, 1])
  for x in ((left[1] + right[1]) / 2, right[1]):
    assert columns[round(x) - 8 : round(x) + 9].sum() > 150
  assert columns[: round((left[1] + right[1]) / 2) - 8].sum() == 0


@pytest.mark.parametrize(
  ("layers", "bounds"),
  [
    ({"one": {8: 1.0}}, (8, 8)),
    ({"exact": {2: 1.0, 3: 1.0}, "not": {2: 0.5, 3: 0.999}}, (3, None)),
    ({f"layer{i}": {2: 0.9, 8: 1 - 1e-9} for i in range(110)}, (None, None)),
  ],
)
def test_similarities_of_any_size_are_drawn(tmp_path, layers, bounds):
  path = tmp_path / "bounds.png"
  plots.similarity_per_width(layers, (0.95, 1), bounds, path)
  assert len(pixels(path, plots.COLORS[0])) > 50
  has_bounds = any(bound is not None for bound in bounds)
  assert (len(pixels(path, plots.COLORS[2])) > 0) == has_bounds


def centers(path, color):
  """Mean position (x, y) of the pixels of a color."""
  return pixels(path, color)[:, ::-1].mean(0)


def test_pareto_places_cost_and_metric(tmp_path):
  path = tmp_path / "pareto.png"
  points = {
    "uniform": (1.0, 0.92, None, None),
    "reversed": (0.6, 0.90, None, None),
    "dpc": (0.7, 0.94, None, None),
  }
  plots.pareto(points, ["reversed", "dpc"], path, metric="accuracy")
  uniform, other, dpc = (centers(path, c) for c in (ORANGE, SKY, BLUE))
  assert (dpc - other)[0] / (uniform - other)[0] == pytest.approx(
    0.25, abs=0.02
  )
  # Pixels count downwards.
  assert (dpc - other)[1] / (uniform - other)[1] == pytest.approx(2, rel=0.06)
  assert dpc[1] < other[1]
  # On the frontier: filled; off it: an outline around white.
  filled, hollow = (len(pixels(path, color)) for color in (BLUE, ORANGE))
  assert filled > 1.5 * hollow


def test_pareto_bars_are_the_intervals(tmp_path):
  path = tmp_path / "pareto.png"
  points = {
    "uniform": (1.0, 0.92, 0.90, 0.94),
    "dpc": (0.7, 0.93, 0.92, 0.94),
    "reversed": (0.8, 0.90, None, None),
  }
  plots.pareto(points, ["dpc"], path, metric="accuracy")
  heights = [np.ptp(pixels(path, color)[:, 0]) for color in (ORANGE, BLUE, SKY)]
  assert heights[0] / heights[1] == pytest.approx(2, rel=0.03)
  assert heights[2] < 40  # the marker alone


def test_pareto_ends_at_the_largest_value(tmp_path):
  # The middle bar reaches 1; the left one would go on to 1.9.
  points = {
    "uniform": (0.5, 0.9, 0.0, 1.9),
    "dpc": (0.7, 0.95, 0.0, 1.0),
  }
  heights = []
  for highest in (None, 1.0):
    path = tmp_path / f"{highest}.png"
    plots.pareto(points, [], path, metric="accuracy", highest=highest)
    wide, exact = (np.ptp(pixels(path, c)[:, 0]) for c in (ORANGE, BLUE))
    heights.append(wide / exact)
  assert heights[0] == pytest.approx(1.9, rel=0.03)
  assert heights[1] == pytest.approx(1.04, abs=0.03)


def test_pareto_of_accuracies_spans_more_than_an_image(figures):
  points = {
    "a": (0.5, 0.98, None, None),
    "b": (0.7, 0.98 + 1 / 360, None, None),
  }
  spans = []
  for highest in (1.0, None):
    plots.pareto(points, [], "x.png", metric="accuracy", highest=highest)
    bottom, top = figures[-1].axes[0].get_ylim()
    assert bottom < 0.98 and 0.98 + 1 / 360 < top <= 1.003
    spans.append(top - bottom)
  assert 0.0499 < spans[0] < 0.0525
  assert spans[1] == pytest.approx(1.24 / 360)


def test_pareto_draws_equal_costs_where_they_are_and_tells_them_apart(figures):
  points = {
    "dpc": (0.5614, 0.9066, 0.90, 0.914),
    "uniform": (0.562, 0.904, 0.89, 0.916),
    "twin": (0.5614, 0.9066, None, None),
    "adaptive": (0.54, 0.9044, 0.89, 0.91),
    "static8": (1.0, 0.91, 0.9, 0.93),
  }
  plots.pareto(points, ["dpc"], "x.png", metric="accuracy", highest=1.0)
  axis = figures[0].axes[0]
  bars = {line.get_color(): line for line in axis.lines if _is_bar(line)}
  found = {line.get_color(): line for line in axis.lines if _is_mark(line)}
  for name, look in labels.looks(points).items():
    (cost, mean, low, high) = points[name]
    mark = found[look.color]
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (cost, mean)
    if low is not None:
      bar = bars[look.color]
      np.testing.assert_array_equal(bar.get_xdata(), [cost, cost])
      np.testing.assert_array_equal(bar.get_ydata(), [low, high])
  colors = {name: look.color for name, look in labels.looks(points).items()}
  front, behind, alone = (
    bars[colors[k]] for k in ("dpc", "uniform", "static8")
  )
  assert behind.get_linewidth() > front.get_linewidth() + 1
  assert behind.get_zorder() < front.get_zorder()
  assert alone.get_linewidth() == front.get_linewidth()
  sizes = [found[colors[k]].get_markersize() for k in ("dpc", "twin")]
  assert abs(sizes[0] - sizes[1]) > 3


def _is_bar(line):
  return len(line.get_xdata()) == 2 and line.get_linestyle() == "-"


def _is_mark(line):
  return len(line.get_xdata()) == 1 and line.get_marker() != "_"


def test_pareto_draws_a_far_method_as_a_line(tmp_path):
  path = tmp_path / "pareto.png"
  points = {
    "pfq": (16.0, 0.93, 0.92, 0.94),
    "uniform": (1.0, 0.92, 0.91, 0.93),
    "dpc": (0.7, 0.91, 0.90, 0.92),
  }
  plots.pareto(points, ["pfq"], path, metric="accuracy")
  uniform, dpc = (centers(path, c) for c in (ORANGE, BLUE))
  # The axis belongs to the two others.
  with Image.open(path) as image:
    assert (uniform - dpc)[0] > image.width / 3
  line = pixels(path, labels.looks(["pfq"])["pfq"].color)
  row = np.bincount(line[:, 0]).argmax()
  assert np.ptp(line[line[:, 0] == row][:, 1]) > (uniform - dpc)[0]


@pytest.mark.parametrize("cost", [1.0, 16.0])
def test_pareto_of_a_single_method(tmp_path, cost):
  path = tmp_path / "pareto.png"
  points = {"dpc": (cost, 0.9, None, None)}
  plots.pareto(points, ["dpc"], path, metric="accuracy")
  assert len(pixels(path, BLUE)) > 100


def test_a_method_looks_the_same_in_every_picture(figures):
  others = ("float", "static8", "uniform", "adaptive")
  found = set()
  for methods in (("dpc", *others), (*others, "dpc")):
    runs = {k: dict.fromkeys(CAPACITIES, (5, 5, 8)) for k in methods}
    plots.bits_per_layer(runs, CAPACITIES, "x.png")
    points = {k: (0.5, 0.9 - i / 90, None, None) for i, k in enumerate(methods)}
    plots.pareto(points, [], "x.png", metric="accuracy")
    bits, pareto = (figure.axes[0].lines for figure in figures[-2:])
    found.add(_look_of(bits[methods.index("dpc")]))
    found |= {_look_of(line) for line in pareto if line.get_color() == BLUE}
  assert found == {(BLUE, "o")}


def _look_of(line):
  return line.get_color(), line.get_marker()


def test_many_methods_share_no_color_and_marker(tmp_path):
  capacities = {"a": 9, "b": 4}
  runs = {f"m{i}": dict.fromkeys(capacities, (5, 5, 8)) for i in range(9)}
  plots.bits_per_layer(runs, capacities, tmp_path / "bits.png")
  looks = {tuple(plots.look(i).values()) for i in range(36)}
  assert len(looks) == 36
