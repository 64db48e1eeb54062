"""Progressive quantization: more bits each time that the loss stops falling.

FracTrain's PFQ: Fu et al., "FracTrain: Fractionally Squeezing Bit Savings Both
Temporally and Spatially for Efficient DNN Training", NeurIPS 2020, Algorithm 1,
as its authors' code has it (github.com/GATECH-EIC/FracTrain, train_pfq.py).
With l_e the mean training loss of epoch e,

  indicator_e = max over the `window` - 1 epochs before e of |l_i - l_e| / scale

where scale is the mean of l over the first 10 epochs (of those so far, if there
are fewer). When the indicator is at most the threshold, all layers go on to the
next entry of the list, the threshold is multiplied by `decay`, and the window
starts again empty.

Our decisions: losses that are not finite count in no mean, an epoch without any
other is left out of the window and of the scale, and the threshold decays at
every switch (the authors' code does so at the first two, and has three). An
epoch has `steps_per_epoch` steps; the authors' has 400 on CIFAR. Where the
learning rate falls the loss does too: PFQ makes nothing of it, nor do we.
"""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpc_jax.policy import schedule
from dpc_jax.quant import grids

# Epochs whose mean loss is the scale of the indicator.
_SCALE_EPOCHS = 10


class ProgressiveState(NamedTuple):
  """State of a progressive schedule with n entries and a window of m epochs.

  Attributes:
    bits: {path: LayerBits} of int32 arrays, shape (n,) or (n, layers).
    entry: int32 (), the one in force.
    steps_per_epoch: int32 ().
    threshold: float32 (), for the next switch.
    decay: float32 ().
    loss: float32 (), mean of the finite losses of this epoch so far.
    losses: int32 (), how many these are.
    epochs: float32 (m,), mean losses of the last epochs, the newest last.
    kept: int32 (), how many of them are in the window.
    scale: float32 (), mean loss of the first epochs.
    scaled: int32 (), how many these are.
    steps: int32 (n - 1,), the first step of each entry but the first; those
      beyond `entry` are 0, here and below.
    indicators: float32 (n - 1,), at these switches.
    thresholds: float32 (n - 1,), at these switches.
  """

  bits: dict[str, grids.LayerBits]
  entry: jax.Array
  steps_per_epoch: jax.Array
  threshold: jax.Array
  decay: jax.Array
  loss: jax.Array
  losses: jax.Array
  epochs: jax.Array
  kept: jax.Array
  scale: jax.Array
  scaled: jax.Array
  steps: jax.Array
  indicators: jax.Array
  thresholds: jax.Array


def progressive(
  bits: Sequence[int | grids.LayerBits],
  *,
  steps_per_epoch: int,
  window: int = 5,
  threshold: float = 0.05,
  decay: float = 0.3,
  weights: int | None = None,
  activations: int | None = None,
  gradients: int | None = 8,
) -> schedule.Schedule:
  """PFQ: the next entry of `bits` when the loss is flat (module's docstring).

  Decided at the first step of an epoch, which is the first at the new widths;
  the last entry stays to the end. A layer without weights (a product of two
  activations) has the widest width of all entries throughout: our decision, as
  such a layer has b_max in `schedules.dpc`.

  Args:
    bits: widths of all layers, one entry after another: an int for weights and
      activations, or three widths. FracTrain's list for CIFAR is (3, 3, 6),
      (4, 4, 6), (6, 6, 8), (8, 8, 8), with gradients=None.
    steps_per_epoch: at least 1.
    window: epochs that are compared, the newest with all others, at least 2.
      5 is FracTrain's.
    threshold: indicator at which the loss is flat, above 0. 0.05 is epsilon in
      the example of FracTrain's README (0.15 is the default of its code).
    decay: of the threshold at a switch, in (0, 1]. 0.3 is alpha there (0.4).
    weights: None takes the entries' own; an int sets the width of this operand
      in every layer and entry, and 32 leaves it in float.
    activations: likewise, for the layer's input.
    gradients: likewise, for the gradient at the layer's output. With None, an
      entry that is an int is its width as well.

  Returns:
    A `Schedule` that needs "loss" and keeps a record of its moves. Its `update`
    raises ValueError without a loss.

  Raises:
    ValueError: naming the parameter that is out of its range, or an entry whose
      own width another parameter would overrule.

  Example:
    >>> progressive((3, 5, 8), steps_per_epoch=50).needs
    ('loss',)
  """
  operands = schedule.operand_widths(weights, activations, gradients)
  entries = _entries(bits, operands)
  _check(steps_per_epoch, window, threshold, decay)

  def init(capacities: Mapping[str, Any]) -> ProgressiveState:
    return _state(entries, capacities, window)._replace(
      steps_per_epoch=jnp.int32(steps_per_epoch),
      threshold=jnp.float32(threshold),
      decay=jnp.float32(decay),
    )

  return schedule.Schedule(init, _update, needs=("loss",), moves=_moves)


