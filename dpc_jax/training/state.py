"""The train state: all that a run needs to go on, and nothing else."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpc_jax.cost import bitops
from dpc_jax.policy import capacity, schedules, statistics
from dpc_jax.quant import grids, precision
from dpc_jax.training import tasks

# Fields that checkpoints of older programs lack; they start as in a new run.
ADDED = ("skips",)


class Skips(NamedTuple):
  """Steps whose update was left out, as a loss or gradient was not finite.

  Attributes:
    total: int32 (), of the whole run.
    in_row: int32 (), up to the last step done; 0 if that one was taken.
    leaf: int32 (), whose gradient it was in the latest of them: n for the n-th
      leaf of `params`, the first of those; 0 if the loss itself was not finite,
      or before any.
  """

  total: Any = np.int32(0)
  in_row: Any = np.int32(0)
  leaf: Any = np.int32(0)


@flax.struct.dataclass
class TrainState:
  """A pytree of arrays of fixed structure, shapes and dtypes.

  Attributes:
    step: int32, the number of steps done.
    params: master weights, float32.
    model_state: every other collection, merged after each step, never
      replaced: `batch_stats`, `precision`, `quant_stats`.
    opt_state: of the optax transformation.
    schedule_state: of the bit schedule.
    cost: exact sums of products of bit-widths so far.
    rng: PRNG key of the run; a step folds its number into it. None only where
      nothing random is in the model.
    carry: a recurrent model's state after the last batch, arrays with a leading
      axis of the batch; () for other models.
    loss: float32 (), the mean over the last batch; NaN before the first.
    skips: counts of the steps whose update was left out.
  """

  step: jax.Array
  params: Any
  model_state: dict[str, Any]
  opt_state: Any
  schedule_state: Any
  cost: bitops.RunCost
  rng: jax.Array | None
  carry: Any = ()
  loss: Any = np.float32(math.nan)
  skips: Skips = Skips()


def schedule_inputs(
  schedule: schedules.Schedule, opt_state: Any, loss: Any
) -> dict[str, Any]:
  """What `schedule.update` needs besides the step; see `Schedule.needs`.

  Raises:
    ValueError: a need that training does not serve, or statistics that the
      optimizer does not track.
  """
  serve = {
    "statistics": lambda: statistics.gradient_statistics(opt_state),
    "loss": lambda: jnp.float32(loss),
  }
  for name in schedule.needs:
    if name not in serve:
      raise ValueError(
        f"schedule.needs: {name!r} is not one of {', '.join(serve)}"
      )
  return {name: serve[name]() for name in schedule.needs}


def update_schedule(
  schedule: schedules.Schedule, state: TrainState
) -> tuple[dict[str, grids.LayerBits], Any]:
  """(the widths of the state's next step, the schedule's state after it)."""
  inputs = schedule_inputs(schedule, state.opt_state, state.loss)
  return schedule.update(state.schedule_state, step=state.step, **inputs)


def make_init(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  schedule: schedules.Schedule,
  sample: jax.ShapeDtypeStruct,
  carry: Any = (),
) -> Callable[[jax.Array], TrainState]:
  """Returns `init(key) -> TrainState`, pure: eval_shape, shard, then jit it.

  The widths of step 0 are already assigned. A model without the collection
  `precision` gets an empty schedule.

  Args:
    model: takes `sample`; its variables are those of `model.init`.
    optimizer: of `params`.
    schedule: of the widths of all layers in `precision`.
    sample: shape and dtype of the input.
    carry: shapes and dtypes of the recurrent state, which starts at zero.
  """

  def init_model(key):
    return model.init(key, jnp.zeros(sample.shape, sample.dtype))

  abstract = jax.eval_shape(init_model, jax.random.key(0))
  capacities = quantized_capacities(abstract)

  def init(key: jax.Array) -> TrainState:
    init_key, run_key = jax.random.split(key)
    variables = init_model(init_key)
    opt_state = optimizer.init(variables["params"])
    schedule_state = schedule.init(capacities)
    inputs = schedule_inputs(schedule, opt_state, math.nan)
    bits, _ = schedule.update(schedule_state, step=jnp.int32(0), **inputs)
    if bits:
      variables = precision.assign_bits(variables, bits)
    model_state = {k: v for k, v in variables.items() if k != "params"}
    return TrainState(
      step=jnp.int32(0),
      params=variables["params"],
      model_state=model_state,
      opt_state=opt_state,
      schedule_state=schedule_state,
      cost=bitops.init_run_cost(bits),
      rng=run_key,
      carry=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), carry),
      loss=jnp.float32(math.nan),
      skips=jax.tree.map(jnp.asarray, Skips()),
    )

  return init


def keep_if_finite(
  old: TrainState, new: TrainState, grads: Any, metrics: tasks.Metrics
) -> tuple[TrainState, tasks.Metrics]:
  """Takes a step, or skips its update if loss or gradient is not finite.

  A gradient counts as not finite where its sum of squares is not, above a norm
  of about 1.8e19. A skipped step (our decision) leaves params, model_state,
  opt_state, carry and loss as they were. What does not depend on the batch goes
  on: the step and with it the noise, the schedule, the widths that it set, and
  the cost, which was spent. So the optimizer's own count, and a learning rate
  that follows it, lags a step behind, its jumps too. Its metrics are zero and
  leave sums as they are.

  Args:
    old: before the step.
    new: after it.
    grads: of `params`, as they came from the batch.
    metrics: of the batch.

  Returns:
    (state, metrics), of the structure of `new` and `metrics`.
  """
  leaves = jax.tree.leaves(grads)
  # Of the squares: an optimizer squares them, too, and could not undo an inf.
  finite = jnp.stack(
    [jnp.isfinite(jnp.sum(jnp.square(g.astype(jnp.float32)))) for g in leaves]
  )
  # Else XLA repeats the "and" over all leaves in the select of each: half of
  # the time to compile ResNet-20, and more with depth.
  finite = jax.lax.optimization_barrier(finite)
  loss_is_finite = jnp.isfinite(new.loss)
  taken = loss_is_finite & jnp.all(finite)

  def select(new_tree, old_tree):
    return jax.tree.map(lambda n, o: jnp.where(taken, n, o), new_tree, old_tree)

  model_state = select(new.model_state, old.model_state)
  if "precision" in new.model_state:
    model_state["precision"] = new.model_state["precision"]
  leaf = jnp.where(loss_is_finite, 1 + jnp.argmin(finite), 0)
  skips = Skips(
    total=old.skips.total + ~taken,
    in_row=jnp.where(taken, 0, old.skips.in_row + 1),
    leaf=jnp.where(taken, old.skips.leaf, leaf),
  )
  state = new.replace(
    params=select(new.params, old.params),
    model_state=model_state,
    opt_state=select(new.opt_state, old.opt_state),
    carry=select(new.carry, old.carry),
    loss=jnp.where(taken, new.loss, old.loss),
    skips=jax.tree.map(lambda x: x.astype(jnp.int32), skips),
  )
  return state, jax.tree.map(lambda x: jnp.where(taken, x, 0), metrics)


def layer_bits(state: TrainState) -> dict[str, grids.LayerBits]:
  """Widths of the last step done, at step 0 of the first; {} if all float."""
  if "precision" not in state.model_state:
    return {}
  return precision.layer_bits(state.model_state)


def is_finite(state: TrainState) -> jax.Array:
  """Whether all floats in the state are finite, a bool (); jit-able."""
  leaves = jax.tree.leaves(
    (state.params, state.model_state, state.opt_state, state.carry)
  )
  checks = [
    jnp.all(jnp.isfinite(x))
    for x in leaves
    if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  return jnp.all(jnp.array(checks))


def quantized_capacities(variables: Any) -> dict[str, Any]:
  """{path: N_k} of the quantized layers; empty for a float model."""
  if "precision" not in variables:
    return {}
  return capacity.layer_capacities(variables)
