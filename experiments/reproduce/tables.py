"""Tables of accuracies or perplexities: published ones and ours beside them."""

import dataclasses
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from dpc_jax import models
from dpc_jax.analysis import cells, comparison, report
from experiments.reproduce import recipes, scales, trials

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
  "our difference from static",
  "from uniform",
  "cost",
  "min a run",
  "runs",
)
_ABOUT = (
  "Ours: mean ± standard deviation over seeds of the test metric at the end of"
  " the run. Differences are seed by seed, from static 8/8 and from uniform"
  " bits of equal cost, with 95 % intervals where there are several seeds, not"
  " adjusted for how many there are (the report of each recipe does that); one"
  " seed shows no order. Of perplexities less is better. Cost: BitOPs of the"
  " run as a multiple of static 8/8's."
)
_ABOUT_SMOKE = (
  "ok: the recipe trained, saved and evaluated. Figures of such runs mean"
  " nothing and are not shown."
)
_ABOUT_PUBLISHED = (
  "The DPC paper's text is not public. That the baseline of its figures is"
  " static 8/8, and that its method is `dpc`, Eq. 1 around the median, is our"
  " reading; the recipes are CPT's. Whether a published figure is of the last"
  " or the best step is not known to us."
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
    environments: {"device", "versions"} of the runs, each once.
    picture: a file in the folder of the scale.
  """

  name: str
  title: str
  header: Sequence[str]
  table: Sequence[Sequence[str]]
  notes: Sequence[str]
  figures: Any
  errors: Sequence[str]
  environments: Sequence[Mapping[str, Any]]
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
  count = sum(
    len(trial.methods) * trial.seeds
    for row in rows
    if (trial := row.trials.get(context.scale)) is not None
  )
  print(f"  {count} {'run' if count == 1 else 'runs'}", flush=True)
  lines, errors, environments = [], [], []
  for row in rows:
    trial = row.trials.get(context.scale)
    outcome = trials.Outcome({}, [], None)
    if trial is not None:
      outcome = trials.train(row.recipe, trial, context)
    lines += _lines(row, trial, outcome)
    errors += outcome.errors(row.recipe)
    environments += outcome.environments()
  shown = {line["network"] for line in lines}
  sources = {f.source for row in rows for f in row.published.values()}
  header, table = _without_empty(HEADER, [_cells(line) for line in lines])
  return Section(
    name=name,
    title=title,
    header=header,
    table=table,
    notes=[
      scales.ABOUT[context.scale],
      _ABOUT_SMOKE if context.scale == "smoke" else _ABOUT,
      _ABOUT_PUBLISHED,
      *(f"{key}: {SOURCES[key]}." for key in SOURCES if key in sources),
      *(row.note for row in rows if row.note and row.network in shown),
      *map(cells.plain, grouped(errors)),
    ],
    figures=lines,
    errors=errors,
    environments=environments,
  )


def _lines(row, trial, outcome) -> list[dict[str, Any]]:
  """A line for each method that was published or run."""
  # DPC's own figure of a network of the paper is what is missing.
  asked = ["dpc"] if "full" in row.trials else []
  tried = trial.methods if trial else asked
  names = dict.fromkeys([*row.published, *tried, *asked])
  runs = {
    method: by_seed for method, by_seed in outcome.runs.items() if by_seed
  }
  config = recipes.get_config(row.recipe)
  is_text = config.model.name in models.LANGUAGE_MODELS
  result = None
  if runs and not trial.is_smoke:
    result = comparison.compare(runs, b_max=config.precision.b_max)
  failed = {failure.method for failure in outcome.failures}
  return [
    {
      "network": row.network,
      "recipe": row.recipe,
      "method": method,
      "metric": "perplexity" if is_text else "accuracy",
      **_published(row, method),
      **_ours(method, result),
      "runs": _runs(method, runs, trial, failed),
    }
    for method in names
  ]


def _without_empty(header, table):
  """Without the columns that have nothing but dashes."""
  kept = [
    i for i in range(len(header)) if any(line[i] != "-" for line in table)
  ]
  return [header[i] for i in kept], [[line[i] for i in kept] for line in table]


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
    return dict.fromkeys(("ours", "against_static", "against_uniform"))
  of_method = {m.method: m for m in result.methods}.get(method)
  return {
    "ours": of_method and dataclasses.asdict(of_method),
    "against_static": _pair(method, result.against_static),
    "against_uniform": _pair(method, result.against_uniform),
  }


def _pair(method, pairs) -> dict[str, Any] | None:
  """What `comparison.Pair` says of the final metric; None without a pair."""
  for pair in pairs:
    if (pair.method, pair.measure) == (method, "final") and pair.difference.n:
      return dataclasses.asdict(pair)
  return None


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
  """A line as the table shows it, in the order of `HEADER`."""
  # Ours are fractions, published accuracies percent.
  scale, unit = (100, " %") if line["metric"] == "accuracy" else (1, "")
  published, ours = line["published"], line["ours"]
  texts = ["-", NOT_RUN, "-", "-", "-", "-", "-"]
  if published is not None:
    texts[0] = f"{published['value']:.2f}{unit} ({published['source']})"
  if line["published_difference"] is not None:
    texts[2] = f"{line['published_difference']:+.2f}"
  if ours is not None:
    final = ours["final"]
    texts[1] = f"{scale * final['mean']:.2f}"
    if final["sd"] is not None:
      texts[1] += f" ± {scale * final['sd']:.2f}"
    texts[1] += unit
    texts[3] = _difference(line["against_static"], scale)
    texts[4] = _difference(line["against_uniform"], scale)
    texts[5] = f"{ours['relative_to_static']:.3f}x"
    texts[6] = f"{ours['seconds'] / 60:.1f}"
  return [line["network"], line["method"], *texts, line["runs"]]


def _difference(pair: Mapping[str, Any] | None, scale: int) -> str:
  """Mean and interval; a control that costs otherwise says so."""
  if pair is None:
    return "-"
  difference = pair["difference"]
  text = f"{scale * difference['mean']:+.2f}"
  if difference["low"] is not None:
    low, high = scale * difference["low"], scale * difference["high"]
    text += f" [{low:+.2f}, {high:+.2f}]"
  if pair["reference"].startswith("uniform") and not pair["equal_cost"]:
    text += ", not of equal cost"
  return text


def grouped(errors: Sequence[str]) -> list[str]:
  """The lines, what was not run for one reason in one of them."""
  recipes: dict[str, list[str]] = {}
  lines = []
  for error in errors:
    recipe, sign, reason = error.partition(", not run: ")
    if not sign:
      lines.append(error)
    elif recipe not in recipes.setdefault(reason, []):
      recipes[reason].append(recipe)
  for reason, (first, *rest) in recipes.items():
    more = f" and {len(rest)} more" if rest else ""
    lines.append(f"{first}{more}, not run: {reason}")
  return lines


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
