"""One step of training and one of evaluation: plain functions, no jit, no I/O.

The widths come from the schedule inside the step, so that one compiled program
serves every bit setting of a run and every host has the same bits.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dpc_jax.cost import bitops
from dpc_jax.policy import schedules
from dpc_jax.quant import delayed, precision
from dpc_jax.quant import remat as remat_lib
from dpc_jax.training import state as state_lib
from dpc_jax.training import tasks

Gather = Callable[[Any], Any]
RNG_STREAMS = ("augment", "dropout", "quant")


def make_train_step(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  schedule: schedules.Schedule,
  task: tasks.Task,
  gather: Gather | None = None,
  remat: str | None = None,
) -> Callable[
  [state_lib.TrainState, tasks.Batch],
  tuple[state_lib.TrainState, tasks.Metrics],
]:
  """Returns `train_step(state, batch) -> (state, metrics)`.

  The task says what a batch holds. The loss is the mean cross-entropy over the
  whole batch, on all devices together; where it or its gradient is not finite,
  the update is left out (see `state.keep_if_finite`). Noise is a function of
  `state.rng`, the step, and an element's place in the global batch.

  Args:
    model: of the task.
    optimizer: of its parameters.
    schedule: of its widths.
    task: what a batch holds, and what the loss is.
    gather: parameters as the optimizer holds them -> as the products take
      them; see `sharding.make_gather`.
    remat: what the backward pass computes anew, one of `quant.remat.POLICIES`;
      None keeps all.

  Raises:
    ValueError: from `train_step`, with `state.rng` None and quantized layers,
      unless the model's attribute `quantization` rounds all to nearest.
  """
  may_be_random = _may_be_random(model)
  differentiate = _differentiate
  if remat is not None:
    differentiate = _with_remat(differentiate, remat)

  def train_step(state, batch):
    rngs = _rngs(state, may_be_random)
    bits, schedule_state = state_lib.update_schedule(schedule, state)
    model_state = state.model_state
    if bits:
      model_state = precision.assign_bits(model_state, bits)
    grads, (metrics, carry, updates) = differentiate(
      model, task, gather, state, model_state, batch, rngs
    )
    deltas, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new_state = state.replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, deltas),
      model_state={**model_state, **updates},
      opt_state=opt_state,
      schedule_state=schedule_state,
      cost=bitops.accumulate(state.cost, bits),
      carry=carry,
      loss=metrics.loss / metrics.count,
    )
    return state_lib.keep_if_finite(state, new_state, grads, metrics)

  return train_step


def make_train_steps(
  train_step: Callable[
    [state_lib.TrainState, tasks.Batch],
    tuple[state_lib.TrainState, tasks.Metrics],
  ],
) -> Callable[
  [state_lib.TrainState, tasks.Batch, jax.Array],
  tuple[state_lib.TrainState, tasks.Metrics],
]:
  """Returns `train_steps(state, batches, count) -> (state, metrics)`.

  The same as `count` calls of `train_step`, one after the other, in a loop that
  is one program: `batches` has a leading axis of at least `count` batches, and
  so have the metrics, zero from `count` on. `count` is data, an int32 (), so
  that one program serves a shorter stretch, too, and rounds alike in it.

  Args:
    train_step: of `make_train_step`; its result has the state's structure.
  """

  def train_steps(state, batches, count):
    def batch(i):
      return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batches
      )

    def one(i, carried):
      state, held = carried
      state, metrics = train_step(state, batch(i))
      held = jax.tree.map(lambda all_, x: all_.at[i].set(x), held, metrics)
      return state, held

    size = jax.tree.leaves(batches)[0].shape[0]
    _, metrics = jax.eval_shape(train_step, state, batch(0))
    held = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), metrics)
    return jax.lax.fori_loop(0, count, one, (state, held))

  return train_steps


def make_eval_step(
  model: nn.Module,
  task: tasks.Task,
  schedule: schedules.Schedule | None = None,
  gather: Gather | None = None,
) -> Callable[..., tuple[tasks.Metrics, Any]]:
  """Returns `eval_step(state, batch, carry) -> (metrics, carry)`.

  Exact by the batch's mask. `carry` is the recurrent state of the evaluation,
  apart from that of training; () for a model without any, the default. The
  widths are those of the last step, or what `schedule.evaluation` says.
  """

  def eval_step(state, batch, carry=()):
    model_state = state.model_state
    if schedule is not None and schedule.evaluation is not None:
      model_state = precision.assign_bits(
        model_state, schedule.evaluation(state.schedule_state)
      )
    args, kwargs = task.inputs(batch, carry, None)
    output = model.apply(
      {"params": _gathered(state.params, gather), **model_state},
      *args,
      **kwargs,
      train=False,
      mutable=False,
    )
    return task.outputs(output, batch)

  return eval_step


def _with_remat(differentiate, policy):
  def wrapped(*args):
    with remat_lib.norms(remat_lib.POLICIES[policy]):
      return differentiate(*args)

  return wrapped


def _differentiate(model, task, gather, state, model_state, batch, rngs):
  """(gradients, (metrics, carry, updated collections)) of a batch."""
  rngs = dict(rngs)
  augment = rngs.pop("augment", None)
  args, kwargs = task.inputs(batch, state.carry, augment)
  kwargs = {**kwargs, "train": True, "rngs": rngs}
  variables = {"params": state.params, **model_state}
  probes = delayed.probes(model, variables, *args, **kwargs)

  def loss_fn(params, probes):
    output, updates = model.apply(
      {"params": _gathered(params, gather), **model_state, **probes},
      *args,
      **kwargs,
      mutable=[n for n in (*model_state, *probes) if n != "precision"],
    )
    metrics, carry = task.outputs(output, batch)
    return metrics.loss / metrics.count, (metrics, carry, updates)

  gradient = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)
  (grads, ranges), aux = gradient(state.params, probes)
  metrics, carry, updates = aux
  return grads, (metrics, carry, delayed.settle(updates, ranges))


def _gathered(params, gather):
  return params if gather is None else gather(params)


def _may_be_random(model: nn.Module) -> bool:
  """False for a model that says that it rounds all to nearest."""
  quantization = getattr(model, "quantization", None)
  return quantization is None or quantization.is_stochastic


def _rngs(
  state: state_lib.TrainState, may_be_random: bool
) -> dict[str, jax.Array]:
  """{stream: key of this step}; empty without `state.rng`."""
  if state.rng is None:
    if may_be_random and "precision" in state.model_state:
      raise ValueError(
        "state.rng = None: stochastic rounding needs the RNG stream 'quant';"
        " set a key, or give the model an attribute `quantization` that rounds"
        " to nearest"
      )
    return {}
  key = jax.random.fold_in(state.rng, state.step)
  return {
    name: jax.random.fold_in(key, i) for i, name in enumerate(RNG_STREAMS)
  }
