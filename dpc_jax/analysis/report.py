"""Tables and a Markdown report of finished runs, from their summaries."""

from collections.abc import Mapping, Sequence
from typing import Any


def header(summaries: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
  """The columns of the comparison; runs of one data set have one metric."""
  metric = next(iter(summaries.values()))["metric"]
  return (
    "method",
    f"test {metric}",
    "GBitOPs",
    "saving",
    "mean bits",
    "seconds",
  )


def rows(
  summaries: Mapping[str, Mapping[str, Any]],
) -> list[tuple[str, ...]]:
  """The cells of the comparison, one tuple per run, in `header`'s order.

  The saving is relative to static B_max; a run that costs more has none and
  shows its cost as a multiple instead.
  """
  table = []
  for label, run in summaries.items():
    saving = run["saving_vs_static"]
    table.append(
      (
        label,
        _score(run),
        f"{run['gbitops']:,.0f}",
        f"{saving:.1%}" if saving >= 0 else f"none ({1 - saving:.1f}x)",
        f"{run['mean_bits']:.2f}",
        f"{run['seconds']:.0f}",
      )
    )
  return table


def text_table(table: Sequence[Sequence[str]], header: Sequence[str]) -> str:
  """Aligned columns for a terminal; the first one is flushed left."""
  lines = [tuple(header), *table]
  sizes = [max(map(len, column)) for column in zip(*lines, strict=True)]
  text = [
    "  ".join(
      cell.ljust(size) if i == 0 else cell.rjust(size)
      for i, (cell, size) in enumerate(zip(line, sizes, strict=True))
    ).rstrip()
    for line in lines
  ]
  text.insert(1, "-" * max(map(len, text)))
  return "\n".join(text)


def markdown_table(
  table: Sequence[Sequence[str]], header: Sequence[str]
) -> str:
  """The same as a Markdown table."""
  lines = [
    "| " + " | ".join(header) + " |",
    "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|",
  ]
  lines += ["| " + " | ".join(line) + " |" for line in table]
  return "\n".join(lines)


def comparison(
  summaries: Mapping[str, Mapping[str, Any]], *, command: str, b_max: int
) -> str:
  """A Markdown report of runs of one model on one data set.

  Args:
    summaries: {label: summary}, at least one.
    command: what was typed.
    b_max: the width that savings are relative to.
  """
  run = next(iter(summaries.values()))
  seeds = sorted({s["seed"] for s in summaries.values()})
  versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
  return "\n".join(
    [
      f"# {run['model']} on {run['dataset']}",
      "",
      f"`{command}`",
      "",
      f"{run['steps']:,} steps per run on {run['device']}; {versions}.",
      "",
      markdown_table(rows(summaries), header(summaries)),
      "",
      f"GBitOPs are those of the whole run, forward and backward; the saving is"
      f" relative to static {b_max}/{b_max} with 8-bit gradients. Mean bits are"
      " the weights' widths averaged over quantized layers and steps. Seconds"
      " include evaluation and saving, not compiling.",
      "",
      "![Bits and weights per layer](bits.png)",
      "",
      "## Layers",
      "",
      markdown_table(*_layers(summaries)),
      "",
      "Bits are weights/activations/gradients at the end of the run.",
      "",
      "## Limits",
      "",
      f"One run per method (seed {', '.join(map(str, seeds))}): how much of a"
      " difference is the noise of a seed is not measured. BitOPs count the"
      " multiply-accumulates of convolutions, dense layers and attention"
      " products; normalization, activation functions, embedding look-ups, the"
      " optimizer and the quantizer itself are left out. Quantization is"
      " simulated in float32, so seconds say nothing about integer hardware.",
      "",
    ]
  )


def _score(run):
  value = run[f"test_{run['metric']}"]
  return f"{value:.4f}" if run["metric"] == "accuracy" else f"{value:.2f}"


def _layers(summaries):
  runs = list(summaries.values())
  columns = ("layer", "N_k", "MACs", *(f"bits, {label}" for label in summaries))
  table = [
    (
      f"`{path}`",
      f"{cost['weights']:,}",
      f"{cost['macs']:,}",
      *(_widths(run["bits"].get(path)) for run in runs),
    )
    for path, cost in runs[0]["layers"].items()
  ]
  return table, columns


def _widths(bits):
  return "float" if bits is None else "/".join(str(width) for width in bits)
