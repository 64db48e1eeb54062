"""How every picture is saved: a PNG and an SVG, each of them whole."""

import os
import pathlib
from typing import Any

SUFFIXES = (".png", ".svg")


def save(figure: Any, path: str | pathlib.Path, dpi: int = 150) -> None:
  """Writes a picture as PNG and, under the same name, as SVG.

  Each appears whole or not at all, whatever another process writes there. The
  SVG holds its letters as outlines, needs no font and nothing from elsewhere,
  and is the same whenever it is made.

  Args:
    figure: a matplotlib figure.
    path: of the PNG; the SVG's has another suffix.
    dpi: dots per inch of the PNG.

  Raises:
    OSError: it cannot be written.
  """
  import matplotlib

  path = pathlib.Path(path)
  # Without: random names inside, and the time of writing.
  with matplotlib.rc_context({"svg.hashsalt": path.stem}):
    for suffix in SUFFIXES:
      temporary = path.with_name(f".{path.stem}.{os.getpid()}{suffix}")
      metadata = {"Date": None} if suffix == ".svg" else None
      try:
        figure.savefig(temporary, dpi=dpi, metadata=metadata)
        temporary.replace(path.with_suffix(suffix))
      finally:
        temporary.unlink(missing_ok=True)
