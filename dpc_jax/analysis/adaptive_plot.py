"""Pictures of runs whose bits moved: when, and what an adaptive run saw."""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpc_jax.analysis import phrases, pictures

# z beyond it is drawn as it.
_LARGEST_SIGNAL = 1.5
# Up to so many layers have their names on the axis.
_NAMED_LAYERS = 40
# Of one map, in inches.
_TALLEST = 8.0
# Of the marks of moves, which no color of the map may hide.
_LOOK = {"color": "black", "markeredgecolor": "white", "markersize": 7}
# Hatched: gray alone is too like the pale colors of signals near 0.
_UNKNOWN = {"facecolor": "#D4D4D4", "edgecolor": "#8C8C8C", "hatch": "////"}
# Of a picture of bits alone: with more times of moves the first ones have a map
# of their own; with more than the page has dots, widths are drawn at so many
# steps of equal distance.
_MANY, _FIRST, _DOTS = 60, 24, 1_000


def bits_over_time(
  signals: Sequence[Mapping[str, Any]],
  moves: Sequence[Mapping[str, Any]],
  layers: Sequence[str],
  path: str | pathlib.Path,
  *,
  steps: int | None = None,
) -> None:
  """Draws z and the weights' bits of every layer against the step.

  Two maps of layers (rows) and all decisions (columns), whether `signals` has
  them or not: z, in nats, in colors from stable to noisy, hatched gray where it
  is not known, with a triangle where the layer gained or lost a bit, a cross
  where a budget took it; and the bits. Decisions are the multiples of the
  largest number that divides the steps of all lines.

  Args:
    signals: lines of `signals.jsonl`.
    moves: lines of `bits.jsonl`, those of step 0 included.
    layers: paths in the network's order; others are left out. Stacked layers
      are drawn one by one.
    path: the PNG to write; the SVG lies beside it.
    steps: of the run; None ends the axis at the last line of `signals`.

  Raises:
    ValueError: no signals, or no first widths.
  """
  if not signals:
    raise ValueError("signals: none; the run has taken no decision yet")
  first = _first(moves, 0)
  rows = _rows([k for k in layers if k in signals[0]["signals"]], first)
  if not rows:
    raise ValueError("moves: no first widths of the layers of `signals`")
  known = {line["step"]: line["signals"] for line in signals}
  columns = _decisions(known, steps)
  z = np.array(
    [
      [_at(known[at][layer], i) if at in known else np.nan for at in columns]
      for layer, i in rows
    ]
  )
  changes = _changes(moves, 0)
  bits = np.array([_bits(row, first, changes, columns) for row in rows])
  _draw(rows, columns, z, bits, moves, path)


def bits_alone(
  moves: Sequence[Mapping[str, Any]],
  layers: Sequence[str],
  path: str | pathlib.Path,
  *,
  steps: int,
) -> None:
  """Draws the bits of every layer against the step, for runs without signals.

  A map of layers (rows) and steps: of the weights, or of the first operand that
  moves where weights do not. Where bits move at more than 60 steps, a second
  map has the time of the first 24 alone.

  Args:
    moves: lines of `bits.jsonl`, those of step 0 included.
    layers: paths in the network's order; others are left out. Stacked layers
      are drawn one by one.
    path: the PNG to write; the SVG lies beside it.
    steps: of the run.

  Raises:
    ValueError: no widths that moved.
  """
  from matplotlib.figure import Figure  # late and local, as in `plots`

  operand = next((i for i in range(3) if _changes(moves, i)), 0)
  first, changes = _first(moves, operand), _changes(moves, operand)
  rows = _rows(layers, first)
  if not rows or not changes:
    raise ValueError("moves: no bits that moved; nothing to draw")
  times = sorted({0, *(at for some in changes.values() for at, _ in some)})
  ends = [steps] if len(times) <= _MANY else [steps, times[_FIRST]]
  size = (5.8, len(ends) * (_height(rows) + 0.6))
  figure = Figure(figsize=size, layout="constrained")
  axes = figure.subplots(len(ends), 1, squeeze=False)[:, 0]
  name = ("weights", "activations", "gradients")[operand]
  label = f"bits of {name}" if operand else phrases.bits(_shown(moves), "\n")
  colors: dict[str, float] = {}  # of the first map, for both
  for axis, end in zip(axes, ends, strict=True):
    edges = [at for at in times if at < end]
    if len(edges) > _DOTS:
      edges = np.linspace(0, end, _DOTS, endpoint=False).astype(int).tolist()
    bits = np.array([_bits(row, first, changes, edges) for row in rows])
    colors = colors or _ends(bits)
    image = _draw_steps(axis, bits, [*edges, end], colors)
    _add_scale(figure, axis, image, bits, label)
    _name_rows(axis, rows)
  if len(ends) > 1:
    axes[-1].set_xlabel(f"step, the first {ends[-1]:,} alone")
  axes[0].set_xlabel("step")
  pictures.save(figure, path, dpi=200)


def _draw_steps(axis, bits, edges, colors) -> Any:
  """Columns between steps at which bits move."""
  rows = np.arange(len(bits) + 1) - 0.5
  image = axis.pcolormesh(edges, rows, bits, rasterized=True, **colors)
  axis.invert_yaxis()
  _write_bits(axis, bits, edges)
  return image


