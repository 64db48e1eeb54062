"""Adaptive DPC: whole runs against the rule in plain Python, and budgets."""

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

import dpc_jax
from dpc_jax.cost import bitops
from tests.policy import epochs
from tests.policy.epochs import CAPACITIES, FIRST, MACS, PERIOD, build, run

_COSTS = {
  path: bitops.LayerCost(MACS[path], int(np.max(n)), max(1, np.size(n)))
  for path, n in CAPACITIES.items()
  if np.any(n)
}


def _relative(bits):
  """Cost of {path: LayerBits} relative to 8 bits, of layers with weights."""
  bits = {path: bits[path] for path in _COSTS}
  return bitops.bitops(_COSTS, bits).total / bitops.bitops(_COSTS, 8).total


# Options, and the oracle's words for them.
_RULES = {
  "defaults": ({}, {}),
  "to the bounds": ({"rebase": False}, {"rebase": False}),
  "quick": (
    {"patience": 1, "threshold": 0.1, "warmup": 1},
    {"patience": 1, "threshold": 0.1, "warmup": 1},
  ),
  "reversed, frozen": (
    {"direction": "noisy_down", "freeze": 20 / 31},
    {"sign": -1, "last_epoch": 20},
  ),
  "with jumps": ({"skip_steps": [20, 40]}, {"skipped": (7, 14)}),
  "budget": (
    {"budget": 0.7, "macs": MACS, "threshold": 0.2, "patience": 1},
    {"budget": 0.7, "threshold": 0.2, "patience": 1},
  ),
  "budget, reversed": (
    {"budget": 0.7, "macs": MACS, "direction": "noisy_down", "patience": 1},
    {"budget": 0.7, "sign": -1, "patience": 1},
  ),
  "no dearer than the start": (
    {"budget": "start", "macs": MACS, "rebase": False},
    {"budget": epochs.relative_cost(FIRST) * (1 + 1e-5), "rebase": False},
  ),
}


@pytest.mark.parametrize("name", _RULES)
def test_runs_equal_the_rule_in_plain_python(name):
  options, words = _RULES[name]
  schedule = build(**options)
  seen = set()
  for seed in range(8):
    logs = epochs.walks(seed)
    result = run(schedule, logs)
    rows = epochs.oracle(logs, **words)
    for got, (bits, z, reasons) in zip(
      zip(*result.state.record, strict=True), rows, strict=True
    ):
      np.testing.assert_allclose(got[0], z, atol=1e-4)
      assert got[1].tolist() == bits
      numbers = [("", "noisy", "stable", "over budget").index(r)
                 for r in reasons]  # fmt: skip
      assert got[2].tolist() == numbers
      seen.update(reasons)
    _check_moves(schedule.moves(result.state), rows)
    _check_signals(schedule.signals(result.state), rows)
    _check_moves_are_the_changes(schedule.moves(result.state), result.bits)
  assert seen >= {"noisy", "stable"}
  assert ("over budget" in seen) == ("budget" in options)


def _check_moves(moves, rows):
  """All moves of layers that are not stacked, and their number."""
  old, expected = FIRST, []
  for epoch, (bits, z, reasons) in enumerate(rows, 1):
    for path, layer in (("", 0), ("m", 4), ("z/conv", 5)):
      if bits[layer] != old[layer]:
        widths = [[b[layer], b[layer], 8] for b in (old, bits)]
        move = (PERIOD * epoch, path, *widths, reasons[layer])
        expected.append((*move, z[layer]))
    old = bits
  got = [move for move in moves if move.path != "blocks"]
  assert [move[:5] for move in got] == [move[:5] for move in expected]
  np.testing.assert_allclose(
    np.array([m.signal for m in got], float),
    [move[5] for move in expected],
    atol=1e-4,
  )
  order = [(move.step, move.path) for move in moves]
  assert order == sorted(order)


def _check_signals(signals, rows):
  """All z that were taken, None where one was not known."""
  expected = [
    (PERIOD * epoch, z)
    for epoch, (_, z, _) in enumerate(rows, 1)
    if not np.all(np.isnan(z))
  ]
  assert [step for step, _ in signals] == [step for step, _ in expected]
  for (_, layers), (_, z) in zip(signals, expected, strict=True):
    assert list(layers) == sorted(_COSTS)
    got = [layers[""], *layers["blocks"], layers["m"], layers["z/conv"]]
    assert [x is None for x in got] == np.isnan(z).tolist()
    np.testing.assert_allclose(np.array(got, float), z, atol=1e-4)


