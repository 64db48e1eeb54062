"""`bits.jsonl`: every change once, replayed on the host."""

import jax
import numpy as np
import pytest

from dpc_jax.policy import schedules
from dpc_jax.quant import grids
from dpc_jax.training import bits_log
from tests.training import tiny

CAPACITIES = {"first": 36, "second": 288}


def expected(steps, start=0):
  lines = []
  for step in range(start, steps):
    before = tiny.cyclic_bits(step - 1) if step else {}
    for path, new in tiny.cyclic_bits(step).items():
      old = before.get(path)
      if old != new:
        lines.append(
          {"step": step, "path": path, "old": old, "new": new, "reason": "dpc"}
        )
  return lines


def make_log(path, schedule, state, bits, step):
  return bits_log.BitsLog(path, schedule, state, bits, step=step, reason="dpc")


# Blocks of one, of many steps, and more than one block at a time.
@pytest.mark.parametrize("stops", [[200], [1, 2, 70, 71, 200], range(1, 201)])
def test_every_change_is_logged_once(tmp_path, stops):
  schedule = tiny.cyclic()
  log = make_log(
    tmp_path / "bits.jsonl", schedule, schedule.init(CAPACITIES), {}, 0
  )
  for step in stops:
    log.advance(step, None)
  log.advance(200, None)
  assert tiny.read_lines(tmp_path / "bits.jsonl") == expected(200)


@pytest.mark.parametrize("start", [5, 6])
def test_goes_on_from_a_state(tmp_path, start):
  """Step 6 changes the widths, step 5 does not."""
  schedule = tiny.cyclic()
  state = schedule.init(CAPACITIES)
  bits = {}
  for step in range(start):
    bits, state = schedule.update(state, step=step)
  log = make_log(
    tmp_path / "bits.jsonl", schedule, state, jax.device_get(bits), start
  )
  log.advance(12, None)
  assert tiny.read_lines(tmp_path / "bits.jsonl") == expected(12, start)


def test_constant_widths_are_logged_at_step_0_alone(tmp_path):
  schedule = schedules.constant({"a": 4, "b": grids.LayerBits(3, 32, 8)})
  state = schedule.init({"a": 10, "b": np.array([5, 5])})
  log = make_log(tmp_path / "bits.jsonl", schedule, state, {}, 0)
  log.advance(300, None)
  lines = tiny.read_lines(tmp_path / "bits.jsonl", "reason")
  assert lines == [
    {"step": 0, "path": "a", "old": None, "new": [4, 4, 8]},
    {
      "step": 0,
      "path": "b",
      "old": None,
      "new": [[3, 3], [32, 32], [8, 8]],
    },
  ]


def test_a_float_run_has_no_changes(tmp_path):
  schedule = schedules.constant({})
  log = make_log(tmp_path / "bits.jsonl", schedule, schedule.init({}), {}, 0)
  log.advance(10, None)
  assert not (tmp_path / "bits.jsonl").exists()
