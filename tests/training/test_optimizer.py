"""Learning rates at their corners, and SGD as PyTorch writes it."""

import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.training import optimizer
from tests.training import tiny


def rates(at, **changes):
  config = tiny.make_config(
    **{"steps": 100, "optimizer.learning_rate": 0.4}
    | {f"optimizer.{k}": v for k, v in changes.items()}
  )
  schedule = optimizer.learning_rate(config)
  return [float(schedule(step)) for step in at]


def test_constant():
  assert rates([0, 99], schedule="constant") == pytest.approx([0.4, 0.4])


def test_warm_up_rises_from_zero_to_the_peak():
  got = rates([0, 5, 10, 11], schedule="constant", warmup=0.1)
  assert got == pytest.approx([0, 0.2, 0.4, 0.4])


@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_cosine_ends_at_zero_after_the_last_step(warmup):
  start = round(100 * warmup)
  middle = (start + 100) // 2
  got = rates([start, middle, 99, 100], schedule="cosine", warmup=warmup)
  assert got[0] == pytest.approx(0.4)
  assert got[1] == pytest.approx(0.2)
  assert 0 < got[2] < 4e-4
  assert got[3] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_steps_take_a_tenth_at_the_boundaries(warmup):
  got = rates([20, 49, 50, 74, 75, 99], schedule="steps", warmup=warmup)
  assert got == pytest.approx([0.4, 0.4, 0.04, 0.04, 0.004, 0.004])


def test_the_recipe_of_cpt():
  """64,000 steps: 0.1, and a tenth at 32k and at 48k."""
  config = tiny.make_config(steps=64_000, **{"optimizer.schedule": "steps"})
  schedule = optimizer.learning_rate(config)
  got = [float(schedule(s)) for s in (0, 31_999, 32_000, 47_999, 48_000)]
  assert got == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])


def test_sgd_is_that_of_pytorch():
  """d = g + decay * p; v = momentum * v + d; p = p - rate * v."""
  config = tiny.make_config(
    steps=100,
    **{
      "optimizer.schedule": "constant",
      "optimizer.learning_rate": 0.1,
      "optimizer.momentum": 0.9,
      "optimizer.weight_decay": 0.01,
    },
  )
  transform = optimizer.make_optimizer(config)
  rng = np.random.default_rng(0)
  p = rng.normal(size=5)
  v = np.zeros(5)
  params = {"kernel": jnp.asarray(p, jnp.float32)}
  state = transform.init(params)
  for _ in range(3):
    g = rng.normal(size=5)
    d = g + 0.01 * p
    v = 0.9 * v + d
    p = p - 0.1 * v
    updates, state = transform.update(
      {"kernel": jnp.asarray(g, jnp.float32)}, state, params
    )
    params = {"kernel": params["kernel"] + updates["kernel"]}
    np.testing.assert_allclose(params["kernel"], p, rtol=1e-5, atol=1e-7)


def test_adamw_decouples_its_decay():
  config = tiny.make_config(
    steps=100,
    **{
      "optimizer.name": "adamw",
      "optimizer.schedule": "constant",
      "optimizer.learning_rate": 0.1,
      "optimizer.weight_decay": 0.5,
    },
  )
  transform = optimizer.make_optimizer(config)
  params = {"kernel": jnp.array([2.0, -1.0])}
  gradient = {"kernel": jnp.array([3.0, 1e-3])}
  updates, _ = transform.update(gradient, transform.init(params), params)
  # The first step of Adam is the sign of the gradient.
  want = -0.1 * (np.array([1, 1]) + 0.5 * np.array([2.0, -1.0]))
  np.testing.assert_allclose(updates["kernel"], want, rtol=1e-4)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_whole_gradient_is_clipped_by_its_norm(name):
  def update(scale, **changes):
    config = tiny.make_config(
      steps=100,
      **{
        "optimizer.name": name,
        "optimizer.schedule": "constant",
        "optimizer.weight_decay": 0.0,
      }
      | changes,
    )
    transform = optimizer.make_optimizer(config)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    state = transform.init(params)
    total = params
    # Adam forgets the scale of one gradient, not that of a sequence.
    for factor in (scale, 1.0):
      gradient = {
        "a": factor * jnp.array([3.0, 0.0]),
        "b": factor * jnp.array([4.0]),
      }
      updates, state = transform.update(gradient, state, params)
      total = {k: total[k] + updates[k] for k in total}
    return np.concatenate([total["a"], total["b"]])

  clip = {"optimizer.clip": 5.0}
  np.testing.assert_allclose(update(1.0, **clip), update(1.0), rtol=1e-6)
  np.testing.assert_allclose(update(9.0, **clip), update(1.0), rtol=1e-5)
  assert not np.allclose(update(9.0), update(1.0), rtol=1e-3)


def test_nesterov_looks_ahead():
  """p = p - rate * (g + momentum * v), v as before."""
  changes = {
    "optimizer.schedule": "constant",
    "optimizer.weight_decay": 0.0,
    "optimizer.nesterov": True,
  }
  config = tiny.make_config(steps=100, **changes)
  transform = optimizer.make_optimizer(config)
  params = {"kernel": jnp.ones(1)}
  updates, _ = transform.update(params, transform.init(params), params)
  np.testing.assert_allclose(updates["kernel"], [-0.1 * 1.9], rtol=1e-6)