def _entries(
  bits: Sequence[int | grids.LayerBits], operands: grids.LayerBits
) -> list[grids.LayerBits]:
  """The entries, checked and overruled."""
  if not isinstance(bits, Sequence) or isinstance(bits, str) or not bits:
    raise ValueError(f"bits={bits!r} is no list of widths; give one or more")
  entries = []
  for i, entry in enumerate(bits):
    widths = grids.as_layer_bits(entry)
    if any(np.ndim(width) for width in widths):
      raise ValueError(
        f"bits[{i}]={entry!r} has arrays; use ints, for all layers"
      )
    if isinstance(entry, tuple | list) or entry == grids.FLOAT_WIDTH:
      for name, own, width in zip(
        grids.LayerBits._fields, widths, operands, strict=True
      ):
        if width is not None and width != own:
          raise ValueError(
            f"{name}={width} would overrule the {own} of bits[{i}]={entry!r}; "
            f"use {name}=None, and three widths in each entry"
          )
      entries.append(widths)
    else:
      entries.append(schedule.overruled(int(entry), operands, True))
  return entries


def _check(
  steps_per_epoch: int, window: int, threshold: float, decay: float
) -> None:
  for name, value, least in (
    ("steps_per_epoch", steps_per_epoch, 1),
    ("window", window, 2),
  ):
    is_integer = isinstance(value, numbers.Integral)
    if not is_integer or isinstance(value, bool) or value < least:
      raise ValueError(
        f"{name}={value!r} is out of range; use an int >= {least}"
      )
  if not _is_real(threshold) or not 0 < threshold < float("inf"):
    raise ValueError(
      f"threshold={threshold!r} is out of range; use a value above 0"
    )
  if not _is_real(decay) or not 0 < decay <= 1:
    raise ValueError(f"decay={decay!r} is out of range; use a value in (0, 1]")


def _state(
  entries: Sequence[grids.LayerBits], capacities: Mapping[str, Any], window: int
) -> ProgressiveState:
  """The state at step 0, but for the parameters of the rule."""
  switches = len(entries) - 1

  # Each leaf an array of its own: the train step takes them all for its own.
  def zeros(dtype: Any, *shape: int) -> jax.Array:
    return jnp.zeros(shape, dtype)

  return ProgressiveState(
    bits=_stacked(entries, capacities),
    entry=zeros(jnp.int32),
    steps_per_epoch=zeros(jnp.int32),
    threshold=zeros(jnp.float32),
    decay=zeros(jnp.float32),
    loss=zeros(jnp.float32),
    losses=zeros(jnp.int32),
    epochs=zeros(jnp.float32, window),
    kept=zeros(jnp.int32),
    scale=zeros(jnp.float32),
    scaled=zeros(jnp.int32),
    steps=zeros(jnp.int32, switches),
    indicators=zeros(jnp.float32, switches),
    thresholds=zeros(jnp.float32, switches),
  )


def _stacked(
  entries: Sequence[grids.LayerBits], capacities: Mapping[str, Any]
) -> dict[str, grids.LayerBits]:
  """`ProgressiveState.bits`."""
  bits = {}
  for path, count in capacities.items():
    columns = np.array(entries, np.int32).T  # (operands, entries)
    if not schedule.has_weights(count):
      # Both operands of a product are activations.
      columns = columns[[1, 1, 2]].max(axis=1, keepdims=True)
    shape = np.shape(count)
    columns = columns.reshape(3, -1, *(1 for _ in shape))
    full = np.broadcast_to(columns, (3, len(entries), *shape))
    bits[path] = grids.LayerBits(*map(jnp.array, full))
  return bits


