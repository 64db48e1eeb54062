"""The picture of an adaptive run: what it decided by, and the bits it gave."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# z beyond it is drawn as it.
_LARGEST_SIGNAL = 1.5
# Up to so many layers have their names on the axis.
_NAMED_LAYERS = 40


def bits_over_time(
  signals: Sequence[Mapping[str, Any]],
  moves: Sequence[Mapping[str, Any]],
  layers: Sequence[str],
  path: str | pathlib.Path,
) -> None:
  """Draws z and the weights' bits of every layer against the step.

  Two maps of layers (rows) and decisions (columns): z in colors from stable to
  noisy, with a triangle where the layer gained or lost a bit, empty where a
  budget took it; and the bits.

  Args:
    signals: lines of `signals.jsonl`.
    moves: lines of `bits.jsonl`, those of step 0 included.
    layers: paths in the network's order; others are left out. Stacked layers
      are drawn one by one.
    path: the picture to write, PNG or SVG by its suffix.

  Raises:
    ValueError: no signals, or no first widths.
  """
  from matplotlib.figure import Figure  # late and local, as in `plots`

  if not signals:
    raise ValueError("signals: none; the run has taken no decision yet")
  first = {
    line["path"]: line["new"][0] for line in moves if line["old"] is None
  }
  rows = [
    (layer, i)
    for layer in layers
    if layer in first and layer in signals[0]["signals"]
    for i in _places(first[layer])
  ]
  if not rows:
    raise ValueError("moves: no first widths of the layers of `signals`")
  steps = [line["step"] for line in signals]
  z = np.array(
    [[_at(line["signals"][layer], i) for line in signals] for layer, i in rows]
  )
  bits = np.array([_bits(layer, i, first, moves, steps) for layer, i in rows])
  figure = Figure(
    figsize=(10.0, max(2.6, 0.24 * len(rows) + 1.4)), layout="constrained"
  )
  left, right = figure.subplots(1, 2, sharey=True)
  _draw_map(
    figure,
    left,
    z,
    steps,
    {"cmap": "PuOr_r", "vmin": -_LARGEST_SIGNAL, "vmax": _LARGEST_SIGNAL},
    "z, nats: stable < 0 < noisy",
  )
  _draw_moves(left, rows, moves, steps)
  ends = {"vmin": bits.min() - 0.5, "vmax": bits.max() + 0.5}
  _draw_map(figure, right, bits, steps, ends, "bits of the weights")
  _write_bits(right, bits)
  _name_rows(left, rows)
  figure.savefig(path, dpi=150)


def _name_rows(axis, rows) -> None:
  if len(rows) > _NAMED_LAYERS:
    axis.set_ylabel("layer, from input to output")
    return
  names = [layer if i is None else f"{layer}[{i}]" for layer, i in rows]
  axis.set_yticks(range(len(rows)), names, fontsize=8)


def _places(width):
  return [None] if np.ndim(width) == 0 else range(len(width))


def _at(value, i):
  value = value if i is None else value[i]
  return np.nan if value is None else value


def _bits(layer, i, first, moves, steps) -> list[int]:
  """The layer's bits from each decision on."""
  changes = [
    (line["step"], _at(line["new"][0], i))
    for line in moves
    if line["path"] == layer and line["old"] is not None
  ]
  widths, now = [], _at(first[layer], i)
  for step in steps:
    now = next((new for at, new in reversed(changes) if at <= step), now)
    widths.append(now)
  return widths


def _is_forced(reason, i) -> bool:
  """Whether a budget took the bit; of stacked layers a reason names some."""
  if i is None:
    return reason == "over budget"
  named = re.search(r"over budget \(([\d, ]+)\)", reason)
  return named is not None and str(i) in named[1].split(", ")


def _draw_map(figure, axis, values, steps, colors, label) -> None:
  image = axis.imshow(values, aspect="auto", interpolation="nearest", **colors)
  figure.colorbar(image, ax=axis, label=label)
  every = max(1, len(steps) // 6)
  axis.set_xticks(range(0, len(steps), every), steps[::every])
  axis.set_xlabel("step")


def _draw_moves(axis, rows, moves, steps) -> None:
  for row, (layer, i) in enumerate(rows):
    for line in moves:
      if line["path"] != layer or line["old"] is None:
        continue
      old, new = (_at(line[name][0], i) for name in ("old", "new"))
      if old == new or line["step"] not in steps:
        continue
      forced = _is_forced(line["reason"], i)
      axis.plot(
        steps.index(line["step"]),
        row,
        marker="^" if new > old else "v",
        color="none" if forced else "black",
        markeredgecolor="black",
        markersize=5,
      )


def _write_bits(axis, bits) -> None:
  """The number where a layer begins and wherever it changes."""
  if bits.size > 2_000:
    return
  middle = (bits.min() + bits.max()) / 2
  for row, widths in enumerate(bits):
    for column, width in enumerate(widths):
      if column == 0 or width != widths[column - 1]:
        axis.text(
          column,
          row,
          str(int(width)),
          ha="center",
          va="center",
          fontsize=7,
          color="black" if width > middle else "white",
        )
