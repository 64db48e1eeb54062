"""The methods of a config, by name: which schedule each one is."""

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from dpc_jax.policy import schedules


class Run(NamedTuple):
  """What a schedule may need to know of a run.

  Attributes:
    steps: of the run.
    steps_per_epoch: rounded.
    macs: {path: multiply-accumulates of one layer's forward pass}.
    jumps: steps at which the learning rate jumps.
    seed: of the run.
  """

  steps: int
  steps_per_epoch: int
  macs: Mapping[str, int]
  jumps: tuple[int, ...]
  seed: int = 0


def names() -> tuple[str, ...]:
  """The methods; static<b> stands for static2 to static16."""
  return ("float", "static<b>", *_METHODS)


def is_known(method: str) -> bool:
  """Whether `method` is one of them."""
  return (
    method == "float" or method in _METHODS or static_width(method) is not None
  )


def static_width(method: str) -> int | None:
  """The width b of the method static<b>, or None for another method."""
  match = re.fullmatch(r"static([1-9][0-9]*)", method)
  return int(match[1]) if match else None


def group(method: str) -> str | None:
  """The group of `config.precision` that is this method's own, or None."""
  return {
    "adaptive": "adaptive",
    "adaptive_reversed": "adaptive",
    "pfq": "pfq",
  }.get(method)


def has_bounds(method: str) -> bool:
  """Whether the method's widths depend on b_min and b_max."""
  return method in _METHODS


def make_schedule(precision: Any, run: Run) -> schedules.Schedule:
  """The bit schedule of a method; empty for the method float.

  Args:
    precision: `config.precision`.
    run: of a known method.

  Raises:
    ValueError: naming the parameter that is out of its range.
  """
  if precision.method == "float":
    return schedules.constant({})
  width = static_width(precision.method)
  if width is not None:
    # One width for all layers is Eq. 1 between equal bounds.
    return schedules.dpc(width, width, **_operands(precision))
  return _METHODS[precision.method](precision, run)


def _dpc(precision, run, **changes):
  del run
  return schedules.dpc(
    precision.b_min, precision.b_max, **_equation(precision, **changes)
  )


def _control(precision, run, make, **changes):
  return make(
    precision.b_min,
    precision.b_max,
    macs=run.macs,
    **_equation(precision, **changes),
  )


def _random(precision, run):
  return schedules.random_layerwise(
    precision.b_min,
    precision.b_max,
    macs=run.macs,
    # A draw for each run: seeds then show what the widths' draw makes.
    seed=precision.seed + run.seed,
    **_equation(precision),
  )


def _cpt(precision, run):
  return schedules.cyclic(
    precision.b_min,
    precision.b_max,
    steps=run.steps,
    cycles=precision.cycles,
    **_operands(precision),
  )


def _dpc_cpt(precision, run):
  return schedules.cyclic_dpc(
    precision.b_min,
    precision.b_max,
    steps=run.steps,
    cycles=precision.cycles,
    **_equation(precision),
  )


def _pfq(precision, run):
  rule = precision.pfq
  low, high = precision.b_min, precision.b_max
  # Equal neighbors stay: the state's shapes must not depend on the bounds.
  stages = [
    round(low + (high - low) * i / max(1, rule.stages - 1))
    for i in range(rule.stages)
  ]
  return schedules.progressive(
    stages,
    steps_per_epoch=run.steps_per_epoch,
    window=rule.window,
    threshold=rule.threshold,
    decay=rule.decay,
    **_operands(precision),
  )


def _adaptive(precision, run, direction):
  rule = precision.adaptive
  return schedules.adaptive(
    precision.b_min,
    precision.b_max,
    steps=run.steps,
    steps_per_epoch=run.steps_per_epoch,
    warmup=rule.warmup,
    patience=rule.patience,
    threshold=rule.threshold,
    freeze=rule.freeze,
    rebase=rule.rebase,
    signal=rule.signal,
    budget="start" if rule.budget is None and rule.keep_cost else rule.budget,
    direction=direction,
    macs=run.macs,
    skip_steps=run.jumps,
    **_equation(precision),
  )


def _equation(precision, **changes):
  """Eq. 1's arguments, and the widths that overrule it."""
  return {
    "delta": precision.delta,
    "center": precision.center,
    "log_form": precision.log_form,
    **_operands(precision),
    **changes,
  }


def _operands(precision):
  return {
    "weights": precision.weights,
    "activations": precision.activations,
    "gradients": precision.gradients,
  }


_METHODS = {
  "dpc": _dpc,
  "dpc_log_midpoint": functools.partial(_dpc, center="log_midpoint"),
  "adaptive": functools.partial(_adaptive, direction="noisy_up"),
  "adaptive_reversed": functools.partial(_adaptive, direction="noisy_down"),
  "cpt": _cpt,
  "dpc_cpt": _dpc_cpt,
  "pfq": _pfq,
  "uniform": functools.partial(_control, make=schedules.uniform),
  "uniform_log_midpoint": functools.partial(
    _control, make=schedules.uniform, center="log_midpoint"
  ),
  "reversed": functools.partial(_control, make=schedules.reversed_dpc),
  "random": _random,
}
