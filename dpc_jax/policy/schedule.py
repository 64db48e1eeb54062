"""What a schedule is: which bit-width every layer has at a step of a run.

A schedule is a pair of functions, as an optax transformation is:

    state = schedule.init(capacities)
    bits, state = schedule.update(state, step=step, statistics=statistics)

`init` runs on the host: `capacities` is {path: N_k} with concrete counts, as
`capacity.layer_capacities` gives them. `update` runs inside the compiled train
step, so a new schedule must keep these rules:

*   pure and jit-able: `step` is a traced int32 scalar, and whatever the next
    step needs is in the state;
*   the state has one structure, one set of shapes and one of dtypes from
    `init` on, so that it can be compiled once, donated and checkpointed;
*   `bits` holds a `LayerBits` of int32 arrays for every path of `capacities`,
    each of shape (), or (layers,) where N_k is an array of that shape: widths
    are data, and a change of width never compiles anything;
*   equal inputs give equal bits on every host: no clock, no host randomness;
*   what tells two runs of one schedule apart, such as bounds, is in the state
    and not in `update`, so that one compiled step serves them all;
*   parameters are checked where the schedule is built, layers in `init`, with
    a ValueError that names the value.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpc_jax.policy import dpc as equation
from dpc_jax.quant import grids


class Schedule(NamedTuple):
  """A pair of functions; the module's docstring is their contract.

  Attributes:
    init: `init(capacities) -> state`.
    update: `update(state, *, step, **inputs) -> (bits, state)`; `inputs` are
      what `needs` names, and `statistics=None` is always accepted.
    evaluation: `evaluation(state) -> bits`, the widths to evaluate with; None
      takes those of the last step.
    needs: names of what `update` must be given besides the step, as it was
      after the step before: "statistics", {path: GradientStatistics} of the
      raw gradients, and "loss", float32 (), the mean over that step's batch
      (NaN at step 0). Such a schedule refuses None.
    moves: `moves(state, since=0) -> [Move]`, on the host: the changes so far
      from step `since` on, in the order of their steps, out of a record that
      the state keeps. A schedule that needs nothing may leave it out: replaying
      it gives its changes.
    signals: `signals(state, since=0) -> [(step, {path: z})]`, likewise: what
      was decided by at every decision, whether or not a layer moved; z is a
      number, or a list of the stacked layers', None where it was not known.
  """

  init: Callable[..., Any]
  update: Callable[..., Any]
  evaluation: Callable[[Any], dict[str, grids.LayerBits]] | None = None
  needs: tuple[str, ...] = ()
  moves: Callable[..., list["Move"]] | None = None
  signals: Callable[..., list[tuple[int, dict[str, Any]]]] | None = None


class Move(NamedTuple):
  """A layer's change of widths.

  Attributes:
    step: the first step at the new widths.
    path: of the layer.
    old: the widths before, [weights, activations, gradients], each an int, or
      a list of the stacked layers' ints.
    new: likewise, after.
    reason: why, in words.
    signal: what the schedule decided by, a number or a list of the stacked
      layers'; None where there is none.
  """

  step: int
  path: str
  old: list[Any]
  new: list[Any]
  reason: str
  signal: Any = None


class FixedState(NamedTuple):
  """State of a schedule whose bits never change.

  Attributes:
    bits: {path: LayerBits} of int32 arrays, shape () or (layers,).
  """

  bits: dict[str, grids.LayerBits]


# {path: N_k} -> {path: LayerBits}, on the host.
Choice = Callable[[Mapping[str, Any]], dict[str, grids.LayerBits]]


def fixed(choose: Choice) -> Schedule:
  """A schedule that keeps what `choose(capacities)` returns."""

  def init(capacities: Mapping[str, Any]) -> FixedState:
    # A choice may compute with what it has made, under a caller's jit too.
    with jax.ensure_compile_time_eval():
      return FixedState(as_arrays(choose(capacities), capacities))

  return Schedule(init, _fixed_update)


def _fixed_update(
  state: FixedState, *, step: jax.typing.ArrayLike, statistics: Any = None
) -> tuple[dict[str, grids.LayerBits], FixedState]:
  del step, statistics
  return state.bits, state


def by_equation(
  b_min: int,
  b_max: int,
  *,
  delta: float = 1.0,
  center: str = "median",
  log_form: str = "base",
  weights: int | None = None,
  activations: int | None = None,
  gradients: int | None = 8,
) -> Choice:
  """Eq. 1 as a choice of widths; `schedules.dpc` explains the arguments.

  Raises:
    ValueError: naming the parameter that is out of its range.
  """
  equation.check_arguments(b_min, b_max, delta, center, log_form)
  operands = operand_widths(weights, activations, gradients)

  def choose(capacities: Mapping[str, Any]) -> dict[str, grids.LayerBits]:
    widths = equation.dpc_bit_widths(
      dict(capacities),
      b_min,
      b_max,
      delta=delta,
      center=center,
      log_form=log_form,
    )
    return {
      path: overruled(b, operands, has_weights(capacities[path]))
      for path, b in widths.items()
    }

  return choose


def operand_widths(
  weights: int | None, activations: int | None, gradients: int | None
) -> grids.LayerBits:
  """The widths that overrule a layer's own; None leaves it that.

  Raises:
    ValueError: one that is no width.
  """
  operands = grids.LayerBits(weights, activations, gradients)
  for name, width in operands._asdict().items():
    if width is None:
      continue
    grids.check_width(width, name)
    if np.ndim(width):
      raise ValueError(
        f"{name}={width!r} is not one width; use an int, or None for the "
        "layer's own"
      )
  return operands


def has_weights(capacity: Any) -> bool:
  """False for a product of two activations, whose N_k is 0."""
  return bool(np.any(capacity))


def overruled(
  b: Any, operands: grids.LayerBits, weighted: bool
) -> grids.LayerBits:
  """B_k = `b` for every operand of a layer that `operands` does not set.

  Args:
    b: the layer's width, or an array of its stacked layers'.
    operands: of `operand_widths`.
    weighted: of `has_weights`.
  """
  if not weighted:
    # Of a product of activations, the second operand is one as well.
    operands = operands._replace(weights=operands.activations)
  return grids.LayerBits(*(b if o is None else o for o in operands))


def as_arrays(
  bits: Mapping[str, grids.LayerBits], capacities: Mapping[str, Any]
) -> dict[str, grids.LayerBits]:
  """Widths as int32 arrays of the shapes of the layers' N_k.

  Raises:
    ValueError: widths that do not fit the stacked layers.
  """
  arrays = {}
  for path, widths in bits.items():
    shape = np.shape(capacities[path])
    for width in widths:
      if np.shape(width) not in ((), shape):
        raise ValueError(
          f"layer {path!r}: widths of shape {np.shape(width)} for layers of "
          f"shape {shape}; give one width, or one for each layer"
        )
    arrays[path] = grids.LayerBits(
      *(jnp.asarray(np.broadcast_to(w, shape), jnp.int32) for w in widths)
    )
  return arrays
