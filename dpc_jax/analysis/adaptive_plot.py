"""The picture of an adaptive run: what it decided by, and the bits it gave."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpc_jax.analysis import pictures

# z beyond it is drawn as it.
_LARGEST_SIGNAL = 1.5
# Up to so many layers have their names on the axis.
_NAMED_LAYERS = 40
# Of one map, in inches.
_TALLEST = 8.0
# Of the marks of moves, which no color of the map may hide.
_LOOK = {"color": "black", "markeredgecolor": "white", "markersize": 7}


def bits_over_time(
  signals: Sequence[Mapping[str, Any]],
  moves: Sequence[Mapping[str, Any]],
  layers: Sequence[str],
  path: str | pathlib.Path,
) -> None:
  """Draws z and the weights' bits of every layer against the step.

  Two maps of layers (rows) and decisions (columns): z, in nats, in colors from
  stable to noisy, blank where it is not known, with a triangle where the layer
  gained or lost a bit, a cross where a budget took it; and the bits.

  Args:
    signals: lines of `signals.jsonl`.
    moves: lines of `bits.jsonl`, those of step 0 included.
    layers: paths in the network's order; others are left out. Stacked layers
      are drawn one by one.
    path: the PNG to write; the SVG lies beside it.

  Raises:
    ValueError: no signals, or no first widths.
  """
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
  _draw(rows, steps, z, bits, moves, path)


def _draw(rows, steps, z, bits, moves, path) -> None:
  from matplotlib.figure import Figure  # late and local, as in `plots`

  room = 0.2 if len(rows) <= _NAMED_LAYERS else 0.04
  height = max(1.6, min(_TALLEST, room * len(rows)))
  figure = Figure(figsize=(5.8, 2 * height + 1.5), layout="constrained")
  top, bottom = figure.subplots(2, 1, sharex=True)
  _draw_map(
    figure,
    top,
    z,
    steps,
    {"cmap": "PuOr_r", "vmin": -_LARGEST_SIGNAL, "vmax": _LARGEST_SIGNAL},
    "z: stable < 0 < noisy",
  )
  _draw_moves(top, rows, moves, steps)
  _explain_moves(figure)
  ends = {"vmin": bits.min() - 0.5, "vmax": bits.max() + 0.5}
  _draw_map(figure, bottom, bits, steps, ends, "bits of the weights")
  _write_bits(bottom, bits)
  bottom.set_xlabel("step")
  for axis in (top, bottom):
    _name_rows(axis, rows)
  pictures.save(figure, path, dpi=200)


def _explain_moves(figure) -> None:
  from matplotlib.lines import Line2D

  texts = {
    "^": "gains a bit",
    "v": "loses a bit",
    "X": "gives one to the budget",
  }
  figure.legend(
    [Line2D([], [], linestyle="", marker=marker, **_LOOK) for marker in texts],
    texts.values(),
    loc="outside upper center",
    ncols=3,
    frameon=False,
    fontsize=9,
    handletextpad=0.1,
    columnspacing=1.2,
  )


def _name_rows(axis, rows) -> None:
  if len(rows) > _NAMED_LAYERS:
    axis.set_ylabel("layer, from input to output")
    return
  names = [layer if i is None else f"{layer}[{i}]" for layer, i in rows]
  axis.set_yticks(range(len(rows)), names, fontsize=9)


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
  bar = figure.colorbar(image, ax=axis, label=label)
  if np.issubdtype(values.dtype, np.integer):
    bar.set_ticks(range(values.min(), values.max() + 1))
  every = max(1, -(-len(steps) // 7))
  axis.set_xticks(range(0, len(steps), every), steps[::every])


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
        marker="X" if forced else "^" if new > old else "v",
        **_LOOK,
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
          fontsize=9,
          color="black" if width > middle else "white",
        )
