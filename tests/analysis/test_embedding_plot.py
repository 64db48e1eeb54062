"""The figure of embeddings: its panels, legend, caption and files."""

import numpy as np
import pytest
from matplotlib import colors
from PIL import Image

from dpc_jax.analysis import embedding_plot, pictures, plots

RESULT = {
  "perplexity": 30.0,
  "seed": 0,
  "pictured": 2000,
  "examples": 10_000,
  "neighbors": 7,
}


def panel(name, count=50, classes=10, points=None):
  rng = np.random.default_rng(count)
  return embedding_plot.Panel(
    name,
    rng.normal(size=(count, 2)) if points is None else points,
    np.arange(count) % classes,
    [f"below {name}"],
  )


@pytest.fixture
def drawn(monkeypatch):
  """Draws without a file; returns the figure."""
  figures = []
  monkeypatch.setattr(
    pictures, "save", lambda figure, *_, **__: figures.append(figure)
  )

  def call(panels, class_names, **arguments):
    embedding_plot.draw(panels, class_names, ["x.png"], **arguments)
    return figures[-1]

  return call


def test_the_figure_has_panels_and_one_legend(drawn):
  names = [f"class-{i}" for i in range(10)]
  figure = drawn([panel("float"), panel("dpc")], names)
  assert [axis.get_title() for axis in figure.axes] == ["float", "dpc"]
  below = [axis.get_xlabel() for axis in figure.axes]
  assert below == ["below float", "below dpc"]
  (legend,) = figure.legends
  assert [t.get_text() for t in legend.get_texts()] == names
  for i, handle in enumerate(legend.legend_handles):
    look = plots.look(i, embedding_plot.COLORS, embedding_plot.MARKERS)
    assert (handle.get_color(), handle.get_marker()) == tuple(look.values())


def test_the_files_are_written_and_the_same_again(tmp_path):
  names = [f"class-{i}" for i in range(10)]
  paths = [tmp_path / "a.png", tmp_path / "a.svg"]
  before = []
  for _ in range(2):
    embedding_plot.draw([panel("float"), panel("dpc")], names, paths)
    before.append([path.read_bytes() for path in paths])
  assert before[0] == before[1]
  assert sorted(tmp_path.iterdir()) == paths
  with Image.open(paths[0]) as image:
    width, height = image.size
  assert width > 1.2 * height > 600
  # Letters are outlines, as in every picture: no font is needed.
  assert b"<svg" in before[0][1] and b"<text" not in before[0][1]
  embedding_plot.draw([panel("dpc")], names, [str(tmp_path / "one.svg")])
  assert not (tmp_path / "one.png").exists()


def test_many_classes_and_runs(drawn):
  names = [f"class-{i}" for i in range(100)]
  figure = drawn([panel(f"run {i}", 200, 100) for i in range(4)], names)
  assert not figure.legends
  assert sum(axis.get_xlabel() != "" for axis in figure.axes) == 4
  assert "100 classes share 50 combinations" in figure.get_supxlabel()
  figure = drawn([panel("run", 200, 50)], names[:50])
  assert "share" not in figure.get_supxlabel()


# Two blobs far apart: no point lies amid the other class.
APART = np.eye(2)[np.arange(50) % 2] * 9 + panel("").points / 100


def test_the_caption_stands_below_all_panels(drawn):
  caption = embedding_plot.parameters(RESULT)
  assert caption == (
    "t-SNE: perplexity 30, seed 0, 2,000 points of 10,000 examples, the numbers"
    " of all; k-NN: k = 7"
  )
  panels = [panel("a", classes=2, points=APART)] * 2
  figure = drawn(panels, ["x", "y"], caption=caption)
  assert figure.get_supxlabel().replace("\u00a0", " ").splitlines() == [
    caption,
    "in brackets: 95 % intervals over the examples",
  ]
  text = drawn(panels, ["x", "y"]).get_supxlabel()
  assert text.startswith("in brackets")
  all_of = embedding_plot.parameters(RESULT | {"pictured": 10_000})
  assert "10,000 points; k-NN" in all_of


def test_a_caption_is_as_wide_as_the_panels(drawn):
  lines = drawn([panel("a")], ["x"] * 10, caption="word " * 40)
  lines = lines.get_supxlabel().splitlines()
  assert len(lines) > 3 and max(map(len, lines)) < 60


def test_misplaced_points_lie_among_another_class():
  points = np.array([[0, 0], [1, 0], [9, 9], [9, 9], [9, 8], [8, 9]])
  found = embedding_plot._misplaced(points, np.array([3, 3, 3, 7, 7, 7]))
  assert found.tolist() == [False, False, True, False, False, False]


def test_misplaced_points_are_drawn_on_top(drawn):
  points = APART.copy()
  points[4] = [0, 9]  # of class 0, amid class 1
  figure = drawn([panel("a", classes=2, points=points)], ["x", "y"])
  (axis,) = figure.axes
  layers = sorted(axis.collections, key=lambda layer: layer.get_zorder())
  np.testing.assert_allclose(layers[-1].get_offsets(), points[4:5])
  assert [len(layer.get_offsets()) for layer in layers] == [24, 25, 1]
  assert "drawn on top" in figure.get_supxlabel()


def test_classes_differ_in_color_or_marker():
  looks = [
    tuple(plots.look(i, embedding_plot.COLORS, embedding_plot.MARKERS).values())
    for i in range(50)
  ]
  assert len(set(looks)) == 50
  assert len({color for color, _ in looks[:10]}) == 10


# From linear RGB to itself, as a reader sees it: Machado et al. 2009.
VISIONS = {
  "normal": np.eye(3),
  "deuteranopia": [
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.011820, 0.042940, 0.968881],
  ],
  "protanopia": [
    [0.152286, 1.052583, -0.204868],
    [0.114503, 0.786281, 0.099216],
    [-0.003882, -0.048116, 1.051998],
  ],
}


def lab(rgb, vision):
  """CIELAB (D65) of sRGB colors in [0, 1], (N, 3)."""
  linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
  seen = np.clip(linear @ np.transpose(VISIONS[vision]), 0, 1)
  to_xyz = np.array(
    [
      [0.4124564, 0.3575761, 0.1804375],
      [0.2126729, 0.7151522, 0.0721750],
      [0.0193339, 0.1191920, 0.9503041],
    ]
  )
  xyz = seen @ to_xyz.T / [0.95047, 1, 1.08883]
  small = xyz <= 216 / 24389
  f = np.where(small, (24389 / 27 * xyz + 16) / 116, np.cbrt(xyz))
  x, y, z = f.T
  return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


@pytest.mark.parametrize("vision", VISIONS)
def test_classes_of_one_marker_differ_in_color_for_every_reader(vision):
  rgb = np.array([colors.to_rgb(c) for c in embedding_plot.COLORS])
  white = lab(np.array([[1.0, 1, 1]]), "normal")
  np.testing.assert_allclose(white, [[100, 0, 0]], atol=0.02)
  seen = lab(rgb, vision)
  assert np.all(np.linalg.norm(seen[:5] - seen[5:], axis=1) > 50)
