"""Tables of accuracies or perplexities: published ones and ours beside them."""

import dataclasses
import importlib
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from dpc_jax.analysis import cells, comparison, report
from experiments.reproduce import scales, trials

SOURCES = {
  "DPC": (
    "Shen et al., Efficient deep neural network training via decreasing"
    " precision with layer capacity, Front. Comput. Sci. 2025, 19(10):1910355"
  ),
  "CPT": "Fu et al., CPT: Efficient deep neural network training via cyclic"
  " precision, ICLR 2021",
}
NOT_RUN = "not run"
HEADER = (
  "network",
  "method",
  "published",
  "ours",
  "published difference",
  "our difference",
  "cost",
  "runs",
)
_ABOUT = (
  "Ours: mean ± standard deviation over seeds of the test metric at the end of"
  " the run. Difference: from static 8/8, seed by seed, with a 95 % interval"
  " where there are several seeds. Cost: BitOPs of the run as a multiple of"
  " static 8/8's."
)
_ABOUT_SMOKE = (
  "Smoke runs are on tiny shapes and made-up data: ok means that the recipe"
  " trained four steps, saved and evaluated; its figures mean nothing and are"
  " not shown."
)


@dataclasses.dataclass(frozen=True)
class Published:
  """A figure from elsewhere.

  Attributes:
    value: in percent, or a perplexity.
    source: of `SOURCES`.
  """

  value: float
  source: str


@dataclasses.dataclass(frozen=True)
class Row:
  """A network on a data set.

  Attributes:
    network: its name in the table.
    recipe: of configs/.
    published: {method: figure}.
    trials: {scale: what it runs}; a scale that is absent runs nothing, and a
      network that is not the paper's is then left out.
    note: what a reader must know about it, Markdown.
  """

  network: str
  recipe: str
  published: Mapping[str, Published] = dataclasses.field(default_factory=dict)
  trials: Mapping[str, scales.Trial] = dataclasses.field(default_factory=dict)
  note: str | None = None


@dataclasses.dataclass(frozen=True)
class Section:
  """A table or figure as it was reproduced.

  Attributes:
    name: of its file.
    title: one line.
    header: of the table's columns.
    table: its cells.
    notes: paragraphs below it, Markdown.
    figures: the same as numbers, for JSON.
    errors: why what the scale names was not run, one line each.
    environment: {"device", "versions"} of the first run made, or {}.
    picture: a file in the folder of the scale.
  """

  name: str
  title: str
  header: Sequence[str]
  table: Sequence[Sequence[str]]
  notes: Sequence[str]
  figures: Any
  errors: Sequence[str]
  environment: Mapping[str, Any]
  picture: str | None = None


def reproduce(
  name: str,
  title: str,
  rows: Sequence[Row],
  context: trials.Context,
) -> Section:
  """Trains what the scale names and sets ours beside the published figures.

  Args:
    name: of the table's file.
    title: one line.
    rows: of the table.
    context: of the command.

  Raises:
    trials.Stopped: SIGTERM; what is finished is kept.
  """
  lines, errors, environment = [], [], {}
  for row in rows:
    trial = row.trials.get(context.scale)
    outcome = trials.Outcome({}, [], None)
    if trial is not None:
      outcome = trials.train(row.recipe, trial, context)
    lines += _lines(row, trial, outcome)
    errors += outcome.errors(row.recipe)
    environment = environment or outcome.environment()
  shown = {line["network"] for line in lines}
  is_smoke = context.scale == "smoke"
  sources = {f.source for row in rows for f in row.published.values()}
  return Section(
    name=name,
    title=title,
    header=HEADER,
    table=[_cells(line) for line in lines],
    notes=[
      _ABOUT_SMOKE if is_smoke else _ABOUT,
      *(f"{key}: {SOURCES[key]}." for key in SOURCES if key in sources),
      *(row.note for row in rows if row.note and row.network in shown),
      *map(cells.plain, errors),
    ],
    figures=lines,
    errors=errors,
    environment=environment,
  )


