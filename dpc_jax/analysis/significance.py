"""Whether a difference between two methods is more than the noise of a seed.

Runs with the same seed share initial weights and the order of the data, so
methods are compared seed by seed (a paired design). All is Student's t (Student
1908): it takes the differences for independent and roughly normal, which a
handful of seeds cannot confirm. Everything is float64.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

ALPHA = 0.05  # two-sided; intervals hold 1 - ALPHA = 95 %
POWER = 0.8
# Differences that are equal but for rounding, relative to what is compared.
_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True)
class Sample:
  """Values of one method, one for each seed.

  Attributes:
    n: how many.
    mean: their mean.
    sd: sample standard deviation, sqrt(sum (x - mean)^2 / (n - 1)); None below
      two values.
    low: lower end of the interval of the mean, mean -+ t_{.975,n-1} sd /
      sqrt(n); None below two values.
    high: its upper end.
  """

  n: int
  mean: float
  sd: float | None
  low: float | None
  high: float | None


@dataclasses.dataclass(frozen=True)
class Difference:
  """Paired differences d_i = method - reference, one for each shared seed.

  Attributes:
    n: number of pairs.
    mean: mean of d; None without a pair.
    sd: sample standard deviation of d; None below two pairs; exactly 0 where
      all d are equal but for rounding.
    low: lower end of the 95 % interval, mean -+ t_{.975,n-1} sd / sqrt(n); None
      below two pairs, and where all d are equal but not 0: no spread was seen
      that an interval could rest on (our decision; accuracies on few images
      are often equal).
    high: its upper end.
    p: two-sided p-value of mean = 0; None where there is no interval, 1 where
      all d are 0.
    detectable: see `detectable`; None where sd is None or 0.
  """

  n: int
  mean: float | None
  sd: float | None
  low: float | None
  high: float | None
  p: float | None
  detectable: float | None


def sample(values: Sequence[float]) -> Sample:
  """Mean, standard deviation and interval of at least one finite value.

  Raises:
    ValueError: no value, or one that is not finite.
  """
  x = _finite(values, "values")
  if not len(x):
    raise ValueError("values=[]: a sample has at least one value")
  mean = float(np.mean(x))
  if len(x) == 1:
    return Sample(1, mean, None, None, None)
  sd = float(np.std(x, ddof=1))
  half = _half_width(sd, len(x))
  return Sample(len(x), mean, sd, mean - half, mean + half)


def paired(values: Sequence[float], reference: Sequence[float]) -> Difference:
  """The paired t-test of a method against a reference.

  t = mean / (sd / sqrt(n)) with n - 1 degrees of freedom; the interval excludes
  0 exactly where p < 0.05.

  Args:
    values: the method's metric, finite, one for each seed.
    reference: the reference's, of the same seeds in the same order.

  Raises:
    ValueError: not equally many, or a value that is not finite.
  """
  x, y = _finite(values, "values"), _finite(reference, "reference")
  if len(x) != len(y):
    raise ValueError(
      f"values, reference: {len(x)} and {len(y)} values; give one of each for"
      " every seed"
    )
  n = len(x)
  if n == 0:
    return Difference(0, None, None, None, None, None, None)
  d = x - y
  mean = float(np.mean(d))
  if n == 1:
    return Difference(1, mean, None, None, None, None, None)
  rounding = _ROUNDING * max(np.max(np.abs(x)), np.max(np.abs(y)))
  sd = float(np.std(d, ddof=1))
  # The square of a spread of 1e-200 is 0.
  if np.ptp(d) <= rounding or sd == 0:
    if abs(mean) <= rounding:
      return Difference(n, 0.0, 0.0, 0.0, 0.0, 1.0, None)
    return Difference(n, mean, 0.0, None, None, None, None)
  half = _half_width(sd, n)
  p = 2 * float(stats.t.sf(abs(mean) / (sd / math.sqrt(n)), n - 1))
  return Difference(n, mean, sd, mean - half, mean + half, p, detectable(sd, n))


def holm(p_values: Sequence[float]) -> list[float]:
  """Adjusted p-values that keep the chance of any false finding below alpha.

  Holm (1979): with m values in ascending order, the i-th (from 1) becomes the
  largest of (m - j + 1) p_(j) over j <= i, at most 1.

  Args:
    p_values: of one family of comparisons, each in [0, 1].

  Returns:
    The adjusted values in the order given.

  Raises:
    ValueError: a value outside [0, 1].
  """
  p = np.asarray(p_values, np.float64)
  if not np.all((p >= 0) & (p <= 1)):
    raise ValueError(f"p_values={list(p_values)}: must be in [0, 1]")
  order = np.argsort(p, kind="stable")
  factors = np.arange(len(p), 0, -1)
  adjusted = np.empty_like(p)
  adjusted[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1)
  return adjusted.tolist()


def detectable(sd: float, n: int) -> float:
  """The smallest true difference that n seeds would most likely have shown.

  That is delta sd / sqrt(n), where the two-sided t-test at alpha = 0.05 has
  power 0.8 for the noncentrality delta (noncentral t; Cohen 1988). It takes
  the sample's sd for the true one, and leaves Holm's correction out: with
  several comparisons even larger differences may go unseen.

  Args:
    sd: standard deviation of the paired differences.
    n: number of pairs, at least 2.

  Raises:
    ValueError: fewer than two pairs.
  """
  if n < 2:
    raise ValueError(f"n={n}: power needs at least 2 pairs")
  return float(_noncentrality(n) * sd / math.sqrt(n))


@functools.cache
def _noncentrality(n: int) -> float:
  """delta with P(|T'_{n-1}(delta)| > t_{.975,n-1}) = 0.8, by bisection.

  T' = (Z + delta) / S with S = sqrt(chi^2_{n-1} / (n-1)), so that the power is
  E[Phi(delta - t S) + Phi(-delta - t S)], here a mean over quantiles of S:
  scipy's own noncentral t gives NaN for some arguments.
  """
  critical = stats.t.ppf(1 - ALPHA / 2, n - 1)
  quantiles = (np.arange(4000) + 0.5) / 4000
  scaled = critical * np.sqrt(stats.chi2.ppf(quantiles, n - 1) / (n - 1))
  low, high = 0.0, 10 * critical
  for _ in range(60):
    delta = (low + high) / 2
    power = np.mean(
      stats.norm.cdf(delta - scaled) + stats.norm.cdf(-delta - scaled)
    )
    low, high = (delta, high) if power < POWER else (low, delta)
  return float(low + high) / 2


def verdict(
  difference: Difference,
  adjusted_p: float | None,
  *,
  higher_is_better: bool,
) -> str:
  """What may be said of a difference; the wording follows the interval.

  "better" and "worse" need both: the 95 % interval excludes 0, and Holm's
  adjusted p is below 0.05.

  Args:
    difference: of the metric, method - reference.
    adjusted_p: of `holm`, over all comparisons with this reference; None where
      the difference has no p-value.
    higher_is_better: True of an accuracy, False of a perplexity.
  """
  if difference.n == 0:
    return "no pair of finished runs"
  if difference.n == 1:
    return "one seed: no interval"
  if difference.low is None or difference.high is None:
    return "all differences equal: no interval"
  if difference.low <= 0 <= difference.high:
    return "no difference shown"
  if adjusted_p is None or not adjusted_p < ALPHA:
    return "not shown after Holm's correction"
  return "better" if (difference.low > 0) == higher_is_better else "worse"


def _half_width(sd: float, n: int) -> float:
  return float(stats.t.ppf(1 - ALPHA / 2, n - 1)) * sd / math.sqrt(n)


def _finite(values: Sequence[float], name: str) -> np.ndarray:
  x = np.asarray(values, np.float64)
  if x.ndim != 1 or not np.all(np.isfinite(x)):
    raise ValueError(f"{name}={values!r}: must be a row of finite numbers")
  return x
