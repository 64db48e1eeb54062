"""Exponents of growth, along a line of measured sizes."""

from collections.abc import Sequence
from typing import Any

from experiments.bench import turns

BATCH, DEPTH = AXES = ("batch", "macs")
# {field of a point: its name in tables}
FITTED = {
  "milliseconds": "ms",
  "temporary_mib": "temporaries, MiB",
  "peak_mib": "peak, MiB",
}


def fits(points: Sequence[dict[str, Any]], axis: str) -> dict[str, Any] | None:
  """{field: {label: `turns.power_law`}} along a line of points.

  Args:
    points: of `measure`, the crossing first.
    axis: "batch" or "macs".

  Returns:
    None where fewer than two points of the line were measured.
  """
  line = along(points, axis)
  if len(line) < 2:
    return None
  x = [point[axis] for point in line]
  return {
    field: {
      label: turns.power_law(
        x, [point["variants"][label][field] for point in line]
      )
      for label in line[0]["variants"]
    }
    for field in FITTED
  }


def along(points: Sequence[dict[str, Any]], axis: str) -> list[dict[str, Any]]:
  """The measured points of one of the two lines, from small to large."""
  fixed = "depth" if axis == BATCH else "batch"
  line = [
    point
    for point in points
    if point[fixed] == points[0][fixed] and point["skipped"] is None
  ]
  return sorted(line, key=lambda point: point[axis])
