"""Runs of adaptive DPC on made-up statistics, and its rule in plain Python."""

import math
import statistics as python_statistics
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from dpc_jax.policy import adaptive, statistics

CAPACITIES = {
  "z/conv": 20,
  "": 100,
  "m": 300,
  "blocks": np.array([20, 100, 1000]),
  "qk": 0,
  "blocks/qk": np.zeros(3, np.int64),
}
# B_k of Eq. 1 between 3 and 8, of "", blocks 0..2, m, z/conv.
FIRST = [6, 8, 6, 3, 5, 8]
MACS = {"": 7, "blocks": 11, "m": 5, "z/conv": 3, "qk": 1000, "blocks/qk": 9}
LAYERS = len(FIRST)
EPOCHS, PERIOD = 30, 3
STEPS = PERIOD * (EPOCHS + 1)


def build(b_min=3, b_max=8, **options):
  options = {"steps": STEPS, "steps_per_epoch": PERIOD} | options
  return adaptive.adaptive(b_min, b_max, **options)


def synthetic(ratios, variances=1.0, count=9, is_resolved=None):
  """Statistics of the layers with weights; ratios (LAYERS,), float32."""
  variances = jnp.broadcast_to(jnp.float32(variances), (LAYERS,))

  def one(where):
    return statistics.GradientStatistics(
      norm=jnp.ones_like(ratios[where]),
      variance=variances[where],
      noise_to_signal=ratios[where],
      count=jnp.int32(count),
      skipped=jnp.int32(0),
      is_resolved=None if is_resolved is None else is_resolved[where],
    )

  return {"": one(0), "blocks": one(slice(1, 4)), "m": one(4), "z/conv": one(5)}


UPDATE = build().update


@jax.jit
def _scan(state, ratios):
  def one(state, inputs):
    step, ratio = inputs
    bits, state = UPDATE(state, step=step, statistics=synthetic(ratio))
    return state, bits

  return jax.lax.scan(one, state, (jnp.arange(STEPS), ratios))


def at_steps(logs, seed=0):
  """ln R at epoch ends (epochs, LAYERS) as ratios at steps (STEPS, LAYERS).

  Other steps have ratios that would move everything; epochs that are not given
  are not known.
  """
  rng = np.random.default_rng(seed)
  steps = np.exp(rng.normal(0, 9, (STEPS, LAYERS)))
  steps[PERIOD::PERIOD] = np.nan
  # Within float32, whose ratios of infinity are not known.
  logs = np.where(np.isfinite(logs), np.clip(logs, -80, 80), logs)
  steps[PERIOD : PERIOD * (len(logs) + 1) : PERIOD] = np.exp(logs)
  return steps.astype(np.float32)


def run(schedule, logs, capacities=CAPACITIES):
  """What happens: .state at the end, .bits of each step, .widths of epochs."""
  state, bits = jax.device_get(
    _scan(schedule.init(capacities), at_steps(np.asarray(logs)))
  )
  return SimpleNamespace(
    state=state, bits=bits, widths=state.record.widths[: len(logs)]
  )


def logs_of(layers, epochs=None):
  """(epochs, LAYERS) of {layer: [ln R]}; the others stay at 0."""
  epochs = epochs or max(len(values) for values in layers.values())
  logs = np.zeros((epochs, LAYERS))
  for layer, values in layers.items():
    logs[: len(values), layer] = values
  return logs


def walks(seed, count=30, step=0.3):
  """ln R of layers that drift, together and each by itself; some are lost."""
  rng = np.random.default_rng(seed)
  logs = np.cumsum(rng.normal(0, step, (count, LAYERS)), axis=0)
  logs += np.cumsum(rng.normal(0, 1, (count, 1)), axis=0)
  logs[rng.random(logs.shape) < 0.03] = np.nan
  return logs


def oracle(logs, **options):
  """The rule, written out: [(bits, z, reasons)] of the epochs."""
  rule = SimpleNamespace(
    **{
      "low": 3,
      "high": 8,
      "warmup": 2,
      "patience": 2,
      "threshold": 0.25,
      "last_epoch": math.inf,
      "rebase": True,
      "sign": 1,
      "budget": math.inf,
      "skipped": (),
      **options,
    }
  )
  bits, votes = list(FIRST), [0] * LAYERS
  reference = [math.nan] * LAYERS
  rows = []
  for epoch, log in enumerate(np.asarray(logs).tolist(), 1):
    if epoch < rule.warmup or epoch in rule.skipped:
      rows.append((list(bits), [math.nan] * LAYERS, [""] * LAYERS))
      continue
    change = [x - r for x, r in zip(log, reference, strict=True)]
    known = [d for d in change if not math.isnan(d)]
    median = python_statistics.median(known) if known else 0.0
    z = [d - median for d in change]
    wanted, voted = list(bits), set()
    for k in range(LAYERS):
      if math.isnan(reference[k]):
        reference[k] = log[k] - median
      way = (z[k] > rule.threshold) - (z[k] < -rule.threshold)
      votes[k] = votes[k] + way if way and way * votes[k] >= 0 else way
      if abs(votes[k]) >= rule.patience and epoch <= rule.last_epoch:
        voted.add(k)
        turned = bits[k] + rule.sign * way
        wanted[k] = min(max(turned, rule.low), rule.high)
    granted, given = give(bits, wanted, z, rule)
    reasons = [""] * LAYERS
    for k in range(LAYERS):
      new = granted[k]
      if given[k]:
        reasons[k] = "over budget"
      elif new != bits[k]:
        reasons[k] = "noisy" if votes[k] > 0 else "stable"
        reference[k] += z[k] if rule.rebase else 0.0
      if k in voted or given[k]:
        votes[k] = 0
      bits[k] = new
    rows.append((list(bits), z, reasons))
  return rows


def give(bits, wanted, z, rule):
  """(what is granted, whether each gave a bit) within the budget."""
  wanted, given = list(wanted), [0] * LAYERS
  order = [
    (0.0 if math.isnan(x) else rule.sign * x, k) for k, x in enumerate(z)
  ]
  idle = [k for k in range(LAYERS) if wanted[k] == bits[k] > rule.low]
  while True:
    new = [w - g for w, g in zip(wanted, given, strict=True)]
    gainers = [k for k in range(LAYERS) if wanted[k] > bits[k]]
    if relative_cost(new, rule.high) <= rule.budget or not gainers:
      return new, given
    payers = [k for k in idle if not given[k]]
    if payers:
      given[min(payers, key=order.__getitem__)] = 1
    else:
      wanted[min(gainers, key=order.__getitem__)] -= 1
      given = [0] * LAYERS


def relative_cost(bits, high=8):
  """Of a step, of the layers with weights, gradients at 8."""
  macs = [MACS[""], *[MACS["blocks"]] * 3, MACS["m"], MACS["z/conv"]]
  cost = sum(m * (b * b + 16 * b) for m, b in zip(macs, bits, strict=True))
  return cost / (sum(macs) * (high * high + 16 * high))
