"""The two steps: the state's contract, the bits inside, exact evaluation."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpc_jax as dpc
from dpc_jax.cost import bitops
from dpc_jax.policy import schedules
from dpc_jax.quant import grids
from dpc_jax.training import state as state_lib
from dpc_jax.training import step as step_lib
from dpc_jax.training import tasks
from tests.training import tiny

SAMPLE = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
ROUNDED_TO_NEAREST = grids.Quantization(gradients=grids.Grid())
STOCHASTIC = grids.Quantization(
  gradients=grids.Grid(rounding="stochastic"),
)


def prepare(images, key):
  del key
  return images.astype(jnp.float32) / 255


TASK = tasks.classification(prepare)


def make(quantization=STOCHASTIC, schedule=None, model=None):
  model = tiny.Tiny(10, quantization) if model is None else model
  schedule = tiny.cyclic() if schedule is None else schedule
  optimizer = optax.sgd(0.1, momentum=0.9)
  init = state_lib.make_init(model, optimizer, schedule, SAMPLE)
  return (
    init,
    step_lib.make_train_step(model, optimizer, schedule, TASK),
    step_lib.make_eval_step(model, TASK),
  )


def make_batch(n=16, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "image": jnp.asarray(rng.integers(0, 256, (n, 8, 8, 1), np.uint8)),
    "label": jnp.asarray(rng.integers(0, 10, n, np.int32)),
  }


def contract(state):
  # A key has no weak type.
  return jax.tree.map(
    lambda x: (x.shape, x.dtype, getattr(x, "weak_type", None), x.sharding),
    state,
  )


@pytest.mark.parametrize("quantization", [None, STOCHASTIC])
@pytest.mark.parametrize("is_jitted", [False, True])
def test_state_keeps_its_structure(quantization, is_jitted):
  schedule = schedules.constant({}) if quantization is None else None
  init, train_step, _ = make(quantization, schedule)
  state = init(jax.random.key(0))
  before = contract(state)
  if is_jitted:
    train_step = jax.jit(train_step)
  for _ in range(2):
    state, metrics = train_step(state, make_batch())
  after = contract(state)
  assert jax.tree.structure(before) == jax.tree.structure(after)
  assert before == after
  assert state.step == 2
  assert metrics.count == 16


def test_donation_does_not_warn():
  init, train_step, _ = make()
  state = jax.jit(init)(jax.random.key(0))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    new, _ = jax.jit(train_step, donate_argnums=0)(state, make_batch())
  assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
  assert not any(x.is_deleted() for x in jax.tree.leaves(new))


def test_one_trace_and_the_bits_of_the_schedule():
  init, train_step, _ = make()
  traces = []

  @jax.jit
  def counted(state, batch):
    traces.append(None)
    return train_step(state, batch)

  state = init(jax.random.key(0))
  costs = dpc.layer_costs(tiny.Tiny(10), SAMPLE)
  total = 0
  for step in range(10):
    state, _ = counted(state, make_batch(seed=step))
    bits = {
      path: [int(width) for width in layer]
      for path, layer in dpc.layer_bits(state.model_state).items()
    }
    assert bits == tiny.cyclic_bits(step)
    widths = {path: grids.LayerBits(*layer) for path, layer in bits.items()}
    total += dpc.bitops(costs, widths, samples=16).total
  assert len(traces) == 1
  run = bitops.run_bitops(costs, state.cost, steps=10, batch_size=16)
  assert run.total == total


def test_widths_change_what_is_computed():
  """Bits in the state are the bits of the products."""
  kernels = []
  for width in (2, 32):
    init, train_step, _ = make(schedule=schedules.constant(width))
    state = jax.jit(init)(jax.random.key(0))
    new, _ = jax.jit(train_step)(state, make_batch())
    kernels.append(new.params["second"]["kernel"])
  assert not np.array_equal(*kernels)


def test_collections_are_merged():
  """apply returns what was named; the rest has to survive."""
  init, train_step, _ = make()
  state = init(jax.random.key(0))
  new, _ = train_step(state, make_batch())
  assert set(new.model_state) == {"batch_stats", "precision", "quant_stats"}
  stats = new.model_state["quant_stats"]["first"]
  assert jax.tree.leaves(stats)
  changed = [
    not np.array_equal(a, b)
    for name in ("batch_stats", "quant_stats")
    for a, b in zip(
      jax.tree.leaves(state.model_state[name]),
      jax.tree.leaves(new.model_state[name]),
      strict=True,
    )
  ]
  assert all(changed[:2])
  assert any(changed[2:])


def test_a_model_without_other_collections():
  class Plain(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      return nn.Dense(10, name="dense")(x.reshape(len(x), -1))

  init, train_step, eval_step = make(
    model=Plain(), schedule=schedules.constant({})
  )
  state, _ = train_step(init(jax.random.key(0)), make_batch())
  assert state.model_state == {}
  mask = jnp.ones(16, jnp.float32)
  metrics, _ = eval_step(state, make_batch() | {"mask": mask})
  assert metrics.count == 16


def test_stochastic_gradients_need_a_key():
  init, train_step, _ = make(STOCHASTIC)
  state = init(jax.random.key(0)).replace(rng=None)
  with pytest.raises(ValueError, match=r"state\.rng = None.*'quant'"):
    train_step(state, make_batch())


def test_a_wrapped_model_needs_a_key_too():
  model = dpc.quantize(tiny.Tiny(10, None), STOCHASTIC)
  init, train_step, _ = make(model=model, schedule=schedules.constant(4))
  state = init(jax.random.key(0)).replace(rng=None)
  with pytest.raises(ValueError, match=r"state\.rng = None"):
    train_step(state, make_batch())


def test_no_key_is_needed_to_round_to_nearest():
  init, train_step, _ = make(ROUNDED_TO_NEAREST)
  state = init(jax.random.key(0)).replace(rng=None)
  new, _ = train_step(state, make_batch())
  assert new.rng is None


def test_noise_differs_from_step_to_step_and_not_from_call_to_call():
  init, train_step, _ = make(schedule=schedules.constant(3))
  step = jax.jit(train_step)
  state = init(jax.random.key(0))
  kernels = [
    step(s, make_batch())[0].params["first"]["kernel"]
    for s in (state, state, state.replace(step=state.step + 1))
  ]
  assert np.array_equal(kernels[0], kernels[1])
  assert not np.array_equal(kernels[0], kernels[2])


def test_loss_is_the_mean_cross_entropy():
  """The gradient too: a step of SGD, written out for the classifier's bias."""
  init, train_step, _ = make(None, schedules.constant({}))
  state = init(jax.random.key(0))
  batch = make_batch()
  model = tiny.Tiny(10, None)
  logits, _ = model.apply(
    {"params": state.params, **state.model_state},
    prepare(batch["image"], None),
    train=True,
    mutable=["batch_stats"],
  )
  logits = np.asarray(logits, np.float64)
  softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  labels = np.asarray(batch["label"])
  right = softmax[np.arange(16), labels]
  new, metrics = train_step(state, batch)
  np.testing.assert_allclose(metrics.loss, -np.log(right).sum(), rtol=1e-5)
  assert metrics.correct == (logits.argmax(-1) == labels).sum()
  gradient = (softmax - np.eye(10)[labels]).mean(0)
  np.testing.assert_allclose(
    new.params["classifier"]["bias"], -0.1 * gradient, atol=1e-6
  )


