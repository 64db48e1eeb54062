"""Controls of DPC: other choices of widths at the cost of DPC's.

What a step costs in layer k, with M_k multiply-accumulates of the forward pass
and widths w, a, g, is M_k*(w*a + g*w + g*a) (CPT's convention), summed over the
quantized layers, each of the stacked ones by itself. The target is the cost of
`schedules.dpc` with the same arguments. A layer without weights (a product of
two activations) keeps what DPC gives it, b_max; all others are fitted to the
target in two steps (our decision, and so are the tie rules):

1.  Every layer has a real-valued width x_k: what the control wants, up to a
    constant. The shift s is the largest with cost(floor(x_k + s)) <= target, so
    that cost(floor(x_k + s) + 1) >= target; widths are clipped to the bounds.
2.  Which layers get the upper of their two widths is a subset-sum problem: the
    subset whose cost differences come nearest to what is missing. Among equal
    subsets the layers nearest to their next bit go up first, and among those
    the first in a *spread* order: by the fractional part of (i + 1)*(sqrt(5) -
    1)/2, where i is the rank of the layer's path in sorted order. Any number of
    layers from its start lies evenly over the network, so that the tie rule
    prefers neither small layers nor early ones. A dict's order plays no part.

The cost misses DPC's by about half the price of one bit in one layer at most:
well below 1 % in networks of a few dozen layers. A tiny net may have no subset
within 1 %: then the nearest is taken and nothing is raised, and
`relative_cost` tells.

All are fixed schedules: one compiled step serves them, constant widths and DPC.
"""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dpc_jax.policy import dpc as equation
from dpc_jax.policy import schedule
from dpc_jax.quant import grids

# Cells of the subset-sum table: finer than a layer's rounding matters.
_CELLS = 2**18

# Of a real-valued width: a millionth of a bit.
_UNIT = 2**20

_GOLDEN = (5**0.5 - 1) / 2

# A layer: its path, and its index among those stacked there, () for one alone.
_Single = tuple[str, tuple[int, ...]]


def uniform(
  b_min: int,
  b_max: int,
  *,
  macs: Mapping[str, int],
  delta: float = 1.0,
  center: str = "median",
  log_form: str = "base",
  weights: int | None = None,
  activations: int | None = None,
  gradients: int | None = 8,
) -> schedule.Schedule:
  """One width for all layers, or two neighboring ones, at the cost of DPC.

  All x_k are equal (the module's docstring has the formulas), so where no
  single width has the cost of DPC, a subset of the layers has one bit more: one
  that fits the cost, and of those the first in the spread order, whatever
  the layers' capacities.

  Args:
    b_min: as in `schedules.dpc`, whose cost is matched; widths stay inside.
    b_max: likewise.
    macs: {path: M_k}, ints >= 1, of one sample and of *one* of the layers that
      are stacked at a path, as `layer_costs` gives them. Paths that are no
      quantized layers are left out.
    delta: as in `schedules.dpc`, and so the arguments below.
    center: likewise.
    log_form: likewise.
    weights: likewise.
    activations: likewise.
    gradients: likewise.

  Returns:
    A `Schedule`. Its `init` raises ValueError for a layer that `macs` misses
    and for counts that `dpc_bit_widths` refuses.

  Raises:
    ValueError: naming the parameter that is out of its range.

  Example:
    >>> macs = {"stem": 27_648, "conv": 147_456, "last": 147_456}
    >>> even = uniform(3, 8, macs=macs)
    >>> state = even.init({"stem": 432, "conv": 9_216, "last": 36_864})
    >>> {path: int(layer.weights) for path, layer in state.bits.items()}
    {'stem': 5, 'conv': 6, 'last': 6}
  """
  return _matched(
    np.zeros_like,
    macs,
    (b_min, b_max),
    {"delta": delta, "center": center, "log_form": log_form},
    (weights, activations, gradients),
  )


def reversed_dpc(
  b_min: int,
  b_max: int,
  *,
  macs: Mapping[str, int],
  delta: float = 1.0,
  center: str = "median",
  log_form: str = "base",
  weights: int | None = None,
  activations: int | None = None,
  gradients: int | None = 8,
) -> schedule.Schedule:
  """More bits for layers with more weights, at the cost of DPC.

  x_k is the argument of ceil in Eq. 1 with -delta in place of delta, up to the
  shift. So the widths rise with N_k, but for the one bit that fits the cost:
  of two layers the smaller has at most one bit more.

  Args:
    b_min: as in `uniform`, and so all arguments.
    b_max: likewise.
    macs: likewise.
    delta: likewise.
    center: likewise.
    log_form: likewise.
    weights: likewise.
    activations: likewise.
    gradients: likewise.

  Returns:
    A `Schedule`, as `uniform` does.

  Raises:
    ValueError: naming the parameter that is out of its range.

  Example:
    >>> macs = {"stem": 27_648, "conv": 147_456, "last": 147_456}
    >>> rising = reversed_dpc(3, 8, macs=macs)
    >>> state = rising.init({"stem": 432, "conv": 9_216, "last": 36_864})
    >>> {path: int(layer.weights) for path, layer in state.bits.items()}
    {'stem': 3, 'conv': 6, 'last': 6}
  """

  def rising(counts: np.ndarray) -> np.ndarray:
    log = equation.log_term(counts, center, log_form)
    return delta / 2 * (b_max - b_min) * log

  return _matched(
    rising,
    macs,
    (b_min, b_max),
    {"delta": delta, "center": center, "log_form": log_form},
    (weights, activations, gradients),
  )


