"""What reports say of a test set's size."""

import re

import pytest
from scipy import stats

from dpc_jax.analysis import phrases


def interval(text):
  return [float(x) for x in re.search(r"of (\S+)\.\.(\S+) from", text).groups()]


@pytest.mark.parametrize("right", [0, 3, 355, 360])
def test_the_interval_is_wilson_s(right):
  text = phrases.binomial(right / 360, "accuracy", 360)
  assert f"360 examples: an accuracy of {right / 360:.4f}" in text
  low, high = interval(text)
  want = stats.binomtest(right, 360).proportion_ci(method="wilson")
  assert (low, high) == pytest.approx((want.low, want.high), abs=1e-4)
  # No accuracy is certain.
  assert high - low > 0.01


def test_a_mean_over_seeds_and_what_is_not_known():
  low, high = interval(phrases.binomial(0.98611, "accuracy", 10_000))
  assert low < 0.9861 < high and high - low < 0.005
  assert phrases.binomial(0.9, "accuracy", None) == ""
  assert phrases.binomial(3.2, "perplexity", 360) == ""
