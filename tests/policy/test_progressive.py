"""Progressive quantization: when the loss counts as flat, and what follows."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.policy import progressive
from dpc_jax.quant import grids

CAPACITIES = {"z/conv": 20, "blocks": np.array([20, 100, 1000]), "qk": 0}
EPOCH = 4
# FracTrain's list for CIFAR.
PFQ = ((3, 3, 6), (4, 4, 6), (6, 6, 8), (8, 8, 8))


def build(bits=(3, 4, 6, 8), **options):
  return progressive.progressive(bits, **({"steps_per_epoch": EPOCH} | options))


@functools.partial(jax.jit, static_argnums=0)
def _scan(update, state, losses):
  def one(state, inputs):
    step, loss = inputs
    bits, state = update(state, step=step, loss=loss)
    return state, (bits, state)

  steps = jnp.arange(losses.size, dtype=jnp.int32)
  return jax.lax.scan(one, state, (steps, losses))


def run(schedule, epochs, capacities=CAPACITIES):
  """(last state, bits of every step, states) for given mean losses of epochs.

  Within an epoch losses differ, so that only their mean tells; the loss at a
  step is that of the step before, NaN at step 0.
  """
  within = np.tile(np.linspace(-0.3, 0.3, EPOCH), len(epochs))
  losses = np.repeat(np.asarray(epochs, np.float32), EPOCH)
  losses = losses + within.astype(np.float32)
  return follow(schedule, np.concatenate([[np.nan], losses]), capacities)


def follow(schedule, losses, capacities=CAPACITIES):
  # Few lengths, few compilations.
  padded = np.resize(np.float32(losses), -(-len(losses) // 128) * 128)
  _, trace = _scan(schedule.update, schedule.init(capacities), padded)
  bits, states = jax.tree.map(lambda x: x[: len(losses)], jax.device_get(trace))
  return jax.tree.map(lambda x: x[-1], states), bits, states


def entry_at_epochs(states):
  """Entry in force at the first step of every epoch but the first."""
  return states.entry[EPOCH::EPOCH].tolist()


def test_a_falling_loss_holds_the_entry():
  # Each epoch falls by 0.1 of a scale below 2: more than 0.05 in all windows.
  state, bits, _ = run(build(), 2 - 0.2 * np.arange(9))
  assert state.entry == 0
  assert set(bits["z/conv"].weights.tolist()) == {3}
  assert build().moves(state) == []


def test_a_plateau_switches_and_the_window_starts_again():
  # 5 epochs of one loss are needed after each switch.
  _, bits, states = run(build(), [1.0] * 22)
  expected = [0] * 4 + [1] * 5 + [2] * 5 + [3] * 8
  assert entry_at_epochs(states) == expected
  # The first step of the sixth epoch is the first at the new widths.
  widths = bits["z/conv"].weights.tolist()
  assert widths[: 5 * EPOCH] == [3] * 5 * EPOCH
  assert widths[5 * EPOCH : 10 * EPOCH] == [4] * 5 * EPOCH
  assert widths[-1] == 8


@pytest.mark.parametrize("window", [2, 3, 5, 8])
def test_the_window_counts_epochs(window):
  _, _, states = run(build(window=window), [1.0] * 20)
  first = np.flatnonzero(np.asarray(entry_at_epochs(states)))[0]
  assert first == window - 1
  # Any one of its epochs that differs is in the way until it has left.
  for i in range(window - 1):
    epochs = [1.0] * 20
    epochs[i] = 3.0
    _, _, states = run(build(window=window), epochs)
    first = np.flatnonzero(np.asarray(entry_at_epochs(states)))[0]
    assert first == window + i


def test_the_indicator_written_out():
  # Windows of three, at the ends of the last three epochs: 3 / (7 / 3), then
  # 1 / (8.02 / 4), then max(|1.04 - 1|, |1.04 - 1.02|) / (9.06 / 5).
  epochs = [4.0, 2.0, 1.0, 1.02, 1.04]
  indicator = 0.04 / (9.06 / 5)
  for threshold, expected in ((indicator - 1e-5, 0), (indicator + 1e-5, 1)):
    state, _, states = run(build(window=3, threshold=threshold), epochs)
    assert entry_at_epochs(states) == [0, 0, 0, 0, expected]
  assert state.indicators[0] == pytest.approx(indicator, rel=1e-5)
  # A rise and a fall are the same.
  epochs = [4.0, 2.0, 1.04, 1.02, 1.0]
  state, _, _ = run(build(window=3, threshold=0.03), epochs)
  assert state.indicators[0] == pytest.approx(indicator, rel=1e-5)


def test_the_scale_is_the_mean_of_ten_epochs():
  # Far larger losses later leave it alone.
  epochs = [*(10.0 - np.arange(10)), *[500.0] * 3]
  state, _, states = run(build(window=12), epochs)
  assert state.scale == pytest.approx(5.5)
  assert states.scale[3 * EPOCH] == pytest.approx(9)
  assert state.scaled == 10


def test_the_threshold_decays_at_every_switch():
  options = {"window": 2, "threshold": 0.2, "decay": 0.5}
  # Changes of 0.15, 0.08 and 0.04 of a scale of about 1: one switch each.
  epochs = [1.0, 0.85, 1.0, 0.92, 0.7, 0.66]
  state, _, states = run(build(**options), epochs)
  assert entry_at_epochs(states) == [0, 1, 1, 2, 2, 3]
  np.testing.assert_allclose(state.thresholds, [0.2, 0.1, 0.05])
  assert state.threshold == pytest.approx(0.025)
  # Without the decay a wider change is flat too.
  _, _, states = run(build(**options | {"decay": 1}), [1, 0.85, 1, 0.85])
  assert entry_at_epochs(states) == [0, 1, 1, 2]
  _, _, states = run(build(**options), [1, 0.85, 1, 0.85])
  assert entry_at_epochs(states) == [0, 1, 1, 1]


def test_losses_that_are_not_finite_are_skipped():
  steady = np.concatenate([[np.nan], np.full(12 * EPOCH, 1.0)])
  _, _, expected = follow(build(), steady)
  for bad in (np.nan, np.inf, -np.inf):
    losses = steady.copy()
    # Some of every epoch, and first or last steps of some.
    losses[[2, 4, 5, 11, 17, 23]] = bad
    state, _, states = follow(build(), losses)
    assert entry_at_epochs(states) == entry_at_epochs(expected)
    assert np.isfinite(jax.tree.leaves(state._replace(bits={}))[0]).all()
    # Of a whole epoch: that one does not count.
    losses[2 * EPOCH + 1 : 3 * EPOCH + 1] = bad
    _, _, states = follow(build(), losses)
    assert entry_at_epochs(states) == [0] * 5 + [1] * 5 + [2] * 2
  state, _, _ = follow(build(), np.full(40, np.nan))
  assert state.entry == state.kept == state.scaled == 0


def test_a_loss_belongs_to_the_step_before():
  # The loss at step t of the second epoch is that of step t - 1.
  losses = [np.nan, 1, 1, 1, 1, 9, 9, 9, 9, 5, 5, 5, 5]
  state, _, _ = follow(build(window=3), losses)
  assert state.epochs.tolist() == [1, 9, 5]


def test_a_long_epoch_keeps_its_mean():
  schedule = build(steps_per_epoch=200_000)
  losses = np.full(200_001, 0.1, np.float32)
  losses[0] = np.nan
  state, _, _ = follow(schedule, losses, {"a": 1})
  assert state.epochs[-1] == pytest.approx(0.1, rel=1e-6)


def test_a_loss_of_zero_is_flat():
  state, _, _ = follow(build(), np.zeros(6 * EPOCH))
  assert state.entry == 1


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  st.lists(
    st.floats(0, 3, width=32) | st.sampled_from([1.0, 1.01, 0.99, np.nan]),
    min_size=1,
    max_size=40,
  ).map(lambda values: np.resize(np.float32(values), 60)),
  st.floats(0.01, 0.5),
)
def test_a_run_equals_the_rule_in_plain_python(losses, threshold):
  schedule = build(window=3, threshold=threshold, decay=0.6)
  losses = np.concatenate([[np.nan], losses]).astype(np.float32)
  state, bits, states = follow(schedule, losses, {"a": 1})
  entry, window, scale, expected, limit = 0, [], [], [], threshold
  margin = 1.0
  for step in range(losses.size):
    epoch = losses[step - EPOCH + 1 : step + 1].astype(float)
    epoch = epoch[np.isfinite(epoch)]
    if step and step % EPOCH == 0 and epoch.size:
      window = [*window, epoch.mean()][-3:]
      scale = [*scale, epoch.mean()][:10]
      if len(window) == 3 and entry < 3 and np.mean(scale) > 0:
        change = max(abs(old - window[-1]) for old in window[:-1])
        indicator = change / np.mean(scale)
        margin = min(margin, abs(indicator - limit))
        if indicator <= limit:
          entry, window, limit = entry + 1, [], limit * 0.6
    expected.append(entry)
  hypothesis.assume(margin > 1e-5 and np.mean(scale or [1]) > 0)
  assert states.entry.tolist() == expected
  widths = np.array([3, 4, 6, 8])[expected]
  np.testing.assert_array_equal(bits["a"].weights, widths)
  switches = np.flatnonzero(np.diff(expected)) + 1
  assert [move.step for move in schedule.moves(state)] == switches.tolist()


def test_moves_agree_with_the_bits():
  schedule = build(PFQ, gradients=None)
  state, bits, _ = run(schedule, [1.0] * 12 + [0.9, 0.8, 0.7] + [0.6] * 12)
  moves = schedule.moves(state)
  changes = []
  for step in range(1, len(bits["z/conv"].weights)):
    for path, layer in bits.items():
      old, new = ([w[t].tolist() for w in layer] for t in (step - 1, step))
      if old != new:
        changes.append((step, path, old, new))
  assert [tuple(move[:4]) for move in moves] == changes
  assert [m.step for m in moves[::2]] == [20, 40, 80]
  # Products stay.
  assert [m.path for m in moves] == ["blocks", "z/conv"] * 3
  first = next(m for m in moves if m.path == "z/conv")
  assert (first.old, first.new) == ([3, 3, 6], [4, 4, 6])
  stacked = next(m for m in moves if m.path == "blocks")
  assert stacked.new == [[4] * 3, [4] * 3, [6] * 3]
  assert first.signal == pytest.approx(0, abs=1e-6)
  assert "loss plateau" in first.reason
  assert "at most 0.05; entry 2 of 4" in first.reason
  assert all(type(w) is int for w in first.new)


def test_operands_and_products():
  def widths(bits, **options):
    state = build(bits, **options).init(CAPACITIES)
    return {
      path: np.stack(layer)[..., 0] if path == "blocks" else np.stack(layer)
      for path, layer in state.bits.items()
    }

  got = widths((3, 5, 8))
  assert got["z/conv"].tolist() == [[3, 5, 8], [3, 5, 8], [8, 8, 8]]
  np.testing.assert_array_equal(got["blocks"], got["z/conv"])
  assert got["qk"].tolist() == [[8] * 3] * 3
  got = widths((3, 5), gradients=None)
  assert got["z/conv"].tolist() == [[3, 5]] * 3
  assert got["qk"].tolist() == [[5, 5]] * 3
  got = widths((3, 5), weights=32, activations=6)
  assert got["z/conv"].tolist() == [[32, 32], [6, 6], [8, 8]]
  assert got["qk"].tolist() == [[6, 6], [6, 6], [8, 8]]
  got = widths([(5, 3, 6), [6, 4, 5], 32], gradients=None)
  assert got["z/conv"].tolist() == [[5, 6, 32], [3, 4, 32], [6, 5, 32]]
  got = widths([(5, 3, 6), (6, 4, 5)], gradients=None)
  assert got["qk"].tolist() == [[4, 4], [4, 4], [6, 6]]


def test_one_entry_never_switches():
  state, bits, _ = run(build([5]), [1.0] * 8)
  assert state.entry == 0
  assert set(bits["z/conv"].weights.tolist()) == {5}
  assert build([5]).moves(state) == []


def test_one_trace_serves_a_run_and_other_runs_of_its_shape():
  runs = (
    build(),
    build(PFQ, gradients=None, threshold=0.2, decay=1, steps_per_epoch=7),
  )
  traces = []

  def count(state, step, loss):
    traces.append(step)
    return runs[0].update(state, step=step, loss=loss)

  update = jax.jit(count, donate_argnums=0)
  for schedule in runs:
    assert schedule.needs == ("loss",)
    state = schedule.init(CAPACITIES)
    signature = _signature(state)
    for step in range(60):
      loss = jnp.float32(1 if step else np.nan)
      before = jax.tree.map(jnp.copy, state) if step == 59 else None
      bits, state = update(state, jnp.int32(step), loss)
      assert _signature(state) == signature
    assert state.entry > 0
    eager, _ = schedule.update(
      before, step=jnp.int32(59), statistics=None, loss=loss
    )
    jax.tree.map(np.testing.assert_array_equal, eager, bits)
    assert _signature(eager) == _signature(bits)
    for path, layer in bits.items():
      assert isinstance(layer, grids.LayerBits)
      assert all(w.dtype == jnp.int32 for w in layer)
      assert all(w.shape == np.shape(CAPACITIES[path]) for w in layer)
  assert len(traces) == 1


def _signature(tree):
  leaves, treedef = jax.tree.flatten(tree)
  return treedef, [(x.shape, x.dtype, x.weak_type) for x in leaves]


def test_a_loss_is_required():
  schedule = build()
  state = schedule.init(CAPACITIES)
  with pytest.raises(ValueError, match=r"loss=None: .*NaN at step 0") as error:
    jax.jit(lambda s: schedule.update(s, step=jnp.int32(0)))(state)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"bits": ()}, r"bits=\(\) is no list of widths"),
    ({"bits": 8}, "bits=8 is no list"),
    ({"bits": "48"}, "bits='48' is no list"),
    ({"bits": (3, 17)}, "bits = 17 is not a bit-width"),
    ({"bits": ((3, 3),)}, "must be one width or three"),
    ({"bits": (np.array([3, 4]),)}, "has arrays"),
    (
      {"bits": (4, (8, 8, 6))},
      r"gradients=8 would overrule the 6 of bits\[1\]=\(8, 8, 6\); use "
      "gradients=None",
    ),
    ({"bits": (4, 32)}, r"gradients=8 would overrule the 32 of bits\[1\]=32"),
    ({"bits": ((4, 4, 8),), "weights": 5}, "weights=5 would overrule the 4"),
    ({"steps_per_epoch": 0}, "steps_per_epoch=0 is out of range"),
    ({"window": 1}, "window=1 is out of range; use an int >= 2"),
    ({"window": 2.0}, "window=2.0 is out of range"),
    ({"threshold": 0}, "threshold=0 is out of range"),
    ({"threshold": float("nan")}, "threshold=nan is out of range"),
    ({"decay": 0}, "decay=0 is out of range"),
    ({"decay": 1.5}, r"decay=1\.5 is out of range"),
    ({"activations": 1}, "activations = 1 "),
  ],
)
def test_parameters_are_checked(options, message):
  with pytest.raises(ValueError, match=message) as error:
    build(**options)
  assert "\n" not in str(error.value)
