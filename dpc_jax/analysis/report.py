"""Tables and a Markdown report of a grid of finished runs."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpc_jax.analysis import cells, layer_tables, phrases
from dpc_jax.analysis import comparison as comparison_lib

_ABOUT_PARETO = (
  "Final metric against cost: means over seeds, with 95 % Student-t intervals"
  " where there are several. Filled points are on the frontier: no other method"
  " is at least as good and as cheap. Where bars or points lie on one another,"
  " those behind are broader. An axis of accuracies spans at least 0.05."
)
_UNKNOWN_COMMAND = (
  "No record says which command trained all of these runs; the `config.json` of"
  " each one has its fields."
)

# A word within a column of figures that does not make it one of text.
_STAND_INS = {"float", "inf", "nan", "none"}
_NUMBER = re.compile(r"(?<!\w)\d[\d,.]*(?:e[-+]?\d+|x|%)?")


def text_table(table: Sequence[Sequence[str]], header: Sequence[str]) -> str:
  """Aligned columns for a terminal: figures flush right, text flush left.

  The first column is flush left. Another is of text if any cell has a word: a
  unit other than % and x, too, which belongs into the header.
  """
  lines = [tuple(header), *table]
  sizes = [max(map(len, column)) for column in zip(*lines, strict=True)]
  is_right = _is_right(table, header)
  text = [
    "  ".join(
      cell.rjust(size) if right else cell.ljust(size)
      for cell, size, right in zip(line, sizes, is_right, strict=True)
    ).rstrip()
    for line in lines
  ]
  text.insert(1, "-" * max(map(len, text)))
  return "\n".join(text)


def markdown_table(
  table: Sequence[Sequence[str]], header: Sequence[str]
) -> str:
  """The same as a Markdown table; a bar within a cell stays a bar."""
  marks = ["---:" if right else "---" for right in _is_right(table, header)]
  header, *table = (
    [cell.replace("|", "\\|") for cell in line] for line in (header, *table)
  )
  lines = ["| " + " | ".join(header) + " |", "|" + "|".join(marks) + "|"]
  lines += ["| " + " | ".join(line) + " |" for line in table]
  return "\n".join(lines)


def _is_right(table, header) -> list[bool]:
  """Whether a column is flush right, for each one."""
  columns = list(zip(header, *table, strict=True))
  return [False, *(_are_figures(cells) for _, *cells in columns[1:])]


def _are_figures(column: Sequence[str]) -> bool:
  text = " ".join(_NUMBER.sub("0", cell) for cell in column)
  words = set(re.findall(r"[^\W\d]\w*", text))
  return not words or (words <= _STAND_INS and "0" in text)


def short(result: comparison_lib.Comparison) -> str:
  """What a terminal shows: the methods and, with several seeds, verdicts."""
  b_max = result.b_max
  parts = [text_table(*_short_methods(result))]
  note = f"saving: against static {b_max}/{b_max} with 8-bit gradients"
  if _one_seed(result):
    return "\n\n".join([*parts, note])
  for reference, pairs in _by_reference(result, "final").items():
    is_control = any(pair in result.against_uniform for pair in pairs)
    header = ["against " + reference, "pairs", "difference", "verdict"]
    table = [
      [
        p.method,
        str(p.difference.n),
        cells.difference(p.difference, result.metric),
        p.verdict,
      ]
      for p in pairs
    ]
    if is_control:
      header.insert(2, "equal cost")
      for line, pair in zip(table, pairs, strict=True):
        line.insert(2, cells.yes_or_no(pair.equal_cost))
    parts.append(text_table(table, header))
  parts.append(
    f"mean ± standard deviation over seeds; differences of the final test"
    f" {result.metric}, seed by\nseed, with 95 % intervals; {note}"
  )
  return "\n\n".join(parts)


def comparison(
  result: comparison_lib.Comparison,
  runs: comparison_lib.Runs,
  *,
  command: str | None,
  failures: Sequence[comparison_lib.Failure] = (),
  pictures: Mapping[str, str] | None = None,
  moved: Sequence[str] = (),
) -> str:
  """A Markdown report of a grid: one model on one data set.

  Args:
    result: what `comparison.compare` made of the runs.
    runs: {method: {seed: summary}}, at least one run.
    command: what trained the runs, as it was typed; None if that is not known.
    failures: the cells that did not finish.
    pictures: {file: what it shows} of those drawn besides `pareto.png` and, of
      a grid with any quantized layer, `bits.png`: files that begin with
      "curves" and with "moves".
    moved: the methods whose bits change during a run.
  """
  summaries = [run for by_seed in runs.values() for run in by_seed.values()]
  first = {
    method: by_seed[min(by_seed)] for method, by_seed in runs.items() if by_seed
  }
  pictures = pictures or {}
  return "\n".join(
    [
      *_what_ran(summaries, command, failures),
      "## Methods",
      "",
      markdown_table(*_methods(result)),
      "",
      _about_methods(result),
      "",
      "![Cost and test metric of the methods](pareto.png)",
      "",
      _ABOUT_PARETO,
      "",
      *_differences(result, {failure.method for failure in failures}),
      *_training(result, pictures),
      *phrases.moves(pictures),
      "## Layers",
      "",
      *_layers(first, result.b_max, moved),
      *_failed(failures),
      "## Limits",
      "",
      _limits(result, summaries),
      "",
    ]
  )


def _training(result, pictures) -> list[str]:
  drawn = phrases.show(pictures, "curves")
  if not drawn:
    return []
  about = phrases.ABOUT_CURVES + (
    "" if _one_seed(result) else phrases.ABOUT_BANDS
  )
  return ["## Training", "", *drawn, "", about, ""]


def _layers(first, b_max, moved) -> list[str]:
  """Sizes, widths and costs, of every method's first seed."""
  picture = ["![Bits and weights per layer](bits.png)", ""]
  seeds = cells.seeds(sorted({run["seed"] for run in first.values()}))
  return [
    *(picture if any(map(layer_tables.has_widths, first.values())) else []),
    markdown_table(*layer_tables.widths(first)),
    "",
    layer_tables.about_widths(seeds, moved),
    "",
    markdown_table(*layer_tables.costs(first, b_max)),
    "",
    layer_tables.ABOUT_COST,
    "",
  ]


