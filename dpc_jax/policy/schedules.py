"""The schedules, by name; `policy.schedule` says what a schedule is."""

from collections.abc import Mapping
from typing import Any

from dpc_jax.policy.adaptive import adaptive
from dpc_jax.policy.controls import random_layerwise, reversed_dpc, uniform
from dpc_jax.policy.cyclic import cyclic, cyclic_dpc
from dpc_jax.policy.progressive import progressive
from dpc_jax.policy.schedule import (
  FixedState,
  Move,
  Schedule,
  by_equation,
  fixed,
)
from dpc_jax.quant import grids

__all__ = [
  "FixedState",
  "Move",
  "Schedule",
  "adaptive",
  "constant",
  "cyclic",
  "cyclic_dpc",
  "dpc",
  "progressive",
  "random_layerwise",
  "reversed_dpc",
  "uniform",
]


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

  Example:
    >>> schedule = constant({"hidden": 4, "head": 32})
    >>> state = schedule.init({"hidden": 16_384, "head": 2_560})
    >>> bits, state = schedule.update(state, step=0)
    >>> {path: int(layer.weights) for path, layer in bits.items()}
    {'hidden': 4, 'head': 32}
  """
  if not isinstance(bits, Mapping):
    widths = grids.as_layer_bits(bits)
    return fixed(lambda capacities: dict.fromkeys(capacities, widths))
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

  return fixed(choose)


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

  Example:
    >>> schedule = dpc(3, 8)
    >>> state = schedule.init({"stem": 432, "conv": 9_216, "last": 36_864})
    >>> bits, state = schedule.update(state, step=0)
    >>> {path: [int(b) for b in layer] for path, layer in bits.items()}
    {'stem': [8, 8, 8], 'conv': [6, 6, 8], 'last': [5, 5, 8]}
  """
  choose = by_equation(
    b_min,
    b_max,
    delta=delta,
    center=center,
    log_form=log_form,
    weights=weights,
    activations=activations,
    gradients=gradients,
  )
  return fixed(choose)
