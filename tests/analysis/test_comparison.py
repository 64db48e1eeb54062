"""Pairs, families, costs and frontier of a grid of made-up runs."""

import dataclasses
import json

import pytest

from dpc_jax.analysis import comparison


def run(final, seed=0, **changes):
  return {
    "metric": "accuracy",
    "seed": seed,
    "test_accuracy": final,
    "best_test_accuracy": final + 0.01,
    "gbitops": 100.0,
    "saving_vs_static": 0.0,
    "saving_vs_float": 0.9,
    "mean_bits": 8.0,
    "seconds": 1.0,
  } | changes


def grid(**methods):
  return {
    method: {seed: run(x, seed) for seed, x in enumerate(finals)}
    for method, finals in methods.items()
  }


def pair(result, method, reference, measure="final"):
  (found,) = (
    p
    for p in (*result.against_static, *result.against_uniform)
    if (p.method, p.reference, p.measure) == (method, reference, measure)
  )
  return found


def test_seeds_are_paired():
  # The method is better on each seed, by less than the seeds differ.
  runs = grid(static8=[0.80, 0.90, 0.85, 0.95], dpc=[0.811, 0.910, 0.861, 0.96])
  result = comparison.compare(runs, b_max=8)
  p = pair(result, "dpc", "static8")
  assert p.seeds == (0, 1, 2, 3)
  assert p.difference.mean == pytest.approx(0.0105)
  assert p.verdict == "better"
  assert (p.family, p.adjusted_p) == (1, pytest.approx(p.difference.p))


def test_missing_cells_leave_the_pairs_that_exist():
  runs = grid(static8=[0.8, 0.9, 0.7], dpc=[0.81, 0.93, 0.7])
  del runs["static8"][0], runs["dpc"][2]
  p = pair(comparison.compare(runs, b_max=8), "dpc", "static8")
  assert (p.seeds, p.difference.n) == ((1,), 1)
  assert p.difference.mean == pytest.approx(0.03)
  assert p.verdict == "one seed: no interval"
  del runs["dpc"][1]
  p = pair(comparison.compare(runs, b_max=8), "dpc", "static8")
  assert (p.difference.n, p.relative_cost, p.equal_cost) == (0, None, None)
  assert p.verdict == "no pair of finished runs"


def test_final_and_best_are_kept_apart():
  runs = grid(static8=[0.8], dpc=[0.9])
  result = comparison.compare(runs, b_max=8)
  assert not result.has_validation
  dpc = result.methods[1]
  assert (dpc.final.mean, dpc.best.mean) == (0.9, pytest.approx(0.91))
  for by_seed in runs.values():
    for one in by_seed.values():
      one |= {"validation_accuracy": 0.5, "test_accuracy_at_best_validation": 1}
  result = comparison.compare(runs, b_max=8)
  assert result.has_validation
  assert result.methods[1].best.mean == 1


def test_lower_perplexities_are_better():
  runs = grid(static8=[0] * 3, dpc=[0] * 3)
  for method, shift in (("static8", 0), ("dpc", -5)):
    for seed, one in runs[method].items():
      value = 100 + shift + 0.1 * seed * (1 if shift else 2)
      one |= {
        "metric": "perplexity",
        "test_perplexity": value,
        "best_test_perplexity": value,
      }
  result = comparison.compare(runs, b_max=8)
  assert not result.higher_is_better
  p = pair(result, "dpc", "static8")
  assert p.difference.high < 0 and p.verdict == "better"
  assert result.frontier == ("dpc",)


