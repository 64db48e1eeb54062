"""The rows of one network: every tool's train step, compiled and timed."""

import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpc_jax.quant import grids
from dpc_jax.training import build
from experiments.bench import (
  builds,
  peer_changes,
  peer_tools,
  peer_widths,
  turns,
)

FLOAT = "Flax, float"
_PASSES = {
  "int8 forward": grids.LayerBits(8, 8, grids.FLOAT_WIDTH),
  "int8 forward + backward": grids.LayerBits(8, 8, 8),
}
# What a run of 50 changes of ours draws from.
_OWN_WIDTHS = range(3, 9)


class Settings(NamedTuple):
  """What the command line says.

  Attributes:
    ours: variants of ours, as `builds.variant` reads them.
    rounds: of one timing each.
    steps: per timing.
    changes: of widths, in the run that is spoken of.
    peer_changes: how many of them are made where each compiles.
    tools: the others.
  """

  ours: tuple[str, ...] = ("static8", "dpc", "adaptive")
  rounds: int = 9
  steps: int = 1
  changes: int = 50
  peer_changes: int = 3
  tools: tuple[peer_tools.Tool, ...] = peer_tools.TOOLS


class _Row(NamedTuple):
  """A row before it is timed.

  Attributes:
    parts: of the run.
    tool: another's; None is Flax or ours.
    bits: of all layers; None is Flax or ours.
    cannot: why there is no step; None: there is one.
    notes: what the figures do not say.
  """

  parts: build.Parts | None = None
  tool: peer_tools.Tool | None = None
  bits: grids.LayerBits | None = None
  cannot: str | None = None
  notes: tuple[str, ...] = ()


def measure(config: Any, chosen: Settings) -> dict[str, Any]:
  """{label: figures} of all rows of a network, in the order of the table.

  Args:
    config: its float recipe; nothing is read of its data set.
    chosen: what to measure.

  Returns:
    For each row `cannot`, None or the reason, `notes`, and of one that can:
    `ratio`, `ratio_quartiles`, `milliseconds` of a step; `compile_seconds`,
    `compile_ratio`; `temporary_mib`, `temporary_ratio`, `peak_mib`,
    `peak_ratio`; `changes`, see `peer_changes.Changes`.

  Raises:
    ConfigError: of one of `chosen.ours`.
  """
  config = builds.without_data(config)
  # Adaptive widths would move between the changes that are made from outside.
  config.precision.adaptive.freeze = 1e-9
  config.precision.b_min = min(_OWN_WIDTHS)
  configs = {FLOAT: config} | {
    f"ours, {text}": variant
    for text, variant in builds.variants(config, chosen.ours, "ours").items()
  }
  own = {
    label: _Row(parts) for label, parts in builds.build_all(configs).items()
  }
  base = own.pop(FLOAT)
  rows = {FLOAT: base} | _others(base.parts, chosen.tools) | own
  turns.warm_up(base.parts)
  compiled = {}
  for label, row in rows.items():
    if row.cannot is not None:
      continue
    print(f"  compiling {label}", flush=True)
    try:
      compiled[label] = turns.compile_step(row.parts)
    except peer_tools.ERRORS as error:
      if row.tool is None:
        raise
      rows[label] = row._replace(cannot=peer_tools.shortened(error))
  batch = turns.first_batch(base.parts)
  print(f"  timing {len(compiled)} steps in turns", flush=True)
  seconds = turns.time_in_turns(
    _fresh(compiled), batch, chosen.rounds, chosen.steps
  )
  figures = {}
  for label, row in rows.items():
    figures[label] = {"cannot": row.cannot, "notes": list(row.notes)}
    if label in compiled:
      figures[label] |= _figures(label, compiled, seconds)
      print(f"  changing widths: {label}", flush=True)
      changes = _changes(row, base.parts, compiled[label], batch, chosen)
      figures[label]["changes"] = changes and changes._asdict()
  return figures


def _fresh(compiled):
  """With a copy of each first state: what a step takes is gone."""
  return {
    label: variant._replace(state=jax.tree.map(jnp.copy, variant.state))
    for label, variant in compiled.items()
  }


