"""Adaptive DPC: widths that follow the noise of the gradients.

The paper gives the direction (stable gradients -> fewer bits, noisy ones ->
more) and that it happens during training; the rule is our decision. A run
starts from static DPC (Eq. 1). At the end of each epoch after the warm-up, with
R_k the `noise_to_signal` of layer k (see `statistics`):

    d_k = ln R_k - ln R_k at the end of the warm-up
    z_k = d_k - median of d over the layers

z_k > threshold for `patience` epochs in a row: B_k + 1. z_k < -threshold for as
many: B_k - 1. Between them nothing, and the count starts anew, as it does after
a move. Widths stay in [b_min, b_max]. With `rebase`, the default, a layer that
its own signal has moved is compared from then on with its R_k at that time, so
that a change which lasts moves it once; without, with the end of the warm-up,
and such a layer goes on to a bound. A layer whose signal is lost in the noise
(`is_resolved`) is not known: it holds, and is not in the median.

The median takes out what all layers share, such as the rise of noise as the
loss falls or a step of the learning rate; what is left is a layer's own share.
Products without weights have no statistics: they keep b_max and are not in the
median.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpc_jax.policy import adaptive_rule, schedule
from dpc_jax.policy import adaptive_state as state_lib
from dpc_jax.policy import dpc as equation
from dpc_jax.quant import grids

# What `schedules.dpc` does with each operand unless told: None is B_k.
_FIXED = grids.LayerBits(None, None, grids.DEFAULT_GRADIENT_WIDTH)._asdict()
# A ratio of 0, of gradients that are equal at all steps, has no logarithm.
_SMALLEST_RATIO = 1e-12
# Beyond every z: the logarithm of a float32 is within +-104.
_FAR = 1e3


def adaptive(
  b_min: int,
  b_max: int,
  *,
  steps: int,
  steps_per_epoch: int,
  warmup: int = 2,
  patience: int = 2,
  threshold: float = 0.25,
  freeze: float | None = None,
  rebase: bool = True,
  signal: str = "noise_to_signal",
  direction: str = "noisy_up",
  budget: float | str | None = None,
  macs: Mapping[str, int] | None = None,
  skip_steps: Sequence[int] = (),
  **dpc: Any,
) -> schedule.Schedule:
  """DPC whose layers gain bits while their gradients are noisy, and lose them.

  The module's docstring has the rule; it and all constants are our decision.

  Args:
    b_min: smallest width, 2..16.
    b_max: largest width, b_min..16.
    steps: of the run; the record has room for so many.
    steps_per_epoch: a decision is taken before each of its multiples.
    warmup: epochs before the reference is taken, as of `adaptive_rule.Rule`,
      and so patience, threshold, freeze, rebase, signal, direction, budget.
    macs: {path: MACs of one layer's forward pass}, which a budget needs.
    skip_steps: steps at which the learning rate jumps; the epochs they are in
      are not looked at, and change no count.
    **dpc: delta, center, log_form, weights, activations, gradients, as of
      `schedules.dpc`. An operand that is set does not move.

  Returns:
    A `Schedule` that needs "statistics", of `track_gradient_statistics` with
    memory "full" or "sketch"; `update` raises ValueError without. `init` raises
    ValueError where no layer has weights, or the budget cannot be kept.

  Raises:
    ValueError: naming the parameter that is out of its range.

  Example:
    >>> adaptive(3, 8, steps=1_000, steps_per_epoch=50).needs
    ('statistics',)
  """
  rule = adaptive_rule.Rule(
    warmup, patience, threshold, freeze, rebase, signal, direction, budget
  )
  run = _Run(b_min, b_max, steps, steps_per_epoch, macs, (*skip_steps,), dpc)
  _check(rule, run)
  return schedule.Schedule(
    functools.partial(_init, rule, run),
    _update,
    needs=("statistics",),
    moves=state_lib.moves,
    signals=state_lib.signals,
  )


class _Run(NamedTuple):
  """The other arguments of `adaptive`."""

  b_min: int
  b_max: int
  steps: int
  steps_per_epoch: int
  macs: Mapping[str, int] | None
  skip_steps: tuple[int, ...]
  dpc: dict[str, Any]


def _check(rule: adaptive_rule.Rule, run: _Run) -> None:
  schedule.by_equation(run.b_min, run.b_max, **run.dpc)
  adaptive_rule.check(rule)
  for name in ("steps", "steps_per_epoch"):
    adaptive_rule.check_count(name, getattr(run, name))
  for step in run.skip_steps:
    if not isinstance(step, int | np.integer) or step < 0:
      raise ValueError(f"skip_steps: {step!r} is no step; use ints >= 0")
  for path, value in (run.macs or {}).items():
    adaptive_rule.check_count(f"macs[{path!r}]", value)
  if rule.budget is not None and run.macs is None:
    raise ValueError(
      f"budget = {rule.budget!r} needs macs, {{path: MACs of one sample}}"
    )


def _init(
  rule: adaptive_rule.Rule, run: _Run, capacities: Mapping[str, Any]
) -> state_lib.AdaptiveState:
  # The checks read what is computed here, under a caller's jit too.
  with jax.ensure_compile_time_eval():
    return _begin(rule, run, capacities)


def _begin(rule, run, capacities) -> state_lib.AdaptiveState:
  weighted = {p: n for p, n in capacities.items() if schedule.has_weights(n)}
  if not weighted:
    raise ValueError(
      f"capacities: no layer with weights among {sorted(capacities)}"
    )
  start = schedule.as_arrays(
    schedule.by_equation(run.b_min, run.b_max, **run.dpc)(capacities),
    capacities,
  )
  moving = {
    k: v for k, v in run.dpc.items() if k not in grids.LayerBits._fields
  }
  widths = equation.dpc_bit_widths(weighted, run.b_min, run.b_max, **moving)
  first = state_lib.vector(widths, weighted)
  rows = max(1, (run.steps - 1) // run.steps_per_epoch)
  state = state_lib.AdaptiveState(
    start={path: start[path] for path in weighted},
    products={p: b for p, b in start.items() if p not in weighted},
    first=jnp.asarray(first, jnp.int32),
    settings=_settings(rule, run, weighted),
    bits=jnp.asarray(first, jnp.int32),
    reference=jnp.full(first.shape, jnp.nan, jnp.float32),
    votes=jnp.zeros(first.shape, jnp.int32),
    record=state_lib.Record(
      signals=jnp.full((rows, first.size), jnp.nan, jnp.float32),
      widths=jnp.zeros((rows, first.size), jnp.int32),
      reasons=jnp.zeros((rows, first.size), jnp.int32),
    ),
  )
  budget = jnp.float32(_budget(rule, state))
  return state._replace(settings=state.settings._replace(budget=budget))


def _settings(rule, run, capacities) -> state_lib.Settings:
  share = dict.fromkeys(capacities, 1.0)
  if run.macs is not None:
    for path in capacities:
      if path not in run.macs:
        raise ValueError(f"macs: layer {path!r} is missing; give its MACs")
    share = {path: run.macs[path] for path in capacities}
  macs = state_lib.vector(share, capacities).astype(np.float64)
  freeze = 1.0 if rule.freeze is None else rule.freeze
  return state_lib.Settings(
    low=jnp.int32(run.b_min),
    high=jnp.int32(run.b_max),
    period=jnp.int32(run.steps_per_epoch),
    warmup=jnp.int32(rule.warmup),
    patience=jnp.int32(rule.patience),
    threshold=jnp.float32(rule.threshold),
    # 0.57 of 100 steps is 56.99999999999999.
    last_step=jnp.int32(round(freeze * run.steps, 6)),
    rebase=jnp.bool_(rule.rebase),
    reads_variance=jnp.bool_(rule.signal == "variance"),
    sign=jnp.int32(1 if rule.direction == "noisy_up" else -1),
    budget=jnp.float32(np.inf),  # set once the costs are known
    share=jnp.asarray(macs / macs.sum(), jnp.float32),
    # With a 0, which is no epoch: orbax refuses arrays of size 0.
    skipped=jnp.asarray(
      [0, *(step // run.steps_per_epoch + 1 for step in run.skip_steps)],
      jnp.int32,
    ),
    follows=jnp.asarray(
      [run.dpc.get(name, default) is None for name, default in _FIXED.items()],
      jnp.int32,
    ),
  )


def _budget(rule, state) -> float:
  """The limit of the relative cost; inf without one."""
  if rule.budget is None:
    return np.inf
  cost = float(state_lib.relative_cost(state, state.first))
  limit = cost if rule.budget == "start" else rule.budget
  # The cost is summed in float32, in an order that is the compiler's.
  limit *= 1 + 1e-5
  if cost > limit:
    raise ValueError(
      f"budget = {rule.budget!r} is below {cost:.4g}, the relative cost of"
      " static DPC, where it starts; raise it, or lower the bounds"
    )
  return limit


def _update(
  state: state_lib.AdaptiveState,
  *,
  step: jax.typing.ArrayLike,
  statistics: Mapping[str, Any] | None = None,
) -> tuple[dict[str, grids.LayerBits], state_lib.AdaptiveState]:
  log_ratios = _log_ratios(state, statistics)
  is_end = (step > 0) & (step % state.settings.period == 0)
  state = jax.lax.cond(
    is_end, _decide, lambda state, *_: state, state, step, log_ratios
  )
  return state_lib.layer_bits(state), state


def _log_ratios(
  state: state_lib.AdaptiveState,
  statistics: Mapping[str, Any] | None,
) -> jax.Array:
  """ln R of the layers, float32 (L,); NaN where it is not known."""
  if statistics is None:
    raise ValueError(
      "statistics = None: adaptive bits need those of"
      " track_gradient_statistics in the optimizer"
    )
  parts = []
  for path in sorted(state.start):
    if path not in statistics:
      raise ValueError(
        f"statistics: layer {path!r} is missing; track its kernel's gradient"
      )
    parts.append(jnp.ravel(_log_ratio(state, path, statistics[path])))
  return jnp.concatenate(parts).astype(jnp.float32)


def _log_ratio(state, path, of_layer) -> jax.Array:
  shape = state.start[path].weights.shape
  ratio = of_layer.noise_to_signal
  if np.shape(ratio) != shape:
    raise ValueError(
      f"statistics: layer {path!r} has ratios of shape {np.shape(ratio)} for"
      f" widths of shape {shape}; pass capacities to track_gradient_statistics"
    )
  # A constant: a traced NaN could not be read here.
  if isinstance(ratio, np.ndarray | np.floating) and np.all(np.isnan(ratio)):
    raise ValueError(
      "statistics: no variance is tracked with memory = 'norm'; use 'full' or"
      " 'sketch'"
    )
  known = of_layer.count > 1
  if of_layer.is_resolved is not None:
    known &= of_layer.is_resolved | state.settings.reads_variance
  ratio = jnp.where(state.settings.reads_variance, of_layer.variance, ratio)
  return jnp.where(
    known & jnp.isfinite(ratio),
    jnp.log(jnp.maximum(ratio, _SMALLEST_RATIO)),
    jnp.nan,
  )


def _decide(
  state: state_lib.AdaptiveState, step: jax.Array, log_ratios: jax.Array
) -> state_lib.AdaptiveState:
  """The rule at an epoch's end."""
  rule = state.settings
  epoch = step // rule.period
  is_seen = (epoch >= rule.warmup) & ~jnp.any(rule.skipped == epoch)
  change = log_ratios - state.reference
  median = jnp.nanmedian(change)
  signals = jnp.where(is_seen, change - median, jnp.nan)
  # A layer that is first known later is taken to have changed as the median.
  reference = jnp.where(
    is_seen & jnp.isnan(state.reference),
    log_ratios - jnp.nan_to_num(median),
    state.reference,
  )
  votes = jnp.where(
    signals > rule.threshold,
    jnp.maximum(state.votes, 0) + 1,
    jnp.where(signals < -rule.threshold, jnp.minimum(state.votes, 0) - 1, 0),
  )
  votes = jnp.where(is_seen, votes, state.votes)
  may_move = is_seen & (step <= rule.last_step)
  turn = jnp.sign(votes) * (may_move & (jnp.abs(votes) >= rule.patience))
  wanted = jnp.clip(state.bits + rule.sign * turn, rule.low, rule.high)
  bits, gave = _within_budget(state, wanted, signals)
  reasons = jnp.where(turn > 0, state_lib.NOISY, state_lib.STABLE)
  reasons = jnp.where(gave > 0, state_lib.OVER_BUDGET, reasons)
  reasons = jnp.where(bits == state.bits, 0, reasons)
  is_own = (bits != state.bits) & (gave == 0)
  row = epoch - 1
  record = state.record
  return state._replace(
    bits=bits,
    reference=reference + jnp.where(rule.rebase & is_own, signals, 0.0),
    votes=jnp.where((turn != 0) | (gave > 0), 0, votes),
    record=state_lib.Record(
      signals=record.signals.at[row].set(signals, mode="drop"),
      widths=record.widths.at[row].set(bits, mode="drop"),
      reasons=record.reasons.at[row].set(reasons, mode="drop"),
    ),
  )


def _within_budget(
  state: state_lib.AdaptiveState, wanted: jax.Array, signals: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(bits, which layers gave one up for others), int32 (L,) both.

  Layers that did not ask for a move pay for those that gain, a bit each, the
  one whose signal speaks least for a bit first. Where all of them cannot pay,
  the gain with the weakest signal is refused, and the account begins anew.
  """
  # An unknown z is taken as the median's, 0.
  order = state.settings.sign * jnp.nan_to_num(signals)
  least = state.settings.low
  # Of one that is refused too: it does not pay for the others.
  asked = wanted != state.bits

  def is_over(carry):
    wanted, gave = carry
    cost = state_lib.relative_cost(state, wanted - gave)
    return (cost > state.settings.budget) & jnp.any(wanted > state.bits)

  def give(carry):
    wanted, gave = carry
    can_pay = ~asked & (gave == 0) & (wanted > least)
    paid = (wanted, gave + _first(can_pay, order))
    refused = (wanted - _first(wanted > state.bits, order), gave * 0)
    return jax.tree.map(
      lambda x, y: jnp.where(jnp.any(can_pay), x, y), paid, refused
    )

  wanted, gave = jax.lax.while_loop(
    is_over, give, (wanted, jnp.zeros_like(wanted))
  )
  return wanted - gave, gave


def _first(among: jax.Array, order: jax.Array) -> jax.Array:
  """1 at the smallest of `order` where `among` holds, else 0."""
  best = jnp.argmin(jnp.where(among, order, jnp.inf))
  return (jnp.arange(order.size) == best).astype(jnp.int32)
