"""Adaptive DPC: the contract of its state, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpc_jax.policy import schedule as schedule_lib
from dpc_jax.policy import statistics
from dpc_jax.quant import grids
from tests.policy import epochs
from tests.policy.epochs import CAPACITIES, FIRST, MACS, PERIOD, build, run


def _signature(tree):
  leaves, treedef = jax.tree.flatten(tree)
  return treedef, [(x.shape, x.dtype, x.weak_type) for x in leaves]


def test_one_trace_serves_all_runs_and_keeps_the_state_as_it_is():
  runs = [
    build(),
    build(4, 6, threshold=1.0, patience=3, warmup=5, rebase=False),
    build(2, 16, direction="noisy_down", freeze=0.5, delta=-1, weights=32),
    build(budget=0.7, macs=MACS, gradients=None),
    build(signal="variance"),
  ]
  traces = []

  def count(state, step, ratios):
    traces.append(step)
    found = epochs.synthetic(ratios)
    return runs[0].update(state, step=step, statistics=found)

  update = jax.jit(count, donate_argnums=0)
  logs = epochs.at_steps(epochs.walks(0))
  ends = []
  for schedule in runs:
    state = schedule.init(CAPACITIES)
    signature = _signature(state)
    first = jnp.asarray(logs[0])
    eager, after = schedule.update(
      state, step=0, statistics=epochs.synthetic(first)
    )
    assert _signature(after) == signature
    for step in range(0, 60):
      bits, state = update(state, jnp.int32(step), jnp.asarray(logs[step]))
      assert _signature(state) == signature
    assert _signature(eager) == _signature(bits)
    assert set(bits) == set(CAPACITIES)
    for path, layer in bits.items():
      assert isinstance(layer, grids.LayerBits)
      for width in layer:
        assert width.dtype == jnp.int32
        assert width.shape == np.shape(CAPACITIES[path])
    ends.append(str(jax.device_get(bits)))
  assert len(traces) == 1
  assert len(set(ends)) == len(runs)


def test_eager_decisions_equal_compiled_ones():
  schedule = build(patience=1)
  logs = epochs.at_steps(epochs.walks(3))
  state = schedule.init(CAPACITIES)
  signature = _signature(state)
  for step in (3, 6, 9):
    bits, state = schedule.update(
      state, step=step, statistics=epochs.synthetic(jnp.asarray(logs[step]))
    )
    assert _signature(state) == signature
  record = run(schedule, epochs.walks(3)).state.record
  np.testing.assert_array_equal(state.record.widths[:3], record.widths[:3])
  np.testing.assert_allclose(state.record.signals[:3], record.signals[:3])
  assert int(bits[""].weights) == record.widths[2, 0]


def test_init_works_under_jit_and_abstractly():
  schedule = build(budget=0.8, macs=MACS)
  state = schedule.init(CAPACITIES)
  jitted = jax.jit(lambda: schedule.init(CAPACITIES))()
  jax.tree.map(np.testing.assert_array_equal, state, jitted)
  abstract = jax.eval_shape(lambda: schedule.init(CAPACITIES))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
    lambda x: (x.shape, x.dtype), abstract
  )
  # orbax refuses arrays of size 0.
  short = build(steps=1, steps_per_epoch=5).init({"a": 3})
  assert all(leaf.size for leaf in jax.tree.leaves(short))
  one = statistics.GradientStatistics(1.0, 1.0, jnp.float32(1), jnp.int32(9))
  _, after = epochs.UPDATE(short, step=jnp.int32(0), statistics={"a": one})
  jax.tree.map(np.testing.assert_array_equal, short, after)


def test_the_order_of_the_layers_plays_no_part():
  logs = epochs.walks(5)
  turned = dict(reversed(CAPACITIES.items()))
  state = run(build(), logs).state
  jax.tree.map(
    np.testing.assert_array_equal, state, run(build(), logs, turned).state
  )


def test_a_run_goes_on_from_a_saved_state():
  schedule = build(patience=1)
  ratios = epochs.at_steps(epochs.walks(1))
  straight = run(schedule, epochs.walks(1)).state
  update = jax.jit(
    lambda state, step, ratio: schedule.update(
      state, step=step, statistics=epochs.synthetic(ratio)
    )
  )
  state = schedule.init(CAPACITIES)
  for step in range(epochs.STEPS):
    if step == 10 * PERIOD + 1:
      leaves, treedef = jax.tree.flatten(jax.tree.map(np.array, state))
      state = jax.tree.unflatten(treedef, leaves)
      moves = schedule.moves(state)
      assert len(moves) > 3
      assert max(move.step for move in moves) <= 10 * PERIOD
    _, state = update(state, jnp.int32(step), jnp.asarray(ratios[step]))
  jax.tree.map(np.testing.assert_array_equal, state, straight)
  saved = schedule.moves(jax.tree.map(np.array, state))
  assert saved == schedule.moves(straight) == schedule.moves(state)
  assert schedule.signals(straight) == schedule.signals(state)
  assert saved[: len(moves)] == moves
  for move in saved:
    assert isinstance(move, schedule_lib.Move)
    assert type(move.step) is int
    assert all(type(w) in (int, list) for w in (*move.old, *move.new))


def _tracked(memory):
  """(update of state and optimizer state under jit, the two states)."""
  params = {
    "kernel": jnp.ones(4),
    "blocks": {"kernel": jnp.ones((3, 4))},
    "m": {"kernel": jnp.ones(5)},
    "z": {"conv": {"kernel": jnp.ones(6)}},
  }
  tracker = optax.chain(
    statistics.track_gradient_statistics(0.5, memory, capacities=CAPACITIES),
    optax.adam(1e-3),
  )
  schedule = build()

  @jax.jit
  def update(state, opt_state, step, gradient):
    found = statistics.gradient_statistics(opt_state)
    bits, state = schedule.update(state, step=step, statistics=found)
    _, opt_state = tracker.update(gradient, opt_state, params)
    return bits, state, opt_state

  return update, schedule.init(CAPACITIES), tracker.init(params), params


def test_the_statistics_of_the_tracker_serve():
  update, state, opt_state, params = _tracked("full")
  rng = np.random.default_rng(0)
  for step in range(4 * PERIOD + 1):
    gradient = jax.tree.map(
      lambda x: x + 0.01 * rng.normal(size=x.shape).astype("f4"), params
    )
    if step >= 2 * PERIOD:
      gradient["m"]["kernel"] += rng.normal(size=5).astype("f4")
    _, state, opt_state = update(state, opt_state, jnp.int32(step), gradient)
  assert state.bits[4] == FIRST[4] + 1
  assert np.all(state.record.signals[2:4, 4] > 2)
  assert state.record.reasons[3, 4] == 1


def test_statistics_that_do_not_serve_are_refused():
  update, state, opt_state, params = _tracked("norm")
  with pytest.raises(ValueError, match="no variance is tracked with memory"):
    update(state, opt_state, jnp.int32(0), params)
  schedule = build()
  assert schedule.needs == ("statistics",)
  with pytest.raises(ValueError, match="statistics = None: adaptive bits"):
    schedule.update(state, step=jnp.int32(0))
  found = epochs.synthetic(jnp.ones(6))
  del found["m"]
  with pytest.raises(ValueError, match="statistics: layer 'm' is missing"):
    jax.jit(schedule.update)(state, step=jnp.int32(0), statistics=found)
  # A stacked kernel that was tracked as one layer.
  found = epochs.synthetic(jnp.ones(6))
  found["blocks"] = found["m"]
  with pytest.raises(ValueError, match="layer 'blocks' has ratios of shape"):
    schedule.update(state, step=jnp.int32(0), statistics=found)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"b_min": 9}, "b_min=9 is above b_max=8"),
    ({"b_max": 17}, "b_max=17 is not a width"),
    ({"steps": 0}, "steps = 0 must be an int, at least 1"),
    ({"steps": 10.0}, r"steps = 10\.0 must be an int"),
    ({"steps_per_epoch": 0}, "steps_per_epoch = 0 must be"),
    ({"warmup": 0}, "warmup = 0 must be"),
    ({"warmup": 1.5}, r"warmup = 1\.5 must be"),
    ({"patience": -1}, "patience = -1 must be"),
    ({"patience": True}, "patience = True must be"),
    ({"threshold": "0.1"}, "threshold = '0.1' must be finite"),
    ({"threshold": -0.1}, "threshold = -0.1 must be finite"),
    ({"threshold": np.inf}, "threshold = inf must be finite"),
    ({"threshold": np.nan}, "threshold = nan must be finite"),
    ({"freeze": 0.0}, r"freeze = 0\.0 must be in \(0, 1\], or None"),
    ({"freeze": 2}, "freeze = 2 must be in"),
    ({"rebase": "no"}, "rebase = 'no' must be True or False"),
    ({"signal": "norm"}, "signal = 'norm': use one of noise_to_signal, vari"),
    ({"direction": "up"}, "direction = 'up': use one of noisy_up, noisy_down"),
    ({"budget": 0, "macs": MACS}, "budget = 0 must be in"),
    ({"budget": 1.1, "macs": MACS}, "budget = 1.1 must be in"),
    ({"budget": "end", "macs": MACS}, "budget = 'end' must be in"),
    ({"budget": 0.9}, "budget = 0.9 needs macs"),
    ({"budget": "start"}, "budget = 'start' needs macs"),
    ({"macs": {"a": 0}}, r"macs\['a'\] = 0 must be an int, at least 1"),
    ({"macs": {"a": 0.5}}, r"macs\['a'\] = 0.5 must be"),
    ({"skip_steps": [5, -1]}, "skip_steps: -1 is no step"),
    ({"skip_steps": (2.5,)}, r"skip_steps: 2\.5 is no step"),
    ({"delta": 2}, "delta=2"),
    ({"center": "mode"}, "center='mode'"),
    ({"log_form": "ln"}, "log_form='ln'"),
    ({"weights": 1}, "weights = 1 "),
    ({"activations": 31}, "activations = 31 "),
    ({"gradients": 8.0}, r"gradients = 8\.0 "),
  ],
)
def test_parameters_are_checked_where_the_schedule_is_built(options, message):
  with pytest.raises(ValueError, match=message) as error:
    build(**options)
  assert "\n" not in str(error.value)
  with pytest.raises(TypeError, match="tau"):
    build(tau=0.25)


@pytest.mark.parametrize(
  ("options", "capacities", "message"),
  [
    ({}, {"qk": 0}, "capacities"),
    ({}, {}, "capacities: no layer with weights"),
    ({"macs": {"a": 3}}, {"a": 5, "b": 6}, "macs: layer 'b' is missing"),
    (
      {"budget": 0.5, "macs": MACS},
      CAPACITIES,
      "budget = 0.5 is below 0.6745, the relative cost of static DPC",
    ),
  ],
)
def test_layers_are_checked_in_init(options, capacities, message):
  with pytest.raises(ValueError, match=message) as error:
    build(**options).init(capacities)
  assert "\n" not in str(error.value)
