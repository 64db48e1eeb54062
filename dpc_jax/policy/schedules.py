"""Schedules: which bit-width every layer has at a step of a run.

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
*   `statistics` is {path: gradient statistics} or None; a schedule that needs
    them refuses None, the others ignore it;
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
    update: `update(state, *, step, statistics=None) -> (bits, state)`.
  """

  init: Callable[..., Any]
  update: Callable[..., Any]


class ConstantState(NamedTuple):
  """State of a schedule whose bits never change.

  Attributes:
    bits: {path: LayerBits} of int32 arrays, shape () or (layers,).
  """

  bits: dict[str, grids.LayerBits]


def constant(
  bits: int | grids.LayerBits | Mapping[str, int | grids.LayerBits],
) -> Schedule:
  """The given widths from the first step to the last.

  Args:
    bits: widths of every layer, or a mapping {path: widths} that names every
      layer. An int b means (b, b, 8), and 32 leaves the layer in float.

  Returns:
    A `Schedule`. Its `init` raises ValueError where a mapping names an unknown
    layer or misses one, or where widths do not fit the stacked layers.

  Raises:
    ValueError: a width outside 2..16 and not 32.
  """
  if not isinstance(bits, Mapping):
    widths = grids.as_layer_bits(bits)
    return _fixed(lambda capacities: dict.fromkeys(capacities, widths))
  named = {path: grids.as_layer_bits(value) for path, value in bits.items()}

  def choose(capacities: Mapping[str, Any]) -> dict[str, grids.LayerBits]:
    for path in named:
      if path not in capacities:
        raise ValueError(
          f"bits: no layer {path!r} in the model; its layers are "
          f"{', '.join(map(repr, capacities))}"
        )
    for path in capacities:
      if path not in named:
        raise ValueError(f"bits: layer {path!r} is missing; give it a width")
    return {path: named[path] for path in capacities}

  return _fixed(choose)


def dpc(
  b_min: int,
  b_max: int,
  *,
  delta: float = 1.0,
  center: str = "median",
  log_form: str = "base",
  weights: int | None = None,
  activations: int | None = None,
  gradients: int | None = 8,
) -> Schedule:
  """Decreasing Precision with layer Capacity: B_k of Eq. 1, never changing.

  A layer without weights (a product of two activations) has B_k = b_max, and
  both of its operands follow `activations`.

  Args:
    b_min: smallest width, 2..16.
    b_max: largest width, b_min..16.
    delta: as in `dpc_bit_widths`, and so `center` and `log_form`.
    center: likewise.
    log_form: likewise.
    weights: None gives each layer its B_k; an int sets the width of this
      operand in every layer, and 32 leaves it in float.
    activations: likewise, for the layer's input.
    gradients: likewise, for the gradient at the layer's output. B_k for
      weights and activations and 8 for gradients are our decision.

  Returns:
    A `Schedule`. Its `init` raises ValueError for counts that
    `dpc_bit_widths` refuses.

  Raises:
    ValueError: naming the parameter that is out of its range.
  """
  equation.check_arguments(b_min, b_max, delta, center, log_form)
  operands = grids.LayerBits(weights, activations, gradients)
  for name, width in operands._asdict().items():
    if width is not None:
      _check_width(name, width)

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
      path: _overruled(b, operands, bool(np.any(capacities[path])))
      for path, b in widths.items()
    }

  return _fixed(choose)


def _overruled(
  b: Any, operands: grids.LayerBits, has_weights: bool
) -> grids.LayerBits:
  """B_k = `b` for every operand of a layer that `operands` does not set."""
  if not has_weights:
    # Of a product of activations, the second operand is one as well.
    operands = operands._replace(weights=operands.activations)
  return grids.LayerBits(*(b if o is None else o for o in operands))


def _check_width(name: str, width: int) -> None:
  grids.check_width(width, name)
  if np.ndim(width):
    raise ValueError(
      f"{name}={width!r} is not one width; use an int, or None for the "
      "layer's own"
    )


def _fixed(
  choose: Callable[[Mapping[str, Any]], dict[str, grids.LayerBits]],
) -> Schedule:
  """A schedule that keeps what `choose(capacities)` returns."""

  def init(capacities: Mapping[str, Any]) -> ConstantState:
    return ConstantState(
      {
        path: _as_arrays(path, widths, np.shape(capacities[path]))
        for path, widths in choose(capacities).items()
      }
    )

  def update(
    state: ConstantState, *, step: jax.typing.ArrayLike, statistics: Any = None
  ) -> tuple[dict[str, grids.LayerBits], ConstantState]:
    del step, statistics
    return state.bits, state

  return Schedule(init, update)


def _as_arrays(
  path: str, widths: grids.LayerBits, shape: tuple[int, ...]
) -> grids.LayerBits:
  """`widths` as int32 arrays of `shape`, the shape of the layer's N_k."""
  for width in widths:
    if np.shape(width) not in ((), shape):
      raise ValueError(
        f"layer {path!r}: widths of shape {np.shape(width)} for layers of "
        f"shape {shape}; give one width, or one for each layer"
      )
  return grids.LayerBits(
    *(jnp.asarray(np.broadcast_to(w, shape), jnp.int32) for w in widths)
  )
