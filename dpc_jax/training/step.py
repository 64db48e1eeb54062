"""One step of training and one of evaluation: plain functions, no jit, no I/O.

The widths come from the schedule inside the step, so that one compiled program
serves every bit setting of a run and every host has the same bits.
"""

from collections.abc import Callable

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dpc_jax.cost import bitops
from dpc_jax.policy import schedules
from dpc_jax.quant import precision
from dpc_jax.training import state as state_lib

Batch = dict[str, jax.Array]
# prepare(images, key) -> model input; key None in evaluation.
Prepare = Callable[[jax.Array, jax.Array | None], jax.Array]

RNG_STREAMS = ("augment", "dropout", "quant")


@flax.struct.dataclass
class Metrics:
  """Masked sums over examples; divide once, at the end.

  Attributes:
    loss: float32 () sum of the cross-entropies, in nats.
    correct: float32 () number of right answers.
    count: float32 () number of examples.
  """

  loss: jax.Array
  correct: jax.Array
  count: jax.Array


def classification_metrics(
  logits: jax.Array, labels: jax.Array, mask: jax.Array
) -> Metrics:
  """Sums over a batch: logits (N, classes), labels and mask (N,)."""
  logits = logits.astype(jnp.float32)
  mask = mask.astype(jnp.float32)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  correct = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
  # where, not a product: a padded row may hold anything, NaN included.
  return Metrics(
    loss=jnp.sum(jnp.where(mask > 0, losses, 0)),
    correct=jnp.sum(correct * mask),
    count=jnp.sum(mask),
  )


def make_train_step(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  schedule: schedules.Schedule,
  prepare: Prepare,
) -> Callable[
  [state_lib.TrainState, Batch], tuple[state_lib.TrainState, Metrics]
]:
  """Returns `train_step(state, batch) -> (state, metrics)`.

  A batch holds `image` (N, H, W, C) uint8 and `label` (N,) int32. The loss is
  the mean cross-entropy over the whole batch, on all devices together. Noise
  is a function of `state.rng`, the step, and an element's place in the global
  batch.

  Raises:
    ValueError: from `train_step`, with `state.rng` None and quantized layers,
      unless the model's attribute `quantization` rounds all to nearest.
  """
  # A model that does not say how it quantizes may round stochastically.
  quantization = getattr(model, "quantization", None)
  may_be_random = quantization is None or quantization.is_stochastic

  def train_step(state, batch):
    rngs = _rngs(state, may_be_random)
    bits, schedule_state = schedule.update(
      state.schedule_state, step=state.step, statistics=None
    )
    model_state = state.model_state
    if bits:
      model_state = precision.assign_bits(model_state, bits)
    images = prepare(batch["image"], rngs.get("augment"))

    def loss_fn(params):
      logits, updates = model.apply(
        {"params": params, **model_state},
        images,
        train=True,
        mutable=[name for name in model_state if name != "precision"],
        rngs={name: rngs[name] for name in rngs if name != "augment"},
      )
      mask = jnp.ones(batch["label"].shape, jnp.float32)
      metrics = classification_metrics(logits, batch["label"], mask)
      return metrics.loss / metrics.count, (metrics, updates)

    grads, (metrics, updates) = jax.grad(loss_fn, has_aux=True)(state.params)
    param_updates, opt_state = optimizer.update(
      grads, state.opt_state, state.params
    )
    new_state = state.replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, param_updates),
      model_state={**model_state, **updates},
      opt_state=opt_state,
      schedule_state=schedule_state,
      cost=bitops.accumulate(state.cost, bits),
    )
    return new_state, metrics

  return train_step


def make_eval_step(
  model: nn.Module, prepare: Prepare
) -> Callable[[state_lib.TrainState, Batch], Metrics]:
  """Returns `eval_step(state, batch) -> metrics`, exact by the batch's mask.

  A batch holds `mask` (N,) too: 1 for an example, 0 for a row of padding.
  """

  def eval_step(state, batch):
    images = prepare(batch["image"], None)
    mask = batch["mask"].reshape((-1,) + (1,) * (images.ndim - 1))
    logits = model.apply(
      {"params": state.params, **state.model_state},
      # One range of activations serves all rows: padding must not be in it.
      jnp.where(mask > 0, images, 0),
      train=False,
      mutable=False,
    )
    return classification_metrics(logits, batch["label"], batch["mask"])

  return eval_step


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