def _check_moves_are_the_changes(moves, bits):
  """A move's step is the first one with the new widths."""
  expected = []
  for path, layer in bits.items():
    widths = np.stack([np.asarray(w) for w in layer], axis=1)
    for step in range(1, epochs.STEPS):
      if np.any(widths[step] != widths[step - 1]):
        expected.append(
          (step, path, widths[step - 1].tolist(), widths[step].tolist())
        )
  assert [move[:4] for move in moves] == sorted(expected)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
  st.integers(0, 2**32 - 1),
  st.floats(0.68, 1),
  st.sampled_from([0.1, 1.0, 10.0]),
  st.booleans(),
  st.sampled_from(["noisy_up", "noisy_down"]),
)
def test_the_budget_is_kept_at_every_step(seed, budget, step, rebase, way):
  schedule = build(
    budget=budget, macs=MACS, rebase=rebase, direction=way, patience=1
  )
  result = run(schedule, epochs.walks(seed, step=step))
  for end in range(0, epochs.STEPS, PERIOD):
    bits = jax.tree.map(lambda w, end=end: w[end], result.bits)
    # Costs are summed in float32.
    assert _relative(bits) <= budget * (1 + 1.1e-5)
    widths = np.concatenate([np.ravel(bits[p].weights) for p in _COSTS])
    assert widths.min() >= 3
    assert widths.max() <= 8


def test_the_least_noisy_layers_give_way():
  # The cost of FIRST, and a little: no room for a bit anywhere.
  budget = epochs.relative_cost(FIRST) + 1e-4
  logs = epochs.logs_of({0: [0, 0, 0.5, 0.5], 4: [0, 0, -0.2, -0.2]})
  schedule = build(budget=budget, macs=MACS)
  result = run(schedule, logs)
  # "" wants a bit: m, whose z is the smallest, gives one, and then, as that
  # is not enough, the first of those at 0 that has one to give.
  assert result.widths.tolist() == [FIRST] * 3 + [[7, 7, 6, 3, 4, 8]]
  reasons = {m.path: m.reason for m in schedule.moves(result.state)}
  assert reasons == {
    "": "noisy",
    "m": "over budget",
    "blocks": "over budget (0)",
  }
  # The noisy one has its own reference anew, those that gave way keep theirs.
  np.testing.assert_allclose(
    result.state.reference, [0.5, 0, 0, 0, 0, 0], atol=1e-6
  )


def test_a_gain_that_nobody_can_pay_for_is_refused():
  # Two layers of 6 bits that want one more, and four at b_min, which have
  # nothing to give. The second of the two does not pay for the first.
  capacities = CAPACITIES | {"": 141, "z/conv": 141, "m": 20_000}
  capacities["blocks"] = np.full(3, 20_000)
  options = {"center": "log_midpoint", "macs": MACS}
  logs = epochs.logs_of({0: [0, 0, 0.5, 0.5], 5: [0, 0, 0.9, 0.9]})
  capacities["m"] = 1
  static = build(**options).init(capacities).first.tolist()
  assert static == [6, 3, 3, 3, 8, 6]
  # m may give a bit for z/conv (87 MACs' worth), not for "" (203).
  for budget, expected in (
    (None, [7, 3, 3, 3, 8, 7]),
    ("start", [6, 3, 3, 3, 7, 7]),
  ):
    schedule = build(budget=budget, **options)
    result = run(schedule, logs, capacities)
    assert result.widths[2].tolist() == static
    assert result.widths[3].tolist() == expected
  logs[2:, 0] = 2.0
  result = run(build(budget="start", **options), logs, capacities)
  assert result.widths[3].tolist() == static
  assert not np.any(result.state.votes[[0, 5]])


def test_what_is_not_known_gives_way_as_the_median_layer_does():
  budget = epochs.relative_cost(FIRST) + 1e-4
  logs = epochs.logs_of({0: [0, 0, 0.5, 0.5], 4: [0, 0, -0.1, -0.1]})
  logs[3, 1] = np.nan
  schedule = build(budget=budget, macs=MACS)
  result = run(schedule, logs)
  # m first, then blocks 0 before the others at 0; it has no z to tell.
  assert result.widths[3].tolist() == [7, 7, 6, 3, 4, 8]
  signal = {m.path: m.signal for m in schedule.moves(result.state)}["blocks"]
  assert signal == [None, 0.0, 0.0]


@pytest.mark.parametrize("widths", [(3, 8), (8, 8), (2, 16)])
def test_a_budget_of_just_the_static_cost_is_enough(widths):
  rng = np.random.default_rng(0)
  capacities = {
    f"l{i}": int(n) for i, n in enumerate(rng.integers(9, 9**6, 40))
  }
  for _ in range(20):
    macs = {path: int(m) for path, m in zip(
      capacities, rng.integers(1, 10**9, 40), strict=True)}  # fmt: skip
    costs = {p: bitops.LayerCost(m, 1) for p, m in macs.items()}
    bits = dpc_jax.schedules.dpc(*widths).init(capacities).bits
    top = bitops.bitops(costs, widths[1]).total
    budget = bitops.bitops(costs, bits).total / top
    build(*widths, budget=budget, macs=macs).init(capacities)
    with pytest.raises(ValueError, match="the relative cost of static DPC"):
      build(*widths, budget=budget * 0.9999, macs=macs).init(capacities)