def _others(parts: build.Parts, tools) -> dict[str, _Row]:
  rows = {}
  for tool in tools:
    for name, bits in _PASSES.items():
      label = f"{tool.name}, {name}"
      if peer_tools.version(tool) is None:
        rows[label] = _Row(
          tool=tool, cannot=f"not installed: {peer_tools.INSTALL}"
        )
        continue
      rows[label] = _other(parts, tool, bits)
  return rows


def _other(parts, tool, bits) -> _Row:
  """A row of a tool, if its layers give gradients at all."""
  notes = []
  for kind in _kinds(parts):
    wrong = peer_widths.check(tool, kind, bits)
    if wrong != peer_widths.YES:
      return _Row(tool=tool, bits=bits, cannot=f"{kind}: {wrong}")
    if bits.gradients != grids.FLOAT_WIDTH:
      noise = peer_widths.check_noise(tool, kind, bits)
      if noise != peer_widths.YES:
        notes.append(f"{kind}: stochastic rounding asked for, {noise}")
  try:
    model = tool.wrap(parts.model, _everywhere(parts, bits))
  except peer_tools.ERRORS as error:
    return _Row(tool=tool, bits=bits, cannot=peer_tools.shortened(error))
  return _Row(parts._replace(model=model), tool, bits, None, tuple(notes))


def _everywhere(parts, bits):
  return peer_tools.uniform(parts.static_bits, bits)


def _kinds(parts: build.Parts) -> list[str]:
  """Of the layers with a kernel that ours quantizes."""
  params = jax.eval_shape(parts.init, jax.random.key(0)).params
  axes = set()
  for path in parts.static_bits:
    kernel = peer_changes.node(params, path).get("kernel")
    if kernel is not None:
      axes.add(len(kernel.shape))
  kinds = {2: "dense", 4: "convolution"}
  return [kinds[n] for n in sorted(axes)]


def _figures(label, compiled, seconds) -> dict[str, Any]:
  own, base = compiled[label], compiled[FLOAT]
  return turns.spread(seconds[label], seconds[FLOAT]) | {
    "milliseconds": 1e3 * statistics.median(seconds[label]),
    "compile_seconds": own.compile_seconds,
    "compile_ratio": own.compile_seconds / base.compile_seconds,
    "temporary_mib": own.temporary_bytes / turns.MIB,
    "temporary_ratio": own.temporary_bytes / max(base.temporary_bytes, 1),
    "peak_mib": own.peak_bytes / turns.MIB,
    "peak_ratio": own.peak_bytes / base.peak_bytes,
  }


def _changes(row, base, variant, batch, chosen) -> peer_changes.Changes | None:
  """None of the float step, which has no widths."""
  if row.tool is not None:
    return _recompiled(row, base, chosen)
  if row.parts.config.precision.method == "float":
    return None
  paths = list(row.parts.static_bits)
  try:
    return peer_changes.run(variant, batch, paths, _OWN_WIDTHS, chosen.changes)
  except peer_changes.OtherScheduleError as error:
    return peer_changes.none(chosen.changes, str(error))


def _recompiled(row, base, chosen) -> peer_changes.Changes:
  """Each setting is drawn from the widths that all of its layers take."""
  usable = None
  for kind in _kinds(row.parts):
    works = {
      b
      for b in _OWN_WIDTHS
      if peer_widths.check(
        row.tool, kind, grids.LayerBits(b, b, row.bits.gradients)
      )
      == peer_widths.YES
    }
    usable = works if usable is None else usable & works
  if len(usable) < 2:
    only = ", ".join(map(str, sorted(usable)))
    return peer_changes.none(
      chosen.changes, f"of the widths 3..8 it can train at {only} alone"
    )
  draw = peer_changes.settings(
    list(base.static_bits), sorted(usable), row.bits.gradients
  )
  return peer_changes.compile_each(
    row.tool, base, draw, chosen.changes, chosen.peer_changes
  )
