"""Statistics against written-out values, and words that claim no more."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dpc_jax.analysis import significance

# Hours of sleep won by ten patients with two drugs: Student (1908).
SLEEP_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SLEEP_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def difference(low, high, n=5):
  return significance.Difference(n, (low + high) / 2, 1.0, low, high, 0.01, 1.0)


def test_paired_differences_of_student():
  d = significance.paired(SLEEP_1, SLEEP_2)
  assert d.n == 10
  assert d.mean == pytest.approx(-1.58)
  assert d.sd == pytest.approx(1.229995, abs=1e-6)
  assert (d.low, d.high) == pytest.approx((-2.459886, -0.700114), abs=1e-6)
  assert d.p == pytest.approx(0.002833, abs=1e-6)


def test_sample_of_student():
  # t_{.975,9} = 2.262157, by tables.
  x = significance.sample(SLEEP_2)
  assert (x.n, x.mean) == (10, pytest.approx(2.33))
  assert x.sd == pytest.approx(2.002249, abs=1e-6)
  half = 2.262157 * 2.002249 / math.sqrt(10)
  assert (x.low, x.high) == pytest.approx((2.33 - half, 2.33 + half), abs=1e-5)


values = st.lists(
  st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8
)


@given(values)
def test_paired_equals_scipy(pairs):
  x, y = np.array(pairs).T
  d = significance.paired(x, y)
  if np.ptp(x - y) < 1e-6:
    return
  theirs = stats.ttest_rel(x, y)
  interval = theirs.confidence_interval(0.95)
  assert d.p == pytest.approx(theirs.pvalue, rel=1e-6)
  assert (d.low, d.high) == pytest.approx(tuple(interval), rel=1e-6, abs=1e-9)
  # The interval and p say the same.
  if abs(d.p - 0.05) > 1e-6:
    assert (d.low <= 0 <= d.high) == (d.p > 0.05)


@given(values)
def test_exchanging_the_two_changes_the_sign_alone(pairs):
  x, y = zip(*pairs, strict=True)
  d, back = significance.paired(x, y), significance.paired(y, x)
  assert back.mean == pytest.approx(-d.mean, abs=1e-12)
  assert (back.p is None) == (d.p is None)
  if d.low is not None:
    assert (back.low, back.high) == pytest.approx((-d.high, -d.low), abs=1e-12)


def test_one_pair_has_no_interval_and_none_no_mean():
  d = significance.paired([0.9], [0.8])
  assert (d.n, d.mean) == (1, pytest.approx(0.1))
  assert [d.sd, d.low, d.high, d.p, d.detectable] == [None] * 5
  assert significance.paired([], []).mean is None
  x = significance.sample([0.9])
  assert (x.mean, x.sd, x.low, x.high) == (0.9, None, None, None)


def test_no_difference_at_all_is_no_evidence_of_one():
  d = significance.paired([0.9, 0.8, 0.7], [0.9, 0.8, 0.7])
  assert (d.mean, d.sd, d.low, d.high, d.p) == (0, 0, 0, 0, 1)
  assert d.detectable is None


def test_equal_differences_give_no_interval():
  # Three images of 360 each time; equal but for rounding.
  method, reference = np.array([[355, 340, 351], [352, 337, 348]]) / 360
  assert np.std(np.subtract(method, reference), ddof=1) > 0
  d = significance.paired(method, reference)
  assert (d.mean, d.sd) == (pytest.approx(1 / 120), 0)
  assert [d.low, d.high, d.p, d.detectable] == [None] * 4
  said = significance.verdict(d, None, higher_is_better=True)
  assert said == "all differences equal: no interval"


@pytest.mark.parametrize(
  ("p", "adjusted"),
  [
    ([], []),
    ([0.02], [0.02]),
    # 4 * .005, 3 * .01, 2 * .03; .04 may not be below the one before it.
    ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
    ([0.5, 0.4], [0.8, 0.8]),
    ([0.9, 0.6, 0.7], [1, 1, 1]),
    ([0.02, 0.02], [0.04, 0.04]),
  ],
)
def test_holm_by_hand(p, adjusted):
  assert significance.holm(p) == pytest.approx(adjusted)


@given(st.lists(st.floats(0, 1), max_size=9))
def test_holm_lies_between_p_and_bonferroni_and_keeps_the_order(p):
  adjusted = significance.holm(p)
  for a, b in zip(p, adjusted, strict=True):
    assert a <= b <= min(1, len(p) * a)
  order = np.argsort(p, kind="stable")
  assert np.all(np.diff(np.array(adjusted)[order]) >= 0)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 50])
def test_detectable_has_power_of_four_fifths(n):
  # At these arguments scipy's noncentral t does not fail.
  delta = significance.detectable(0.3, n) / 0.3 * math.sqrt(n)
  critical = stats.t.ppf(0.975, n - 1)
  power = stats.nct.sf(critical, n - 1, delta)
  assert power == pytest.approx(0.8, abs=1e-4)


def test_detectable_by_simulation():
  size = significance.detectable(2.0, 5)
  draws = np.random.default_rng(0).normal(size, 2.0, (20_000, 5))
  share = np.mean(stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05)
  assert share == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(
  ("low", "high", "p", "higher", "lower"),
  [
    (0.1, 0.3, 0.01, "better", "worse"),
    (-0.3, -0.1, 0.01, "worse", "better"),
    (0.1, 0.3, 0.05, *["not shown after Holm's correction"] * 2),
    (-0.3, -0.1, 0.2, *["not shown after Holm's correction"] * 2),
    (0.1, 0.3, None, *["not shown after Holm's correction"] * 2),
    (-0.1, 0.3, 0.01, *["no difference shown"] * 2),
    (0.0, 0.3, 0.01, *["no difference shown"] * 2),
  ],
)
def test_verdict(low, high, p, higher, lower):
  d = difference(low, high)
  assert significance.verdict(d, p, higher_is_better=True) == higher
  assert significance.verdict(d, p, higher_is_better=False) == lower


def test_verdict_of_few_seeds():
  for n, said in ((0, "no pair of finished runs"), (1, "one seed: no inter")):
    d = significance.paired([0.9] * n, [0.1] * n)
    assert significance.verdict(d, None, higher_is_better=True).startswith(said)


ends = st.one_of(st.none(), st.floats(-1, 1))


@given(ends, ends, st.integers(0, 9), ends, st.booleans())
def test_no_claim_without_an_interval_off_zero(low, high, n, p, higher):
  d = significance.Difference(n, 0.0, 1.0, low, high, p, 1.0)
  said = significance.verdict(d, p, higher_is_better=higher)
  covers = low is None or high is None or low <= 0 <= high
  if said in ("better", "worse"):
    assert n >= 2 and not covers and p is not None and p < 0.05
  if covers:
    assert "better" not in said and "worse" not in said


@given(values, st.booleans())
def test_claims_of_data_follow_their_interval(pairs, higher):
  x, y = zip(*pairs, strict=True)
  d = significance.paired(x, y)
  said = significance.verdict(d, d.p, higher_is_better=higher)
  if said == "better":
    assert (d.low > 0) if higher else (d.high < 0)
  if said == "worse":
    assert (d.high < 0) if higher else (d.low > 0)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: significance.sample([]), "at least one value"),
    (lambda: significance.sample([math.nan]), r"values=\[nan\]"),
    (lambda: significance.paired([1.0], [1.0, 2.0]), "1 and 2 values"),
    (lambda: significance.paired([1.0], [math.inf]), r"reference=\[inf\]"),
    (lambda: significance.holm([1.5]), r"must be in \[0, 1\]"),
    (lambda: significance.detectable(1.0, 1), "at least 2 pairs"),
  ],
)
def test_mistakes_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