def _what_ran(summaries, command, failures) -> list[str]:
  run = summaries[0]
  seeds = sorted(
    {s["seed"] for s in summaries} | {failure.seed for failure in failures}
  )
  return [
    phrases.title(run),
    "",
    _UNKNOWN_COMMAND if command is None else cells.code(command),
    "",
    f"{run['steps']:,} steps per run; {cells.seeds(seeds)};"
    f" {phrases.environment(summaries)}.",
    "",
  ]


def _short_methods(result):
  metric = result.metric
  if _one_seed(result):
    header = ["method", f"test {metric}", "GBitOPs", "saving", "mean bits"]
    table = [
      [m.method, cells.spread(m.final, metric), *cells.cost(m)]
      for m in result.methods
    ]
    for line, method in zip(table, result.methods, strict=True):
      line.append(f"{method.seconds:.0f}")
    return table, [*header, "seconds"]
  header = ["method", "seeds", f"final test {metric}", "best"]
  table = [
    [
      m.method,
      str(m.final.n),
      cells.spread(m.final, metric),
      cells.spread(m.best, metric),
      *cells.cost(m),
    ]
    for m in result.methods
  ]
  return table, [*header, "GBitOPs", "saving", "mean bits"]


def _methods(result):
  b_max, metric = result.b_max, result.metric
  header = (
    "method",
    "seeds",
    f"test {metric}, final",
    f"test {metric}, best",
    "GBitOPs",
    f"cost / static {b_max}/{b_max}",
    "cost / float",
    "mean bits",
    "seconds",
  )
  table = [
    (
      m.method,
      str(m.final.n),
      cells.spread(m.final, metric),
      cells.spread(m.best, metric),
      f"{m.gbitops:,.0f}",
      f"{m.relative_to_static:.4f}",
      f"{m.relative_to_float:.4f}",
      f"{m.mean_bits:.2f}",
      f"{m.seconds:.0f}",
    )
    for m in result.methods
  ]
  return table, header


