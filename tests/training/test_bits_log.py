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


def recorded(*moves, signals=None):
  """A schedule whose record is `moves`, and whose state is not looked at."""
  schedule = schedules.constant(8)
  told = None
  if signals is not None:

    def told(state, since=0):
      return [(step, values) for step, values in signals if step >= since]

  return schedule._replace(
    needs=("statistics",),
    moves=lambda state, since=0: [m for m in moves if m.step >= since],
    signals=told,
  )


def move(step, path, old, new):
  widths = ([b, b, 8] for b in (old, new))
  return schedules.Move(step, path, *widths, reason="noisy", signal=0.5)


FIRST = {
  path: grids.LayerBits(*map(np.int32, (8, 8, 8))) for path in CAPACITIES
}
MOVES = (
  move(4, "first", 8, 7),
  move(4, "second", 8, 9),
  move(8, "first", 7, 6),
)


@pytest.mark.parametrize("stops", [[12], [4, 5, 8, 9], [3, 12], range(1, 13)])
def test_the_record_is_logged_once(tmp_path, stops):
  signals = [(4, {"first": 0.5}), (8, {"first": None})]
  schedule = recorded(*MOVES, signals=signals)
  path = tmp_path / "bits.jsonl"
  log = make_log(path, schedule, schedule.init(CAPACITIES), FIRST, 0)
  found = [line for step in stops for line in log.advance(step, None)]
  assert found == [move._asdict() for move in MOVES]
  first = [
    {"step": 0, "path": p, "old": None, "new": [8, 8, 8], "reason": "dpc"}
    for p in CAPACITIES
  ]
  assert tiny.read_lines(path) == first + found
  assert tiny.read_lines(tmp_path / bits_log.SIGNALS) == [
    {"step": step, "signals": values} for step, values in signals
  ]


@pytest.mark.parametrize(("start", "kept"), [(4, 3), (5, 1), (8, 1), (9, 0)])
def test_a_record_goes_on_from_a_step(tmp_path, start, kept):
  schedule = recorded(*MOVES)
  path = tmp_path / "bits.jsonl"
  log = make_log(path, schedule, schedule.init(CAPACITIES), FIRST, start)
  assert len(log.advance(12, None)) == kept
  lines = tiny.read_lines(path) if kept else []
  assert lines == [move._asdict() for move in MOVES[3 - kept :]]


@pytest.mark.parametrize("is_recorded", [False, True])
@pytest.mark.parametrize("step", [0, 9])
def test_another_state_from_a_step_on(tmp_path, step, is_recorded):
  """Of layers that stay nothing is said, and what was written stays."""
  schedule = recorded(MOVES[0]) if is_recorded else schedules.constant(8)
  path = tmp_path / "bits.jsonl"
  log = make_log(path, schedule, schedule.init(CAPACITIES), FIRST, 0)
  log.advance(step, None)
  before = tiny.read_lines(path) if step else []
  other = schedules.constant({"first": 7, "second": 4}).init(CAPACITIES)
  log.replace(other, jax.device_get(other.bits), "bounds 4..7")
  changes = {"second": [8, 8, 8] if step else None}
  if not step:
    changes = {"first": None} | changes
  elif not is_recorded:
    changes = {"first": [8, 8, 8]} | changes
  new = {"first": [7, 7, 8], "second": [4, 4, 8]}
  after = [
    {
      "step": step,
      "path": path,
      "old": old,
      "new": new[path],
      "reason": "bounds 4..7",
    }
    for path, old in changes.items()
  ]
  assert tiny.read_lines(path) == before + after
  if not is_recorded:
    assert log.advance(200, None) == []
    assert tiny.read_lines(path) == before + after


def test_the_other_state_goes_on_changing(tmp_path):
  schedule = tiny.cyclic()
  state = schedule.init(CAPACITIES)
  path = tmp_path / "bits.jsonl"
  log = make_log(path, schedule, state, {}, 0)
  log.advance(7, None)
  # The widths of `cyclic` at step 30.
  later = state | {"count": np.int32(30)}
  bits, _ = schedule.update(later, step=0)
  log.replace(later, jax.device_get(bits), "later")
  log.advance(20, None)
  lines = [x for x in tiny.read_lines(path) if x["step"] > 7]
  assert [(x["step"] + 23, x["path"], x["new"]) for x in lines] == [
    (x["step"], x["path"], x["new"]) for x in expected(43, 31)
  ]


def test_what_cannot_be_replayed_needs_a_record(tmp_path):
  for needs in (("statistics",), ("loss",), ("statistics", "loss")):
    schedule = schedules.constant(8)._replace(needs=needs)
    with pytest.raises(ValueError) as caught:
      make_log(tmp_path / "bits.jsonl", schedule, None, {}, 0)
    message = str(caught.value)
    assert message.startswith("schedule.moves = None: ")
    assert ", ".join(needs) in message
    assert "\n" not in message
