"""Cyclic Precision Training (CPT), plain and with bounds of each layer's own.

Fu et al., "CPT: Efficient Deep Neural Network Training via Cyclic Precision",
ICLR 2021. With T steps to a cycle, the width at step t is

  b_t = rint(B_min + (B_max - B_min)/2 * (1 + cos(pi*(t mod T)/T + pi)))

where rint rounds half to even. A width climbs from B_min to B_max within a
cycle and falls back at its end.

No cosine is computed in the train step. The host finds, for every range of
widths, the phase t mod T at which each next width begins, and the step
compares integers: values come within 7e-8 of a tie (T = 1518, 6 bits between
the bounds), which float32 does not tell from it, and cosines differ in their
last digit between devices.
"""

import math
import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpc_jax.policy import dpc as equation
from dpc_jax.policy import schedule
from dpc_jax.quant import grids

# Bits between the narrowest and the widest grid.
_MAX_RANGE = grids.MAX_WIDTH - grids.MIN_WIDTH
_MAX_PERIOD = 2**31 - 1


class CyclicState(NamedTuple):
  """State of a cyclic schedule; it never changes in a run.

  Attributes:
    low: {path: LayerBits} of int32 arrays, shape () or (layers,): the widths
      at the start of a cycle.
    high: likewise, at its end; equal to `low` where an operand does not cycle.
    period: T, int32 ().
    begins: int32 (2, 15, 14): [p, d, k] is the phase at which width low+k+1
      begins where low is odd (p = 1) or even and high - low = d; T for k >= d.
  """

  low: dict[str, grids.LayerBits]
  high: dict[str, grids.LayerBits]
  period: jax.Array
  begins: jax.Array


def cyclic(
  b_min: int,
  b_max: int,
  *,
  steps: int,
  cycles: int = 32,
  weights: int | None = None,
  activations: int | None = None,
  gradients: int | None = 8,
) -> schedule.Schedule:
  """CPT: all layers cycle between b_min and b_max (the module's docstring).

  T = max(1, steps // cycles); steps beyond `steps` go on cycling. Evaluated at
  b_max, as in CPT. A layer without weights (a product of two activations) has
  b_max throughout: our decision, as in `schedules.dpc`.

  Args:
    b_min: width at the start of a cycle, 2..16.
    b_max: width at its end, b_min..16.
    steps: length of the run, at least 1. A run with fewer steps than `cycles`
      stays at b_min.
    cycles: how many of them, at least 1; 32 is CPT's.
    weights: None lets this operand cycle; an int sets its width in every layer
      and step, and 32 leaves it in float.
    activations: likewise, for the layer's input.
    gradients: likewise, for the gradient at the layer's output; 8 is CPT's.

  Returns:
    A `Schedule`.

  Raises:
    ValueError: naming the parameter that is out of its range.

  Example:
    >>> one = cyclic(3, 8, steps=8, cycles=1)
    >>> state = one.init({"conv": 9_216})
    >>> bits = (one.update(state, step=step)[0] for step in range(10))
    >>> [int(b["conv"].weights) for b in bits]
    [3, 3, 4, 5, 6, 6, 7, 8, 3, 3]
  """
  equation.check_arguments(b_min, b_max)
  period = _period(steps, cycles)
  operands = schedule.operand_widths(weights, activations, gradients)

  def init(capacities: Mapping[str, Any]) -> CyclicState:
    weighted = {p: schedule.has_weights(n) for p, n in capacities.items()}
    high = {
      path: schedule.overruled(b_max, operands, has)
      for path, has in weighted.items()
    }
    return _state(b_min, high, operands, period, capacities)

  return schedule.Schedule(init, _update, evaluation=_evaluation)


