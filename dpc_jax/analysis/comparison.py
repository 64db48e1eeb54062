"""Figures and verdicts of a grid of runs, methods x seeds.

A grid's runs are {method: {seed: summary}}, summaries as `training.summary`
writes them; a cell that failed is absent.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpc_jax.analysis import significance

Runs = Mapping[str, Mapping[int, Mapping[str, Any]]]

# A control's cost may differ from its method's by so much (DESIGN: 1 %).
EQUAL_COST = 0.01
MEASURES = ("final", "best")


@dataclasses.dataclass(frozen=True)
class Failure:
  """A cell of the grid that did not finish.

  Attributes:
    method: of the cell.
    seed: of the cell.
    message: one line that says why.
  """

  method: str
  seed: int
  message: str


@dataclasses.dataclass(frozen=True)
class Method:
  """One method over its seeds; costs are means over seeds.

  Attributes:
    method: its name.
    seeds: of the finished runs, ascending; at least one.
    final: the test metric at the end of the run.
    best: the test metric at the best validation; without a validation split
      the best of all evaluations, chosen on the test set and so optimistic.
    gbitops: BitOPs of a run / 1e9, forward and backward.
    relative_to_static: cost as a multiple of that of static B_max.
    relative_to_float: cost as a multiple of that of float32.
    mean_bits: width of the weights over quantized layers and steps.
    seconds: of a run, with evaluation and saving, without compiling.
  """

  method: str
  seeds: tuple[int, ...]
  final: significance.Sample
  best: significance.Sample
  gbitops: float
  relative_to_static: float
  relative_to_float: float
  mean_bits: float
  seconds: float


@dataclasses.dataclass(frozen=True)
class Pair:
  """A method against a reference, on the seeds that both have finished.

  Attributes:
    method: whose merit is in question.
    reference: static<B_max>, or the method's uniform control.
    measure: "final" or "best".
    seeds: of the pairs.
    difference: of the metric, method - reference.
    adjusted_p: Holm's, over the `family`; None without a p-value.
    family: number of comparisons of this measure against this reference that
      have a p-value.
    relative_cost: the reference's cost / the method's, on these seeds; None
      without a pair.
    equal_cost: whether that is within 1 % of 1; None without a pair.
    verdict: see `significance.verdict`.
  """

  method: str
  reference: str
  measure: str
  seeds: tuple[int, ...]
  difference: significance.Difference
  adjusted_p: float | None
  family: int
  relative_cost: float | None
  equal_cost: bool | None
  verdict: str


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What a grid shows.

  Attributes:
    metric: "accuracy" or "perplexity".
    higher_is_better: True of an accuracy.
    has_validation: whether `best` was chosen on a validation split.
    b_max: the width of the static reference.
    methods: in the order of the grid.
    against_static: of every method but the reference, per measure.
    against_uniform: of every method that gives layers or steps unequal bits,
      against its uniform control, per measure.
    frontier: methods that no other one beats in mean final metric and cost.
    missing_references: references that a comparison needs and the grid lacks.
  """

  metric: str
  higher_is_better: bool
  has_validation: bool
  b_max: int
  methods: tuple[Method, ...]
  against_static: tuple[Pair, ...]
  against_uniform: tuple[Pair, ...]
  frontier: tuple[str, ...]
  missing_references: tuple[str, ...]


def control(method: str) -> str | None:
  """The uniform control of a method, which has one width (or a mix of two).

  None of methods that are uniform themselves: float, static<b>, uniform and
  uniform_log_midpoint.
  """
  if re.fullmatch(r"float|static\d+|uniform(_.+)?", method):
    return None
  return "uniform_log_midpoint" if method == "dpc_log_midpoint" else "uniform"


def value(run: Mapping[str, Any], measure: str) -> float:
  """The test metric of a summary: "final", or "best" as in `Method`."""
  metric = run["metric"]
  if measure == "final":
    return run[f"test_{metric}"]
  honest = f"test_{metric}_at_best_validation"
  return run[honest if honest in run else f"best_test_{metric}"]


