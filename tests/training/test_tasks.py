"""Tasks inside the steps: masks, resets, the carry of a recurrent model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpc_jax import models
from dpc_jax.policy import schedules
from dpc_jax.training import state as state_lib
from dpc_jax.training import step as step_lib
from dpc_jax.training import tasks

WORDS = 11
ROWS, UNROLL = 3, 5


def make(**sizes):
  """(model, task, init, train_step, eval_step) of a float LSTM of width 4."""
  model = models.create(
    "lstm_lm",
    num_classes=WORDS,
    quantization=None,
    **{"width": 4, "layers": 1, "dropout": 0.0} | sizes,
  )
  task = tasks.language_model(model.initial_carry)
  optimizer, schedule = optax.sgd(0.5), schedules.constant({})
  carry = jax.eval_shape(lambda: task.initial_carry(ROWS))
  sample = jax.ShapeDtypeStruct((1, UNROLL), jnp.int32)
  return (
    model,
    task,
    state_lib.make_init(model, optimizer, schedule, sample, carry),
    jax.jit(step_lib.make_train_step(model, optimizer, schedule, task)),
    jax.jit(step_lib.make_eval_step(model, task)),
  )


def batch(step, reset=False):
  rng = np.random.default_rng(step)
  stream = rng.integers(0, WORDS, (ROWS, UNROLL + 1), np.int32)
  return {
    "tokens": jnp.asarray(stream[:, :-1]),
    "targets": jnp.asarray(stream[:, 1:]),
    "mask": jnp.ones((ROWS, UNROLL), jnp.float32),
    "reset": jnp.full((ROWS,), reset),
  }


def nll(model, params, batches, carry):
  """Written out: log-probabilities of one long unroll, picked by hand."""
  tokens, targets = (
    jnp.concatenate([b[name] for b in batches], axis=1)
    for name in ("tokens", "targets")
  )
  log_p, carry = model.apply({"params": params}, tokens, carry=carry)
  picked = np.take_along_axis(
    np.asarray(log_p), np.asarray(targets)[..., None], axis=-1
  )
  return -picked[..., 0], carry


def test_the_carry_goes_from_step_to_step_until_a_reset():
  model, task, init, train_step, _ = make()
  state = init(jax.random.key(0))
  zero = task.initial_carry(ROWS)
  for x in jax.tree.leaves(state.carry):
    assert x.shape[0] == ROWS and not np.any(x)
  contract = jax.tree.map(lambda x: (x.shape, x.dtype), state)
  for step, reset in enumerate([True, False, True]):
    before = state
    start = zero if reset else before.carry
    losses, carry = nll(model, before.params, [batch(step)], start)
    state, metrics = train_step(before, batch(step, reset))
    np.testing.assert_allclose(metrics.loss, losses.sum(), rtol=1e-5)
    assert metrics.count == ROWS * UNROLL and metrics.correct is None
    for a, b in zip(
      jax.tree.leaves(state.carry), jax.tree.leaves(carry), strict=True
    ):
      np.testing.assert_allclose(a, b, atol=1e-6)
      assert np.any(a)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == contract


def test_evaluation_carries_on_and_leaves_the_state_of_training_alone():
  model, task, init, train_step, eval_step = make()
  state, _ = train_step(init(jax.random.key(0)), batch(9, reset=True))
  batches = [batch(1, reset=True), batch(2), batch(3)]
  carry = jax.tree.map(lambda x: x + 7.0, task.initial_carry(ROWS))
  total = 0
  for one in batches:
    metrics, carry = eval_step(state, one, carry)
    total += float(metrics.loss)
  losses, _ = nll(model, state.params, batches, None)
  assert total == pytest.approx(losses.sum(), rel=1e-5)
  # Without the reset the carry that came in would count.
  metrics, _ = eval_step(
    state, batch(1), jax.tree.map(lambda x: x + 7.0, task.initial_carry(ROWS))
  )
  assert float(metrics.loss) != pytest.approx(losses[:, :UNROLL].sum())


def test_masked_tokens_count_for_nothing():
  task = tasks.language_model()
  losses = jnp.array([[1.0, 2.0], [jnp.nan, 4.0]])
  mask = jnp.array([[1.0, 1.0], [0.0, 1.0]])
  metrics, carry = task.outputs(losses, {"mask": mask})
  assert (metrics.loss, metrics.count, carry) == (7.0, 3.0, ())


def test_the_loss_is_the_mean_over_the_tokens_that_count():
  """The gradient of a half-masked batch is that of the other half."""
  _, _, init, train_step, _ = make()
  state = init(jax.random.key(0))
  half = batch(0, reset=True)
  half["mask"] = half["mask"].at[:, 3:].set(0.0)
  wrong = dict(half)
  wrong["targets"] = half["targets"].at[:, 3:].set(0)
  one, metrics = train_step(state, half)
  two, _ = train_step(state, wrong)
  assert metrics.count == ROWS * 3
  for a, b in zip(
    jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_a_broken_carry_is_seen():
  _, _, init, _, _ = make()
  state = init(jax.random.key(0))
  assert state_lib.is_finite(state)
  carry = jax.tree.map(lambda x: x * jnp.nan, state.carry)
  assert not state_lib.is_finite(state.replace(carry=carry))
