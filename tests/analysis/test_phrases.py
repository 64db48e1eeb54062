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


def about(**pictures):
  return "\n".join(
    phrases.moves({f"{k}.png": what for k, what in pictures.items()})
  )


def test_pictures_of_moves_are_explained_by_what_they_show():
  signals, bits = (f"{what} of a" for what in (phrases.SIGNALS, phrases.BITS))
  both = about(moves_a=signals, moves_b=bits, curves="c")
  assert both.startswith(
    "## Bits over time\n\n![Signals and bits of a](moves_a.png)\n"
    "![Bits over time of a](moves_b.png)\n\n"
  )
  for text, has_signals, has_bits in (
    (both, True, True),
    (about(moves=signals), True, False),
    (about(moves=bits), False, True),
  ):
    assert ("Gray: not known" in text) is has_signals
    assert ("A picture without signals" in text) is has_bits
  assert about(curves="c") == ""


def test_bits_are_of_what_has_them():
  layers = [(5, 5, 8), ([3, 4], [3, 4], [8, 8])]
  assert phrases.bits(layers) == "bits of weights and activations"
  assert phrases.bits([*layers, (5, 8, 8)]) == "bits of weights"
