"""The log of bit changes, replayed on the host from the pure schedule."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpc_jax.policy import schedules
from dpc_jax.quant import grids


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
    *,
    step: int,
    reason: str,
    write: bool = True,
  ):
    """Starts at `step`, with the schedule's state before that step.

    Args:
      path: the file, appended to.
      schedule: of the run.
      schedule_state: at `step`; copied to the host.
      step: the first step to replay.
      reason: what the log says of every change.
      write: False keeps the bits but writes nothing.
    """
    self._path, self._reason, self._write = path, reason, write
    self._state = jax.device_get(schedule_state)
    self._update = jax.jit(
      lambda state, step: schedule.update(state, step=step)
    )
    self._step = step
    self.bits: dict[str, grids.LayerBits] = {}
    if step > 0:
      # The widths before `step`, so that only a change is written.
      self.bits = _on_host(self._update(self._state, jnp.int32(step - 1))[0])

  def advance(self, step: int) -> dict[str, grids.LayerBits]:
    """Replays up to `step`, excluded; returns the widths of the last one."""
    lines = []
    while self._step < step:
      bits, self._state = self._update(self._state, jnp.int32(self._step))
      bits = _on_host(bits)
      for path, new in bits.items():
        old = self.bits.get(path)
        if old is None or not all(map(np.array_equal, old, new)):
          lines.append(
            {
              "step": self._step,
              "path": path,
              "old": None if old is None else _as_list(old),
              "new": _as_list(new),
              "reason": self._reason,
            }
          )
      self.bits = bits
      self._step += 1
    if self._write and lines:
      with self._path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return self.bits


def _on_host(bits):
  return jax.device_get(bits)


def _as_list(bits):
  return [np.asarray(width).tolist() for width in bits]