def _update(
  state: ProgressiveState,
  *,
  step: jax.typing.ArrayLike,
  statistics: Any = None,
  loss: jax.typing.ArrayLike | None = None,
) -> tuple[dict[str, grids.LayerBits], ProgressiveState]:
  """One step; `loss` is that of the step before."""
  del statistics
  if loss is None:
    raise ValueError(
      "loss=None: a progressive schedule needs the loss of the step before; "
      "pass loss=, NaN at step 0"
    )
  step = jnp.asarray(step, jnp.int32)
  state = _heard(state, jnp.asarray(loss, jnp.float32))
  ends = (step > 0) & (step % state.steps_per_epoch == 0)
  state = _end_epoch(state, step, ends)
  return jax.tree.map(lambda widths: widths[state.entry], state.bits), state


def _heard(state: ProgressiveState, loss: jax.Array) -> ProgressiveState:
  """Takes the loss of one step into the mean of the epoch."""
  finite = jnp.isfinite(loss)
  losses = state.losses + finite
  # A running mean: a float32 sum would lose digits in long epochs.
  excess = jnp.where(finite, loss, state.loss) - state.loss
  mean = state.loss + excess / jnp.maximum(losses, 1)
  return state._replace(loss=mean, losses=losses)


def _end_epoch(
  state: ProgressiveState, step: jax.Array, ends: jax.Array
) -> ProgressiveState:
  """Ends the epoch before `step` where `ends`, and decides."""
  counts = ends & (state.losses > 0)
  shifted = jnp.concatenate([state.epochs[1:], state.loss[None]])
  epochs = jnp.where(counts, shifted, state.epochs)
  kept = jnp.minimum(state.kept + counts, epochs.size)
  scales = counts & (state.scaled < _SCALE_EPOCHS)
  scaled = state.scaled + scales
  excess = jnp.where(scales, state.loss - state.scale, 0)
  scale = state.scale + excess / jnp.maximum(scaled, 1)

  change = jnp.max(jnp.abs(epochs[:-1] - epochs[-1]))
  tiny = jnp.finfo(jnp.float32).tiny
  indicator = change / jnp.maximum(jnp.abs(scale), tiny)
  switches = (
    counts
    & (kept == epochs.size)
    & (state.entry < state.steps.size)
    & (indicator <= state.threshold)
  )
  here = switches & (jnp.arange(state.steps.size) == state.entry)
  return state._replace(
    entry=state.entry + switches,
    threshold=jnp.where(
      switches, state.threshold * state.decay, state.threshold
    ),
    loss=jnp.where(ends, 0, state.loss),
    losses=jnp.where(ends, 0, state.losses),
    epochs=epochs,
    kept=jnp.where(switches, 0, kept),
    scale=scale,
    scaled=scaled,
    steps=jnp.where(here, step, state.steps),
    indicators=jnp.where(here, indicator, state.indicators),
    thresholds=jnp.where(here, state.threshold, state.thresholds),
  )


def _moves(state: ProgressiveState, since: int = 0) -> list[schedule.Move]:
  """Switches from step `since` on, for each layer whose widths they changed."""
  state = jax.device_get(state)
  moves = []
  for i in range(int(state.entry)):
    if state.steps[i] < since:
      continue
    reason = (
      f"loss plateau: indicator {state.indicators[i]:.4g} at most "
      f"{state.thresholds[i]:.4g}; entry {i + 2} of {state.steps.size + 1}"
    )
    for path, widths in state.bits.items():
      old, new = ([w[k].tolist() for w in widths] for k in (i, i + 1))
      if old != new:
        step, signal = int(state.steps[i]), float(state.indicators[i])
        moves.append(schedule.Move(step, path, old, new, reason, signal))
  return moves


def _is_real(value: Any) -> bool:
  return isinstance(value, numbers.Real) and not isinstance(value, bool)