def test_a_family_is_all_comparisons_with_one_reference():
  runs = grid(
    static8=[0.80, 0.81, 0.82],
    uniform=[0.80, 0.83, 0.85],
    dpc=[0.83, 0.85, 0.85],
    random=[0.70, 0.73, 0.72],
    uniform_log_midpoint=[0.81, 0.84, 0.80],
    dpc_log_midpoint=[0.85, 0.89, 0.83],
  )
  result = comparison.compare(runs, b_max=8)
  static = [p for p in result.against_static if p.measure == "final"]
  assert {p.family for p in static} == {5}
  smallest = min(static, key=lambda p: p.difference.p)
  assert smallest.adjusted_p == pytest.approx(5 * smallest.difference.p)
  controls = [p for p in result.against_uniform if p.measure == "final"]
  assert [(p.method, p.reference, p.family) for p in controls] == [
    ("dpc", "uniform", 2),
    ("random", "uniform", 2),
    ("dpc_log_midpoint", "uniform_log_midpoint", 1),
  ]


@pytest.mark.parametrize(
  ("method", "reference"),
  [
    ("float", None),
    ("static8", None),
    ("static16", None),
    ("uniform", None),
    ("uniform_log_midpoint", None),
    ("dpc", "uniform"),
    ("dpc_log_midpoint", "uniform_log_midpoint"),
    *[
      (method, "uniform")
      for method in (
        "adaptive",
        "adaptive_reversed",
        "cpt",
        "pfq",
        "reversed",
        "random",
        "dpc_cpt",
      )
    ],
  ],
)
def test_control(method, reference):
  assert comparison.control(method) == reference


@pytest.mark.parametrize(
  ("cost", "equal"),
  [(100.0, True), (100.9, True), (99.1, True), (101.1, False), (98.9, False)],
)
def test_equal_cost_is_within_one_percent(cost, equal):
  runs = grid(uniform=[0.8, 0.9], dpc=[0.8, 0.9])
  for one in runs["uniform"].values():
    one["gbitops"] = cost
  p = pair(comparison.compare(runs, b_max=8), "dpc", "uniform")
  assert p.equal_cost is equal
  assert p.relative_cost == pytest.approx(cost / 100)


def test_missing_references_are_named():
  result = comparison.compare(grid(float=[0.8], dpc=[0.8]), b_max=8)
  assert result.missing_references == ("static8", "uniform")
  assert result.against_static == result.against_uniform == ()
  result = comparison.compare(grid(static6=[0.8]) | {"dpc": {}}, b_max=6)
  assert result.missing_references == ()
  assert [m.method for m in result.methods] == ["static6"]


def test_costs_are_means_over_seeds():
  runs = grid(dpc=[0.8, 0.9])
  runs["dpc"][1] |= {
    "gbitops": 50.0,
    "saving_vs_static": 0.5,
    "saving_vs_float": 0.95,
    "mean_bits": 5.0,
  }
  (dpc,) = comparison.compare(runs, b_max=8).methods
  assert dpc.seeds == (0, 1)
  assert dpc.gbitops == 75
  assert dpc.relative_to_static == pytest.approx(0.75)
  assert dpc.relative_to_float == pytest.approx(0.075)
  assert dpc.mean_bits == 6.5


def test_frontier_by_hand():
  costs, gains = [1.0, 0.7, 0.7, 0.5, 0.5], [0.9, 0.9, 0.8, 0.7, 0.7]
  rising = comparison.frontier(costs, gains, higher_is_better=True)
  assert rising == [False, True, False, True, True]
  falling = comparison.frontier(costs, gains, higher_is_better=False)
  assert falling == [False, False, False, True, True]


def test_all_of_it_is_json():
  result = comparison.compare(grid(static8=[0.8, 0.9], dpc=[0.8, 0.9]), b_max=8)
  text = json.dumps(dataclasses.asdict(result), allow_nan=False)
  assert json.loads(text)["methods"][0]["final"]["n"] == 2


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="give finished runs"):
    comparison.compare({"dpc": {}}, b_max=8)
  runs = grid(static8=[0.8], dpc=[0.8])
  runs["dpc"][0]["metric"] = "perplexity"
  with pytest.raises(ValueError, match=r"'accuracy', 'perplexity'"):
    comparison.compare(runs, b_max=8)