def compare(runs: Runs, *, b_max: int) -> Comparison:
  """Means, paired differences and verdicts of a grid.

  Args:
    runs: {method: {seed: summary}} of one model on one data set; at least one
      run.
    b_max: the width of the static reference.

  Raises:
    ValueError: no run, or runs of different metrics.
  """
  runs = {method: dict(cells) for method, cells in runs.items() if cells}
  summaries = [run for cells in runs.values() for run in cells.values()]
  metrics = {run["metric"] for run in summaries}
  if len(metrics) != 1:
    raise ValueError(
      f"runs: metrics {sorted(metrics)}; give finished runs of one data set"
    )
  (metric,) = metrics
  static = f"static{b_max}"
  rises = metric == "accuracy"
  wanted = {method: static for method in runs if method != static}
  controls = {
    method: reference
    for method in runs
    if (reference := control(method)) is not None
  }
  needed = dict.fromkeys([*wanted.values(), *controls.values()])
  methods = tuple(_method(name, by_seed) for name, by_seed in runs.items())
  is_best = frontier(
    [method.relative_to_static for method in methods],
    [method.final.mean for method in methods],
    higher_is_better=rises,
  )
  return Comparison(
    metric=metric,
    higher_is_better=rises,
    has_validation=all(f"validation_{metric}" in run for run in summaries),
    b_max=b_max,
    methods=methods,
    against_static=_pairs(runs, wanted, rises),
    against_uniform=_pairs(runs, controls, rises),
    frontier=tuple(
      method.method
      for method, best in zip(methods, is_best, strict=True)
      if best
    ),
    missing_references=tuple(name for name in needed if name not in runs),
  )


def frontier(
  costs: Sequence[float], values: Sequence[float], *, higher_is_better: bool
) -> list[bool]:
  """Which points no other one beats: cheaper or equal, and as good or better.

  Of points that are the same in both, all are on the frontier.
  """
  gains = values if higher_is_better else [-v for v in values]
  points = list(zip(costs, gains, strict=True))
  return [
    not any(
      c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points
    )
    for cost, gain in points
  ]


def _method(name: str, cells: Mapping[int, Mapping[str, Any]]) -> Method:
  seeds = sorted(cells)
  runs = [cells[seed] for seed in seeds]

  def mean(field):
    return float(np.mean([run[field] for run in runs]))

  return Method(
    method=name,
    seeds=tuple(seeds),
    final=significance.sample([value(run, "final") for run in runs]),
    best=significance.sample([value(run, "best") for run in runs]),
    gbitops=mean("gbitops"),
    relative_to_static=1 - mean("saving_vs_static"),
    relative_to_float=1 - mean("saving_vs_float"),
    mean_bits=mean("mean_bits"),
    seconds=mean("seconds"),
  )


def _pairs(
  runs: Runs, references: Mapping[str, str], higher_is_better: bool
) -> tuple[Pair, ...]:
  """Comparisons {method: reference}, of those references that were run."""
  references = {m: r for m, r in references.items() if r in runs}
  pairs = []
  for measure in MEASURES:
    differences = {
      method: _difference(runs[method], runs[reference], measure)
      for method, reference in references.items()
    }
    adjusted, sizes = {}, {}
    # A family is all comparisons with the same reference.
    for reference in set(references.values()):
      family = {
        method: difference.p
        for method, difference in differences.items()
        if references[method] == reference
      }
      sizes[reference] = len(family)
      # One that has no p-value was compared all the same: it counts.
      holm = significance.holm(
        [1.0 if p is None else p for p in family.values()]
      )
      adjusted |= {
        method: p
        for method, p in zip(family, holm, strict=True)
        if family[method] is not None
      }
    for method, reference in references.items():
      seeds, cost = _shared(runs[method], runs[reference])
      pairs.append(
        Pair(
          method=method,
          reference=reference,
          measure=measure,
          seeds=seeds,
          difference=differences[method],
          adjusted_p=adjusted.get(method),
          family=sizes[reference],
          relative_cost=cost,
          equal_cost=None if cost is None else abs(cost - 1) <= EQUAL_COST,
          verdict=significance.verdict(
            differences[method],
            adjusted.get(method),
            higher_is_better=higher_is_better,
          ),
        )
      )
  return tuple(pairs)


def _difference(
  cells: Mapping[int, Any], reference: Mapping[int, Any], measure: str
) -> significance.Difference:
  seeds = sorted(cells.keys() & reference.keys())
  return significance.paired(
    [value(cells[seed], measure) for seed in seeds],
    [value(reference[seed], measure) for seed in seeds],
  )


def _shared(
  cells: Mapping[int, Any], reference: Mapping[int, Any]
) -> tuple[tuple[int, ...], float | None]:
  """Shared seeds, and the reference's cost / the method's there."""
  seeds = tuple(sorted(cells.keys() & reference.keys()))
  if not seeds:
    return seeds, None
  cost, other = (
    sum(runs[seed]["gbitops"] for seed in seeds) for runs in (cells, reference)
  )
  return seeds, other / cost
