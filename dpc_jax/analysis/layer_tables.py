"""Tables of a network's layers: sizes, widths, and what each one costs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpc_jax.analysis import cells
from dpc_jax.cost import bitops
from dpc_jax.quant import grids

Table = tuple[list[tuple[str, ...]], tuple[str, ...]]

ABOUT_COST = (
  "MBitOPs are BitOPs / 10^6 of one training step per sample, forward and"
  " backward, at the widths of the run's end; a layer in float counts as 32"
  " bits."
)


def widths(runs: Mapping[str, Mapping[str, Any]]) -> Table:
  """N_k, MACs and the widths at the end of the run, a column per method.

  The last line has the summaries' `mean_bits`, of the whole run.

  Args:
    runs: {method: summary} of one model, at least one.

  Returns:
    (lines, header).
  """
  header = ("layer", "N_k", "MACs", *(f"bits, {method}" for method in runs))
  layers = next(iter(runs.values()))["layers"]
  lines = [
    (
      cells.code(path),
      f"{cost['weights']:,}",
      f"{cost['macs']:,}",
      *(cells.widths(run["bits"].get(path)) for run in runs.values()),
    )
    for path, cost in layers.items()
  ]
  means = (f"{run['mean_bits']:.2f}" for run in runs.values())
  return [*lines, ("mean over the run", "", "", *means)], header


def about_widths(seeds: str, moved: Sequence[str]) -> str:
  """What the figures of `widths` are.

  Args:
    seeds: of the runs shown, in words.
    moved: the methods whose bits change during a run.
  """
  text = (
    f"Bits are weights/activations/gradients at the end of the run ({seeds})."
  )
  if moved:
    names = ", ".join(map(cells.plain, moved))
    text += f" During the run they moved: {names}."
  return text + (
    " The last line is the weights' mean over the quantized layers and all"
    " steps."
  )


def costs(runs: Mapping[str, Mapping[str, Any]], b_max: int) -> Table:
  """MBitOPs of a training step per sample, layer by layer and in all.

  Below the sum stands what static B_max costs, where a run tells which layers
  that is about, and the sum as a multiple of it.

  Args:
    runs: {method: summary} of one model, at least one.
    b_max: the width of the static reference.

  Returns:
    (lines, header).
  """
  found = {method: _bitops(run) for method, run in runs.items()}
  paths = list(next(iter(runs.values()))["layers"])
  lines = [
    (
      cells.code(path),
      *(_mega(of_run.layers[path].total) for of_run in found.values()),
    )
    for path in paths
  ]
  lines.append(("sum", *(_mega(of_run.total) for of_run in found.values())))
  static = _static(runs, b_max)
  if static is not None:
    lines.append(
      (
        f"sum / static {b_max}/{b_max}",
        *(f"{of_run.total / static.total:.4f}" for of_run in found.values()),
      )
    )
  return lines, ("MBitOPs", *runs)


def run(summary: Mapping[str, Any], b_max: int) -> Table:
  """All of it for one run: sizes, widths, cost and the share of each layer.

  Args:
    summary: of the run.
    b_max: the width of the static reference.

  Returns:
    (lines, header).
  """
  found = _bitops(summary)
  static = _static({"": summary}, b_max)
  header = [
    "layer",
    "N_k",
    "MACs",
    "bits, w/a/g",
    "forward",
    "backward",
    "share",
  ]
  if static is not None:
    header.append(f"/ static {b_max}/{b_max}")
  lines = []
  for path, cost in summary["layers"].items():
    layer = found.layers[path]
    line = [
      cells.code(path),
      f"{cost['weights']:,}",
      f"{cost['macs']:,}",
      cells.widths(summary["bits"].get(path)),
      _mega(layer.forward),
      _mega(layer.backward),
      f"{layer.total / found.total:.1%}",
    ]
    if static is not None:
      line.append(f"{layer.total / static.layers[path].total:.3f}")
    lines.append(tuple(line))
  weights, macs = (
    sum(cost[k] * cost["layers"] for cost in summary["layers"].values())
    for k in ("weights", "macs")
  )
  total = [
    "sum",
    f"{weights:,}",
    f"{macs:,}",
    "",
    _mega(found.forward),
    _mega(found.backward),
    "100%",
  ]
  if static is not None:
    total.append(f"{found.total / static.total:.3f}")
  return [*lines, tuple(total)], tuple(header)


def has_widths(run: Mapping[str, Any]) -> bool:
  """Whether any layer of a summary is quantized."""
  return bool(run["bits"])


def _bitops(run: Mapping[str, Any], static: int | None = None) -> bitops.Bitops:
  """At the run's last widths, or with its layers at a static width."""
  sizes = {
    path: bitops.LayerCost(cost["macs"], cost["weights"], cost["layers"])
    for path, cost in run["layers"].items()
  }
  bits: dict[str, Any] = {
    path: grids.LayerBits(*map(_array, layer))
    for path, layer in run["bits"].items()
  }
  return bitops.bitops(
    sizes, bits if static is None else dict.fromkeys(bits, static)
  )


def _array(width: int | Sequence[int]) -> Any:
  return width if isinstance(width, int) else np.asarray(width)


def _static(
  runs: Mapping[str, Mapping[str, Any]], b_max: int
) -> bitops.Bitops | None:
  """Static B_max of the layers that a run quantizes; None without such."""
  quantized = [run for run in runs.values() if has_widths(run)]
  return _bitops(quantized[0], b_max) if quantized else None


def _mega(count: int) -> str:
  return f"{count / 1e6:,.3g}" if count < 1e8 else f"{count / 1e6:,.0f}"
