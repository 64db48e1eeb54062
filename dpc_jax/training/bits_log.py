"""The log of bit changes, replayed on the host from the pure schedule."""

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


class BitsLog:
  """Writes `bits.jsonl`: one object per change of a layer's widths.

  An object has step, path, old, new, reason; old and new are [weights,
  activations, gradients] (lists of them under `nn.scan`), and old is null at
  step 0. The train step never waits for it: the schedule is a pure function,
  which the host runs again.
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
      bits: the widths of the step before `step`; not looked at where that is
        0, so that all of the first ones are logged.
      step: the first step to replay.
      reason: what the log says of every change.
    """
    self._path, self._reason, self._step = path, reason, step
    # A copy: the train step takes the state's buffers for its own.
    self._state = jax.tree.map(np.array, jax.device_get(schedule_state))
    self._rows = {}
    if step > 0:
      self._rows = {name: np.stack(layer) for name, layer in bits.items()}

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

    self._replay = jax.jit(replay)

  def advance(self, step: int) -> None:
    """Replays up to `step`, excluded, and appends what has changed."""
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
    if lines:
      # Stable: layers stay in their order.
      lines.sort(key=lambda line: line["step"])
      with self._path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)

  def _changes(self, name: str, rows: np.ndarray) -> list[dict[str, Any]]:
    """Lines of a layer; `rows` are its widths from `self._step` on."""
    old = self._rows.get(name)
    self._rows[name] = rows[-1]
    if old is not None and np.all(rows == old[None]):
      return []
    lines = []
    for i, (before, after) in enumerate(zip([old, *rows], rows, strict=False)):
      if before is None or not np.array_equal(before, after):
        lines.append(
          {
            "step": self._step + i,
            "path": name,
            "old": None if before is None else before.tolist(),
            "new": after.tolist(),
            "reason": self._reason,
          }
        )
    return lines
