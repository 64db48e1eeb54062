"""The optimizer of a config: optax, nothing of our own."""

import ml_collections
import optax


def learning_rate(config: ml_collections.ConfigDict) -> optax.Schedule:
  """Linear warm-up to the peak, then constant, cosine to 0, or x0.1 steps.

  Args:
    config: `optimizer.*` and `steps`, the length of the run.
  """
  optimizer = config.optimizer
  peak, steps = optimizer.learning_rate, config.steps
  warmup = round(optimizer.warmup * steps)
  if optimizer.schedule == "cosine":
    after = optax.cosine_decay_schedule(peak, max(1, steps - warmup))
  elif optimizer.schedule == "steps":
    after = optax.piecewise_constant_schedule(
      peak, {round(b * steps) - warmup: 0.1 for b in optimizer.boundaries}
    )
  else:
    after = optax.constant_schedule(peak)
  if warmup == 0:
    return after
  rise = optax.linear_schedule(0.0, peak, warmup)
  return optax.join_schedules([rise, after], [warmup])


def jumps(config: ml_collections.ConfigDict) -> tuple[int, ...]:
  """The steps at which the learning rate jumps; none of a smooth schedule."""
  optimizer = config.optimizer
  if optimizer.schedule != "steps":
    return ()
  return tuple(round(b * config.steps) for b in optimizer.boundaries)


def make_optimizer(
  config: ml_collections.ConfigDict,
) -> optax.GradientTransformation:
  """SGD with momentum and L2 decay as PyTorch's, or AdamW.

  Gradients are clipped first, by their global norm, where `clip` is set.
  """
  optimizer = config.optimizer
  rate = learning_rate(config)
  if optimizer.name == "adamw":
    update = optax.adamw(rate, weight_decay=optimizer.weight_decay)
  else:
    update = optax.chain(
      optax.add_decayed_weights(optimizer.weight_decay),
      optax.sgd(
        rate,
        momentum=optimizer.momentum or None,
        nesterov=optimizer.nesterov,
      ),
    )
  if optimizer.clip is None:
    return update
  return optax.chain(optax.clip_by_global_norm(optimizer.clip), update)