def random_layerwise(
  b_min: int,
  b_max: int,
  *,
  macs: Mapping[str, int],
  seed: int = 0,
  delta: float = 1.0,
  center: str = "median",
  log_form: str = "base",
  weights: int | None = None,
  activations: int | None = None,
  gradients: int | None = 8,
) -> schedule.Schedule:
  """Random widths for each layer, at the cost of DPC.

  x_k is uniform in [b_min, b_max), drawn by `numpy.random.default_rng(seed)` in
  the spread order: equal models and seeds have equal widths.

  Args:
    b_min: as in `uniform`, and so all arguments but `seed`.
    b_max: likewise.
    macs: likewise.
    seed: of the draw, an int >= 0.
    delta: likewise.
    center: likewise.
    log_form: likewise.
    weights: likewise.
    activations: likewise.
    gradients: likewise.

  Returns:
    A `Schedule`, as `uniform` does.

  Raises:
    ValueError: naming the parameter that is out of its range.

  Example:
    >>> macs = {f"layer{i}": 9_216 for i in range(20)}
    >>> drawn = random_layerwise(3, 8, macs=macs, seed=1).init(macs)
    >>> equal = schedule.fixed(schedule.by_equation(3, 8)).init(macs)
    >>> round(relative_cost(drawn.bits, equal.bits, macs), 2)
    1.0
  """
  if not _is_int(seed) or seed < 0:
    raise ValueError(f"seed={seed!r} is out of range; use an int >= 0")

  def draw(counts: np.ndarray) -> np.ndarray:
    return np.random.default_rng(seed).uniform(b_min, b_max, counts.shape)

  return _matched(
    draw,
    macs,
    (b_min, b_max),
    {"delta": delta, "center": center, "log_form": log_form},
    (weights, activations, gradients),
  )


def cost(bits: Mapping[str, grids.LayerBits], macs: Mapping[str, int]) -> int:
  """BitOPs of a training step for one sample, over the layers of `bits`.

  The sum of M_k*(w*a + g*w + g*a), which is that of `cost.bitops`.

  Args:
    bits: {path: LayerBits}, arrays of the shape of the stacked layers, as the
      state of a fixed schedule holds them.
    macs: {path: M_k} of one of the stacked layers; ints.

  Raises:
    ValueError: a path of `bits` that `macs` misses.
  """
  total = 0
  for path, widths in bits.items():
    w, a, g = (np.asarray(width, np.int64) for width in widths)
    total += _macs_of(path, macs) * int(np.sum(w * a + g * w + g * a))
  return total


def relative_cost(
  bits: Mapping[str, grids.LayerBits],
  reference: Mapping[str, grids.LayerBits],
  macs: Mapping[str, int],
) -> float:
  """cost(bits) / cost(reference): 1 for a control that matches perfectly."""
  return cost(bits, macs) / cost(reference, macs)


