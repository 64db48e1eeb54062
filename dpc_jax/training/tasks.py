"""Tasks: what goes into a model, and what its output is worth.

A task is a few pure functions of arrays, called inside the compiled steps:
image classification, or language modeling with or without a recurrent state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax

Batch = dict[str, jax.Array]
# prepare(images, key) -> model input; key None in evaluation.
Prepare = Callable[[jax.Array, jax.Array | None], jax.Array]


@flax.struct.dataclass
class Metrics:
  """Masked sums over examples (images or tokens); divide once, at the end.

  Attributes:
    loss: float32 () sum of the cross-entropies, in nats.
    count: float32 () number of examples.
    correct: float32 () number of right answers; None where only the targets'
      likelihoods are computed.
  """

  loss: jax.Array
  count: jax.Array
  correct: jax.Array | None = None


class Task(NamedTuple):
  """What the two steps know of the data and the model's interface.

  Attributes:
    metric: "accuracy" (higher is better) or "perplexity" (lower).
    unit: what is counted, "images" or "tokens".
    inputs: (batch, carry, key) -> (args, kwargs) of the model's call; key is
      None in evaluation.
    outputs: (model output, batch) -> (Metrics, carry).
    initial_carry: rows of a batch -> the recurrent state before the first
      token, arrays with a leading axis of that size; () if there is none.
  """

  metric: str
  unit: str
  inputs: Callable[[Batch, Any, jax.Array | None], tuple[tuple, dict]]
  outputs: Callable[[Any, Batch], tuple[Metrics, Any]]
  initial_carry: Callable[[int], Any]


def classification(prepare: Prepare) -> Task:
  """Images in, classes out.

  A batch holds `image` (N, H, W, C) uint8 and `label` (N,) int32, and where
  rows may be padding `mask` (N,): 1 for an example, 0 for a row of padding.

  Args:
    prepare: augmentation, with a key, and normalization.
  """

  def inputs(batch, carry, key):
    del carry
    images = prepare(batch["image"], key)
    if "mask" in batch:
      # One range of activations serves all rows: padding must not be in it.
      mask = batch["mask"].reshape((-1,) + (1,) * (images.ndim - 1))
      images = jnp.where(mask > 0, images, 0)
    return (images,), {}

  def outputs(logits, batch):
    mask = batch.get("mask", jnp.ones(batch["label"].shape, jnp.float32))
    return classification_metrics(logits, batch["label"], mask), ()

  return Task("accuracy", "images", inputs, outputs, lambda rows: ())


def language_model(
  initial_carry: Callable[[int], Any] | None = None,
) -> Task:
  """Tokens in, the next token's negative log-likelihood out.

  A batch holds `tokens`, `targets` (N, T) int32, `mask` (N, T), and `reset`
  (N,) bool: where a row's recurrent state starts anew.

  Args:
    initial_carry: rows -> zero state of a recurrent model, which is then called
      with `carry=` and returns (negative log-likelihoods, carry); None for a
      model that returns the former alone.
  """
  is_recurrent = initial_carry is not None

  def inputs(batch, carry, key):
    del key
    arguments = (batch["tokens"], batch["targets"])
    if not is_recurrent:
      return arguments, {}
    reset = batch["reset"]
    carry = jax.tree.map(
      lambda x: jnp.where(reset.reshape((-1,) + (1,) * (x.ndim - 1)), 0, x),
      carry,
    )
    return arguments, {"carry": carry}

  def outputs(output, batch):
    losses, carry = output if is_recurrent else (output, ())
    mask = batch["mask"]
    # where, not a product: a padded place may hold anything, NaN included.
    loss = jnp.sum(jnp.where(mask > 0, losses.astype(jnp.float32), 0))
    # What is carried on is data for the next step.
    carry = jax.lax.stop_gradient(carry)
    return Metrics(loss=loss, count=jnp.sum(mask)), carry

  return Task(
    "perplexity",
    "tokens",
    inputs,
    outputs,
    initial_carry if is_recurrent else lambda rows: (),
  )


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
    count=jnp.sum(mask),
    correct=jnp.sum(correct * mask),
  )