def _about_methods(result) -> str:
  b_max = result.b_max
  best = (
    "best is the test value at the best validation"
    if result.has_validation
    else "best is the best of all evaluations on the test set, chosen on the"
    " test set itself and so optimistic"
  )
  spread = (
    "" if _one_seed(result) else "Mean ± sample standard deviation over seeds. "
  )
  return (
    f"{spread}Final is the value at the end of the run; {best}. GBitOPs are"
    " those of a whole run, forward and backward; static"
    f" {b_max}/{b_max} has 8-bit gradients. Mean bits are the weights' widths"
    " averaged over quantized layers and steps. Seconds include evaluation and"
    " saving, not compiling."
  )


def _differences(result, failed) -> list[str]:
  text = ["## Differences", "", _how_to_read(result), ""]
  for measure in comparison_lib.MEASURES:
    for reference, pairs in _by_reference(result, measure).items():
      family = pairs[0].family
      count = f", {family} comparisons" if family > 1 else ""
      text += [
        f"### {measure.capitalize()}, against {reference}{count}",
        "",
        markdown_table(*_pairs(pairs, result)),
        "",
      ]
  for name in result.missing_references:
    is_static = name.startswith("static")
    what = "static bits" if is_static else "uniform bits of equal cost"
    remedy = (
      f"No run of {name} is finished, so that nothing is compared with {what}."
      if name in failed
      else f"Add {name} to `--methods` to compare with {what}."
    )
    text += [remedy, ""]
  return text


def _pairs(pairs, result):
  header = [
    "method",
    "pairs",
    "difference [95 %]",
    "p",
    "p, Holm",
    "detectable",
  ]
  is_control = any(pair in result.against_uniform for pair in pairs)
  if is_control:
    header.append("control's cost")
  table = []
  for pair in pairs:
    d = pair.difference
    line = [
      pair.method,
      str(d.n),
      cells.difference(pair.difference, result.metric),
      cells.p_value(d.p),
      cells.p_value(pair.adjusted_p),
      cells.figure(d.detectable, result.metric),
    ]
    if is_control:
      line.append(cells.control_cost(pair))
    table.append((*line, pair.verdict))
  return table, (*header, "verdict")


def _how_to_read(result) -> str:
  better = "Higher" if result.higher_is_better else "Lower"
  if _one_seed(result):
    return (
      f"A difference is the method's test {result.metric} minus the"
      f" reference's on the same seed. {better} is better. One seed has no"
      " interval: nothing can be said of a difference yet; `--seeds=5` would"
      " show more."
    )
  return (
    f"A difference is the method's test {result.metric} minus the reference's"
    " on the same seed, averaged over pairs, with its 95 % Student-t interval."
    f" {better} is better, and a verdict says so only where the interval"
    " excludes zero and p stays below 0.05 after Holm's correction over the"
    ' comparisons of a table. "No difference shown" is not equality:'
    " detectable is the smallest true difference that so many seeds show with"
    " probability 0.8 (without correction), and a control that is not of equal"
    " cost (within 1 %) mixes cost and merit."
  )


def _failed(failures) -> list[str]:
  if not failures:
    return []
  table = [(f.method, str(f.seed), cells.code(f.message)) for f in failures]
  return [
    "## Failed runs",
    "",
    markdown_table(table, ("method", "seed", "message")),
    "",
  ]


def _limits(result, summaries: Sequence[Mapping[str, Any]]) -> str:
  count = max(method.final.n for method in result.methods)
  seeds = sorted({run["seed"] for run in summaries})
  if count == 1:
    text = (
      f"One run per method ({cells.seeds(seeds)}): how much of a difference is"
      " the noise of a seed is not measured. "
    )
  else:
    text = (
      f"{count} seeds: the intervals take differences between seeds for"
      " normally distributed, which so few cannot confirm, and say nothing of"
      " other models, data or lengths of training. Final and best are two"
      " looks at the same runs; Holm's correction holds within a table, not"
      " across them. "
    )
  final = result.methods[0].final.mean
  text += phrases.binomial(
    final, result.metric, summaries[0].get("test_examples")
  )
  return text + phrases.LEFT_OUT


def _by_reference(result, measure):
  """{reference: its pairs of a measure}, static before the controls."""
  groups = {}
  for pair in (*result.against_static, *result.against_uniform):
    if pair.measure == measure:
      groups.setdefault(pair.reference, []).append(pair)
  return groups


def _one_seed(result) -> bool:
  return max(method.final.n for method in result.methods) == 1