@pytest.mark.parametrize("filling", [0, np.nan])
def test_evaluation_is_exact_for_any_batch_size(filling):
  init, train_step, _ = make()
  state, _ = train_step(init(jax.random.key(0)), make_batch())

  def take(images, key):
    del key
    return images

  eval_step = jax.jit(
    step_lib.make_eval_step(
      tiny.Tiny(10, STOCHASTIC), tasks.classification(take)
    )
  )
  rng = np.random.default_rng(3)
  images = rng.random((23, 8, 8, 1), np.float32)
  labels = rng.integers(0, 10, 23, np.int32)

  def evaluate(size):
    sums = np.zeros(3)
    for start in range(0, 23, size):
      rows = slice(start, min(start + size, 23))
      missing = size - (rows.stop - rows.start)
      padding = np.full((missing, 8, 8, 1), filling, np.float32)
      metrics, _ = eval_step(
        state,
        {
          "image": jnp.asarray(np.concatenate([images[rows], padding])),
          "label": jnp.asarray(np.pad(labels[rows], (0, missing))),
          "mask": jnp.asarray(
            np.pad(np.ones(len(labels[rows]), np.float32), (0, missing))
          ),
        },
      )
      sums += [metrics.loss, metrics.correct, metrics.count]
    return sums

  whole = evaluate(23)
  assert whole[2] == 23
  assert np.isfinite(whole).all()
  for size in (1, 8, 64):
    loss, correct, count = evaluate(size)
    np.testing.assert_allclose(loss, whole[0], rtol=1e-6)
    assert (correct, count) == (whole[1], 23)


def test_is_finite_looks_at_all_floats():
  init, _, _ = make()
  state = init(jax.random.key(0))
  assert state_lib.is_finite(state)
  params = jax.tree.map(lambda x: x, state.params)
  params["norm"]["scale"] = params["norm"]["scale"].at[1].set(jnp.inf)
  assert not state_lib.is_finite(state.replace(params=params))
  momentum = jax.tree.map(lambda x: x * jnp.nan, state.opt_state)
  assert not state_lib.is_finite(state.replace(opt_state=momentum))


class Plain(nn.Module):
  """A user's model: quantized layers, and no word on how they quantize."""

  @nn.compact
  def __call__(self, x, train=False):
    return dpc.QuantDense(10, name="head")(x.reshape((len(x), -1)))


def test_a_model_that_does_not_say_needs_a_key():
  init, train_step, _ = make(model=Plain(), schedule=schedules.constant(4))
  state = init(jax.random.key(0))
  train_step(state, make_batch())
  with pytest.raises(ValueError, match=r"state\.rng = None: stochastic"):
    train_step(state.replace(rng=None), make_batch())


def listening(steps):
  """A schedule that keeps the losses that it is told."""

  def init(capacities):
    bits = {path: grids.LayerBits(4, 4, 8) for path in capacities}
    return {
      "bits": jax.tree.map(jnp.int32, bits),
      "losses": jnp.zeros(steps, jnp.float32),
    }

  def update(state, *, step, statistics=None, loss):
    del statistics
    losses = state["losses"].at[step].set(loss)
    return state["bits"], state | {"losses": losses}

  return schedules.Schedule(init, update, needs=("loss",), moves=list)


def test_a_schedule_hears_the_loss_of_the_step_before():
  init, train_step, _ = make(schedule=listening(4))
  step = jax.jit(train_step)
  state = init(jax.random.key(0))
  means = []
  for i in range(4):
    state, metrics = step(state, make_batch(seed=i))
    means.append(float(metrics.loss / metrics.count))
    assert state.loss == means[-1]
  heard = np.asarray(state.schedule_state["losses"])
  assert np.isnan(heard[0])
  np.testing.assert_array_equal(heard[1:], means[:-1])
  assert len(set(means)) == 4