def match_widths(
  real: np.ndarray, prices: Sequence[Sequence[int]], b_min: int, target: int
) -> list[int]:
  """Widths near `real` + s, for one s, whose price is nearest to `target`.

  The two steps of the module's docstring.

  Args:
    real: float64 (layers,), x_k; rounded to 2^-20.
    prices: for each layer, what the widths b_min, b_min + 1, ... cost: ints
      that do not fall from one to the next, as many for every layer.
    b_min: the smallest width.
    target: between the sums of the first and of the last prices.

  Returns:
    One width for each layer. Ties go to the layer that comes first.
  """
  top = len(prices[0]) - 1
  # Fixed point: sums are exact, and machines whose logarithms differ in the
  # last digit agree.
  fixed = np.rint(real * _UNIT).astype(np.int64)

  def above(shift: int, more: int = 0) -> np.ndarray:
    """Bits above b_min, within the bounds."""
    return np.clip((fixed + shift) // _UNIT - b_min + more, 0, top)

  def price(bits: np.ndarray) -> int:
    return sum(row[i] for row, i in zip(prices, bits.tolist(), strict=True))

  low = (b_min - 1) * _UNIT - int(fixed.max())
  high = (b_min + top + 1) * _UNIT - int(fixed.min())
  if price(above(high)) <= target:
    return [b_min + top] * len(prices)
  while high - low > 1:
    middle = (low + high) // 2
    if price(above(middle)) <= target:
      low = middle
    else:
      high = middle
  lower, upper = above(low), above(low, 1)
  order = np.argsort(-((fixed + low) % _UNIT), kind="stable").tolist()
  differences = [prices[k][upper[k]] - prices[k][lower[k]] for k in order]
  widths = (b_min + lower).tolist()
  for i in _subset(differences, target - price(lower)):
    widths[order[i]] = b_min + int(upper[order[i]])
  return widths


def _subset(sizes: Sequence[int], goal: int) -> list[int]:
  """Indices of a subset of `sizes` whose sum is near to `goal` >= 0.

  Exact where the sizes are multiples of a common divisor large enough, as those
  of one network mostly are; else each is rounded to 2^-18 of their sum. Of two
  sums equally near the smaller is taken, of equal subsets the earlier indices.
  """
  divisor = math.gcd(*sizes)
  if not divisor:
    return []
  cell = divisor * max(1, -(-sum(sizes) // (divisor * _CELLS)))
  cells = [(size + cell // 2) // cell for size in sizes]
  # Bit i of reached[k]: a subset of the first k has the sum of i cells.
  reached = [1]
  for size in cells:
    reached.append(reached[-1] | reached[-1] << size)
  rest = (reached[-1] & ((2 << (goal // cell)) - 1)).bit_length() - 1
  beyond = reached[-1] >> (rest + 1)
  if beyond:
    next_sum = rest + (beyond & -beyond).bit_length()
    if next_sum * cell - goal < goal - rest * cell:
      rest = next_sum
  subset = []
  for k in reversed(range(len(cells))):
    if not (reached[k] >> rest) & 1:
      subset.append(k)
      rest -= cells[k]
  return subset[::-1]


def _matched(
  real: Callable[[np.ndarray], np.ndarray],
  macs: Mapping[str, int],
  bounds: tuple[int, int],
  options: Mapping[str, Any],
  operands: tuple[int | None, int | None, int | None],
) -> schedule.Schedule:
  """The control with widths near real(N_k) + s, N_k float64 (layers,)."""
  b_min, b_max = bounds
  named = dict(zip(grids.LayerBits._fields, operands, strict=True))
  reference = schedule.by_equation(b_min, b_max, **options, **named)
  overrules = schedule.operand_widths(*operands)
  macs = dict(macs)
  for path in macs:
    _macs_of(path, macs)

  def price(path: str, b: int) -> int:
    return cost({path: schedule.overruled(b, overrules, True)}, macs)

  def choose(capacities: Mapping[str, Any]) -> dict[str, grids.LayerBits]:
    for path in capacities:
      _macs_of(path, macs)
    bits = reference(capacities)
    singles = _singles(capacities)
    counts = np.array([np.asarray(capacities[p])[i] for p, i in singles], float)
    prices = {
      path: [price(path, b) for b in range(b_min, b_max + 1)]
      for path in {path for path, _ in singles}
    }
    weighted = {path: bits[path] for path in prices}
    target = cost(schedule.as_arrays(weighted, capacities), macs)
    widths = match_widths(
      real(counts), [prices[path] for path, _ in singles], b_min, target
    )
    own = {path: np.zeros(np.shape(capacities[path]), int) for path in prices}
    for (path, index), width in zip(singles, widths, strict=True):
      own[path][index] = width
    return bits | {
      path: schedule.overruled(b, overrules, True) for path, b in own.items()
    }

  return schedule.fixed(choose)


def _singles(capacities: Mapping[str, Any]) -> list[_Single]:
  """Every single layer that has weights, in the spread order."""
  singles = [
    (path, index)
    for path in sorted(capacities)
    if schedule.has_weights(capacities[path])
    for index in np.ndindex(np.shape(capacities[path]))
  ]
  places = np.arange(1, len(singles) + 1) * _GOLDEN % 1
  return [singles[i] for i in np.argsort(places, kind="stable")]


def _macs_of(path: str, macs: Mapping[str, int]) -> int:
  """M_k of a path, checked."""
  if path not in macs:
    raise ValueError(
      f"macs: layer {path!r} is missing; give the macs of every quantized layer"
    )
  value = macs[path]
  if not _is_int(value) or value < 1:
    raise ValueError(f"macs[{path!r}]={value!r} is no count; use an int >= 1")
  return int(value)


def _is_int(value: Any) -> bool:
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)
