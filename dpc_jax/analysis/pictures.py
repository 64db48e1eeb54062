"""How every picture is saved: as PNG and as SVG, each of them whole."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

SUFFIXES = (".png", ".svg")


def save(
  figure: Any,
  path: str | pathlib.Path,
  dpi: int = 150,
  suffixes: Sequence[str] = SUFFIXES,
  is_trimmed: bool = False,
) -> None:
  """Writes a picture as PNG and, under the same name, as SVG.

  Each appears whole or not at all, whatever another process writes there. The
  SVG holds its letters as outlines, needs no font and nothing from elsewhere,
  and is the same whenever it is made.

  Args:
    figure: a matplotlib figure.
    path: of the PNG; the SVG's has another suffix.
    dpi: dots per inch of the PNG.
    suffixes: of the files to write, if not both.
    is_trimmed: whether the empty margins of the figure are cut off.

  Raises:
    OSError: it cannot be written.
    ValueError: another suffix.
  """
  import matplotlib

  path = pathlib.Path(path)
  box = "tight" if is_trimmed else None
  if other := set(suffixes).difference(SUFFIXES):
    raise ValueError(
      f"{path.stem}{min(other)}: use {' or '.join(SUFFIXES)} for a picture"
    )
  # Without: random names inside, and the time of writing.
  with matplotlib.rc_context({"svg.hashsalt": path.stem}):
    for suffix in suffixes:
      temporary = path.with_name(f".{path.stem}.{os.getpid()}{suffix}")
      metadata = {"Date": None} if suffix == ".svg" else None
      try:
        figure.savefig(temporary, dpi=dpi, metadata=metadata, bbox_inches=box)
        temporary.replace(path.with_suffix(suffix))
      finally:
        temporary.unlink(missing_ok=True)
