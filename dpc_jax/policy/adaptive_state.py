"""The state of adaptive DPC: widths as data, and the record of their moves."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpc_jax.policy import schedule
from dpc_jax.quant import grids

# Why a layer moved; the record keeps an index into these.
REASONS = ("", "noisy", "stable", "over budget")
NOISY, STABLE, OVER_BUDGET = 1, 2, 3


class Settings(NamedTuple):
  """What tells two adaptive runs apart, as data: one step serves them all.

  Attributes:
    low: int32 (), the smallest width.
    high: int32 (), the largest one.
    period: int32 (), steps of an epoch.
    warmup: int32 (), epochs before the reference is taken.
    patience: int32 (), epochs in a row before a move.
    threshold: float32 (), half of the dead band, in nats.
    last_step: int32 (), no layer moves after it.
    rebase: bool (), whether a move sets the layer's reference anew.
    reads_variance: bool (), whether R is the variance alone.
    sign: int32 (), +1 or -1: what a noisy layer gains.
    budget: float32 (), largest cost relative to `high` everywhere; inf: none.
    share: float32 (L,), MACs of each layer over those of all; without macs
      equal ones.
    skipped: int32 (n,), epochs that are not looked at, counted from 1.
    follows: int32 (3,), 1 for an operand that follows B_k, else 0.
  """

  low: jax.Array
  high: jax.Array
  period: jax.Array
  warmup: jax.Array
  patience: jax.Array
  threshold: jax.Array
  last_step: jax.Array
  rebase: jax.Array
  reads_variance: jax.Array
  sign: jax.Array
  budget: jax.Array
  share: jax.Array
  skipped: jax.Array
  follows: jax.Array


class Record(NamedTuple):
  """What was seen and done at each of the run's D epoch ends.

  Attributes:
    signals: float32 (D, L), z; NaN where it was not taken.
    widths: int32 (D, L), bits from then on; 0 in the future.
    reasons: int32 (D, L), an index into REASONS; 0 where a layer stayed.
  """

  signals: jax.Array
  widths: jax.Array
  reasons: jax.Array


class AdaptiveState(NamedTuple):
  """State of `adaptive`: L single layers, stacked ones counted one by one.

  Vectors hold the layers of `start`'s sorted paths, one after the other.

  Attributes:
    start: {path: LayerBits} of static DPC, int32 () or (layers,), of the layers
      with weights.
    products: likewise of those without, which never move.
    first: int32 (L,), B_k of static DPC.
    settings: of the run; they never change.
    bits: int32 (L,), now.
    reference: float32 (L,), ln R at the end of the warm-up, or where a move has
      set it; NaN before.
    votes: int32 (L,), epochs in a row: above the dead band > 0, below it < 0.
    record: of the run so far.
  """

  start: dict[str, grids.LayerBits]
  products: dict[str, grids.LayerBits]
  first: jax.Array
  settings: Settings
  bits: jax.Array
  reference: jax.Array
  votes: jax.Array
  record: Record


def relative_cost(state: AdaptiveState, bits: jax.Array) -> jax.Array:
  """Cost of a step relative to b_max everywhere (gradients 8), float32 ().

  M (w a + g w + g a) summed over the layers with weights, as in `cost.bitops`.
  """
  w, a, g = (
    jnp.concatenate([jnp.ravel(b[i]) for _, b in sorted(state.start.items())])
    + state.settings.follows[i] * (bits - state.first)
    for i in range(3)
  )
  high = state.settings.high
  full = high * (high + 2 * grids.DEFAULT_GRADIENT_WIDTH)
  return jnp.sum(state.settings.share * (w * a + g * w + g * a)) / full


def layer_bits(state: AdaptiveState) -> dict[str, grids.LayerBits]:
  """{path: LayerBits} of all layers, int32."""
  bits = dict(state.products)
  end = 0
  for path, start in sorted(state.start.items()):
    shape = start.weights.shape
    begin, end = end, end + start.weights.size
    shift = (state.bits - state.first)[begin:end].reshape(shape)
    bits[path] = grids.LayerBits(
      *(b + state.settings.follows[i] * shift for i, b in enumerate(start))
    )
  return bits


def vector(
  values: Mapping[str, Any], capacities: Mapping[str, Any]
) -> np.ndarray:
  """The layers of the sorted paths, one after the other; (L,)."""
  return np.concatenate(
    [
      np.ravel(np.broadcast_to(values[path], np.shape(capacities[path])))
      for path in sorted(capacities)
    ]
  )


def moves(state: AdaptiveState, since: int = 0) -> list[schedule.Move]:
  """Moves from step `since` on, by steps and paths; on the host."""
  record = jax.tree.map(np.asarray, state.record)
  period = int(state.settings.period)
  found = []
  for before, row in _rows(state, since):
    reasons = record.reasons[row]
    if not np.any(reasons):
      continue
    old = state.first if before is None else record.widths[before]
    found += _moves_of(
      state._replace(bits=old),
      state._replace(bits=record.widths[row]),
      (row + 1) * period,
      reasons,
      record.signals[row],
    )
  return found


def signals(
  state: AdaptiveState, since: int = 0
) -> list[tuple[int, dict[str, Any]]]:
  """z of all layers at the epochs' ends that were looked at; on the host."""
  table = np.asarray(state.record.signals)
  period = int(state.settings.period)
  found = []
  for _, row in _rows(state, since):
    if np.all(np.isnan(table[row])):
      continue
    layers, end = {}, 0
    for path, start in sorted(state.start.items()):
      begin, end = end, end + start.weights.size
      part = _known(table[row, begin:end])
      layers[path] = part if start.weights.shape else part[0]
    found.append(((row + 1) * period, layers))
  return found


def _rows(state: AdaptiveState, since: int) -> list[tuple[int | None, int]]:
  """(row before, row) of the record's filled rows from step `since` on."""
  filled = np.flatnonzero(np.asarray(state.record.widths)[:, 0]).tolist()
  period = int(state.settings.period)
  return [
    (before, row)
    for before, row in zip([None, *filled], filled, strict=False)
    if (row + 1) * period >= since
  ]


def _known(values: np.ndarray) -> list[float | None]:
  """Floats; None for NaN, which JSON does not have."""
  return [None if np.isnan(z) else float(z) for z in values]


def _moves_of(old, new, step, reasons, signals) -> list[schedule.Move]:
  """The moves of one epoch's end."""
  before, after = (
    {path: [np.asarray(w).tolist() for w in b] for path, b in bits.items()}
    for bits in (layer_bits(old), layer_bits(new))
  )
  found = []
  end = 0
  for path, start in sorted(old.start.items()):
    begin, end = end, end + start.weights.size
    # Where both operands are set, B_k may move and the widths do not.
    if not np.any(reasons[begin:end]) or before[path] == after[path]:
      continue
    is_stacked = bool(start.weights.shape)
    part = _known(signals[begin:end])
    found.append(
      schedule.Move(
        step=int(step),
        path=path,
        old=before[path],
        new=after[path],
        reason=_words(reasons[begin:end], is_stacked),
        signal=part if is_stacked else part[0],
      )
    )
  return found


def _words(reasons: np.ndarray, is_stacked: bool) -> str:
  """The reasons of a path's layers, such as "noisy" or "noisy (0, 2)"."""
  if not is_stacked:
    return REASONS[reasons[0]]
  return ", ".join(
    f"{name} ({', '.join(map(str, np.flatnonzero(reasons == i)))})"
    for i, name in enumerate(REASONS)
    if i and np.any(reasons == i)
  )
