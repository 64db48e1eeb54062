"""A Markdown report of one finished run."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpc_jax.analysis import cells, layer_tables, phrases, report

# Moves that the table names; `bits.jsonl` has them all.
_MOVES_SHOWN = 40
_ABOUT_COST = (
  " Share is the layer's part of the network's cost; the last column, where a"
  " layer is quantized, is its cost as a multiple of that at the static width."
)
_END = (
  "The bits are those of the run's end: they moved before, and their mean over"
  " the run is above, under Result. "
)


def run(
  summary: Mapping[str, Any],
  config: Mapping[str, Any],
  moves: Sequence[Mapping[str, Any]],
  *,
  workdir: str,
  b_max: int,
  pictures: Mapping[str, str] | None = None,
) -> str:
  """A Markdown report of a run.

  Args:
    summary: of the run, as `training.summary` writes it.
    config: the resolved one, as in `config.json`.
    moves: lines of `bits.jsonl`.
    workdir: of the run, as it was typed.
    b_max: the width of the static reference.
    pictures: {file: what it shows} of those drawn; files that begin with
      "bits", with "curves" and with "moves".
  """
  pictures = pictures or {}
  mean = summary[f"test_{summary['metric']}"]
  examples = summary.get("test_examples")
  limits = phrases.binomial(mean, summary["metric"], examples)
  return "\n".join(
    [
      phrases.title(summary, prefix=f"{summary['method']}: "),
      "",
      f"{cells.code(workdir)}: {summary['steps']:,} steps, seed"
      f" {summary['seed']}; {phrases.environment([summary])}.",
      "",
      "## Result",
      "",
      report.markdown_table(*_result(summary, b_max)),
      "",
      *_training(pictures),
      *phrases.moves(pictures),
      *_moves(moves),
      *_layers(summary, b_max, pictures, moves),
      "## Config",
      "",
      report.markdown_table(list(_fields(config)), ("field", "value")),
      "",
      "Fields without a value are off or at their default; the hash of them all"
      f" is {cells.code(str(summary.get('config_hash', '-')))}.",
      "",
      "## Limits",
      "",
      _one_run(summary["method"]) + limits + phrases.LEFT_OUT,
      "",
    ]
  )


def _training(pictures) -> list[str]:
  drawn = phrases.show(pictures, "curves")
  return (
    ["## Training", "", *drawn, "", phrases.ABOUT_CURVES, ""] if drawn else []
  )


def _one_run(method) -> str:
  # Files and users' methods may have names with anything in them.
  argument = shlex.quote(f"--methods={method}")
  command = f"python -m experiments.compare --config=FILE {argument} --seeds=5"
  return (
    "One run: how much of its figures is the noise of a seed is not measured;"
    f" {cells.code(command)} would show, FILE being the recipe it was trained"
    " by. "
  )


def _layers(summary, b_max, pictures, moves) -> list[str]:
  drawn = phrases.show(pictures, "bits")
  has_moved = any(
    line["old"] is not None and line["old"] != line["new"] for line in moves
  )
  return [
    "## Layers",
    "",
    *([*drawn, ""] if drawn else []),
    report.markdown_table(*layer_tables.run(summary, b_max)),
    "",
    (_END if has_moved else "")
    + "Forward and backward in MBitOPs. "
    + layer_tables.ABOUT_COST
    + _ABOUT_COST,
    "",
  ]


def _result(summary, b_max):
  metric = summary["metric"]
  names = {
    f"test_{metric}": f"test {metric}, final",
    f"test_{metric}_at_best_validation": f"test {metric}, best validation",
    f"best_test_{metric}": f"test {metric}, best of all (optimistic)",
    f"validation_{metric}": f"validation {metric}, final",
    f"best_validation_{metric}": f"validation {metric}, best",
  }
  table = [
    (what, cells.figure(summary[name], metric))
    for name, what in names.items()
    if name in summary
  ]
  static, whole = (
    1 - summary[f"saving_vs_{name}"] for name in ("static", "float")
  )
  table += [
    ("GBitOPs of the run", f"{summary['gbitops']:,.0f}"),
    (f"cost / static {b_max}/{b_max}", f"{static:.4f}"),
    ("cost / float", f"{whole:.4f}"),
    ("mean bits of the weights", f"{summary['mean_bits']:.2f}"),
    ("seconds, with evaluation and saving", f"{summary['seconds']:.0f}"),
  ]
  for name, what in (
    ("compile_seconds", "seconds of compiling"),
    ("skipped_steps", "steps skipped for gradients that were not finite"),
  ):
    if summary.get(name):
      table.append((what, f"{summary[name]:.0f}"))
  return table, ("of the run", "value")


def _moves(moves) -> list[str]:
  """The table of the moves of the weights' bits; [] if they never moved."""
  moved = [
    line
    for line in moves
    if line["old"] is not None and line["old"] != line["new"]
  ]
  if not moved:
    return []
  if len(moved) > _MOVES_SHOWN:
    last = f"The first {_MOVES_SHOWN} of {len(moved):,}; bits.jsonl has all."
  else:
    last = "All moves of the run; a width holds from its step on."
  table = []
  for line in moved[:_MOVES_SHOWN]:
    old, new = line["old"], line["new"]
    # The weights may be set; of the operands then the first that moves.
    i = next(i for i in range(3) if old[i] != new[i])
    signal = line.get("signal")
    table.append(
      (
        f"{line['step']:,}",
        cells.code(line["path"]),
        f"{old[i]} → {new[i]}",
        f"{signal:+.2f}" if isinstance(signal, float) else "-",
        cells.plain(line["reason"]),
      )
    )
  header = ("step", "layer", "bits", "z", "reason")
  return [
    "## Moves of the bits",
    "",
    report.markdown_table(table, header),
    "",
    last,
    "",
  ]


def _fields(config, prefix="") -> Iterator[tuple[str, str]]:
  """Dotted fields and their values, of those that have one."""
  for name, value in config.items():
    if isinstance(value, Mapping):
      yield from _fields(value, f"{prefix}{name}.")
    elif value is not None:
      yield cells.code(prefix + name), cells.code(str(value))
