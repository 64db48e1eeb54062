"""The pictures show what they are given."""

import numpy as np
import pytest
from PIL import Image

from dpc_jax.analysis import plots

CAPACITIES = {"stem": 144, "conv": 2304, "big": 36864}


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
    "static8": dict.fromkeys(CAPACITIES, (8, 8, 8)),
    "dpc": {name: (w, w, 8) for name, w in widths.items()},
  }
  plots.bits_per_layer(runs, CAPACITIES, path)
  static = markers(path, plots.COLORS[0], 3)
  dpc = markers(path, plots.COLORS[1], 3)
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
  assert len(pixels(tmp_path / "bits.png", plots.COLORS[0])) > 10 * count


def test_stacked_layers_are_drawn_one_by_one():
  runs = {"dpc": {"block/conv": ([3, 4, 5], [3, 4, 5], [8, 8, 8])}}
  names, sizes = plots._unstacked({"block/conv": 9, "head": 4}, runs)
  assert names == ["block/conv[0]", "block/conv[1]", "block/conv[2]", "head"]
  assert sizes == [9, 9, 9, 4]
  assert plots._width(runs["dpc"], "block/conv[1]") == 4
  assert np.isnan(plots._width(runs["dpc"], "head"))


def test_a_float_run_leaves_no_marker(tmp_path):
  runs = {"float": {}, "dpc": dict.fromkeys(CAPACITIES, (5, 5, 8))}
  plots.bits_per_layer(runs, CAPACITIES, tmp_path / "bits.png")
  assert len(pixels(tmp_path / "bits.png", plots.COLORS[0])) == 0
