"""A picture is written as PNG and SVG, each whole, and the same every time."""

import pytest
from matplotlib.figure import Figure

from dpc_jax.analysis import pictures


def draw():
  figure = Figure(figsize=(2, 1))
  figure.subplots().plot([1, 2], label="a line")
  return figure


def test_png_and_svg_of_the_same_name(tmp_path):
  pictures.save(draw(), tmp_path / "a.b.png")
  assert {p.name for p in tmp_path.iterdir()} == {"a.b.png", "a.b.svg"}
  assert (tmp_path / "a.b.png").read_bytes().startswith(b"\x89PNG")
  assert b"<svg" in (tmp_path / "a.b.svg").read_bytes()


def test_the_svg_is_the_same_whenever_it_is_made(tmp_path):
  pictures.save(draw(), tmp_path / "a.png")
  first = (tmp_path / "a.svg").read_bytes()
  pictures.save(draw(), tmp_path / "a.png")
  assert (tmp_path / "a.svg").read_bytes() == first


def test_what_fails_leaves_the_picture_before(tmp_path):
  pictures.save(draw(), tmp_path / "a.png")
  before = (tmp_path / "a.png").read_bytes()

  class Broken:
    def savefig(self, path, **rest):
      path.write_bytes(b"half")
      raise OSError(28, "No space left on device")

  with pytest.raises(OSError, match="No space"):
    pictures.save(Broken(), tmp_path / "a.png")
  assert (tmp_path / "a.png").read_bytes() == before
  assert {p.name for p in tmp_path.iterdir()} == {"a.png", "a.svg"}
