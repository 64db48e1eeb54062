"""Adaptive DPC: each part of the rule by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.policy import adaptive, schedules
from tests.policy import epochs
from tests.policy.epochs import CAPACITIES, FIRST, PERIOD, build, logs_of, run

# Layers that have room on both sides: "", blocks 1, m.
ROOT, BLOCK, M = 0, 2, 4


def _steps_of(widths, layer):
  """Differences of a layer's width from epoch to epoch, the first epoch's
  against static DPC."""
  return np.diff(widths[:, layer], prepend=FIRST[layer]).tolist()


def _others_stay(widths, *layers):
  rest = np.delete(widths, layers, axis=1)
  assert np.all(rest == np.delete(FIRST, layers))


def test_starts_from_static_dpc_and_stays_while_nothing_changes():
  result = run(build(), np.zeros((12, 6)))
  assert np.all(result.widths == FIRST)
  static = schedules.dpc(3, 8).init(CAPACITIES).bits
  assert result.bits.keys() == static.keys()
  for path, layer in static.items():
    for width, expected in zip(result.bits[path], layer, strict=True):
      assert np.all(width == expected[None])


@pytest.mark.parametrize("log_ratio", [0.0, 3.0, -20.0])
def test_noisy_rises_stable_falls_and_between_nothing_moves(log_ratio):
  changes = {ROOT: 0.26, BLOCK: -0.26, M: 0.24, 5: -0.24}
  logs = logs_of({k: [0, 0] + [x] * 6 for k, x in changes.items()})
  result = run(build(), logs + log_ratio)
  # The warm-up's end is 2; two epochs in a row later they move, and once.
  assert _steps_of(result.widths, ROOT) == [0, 0, 0, 1, 0, 0, 0, 0]
  assert _steps_of(result.widths, BLOCK) == [0, 0, 0, -1, 0, 0, 0, 0]
  _others_stay(result.widths, ROOT, BLOCK)
  np.testing.assert_allclose(
    result.state.record.signals[2:4], logs[2:4], atol=1e-5
  )
  np.testing.assert_allclose(result.state.record.signals[4, ROOT], 0, atol=1e-5)


def test_the_threshold_sets_the_band():
  logs = logs_of({ROOT: [0, 0] + [0.5] * 4, M: [0, 0] + [-0.5] * 4})
  for threshold, moved in ((0.0, 1), (0.49, 1), (0.51, 0), (9.0, 0)):
    widths = run(build(threshold=threshold), logs).widths
    assert sum(_steps_of(widths, ROOT)) == moved
    assert sum(_steps_of(widths, M)) == -moved
    _others_stay(widths, ROOT, M)


@pytest.mark.parametrize("patience", [1, 2, 3, 5])
def test_patience_counts_epochs_in_a_row(patience):
  n = patience
  high = [0.3] * n
  # Just too few, then a break, or a swing to the other side; then enough.
  for gap in ([0.0], [-0.3]):
    logs = logs_of({ROOT: [0, 0] + [0.3] * (n - 1) + gap * (n > 1) + high})
    steps = _steps_of(run(build(patience=n), logs).widths, ROOT)
    assert steps == [0] * (len(logs) - 1) + [1]


def test_a_swing_is_the_first_vote_of_the_other_side():
  logs = logs_of({ROOT: [0, 0, 0.3, -0.3, -0.3]})
  steps = _steps_of(run(build(), logs).widths, ROOT)
  assert steps == [0, 0, 0, 0, -1]


@pytest.mark.parametrize("warmup", [1, 2, 5])
def test_the_reference_is_taken_at_the_end_of_the_warm_up(warmup):
  rng = np.random.default_rng(0)
  logs = rng.normal(0, 5, (12, 6))
  logs[warmup - 1 :] = logs[warmup - 1]
  logs[warmup:, ROOT] += 0.3
  widths = run(build(warmup=warmup), logs).widths
  assert _steps_of(widths, ROOT) == [0] * (warmup + 1) + [1] + [0] * (
    10 - warmup
  )
  _others_stay(widths, ROOT)


def test_without_rebase_a_lasting_change_goes_to_the_bound():
  logs = logs_of({ROOT: [0, 0] + [0.3] * 10, M: [0, 0] + [-0.3] * 10})
  rebased = run(build(), logs).widths
  assert rebased[-1, [ROOT, M]].tolist() == [7, 4]
  widths = run(build(rebase=False), logs).widths
  # From 6 to 8, from 5 to 3, a bit for each two epochs; then no further.
  assert widths[:, ROOT].tolist() == [6, 6, 6, 7, 7, 8, 8, 8, 8, 8, 8, 8]
  assert widths[:, M].tolist() == [5, 5, 5, 4, 4, 3, 3, 3, 3, 3, 3, 3]
  assert len(build().moves(run(build(rebase=False), logs).state)) == 4


def test_with_rebase_each_further_change_moves_once_more():
  levels = np.repeat([0.0, 0.3, 0.6, 0.3], [2, 4, 4, 4])
  widths = run(build(), logs_of({BLOCK: levels})).widths
  assert _steps_of(widths, BLOCK) == [0] * 3 + [1] + [0] * 3 + [1] + [0] * 3 + [
    -1,
    0,
    0,
  ]


def test_the_median_takes_out_what_all_layers_share():
  factor = np.repeat([0.0, np.log(10), -5.0], [4, 4, 4])[:, None]
  widths = run(build(threshold=1e-3), np.zeros((12, 6)) + factor).widths
  assert np.all(widths == FIRST)
  # One layer that does not follow is the one that moves.
  logs = np.zeros((12, 6)) + factor
  logs[:, ROOT] = 0.0
  widths = run(build(), logs).widths
  assert _steps_of(widths, ROOT)[4:] == [0, -1, 0, 0, 0, 1, 0, 0]
  _others_stay(widths, ROOT)


@pytest.mark.parametrize(
  ("step", "epoch"), [(8, 3), (9, 4), (11, 4), (12, 5), (0, 1), (10**6, None)]
)
def test_the_epoch_of_a_jump_changes_no_count(step, epoch):
  # Layer ROOT: one vote, an epoch without, two votes; M: a swing in it.
  logs = logs_of(
    {ROOT: [0, 0, 0.3, 0.3, 0.3, 0.3, 0, 0], M: [0, 0, -0.3, 0.9, -0.3, 0, 0]}
  )
  result = run(build(skip_steps=[step]), logs)
  expected = {
    3: ([0, 0, 0, 0, 1, 0, 0, -1], [0] * 8),
    4: ([0, 0, 0, 0, 1, 0, 0, -1], [0, 0, 0, 0, -1, 0, 1, 0]),
    5: ([0, 0, 0, 1, 0, 0, 0, -1], [0] * 8),
  }.get(epoch, ([0, 0, 0, 1, 0, 0, 0, -1], [0] * 8))
  assert _steps_of(result.widths, ROOT) == expected[0]
  assert _steps_of(result.widths, M) == expected[1]
  if epoch:
    assert np.all(np.isnan(result.state.record.signals[epoch - 1]))


def test_a_jump_at_the_end_of_the_warm_up_puts_the_reference_off():
  logs = logs_of({ROOT: [0, 9, 0, 0, 0, 0], M: [0, 0, -0.3, 0, 0, 0]})
  widths = run(build(skip_steps=[3]), logs).widths
  assert _steps_of(widths, M) == [0, 0, 0, 0, 1, 0]
  _others_stay(widths, M)


def test_freeze_ends_all_moves():
  # From 3 to 8, at the ends of the epochs 4, 6, 8, 10, 12 of 31.
  logs = logs_of({3: [0, 0] + [0.3] * 20})
  for freeze, expected in (
    (None, [4, 6, 8, 10, 12]),
    (12 / 31, [4, 6, 8, 10, 12]),
    (11.9 / 31, [4, 6, 8, 10]),
    (4 / 31, [4]),
    (0.1, []),
  ):
    widths = run(build(rebase=False, freeze=freeze), logs).widths
    assert (np.flatnonzero(_steps_of(widths, 3)) + 1).tolist() == expected
  settings = build(freeze=0.57, steps=100).init(CAPACITIES).settings
  assert int(settings.last_step) == 57
  assert int(build(freeze=1.0).init(CAPACITIES).settings.last_step) == 93


def test_noisy_down_is_the_reverse():
  logs = logs_of({ROOT: [0, 0] + [0.3] * 4, M: [0, 0] + [-0.3] * 4})
  result = run(build(direction="noisy_down"), logs)
  assert _steps_of(result.widths, ROOT) == [0, 0, 0, -1, 0, 0]
  assert _steps_of(result.widths, M) == [0, 0, 0, 1, 0, 0]
  reasons = {m.path: m.reason for m in build().moves(result.state)}
  assert reasons == {"": "noisy", "m": "stable"}


def test_the_signal_variance_is_read_instead():
  schedule = build(signal="variance")
  update = jax.jit(schedule.update)
  state = schedule.init(CAPACITIES)
  rng = np.random.default_rng(0)
  for epoch in range(1, 5):
    variances = np.ones(6) + (epoch > 2) * np.eye(6)[ROOT]
    ratios = jnp.asarray(np.exp(rng.normal(0, 5, 6)), jnp.float32)
    statistics = epochs.synthetic(ratios, variances)
    _, state = update(
      state, step=jnp.int32(PERIOD * epoch), statistics=statistics
    )
  assert state.bits.tolist() == [FIRST[0] + 1, *FIRST[1:]]
  np.testing.assert_allclose(
    state.record.signals[3], np.log(2) * np.eye(6)[ROOT], atol=1e-6
  )


def _moved_operands(**options):
  """Widths of the root layer at the first and the last step."""
  logs = logs_of({ROOT: [0, 0] + [0.3] * 4})
  result = run(build(**options), logs)
  root = result.bits[""]
  return [(int(w[0]), int(w[-1])) for w in root], result.state


def test_operands_that_are_set_do_not_move():
  assert _moved_operands()[0] == [(6, 7), (6, 7), (8, 8)]
  assert _moved_operands(weights=6)[0] == [(6, 6), (6, 7), (8, 8)]
  assert _moved_operands(activations=32)[0] == [(6, 7), (32, 32), (8, 8)]
  assert _moved_operands(gradients=5)[0] == [(6, 7), (6, 7), (5, 5)]
  assert _moved_operands(gradients=None)[0] == [(6, 7), (6, 7), (6, 7)]
  both, state = _moved_operands(weights=4, activations=5)
  assert both == [(4, 4), (5, 5), (8, 8)]
  # B_k has moved and no width has: nothing to tell.
  assert build().moves(state) == []
  (move,) = build().moves(_moved_operands(weights=6)[1])
  assert (move.old, move.new) == ([6, 6, 8], [6, 7, 8])


def test_products_keep_b_max_and_have_no_part_in_the_median():
  logs = np.random.default_rng(0).normal(0, 2, (20, 6))
  result = run(build(), logs)
  assert not np.all(result.widths == FIRST)
  for path in ("qk", "blocks/qk"):
    for width in result.bits[path]:
      assert width.shape == (epochs.STEPS, *np.shape(CAPACITIES[path]))
      assert np.all(width == 8)


def test_stacked_layers_move_one_by_one():
  logs = logs_of({1: [0, 0] + [-0.3] * 4, 3: [0, 0, 0] + [0.3] * 3})
  result = run(build(), logs)
  weights = result.bits["blocks"].weights
  ends = weights[PERIOD * np.arange(1, 7)]
  expected = [[8, 6, 3]] * 3 + [[7, 6, 3]] + [[7, 6, 4]] * 2
  assert ends.tolist() == expected
  first, second = build().moves(result.state)
  assert first.path == second.path == "blocks"
  assert first.reason == "stable (0)"
  assert second.reason == "noisy (2)"
  assert first.old == [[8, 6, 3], [8, 6, 3], [8, 8, 8]]
  assert first.new == second.old == [[7, 6, 3], [7, 6, 3], [8, 8, 8]]
  np.testing.assert_allclose(first.signal, [-0.3, 0, 0.3], atol=1e-6)


@pytest.mark.parametrize("unknown", [np.nan, np.inf, -np.inf])
def test_what_is_not_known_moves_nothing_and_takes_no_part(unknown):
  # ROOT is lost for an epoch, and its count starts anew.
  logs = logs_of({ROOT: [0, 0, 0.3, unknown, 0.3, 0.3, 0], M: [0] * 7})
  with np.errstate(over="ignore"):
    result = run(build(), logs)
  # A ratio of 0 is known, and very stable.
  expected = [0, 0, 0, 0, 0, 1, 0]
  assert _steps_of(result.widths, ROOT) == expected
  _others_stay(result.widths, ROOT)
  # Nothing is known of any layer.
  result = run(build(), np.full((8, 6), np.nan))
  assert np.all(result.widths == FIRST)
  assert np.all(np.isnan(result.state.reference))


def test_no_count_no_decision():
  schedule = build(patience=1)
  update = jax.jit(schedule.update)
  state = schedule.init(CAPACITIES)
  for epoch, count in enumerate((9, 9, 1, 0, 1), 1):
    ratios = jnp.ones(6).at[ROOT].set(50.0 * (epoch > 2) + 1)
    statistics = epochs.synthetic(ratios, count=jnp.int32(count))
    _, state = update(state, step=jnp.int32(PERIOD * epoch),
                      statistics=statistics)  # fmt: skip
  assert state.bits.tolist() == FIRST
  assert np.all(np.isnan(state.record.signals[2:]))


def test_a_signal_that_is_lost_in_the_noise_is_not_known():
  logs = np.zeros((6, 6))
  logs[2:, [ROOT, M]] = 0.5, -0.5
  for signal, moved in (("noise_to_signal", 0), ("variance", 1)):
    schedule = build(signal=signal)
    update = jax.jit(schedule.update)
    state = schedule.init(CAPACITIES)
    for epoch, log in enumerate(logs, 1):
      ratios = jnp.asarray(np.exp(log), jnp.float32)
      statistics = epochs.synthetic(
        ratios, ratios, is_resolved=jnp.arange(6) != ROOT
      )
      _, state = update(
        state, step=jnp.int32(PERIOD * epoch), statistics=statistics
      )
    assert int(state.bits[ROOT]) == FIRST[ROOT] + moved
    assert int(state.bits[M]) == FIRST[M] - 1


def test_a_layer_that_is_known_later_starts_at_the_median():
  # All layers have risen by 5 when the first is seen, and rise by 1 more.
  logs = np.repeat([0.0, 5.0, 6.0], [2, 4, 4])[:, None] + np.zeros((10, 6))
  logs[:5, ROOT] = np.nan
  result = run(build(), logs)
  assert np.all(result.widths == FIRST)
  np.testing.assert_allclose(result.state.record.signals[5:10, 1:], 0)
  np.testing.assert_allclose(result.state.record.signals[6:10, ROOT], 0)


def test_decisions_happen_at_the_ends_of_epochs_only():
  # `run` gives wild ratios between them.
  logs = np.random.default_rng(1).normal(0, 1, (30, 6))
  result = run(build(), logs)
  for path in CAPACITIES:
    for width in result.bits[path]:
      changed = np.flatnonzero(np.any(np.atleast_2d(np.diff(width, axis=0).T),
                                      axis=0)) + 1  # fmt: skip
      assert np.all(changed % PERIOD == 0)
  widths = np.concatenate(
    [result.bits[""].weights[:, None], result.bits["blocks"].weights,
     result.bits["m"].weights[:, None], result.bits["z/conv"].weights[:, None]],
    axis=1,
  )  # fmt: skip
  ends = widths[PERIOD * np.arange(1, 31)]
  np.testing.assert_array_equal(ends, result.widths)
  assert len(np.unique(result.widths, axis=0)) > 5


def test_a_ratio_of_0_is_as_stable_as_can_be():
  logs = logs_of({ROOT: [0, 0] + [-np.inf] * 3})
  result = run(build(), logs)
  assert _steps_of(result.widths, ROOT) == [0, 0, 0, -1, 0]
  assert np.all(np.isfinite(result.state.record.signals[2:5]))
  assert adaptive.adaptive is schedules.adaptive