def _lines(row, trial, outcome) -> list[dict[str, Any]]:
  """A line for each method that was published or run."""
  # DPC's own figure of a network of the paper is what is missing.
  asked = ["dpc"] if "full" in row.trials else []
  tried = trial.methods if trial else asked
  names = dict.fromkeys([*row.published, *tried, *asked])
  runs = {method: cells for method, cells in outcome.runs.items() if cells}
  result = None
  if runs and not trial.is_smoke:
    result = comparison.compare(runs, b_max=8)
  failed = {failure.method for failure in outcome.failures}
  return [
    {
      "network": row.network,
      "recipe": row.recipe,
      "method": method,
      "metric": _metric(row.recipe),
      **_published(row, method),
      **_ours(method, result),
      "runs": _runs(method, runs, trial, failed),
    }
    for method in names
  ]


def _metric(recipe: str) -> str:
  config = importlib.import_module(f"configs.{recipe}").get_config("dpc")
  return "perplexity" if config.model.name.endswith("_lm") else "accuracy"


def _published(row, method) -> dict[str, Any]:
  found = row.published.get(method)
  static = row.published.get("static8")
  difference = None
  if found is not None and static is not None and method != "static8":
    difference = round(found.value - static.value, 4)
  return {
    "published": None if found is None else dataclasses.asdict(found),
    "published_difference": difference,
  }


def _ours(method, result) -> dict[str, Any]:
  """Of a method that was run at a scale whose figures mean something."""
  if result is None:
    return dict.fromkeys(("ours", "our_difference", "relative_cost"))
  of_method = {m.method: m for m in result.methods}.get(method)
  differences = {
    pair.method: pair.difference
    for pair in result.against_static
    if pair.measure == "final" and pair.difference.n
  }
  difference = differences.get(method)
  return {
    "ours": of_method and dataclasses.asdict(of_method.final),
    "our_difference": difference and dataclasses.asdict(difference),
    "relative_cost": of_method and of_method.relative_to_static,
  }


def _runs(method, runs, trial, failed) -> str:
  """What was run of a method, in words."""
  by_seed = runs.get(method, {})
  if not by_seed:
    return "failed" if method in failed else NOT_RUN
  steps = next(iter(by_seed.values()))["steps"]
  if trial.is_smoke:
    return f"smoke ok, {steps} steps"
  text = f"{len(by_seed)} x {steps:,} steps"
  return f"{text}, others failed" if method in failed else text


def _cells(line: Mapping[str, Any]) -> list[str]:
  """A line as the table shows it."""
  in_percent = line["metric"] == "accuracy"
  # Ours are fractions, published accuracies percent.
  scale, unit = (100, " %") if in_percent else (1, "")
  published, ours = line["published"], line["ours"]
  difference = line["our_difference"]
  texts = ["-", NOT_RUN, "-", "-", "-"]
  if published is not None:
    texts[0] = f"{published['value']:.2f}{unit} ({published['source']})"
  if ours is not None:
    texts[1] = f"{scale * ours['mean']:.2f}"
    if ours["sd"] is not None:
      texts[1] += f" ± {scale * ours['sd']:.2f}"
    texts[1] += unit
    texts[4] = f"{line['relative_cost']:.3f}x"
  if line["published_difference"] is not None:
    texts[2] = f"{line['published_difference']:+.2f}"
  if difference is not None:
    texts[3] = f"{scale * difference['mean']:+.2f}"
    if difference["low"] is not None:
      low, high = scale * difference["low"], scale * difference["high"]
      texts[3] += f" [{low:+.2f}, {high:+.2f}]"
  return [line["network"], line["method"], *texts, line["runs"]]


def text(section: Section) -> str:
  """A section for a terminal."""
  table = report.text_table(section.table, section.header)
  notes = [
    textwrap.fill(note, 79, break_long_words=False, break_on_hyphens=False)
    for note in section.notes
  ]
  return "\n\n".join([section.title, table, *notes])


def markdown(section: Section, where: pathlib.Path) -> str:
  """A section for a report in the folder `where`, with its picture if any."""
  shown = []
  if section.picture is not None and (where / section.picture).exists():
    shown = [f"![{section.title}]({section.picture})"]
  return "\n\n".join(
    [
      f"## {section.title}",
      *shown,
      report.markdown_table(section.table, section.header),
      *section.notes,
    ]
  )
