"""What a schedule is given of the state, and what the state begins with."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpc_jax as dpc
from dpc_jax.policy import schedules
from dpc_jax.training import state as state_lib
from tests.training import tiny

SAMPLE = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)


def make_init(schedule, *transformations):
  optimizer = optax.chain(*transformations, optax.sgd(0.1))
  return state_lib.make_init(tiny.Tiny(10), optimizer, schedule, SAMPLE)


def adaptive():
  return schedules.adaptive(3, 8, steps=9, steps_per_epoch=3)


@pytest.fixture(scope="module")
def state():
  """Of adaptive bits, before the first step."""
  tracker = dpc.track_gradient_statistics()
  return jax.jit(make_init(adaptive(), tracker))(jax.random.key(0))


def test_a_need_that_training_does_not_serve():
  schedule = schedules.constant(8)._replace(needs=("loss", "epoch"))
  with pytest.raises(ValueError) as caught:
    jax.eval_shape(make_init(schedule), jax.random.key(0))
  assert str(caught.value) == (
    "schedule.needs: 'epoch' is not one of statistics, loss"
  )


def test_adaptive_bits_need_a_tracker():
  with pytest.raises(ValueError, match="put track_gradient_statistics first"):
    jax.eval_shape(make_init(adaptive()), jax.random.key(0))


def test_of_a_tracker_that_cannot_tell_noise():
  tracker = dpc.track_gradient_statistics(memory="norm")
  with pytest.raises(ValueError, match="'norm'; use 'full' or 'sketch'"):
    jax.eval_shape(make_init(adaptive(), tracker), jax.random.key(0))


def test_needs_are_served_out_of_the_state(state):
  schedule = schedules.constant(8)._replace(needs=("loss", "statistics"))
  inputs = state_lib.schedule_inputs(schedule, state.opt_state, 0.25)
  assert list(inputs) == ["loss", "statistics"]
  assert inputs["loss"] == 0.25
  assert inputs["loss"].dtype == jnp.float32
  # Every kernel is tracked, where it is not said which.
  assert inputs["statistics"].keys() == {"first", "second", "classifier"}
  assert state_lib.schedule_inputs(schedules.constant(8), (), 0.25) == {}


def test_the_first_loss_is_not_known_and_that_is_no_divergence(state):
  assert state.loss.dtype == jnp.float32
  assert np.isnan(state.loss)
  assert state_lib.is_finite(state)


def test_the_next_widths():
  """Those of a step that is yet to come, without taking it."""
  state = jax.jit(make_init(tiny.cyclic()))(jax.random.key(0))
  state = state.replace(
    step=jnp.int32(3), schedule_state=state.schedule_state | {"count": 3}
  )
  bits, after = state_lib.update_schedule(tiny.cyclic(), state)
  widths = {path: [int(b) for b in layer] for path, layer in bits.items()}
  assert widths == tiny.cyclic_bits(3)
  assert after["count"] == 4
  assert state_lib.layer_bits(state)["first"].weights == 2