def cyclic_dpc(
  b_min: int,
  b_max: int,
  *,
  steps: int,
  cycles: int = 32,
  delta: float = 1.0,
  center: str = "median",
  log_form: str = "base",
  weights: int | None = None,
  activations: int | None = None,
  gradients: int | None = 8,
) -> schedule.Schedule:
  """CPT and DPC together: each layer cycles between b_min and its own B_k.

  B_k is that of Eq. 1 and takes the place of B_max in CPT's formula; evaluated
  at B_k. The combination is our decision: no published system has it. A layer
  with B_k = b_min does not cycle, one without weights stays at b_max.

  Args:
    b_min: width of all layers at the start of a cycle, and of Eq. 1, 2..16.
    b_max: largest width of Eq. 1, b_min..16.
    steps: as in `cyclic`.
    cycles: likewise.
    delta: as in `dpc_bit_widths`, and so `center` and `log_form`.
    center: likewise.
    log_form: likewise.
    weights: as in `cyclic`, and so `activations` and `gradients`.
    activations: likewise.
    gradients: likewise.

  Returns:
    A `Schedule`, whose compiled update serves `cyclic` as well. Its `init`
    raises ValueError for counts that `dpc_bit_widths` refuses.

  Raises:
    ValueError: naming the parameter that is out of its range.

  Example:
    >>> state = cyclic_dpc(3, 8, steps=64).init({"stem": 432, "last": 36_864})
    >>> {path: int(high.weights) for path, high in state.high.items()}
    {'stem': 8, 'last': 6}
  """
  choose = schedule.by_equation(
    b_min,
    b_max,
    delta=delta,
    center=center,
    log_form=log_form,
    weights=weights,
    activations=activations,
    gradients=gradients,
  )
  period = _period(steps, cycles)
  operands = schedule.operand_widths(weights, activations, gradients)

  def init(capacities: Mapping[str, Any]) -> CyclicState:
    return _state(b_min, choose(capacities), operands, period, capacities)

  return schedule.Schedule(init, _update, evaluation=_evaluation)


def _state(
  b_min: int,
  high: Mapping[str, grids.LayerBits],
  operands: grids.LayerBits,
  period: int,
  capacities: Mapping[str, Any],
) -> CyclicState:
  """Cycles from b_min to `high`, which layers without weights never leave."""
  low = {
    path: schedule.overruled(b_min, operands, True)
    if schedule.has_weights(capacities[path])
    else widths
    for path, widths in high.items()
  }
  return CyclicState(
    low=schedule.as_arrays(low, capacities),
    high=schedule.as_arrays(high, capacities),
    period=jnp.int32(period),
    begins=jnp.asarray(_begins(period)),
  )


def _period(steps: int, cycles: int) -> int:
  """T, checked."""
  for name, value in (("steps", steps), ("cycles", cycles)):
    is_integer = isinstance(value, numbers.Integral)
    if not is_integer or isinstance(value, bool) or value < 1:
      raise ValueError(f"{name}={value!r} is out of range; use an int >= 1")
  period = max(1, int(steps) // int(cycles))
  if period > _MAX_PERIOD:
    raise ValueError(
      f"steps={steps} makes cycles of {period} steps; use more cycles, so that "
      "one has less than 2^31"
    )
  return period


def _begins(period: int) -> np.ndarray:
  """`CyclicState.begins` for one period."""
  begins = np.full((2, _MAX_RANGE + 1, _MAX_RANGE), period, np.int32)
  for span in range(1, _MAX_RANGE + 1):
    for k in range(span):
      begins[:, span, k] = _begin(period, span, k)
  return begins


def _begin(period: int, span: int, k: int) -> tuple[int, int]:
  """First phase of width low + k + 1 of low + span: for an even, an odd low.

  It is the first at which span/2 * (1 - cos(pi*phase/T)) is above k + 1/2, or
  equal to it where half to even means up. A phase that gives exactly k + 1/2
  is 1/3, 1/2 or 2/3 of T (Niven: no other rational part of a half turn has a
  rational cosine but its ends), so those three are told by integers.
  """
  sixths = {span: 2, 2 * span: 3, 3 * span: 4}.get(2 * (2 * k + 1))
  if sixths is None:
    tie = period * math.acos(1 - (2 * k + 1) / span) / math.pi
    first = math.floor(tie) + 1
    return first, first
  phase, rest = divmod(sixths * period, 6)
  if rest:
    return phase + 1, phase + 1
  # Half to even: up where low + k + 1 is even.
  return (phase + 1, phase) if k % 2 == 0 else (phase, phase + 1)


def _update(
  state: CyclicState, *, step: jax.typing.ArrayLike, statistics: Any = None
) -> tuple[dict[str, grids.LayerBits], CyclicState]:
  """The widths of a step; one function, so one trace, for both schedules."""
  del statistics
  phase = jnp.asarray(step, jnp.int32) % state.period

  def width(low: jax.Array, high: jax.Array) -> jax.Array:
    begun = phase >= state.begins[low % 2, high - low]
    return low + jnp.sum(begun, axis=-1, dtype=jnp.int32)

  return jax.tree.map(width, state.low, state.high), state


def _evaluation(state: CyclicState) -> dict[str, grids.LayerBits]:
  return state.high