def has_moved(moves: Sequence[Mapping[str, Any]]) -> bool:
  """Whether, by the lines of `bits.jsonl`, a layer's first widths change."""
  return any(_changes(moves, i).keys() & _first(moves, i) for i in range(3))


def _first(moves, operand) -> dict[str, Any]:
  """{path: first widths}."""
  return {
    line["path"]: line["new"][operand] for line in moves if line["old"] is None
  }


def _changes(moves, operand) -> dict[str, list[tuple[int, Any]]]:
  """{path: (step, new widths)} of the layers that move, by steps."""
  found = {}
  for line in moves:
    old, new = line["old"], line["new"]
    if old is not None and old[operand] != new[operand]:
      found.setdefault(line["path"], []).append((line["step"], new[operand]))
  return found


def _rows(layers, first) -> list[tuple[str, int | None]]:
  """(path, place among stacked ones) of all layers, one by one."""
  return [
    (layer, i)
    for layer in layers
    if layer in first
    for i in _places(first[layer])
  ]


def _decisions(known, steps) -> list[int]:
  """The steps of all decisions, from those of some."""
  period = math.gcd(*known)
  return list(range(period, max(max(known) + 1, steps or 0), period))


def _shown(moves):
  return [line["new"] for line in moves]


def _height(rows) -> float:
  """Of a map, in inches."""
  room = 0.2 if len(rows) <= _NAMED_LAYERS else 0.04
  return max(1.6, min(_TALLEST, room * len(rows)))


def _draw(rows, steps, z, bits, moves, path) -> None:
  from matplotlib.figure import Figure  # late and local, as in `plots`

  figure = Figure(figsize=(5.8, 2 * _height(rows) + 1.5), layout="constrained")
  top, bottom = figure.subplots(2, 1, sharex=True)
  colors = {"vmin": -_LARGEST_SIGNAL, "vmax": _LARGEST_SIGNAL}
  image = _draw_map(top, z, steps, {"cmap": "PuOr_r"} | colors)
  figure.colorbar(image, ax=top, label="z: stable < 0 < noisy")
  top.patch.set(**_UNKNOWN)
  _draw_moves(top, rows, moves, steps)
  _explain_moves(figure, has_unknown=np.any(np.isnan(z)))
  image = _draw_map(bottom, bits, steps, _ends(bits))
  _add_scale(figure, bottom, image, bits, phrases.bits(_shown(moves), "\n"))
  _write_bits(bottom, bits, np.arange(len(steps) + 1) - 0.5)
  bottom.set_xlabel("step")
  for axis in (top, bottom):
    _name_rows(axis, rows)
  pictures.save(figure, path, dpi=200)


def _explain_moves(figure, has_unknown) -> None:
  from matplotlib.lines import Line2D
  from matplotlib.patches import Patch

  texts = {
    "^": "gains a bit",
    "v": "loses a bit",
    "X": "gives one to the budget",
  }
  handles: list[Any] = [
    Line2D([], [], linestyle="", marker=marker, **_LOOK) for marker in texts
  ]
  names = list(texts.values())
  if has_unknown:
    handles.append(Patch(**_UNKNOWN))
    names.append("not known")
  figure.legend(
    handles,
    names,
    loc="outside upper center",
    ncols=4,
    frameon=False,
    fontsize=9,
    handletextpad=0.4,
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


def _bits(row, first, changes, steps) -> list[int]:
  """The bits of a row at each of the steps; a move holds from its own on."""
  layer, i = row
  moved = changes.get(layer, [])
  widths = [_at(first[layer], i), *(_at(new, i) for _, new in moved)]
  count = np.searchsorted([at for at, _ in moved], steps, side="right")
  return [widths[k] for k in count]


def _is_forced(reason, i) -> bool:
  """Whether a budget took the bit; of stacked layers a reason names some."""
  if i is None:
    return reason == "over budget"
  named = re.search(r"over budget \(([\d, ]+)\)", reason)
  return named is not None and str(i) in named[1].split(", ")


def _draw_map(axis, values, steps, colors) -> Any:
  image = axis.imshow(values, aspect="auto", interpolation="nearest", **colors)
  every = max(1, -(-len(steps) // 7))
  axis.set_xticks(range(0, len(steps), every), steps[::every])
  return image


def _ends(bits) -> dict[str, float]:
  return {"vmin": bits.min() - 0.5, "vmax": bits.max() + 0.5}


def _add_scale(figure, axis, image, bits, label) -> None:
  bar = figure.colorbar(image, ax=axis, label=label)
  bar.set_ticks(range(bits.min(), bits.max() + 1))


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


def _write_bits(axis, bits, edges) -> None:
  """The number where a layer begins and wherever it changes.

  None where most of them would not fit: columns have the same height, but not
  the same width.
  """
  room = np.diff(edges) / (edges[-1] - edges[0])
  if bits.size > 2_000 or np.median(room) < 0.02:
    return
  middle = (bits.min() + bits.max()) / 2
  for row, widths in enumerate(bits):
    for column, width in enumerate(widths):
      is_new = column == 0 or width != widths[column - 1]
      if is_new and room[column] >= 0.02:
        axis.text(
          (edges[column] + edges[column + 1]) / 2,
          row,
          str(int(width)),
          ha="center",
          va="center",
          fontsize=9,
          color="black" if width > middle else "white",
        )
