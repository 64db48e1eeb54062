"""The log of bit changes: `bits.jsonl`, and what the console says of them."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpc_jax.policy import schedules
from dpc_jax.quant import grids

# Steps of one replay: a call and a transfer for all of them.
_BLOCK = 64
SIGNALS = "signals.jsonl"


class BitsLog:
  """Writes `bits.jsonl`: one object per change of a layer's widths.

  An object has step, path, old, new, reason; old and new are [weights,
  activations, gradients] (lists of them under `nn.scan`), and old is null at
  step 0. The train step never waits for it: a schedule that needs nothing but
  the step is a pure function, which the host runs again; another keeps a record
  in its state (`Schedule.moves`), and its objects have a `signal` too. What it
  decided by at every decision goes to `signals.jsonl` beside it: step, signals.
  """

  def __init__(
    self,
    path: pathlib.Path,
    schedule: schedules.Schedule,
    schedule_state: Any,
    bits: dict[str, grids.LayerBits],
    *,
    step: int,
    reason: str,
  ):
    """Starts at `step`, with the schedule's state before that step.

    Args:
      path: the file, appended to.
      schedule: of the run.
      schedule_state: at `step`; copied to the host.
      bits: the widths of the step before `step`; where that is 0, the first
        ones.
      step: the first step to log.
      reason: what the log says of the first widths, and of replayed changes.

    Raises:
      ValueError: a schedule that needs more than the step, without `moves`.
    """
    if schedule.needs and schedule.moves is None:
      raise ValueError(
        f"schedule.moves = None: one that needs {', '.join(schedule.needs)}"
        " cannot be replayed; give it a record of its moves"
      )
    self._path, self._reason, self._step = path, reason, step
    self._schedule = schedule
    self._rows = _as_rows(bits) if step > 0 else {}
    self._first = bits
    self._keep(schedule_state)
    self._replay = jax.jit(_replayer(schedule))

  def advance(self, step: int, schedule_state: Any) -> list[dict[str, Any]]:
    """Appends what has changed up to `step`, excluded, and returns it.

    Args:
      step: the next step of the run.
      schedule_state: before that step; looked at where it has a record.
    """
    if self._schedule.moves is None:
      lines = self._replay_to(step)
    else:
      if self._step < step and not self._rows:
        # Not before: at step 0 they may be replaced.
        self._write(self._replaced(self._first, self._reason))
      state = jax.device_get(schedule_state)
      lines = [
        move._asdict()
        for move in self._schedule.moves(state, self._step)
        if move.step < step
      ]
      for line in lines:
        self._rows[line["path"]] = np.asarray(line["new"])
      self._write_signals(state, step)
      self._step = max(self._step, step)
    self._write(lines)
    return lines

  def replace(
    self, schedule_state: Any, bits: dict[str, grids.LayerBits], reason: str
  ) -> None:
    """Goes on from another state, whose `bits` hold from this step on.

    Call `advance` to this step first.
    """
    self._keep(schedule_state)
    self._write(self._replaced(bits, reason))

  def _keep(self, schedule_state):
    if self._schedule.moves is None:
      # A copy: the train step takes the state's buffers for its own.
      self._state = jax.tree.map(np.array, jax.device_get(schedule_state))

  def _write(self, lines):
    _append(self._path, lines)

  def _write_signals(self, state, step):
    if self._schedule.signals is None:
      return
    lines = [
      {"step": at, "signals": values}
      for at, values in self._schedule.signals(state, self._step)
      if at < step
    ]
    _append(self._path.with_name(SIGNALS), lines)

  def _replaced(self, bits, reason) -> list[dict[str, Any]]:
    lines = []
    for name, new in _as_rows(bits).items():
      old = self._rows.get(name)
      if old is None or not np.array_equal(old, new):
        lines.append(_line(self._step, name, old, new, reason))
      self._rows[name] = new
    return lines

  def _replay_to(self, step: int) -> list[dict[str, Any]]:
    lines = []
    while self._step < step:
      end = min(step, self._step + _BLOCK)
      self._state, bits = self._replay(
        self._state, jnp.int32(self._step), jnp.int32(end)
      )
      for name, layer in jax.device_get(bits).items():
        rows = np.stack(layer, axis=1)[: end - self._step]
        lines += self._changes(name, rows)
      self._step = end
    # Stable: layers stay in their order.
    return sorted(lines, key=lambda line: line["step"])

  def _changes(self, name: str, rows: np.ndarray) -> list[dict[str, Any]]:
    """Lines of a layer; `rows` are its widths from `self._step` on."""
    old = self._rows.get(name)
    self._rows[name] = rows[-1]
    if old is not None and np.all(rows == old[None]):
      return []
    return [
      _line(self._step + i, name, before, after, self._reason)
      for i, (before, after) in enumerate(zip([old, *rows], rows, strict=False))
      if before is None or not np.array_equal(before, after)
    ]


def _append(path, lines):
  if lines:
    with path.open("a") as file:
      file.writelines(json.dumps(line) + "\n" for line in lines)


def _as_rows(bits):
  return {name: np.stack(layer) for name, layer in bits.items()}


def _line(step, name, old, new, reason):
  return {
    "step": step,
    "path": name,
    "old": None if old is None else old.tolist(),
    "new": new.tolist(),
    "reason": reason,
  }


def _replayer(schedule):
  """(state, first, end) -> (state at `end`, bits of a block from `first`)."""

  def replay(state, first, end):
    def one(state, step):
      bits, new = schedule.update(state, step=step)
      # Past the end the widths are not looked at, and the state stays.
      kept = jax.tree.map(
        lambda new, old: jnp.where(step < end, new, old), new, state
      )
      return kept, bits

    steps = first + jnp.arange(_BLOCK, dtype=jnp.int32)
    return jax.lax.scan(one, state, steps)

  return replay
