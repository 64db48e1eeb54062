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


def test_bits_per_layer_draws_each_run_at_its_height(tmp_path):
  path = tmp_path / "bits.png"
  runs = {
    "static8": dict.fromkeys(CAPACITIES, (8, 8, 8)),
    "dpc": dict.fromkeys(CAPACITIES, (3, 3, 8)),
  }
  plots.bits_per_layer(runs, CAPACITIES, path)
  # The legend has one marker of each color too: medians leave it out.
  static = np.median(pixels(path, plots.COLORS[0])[:, 0])
  dpc = np.median(pixels(path, plots.COLORS[1])[:, 0])
  with Image.open(path) as image:
    assert static < dpc < image.height * 0.6


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
