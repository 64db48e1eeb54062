"""A picture is written as PNG and SVG, each whole, and the same every time."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

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


def test_one_kind_alone_and_without_its_margins(tmp_path):
  pictures.save(draw(), tmp_path / "a.png")
  pictures.save(draw(), tmp_path / "b.png", suffixes=[".png"], is_trimmed=True)
  assert not (tmp_path / "b.svg").exists()
  with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
    assert a.size == (300, 150)
    assert b.size != a.size
  with pytest.raises(ValueError, match=r"a\.pdf: use \.png or \.svg"):
    pictures.save(draw(), tmp_path / "a.pdf", suffixes=[".pdf"])


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
