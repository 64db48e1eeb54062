"""Gradient statistics across steps: norm, variance, noise-to-signal ratio.

With the weights w_i of an exponential moving average over the steps so far,
which sum to 1, g_i the gradient of a layer's kernel at step i, m = sum w_i g_i
and c = sum w_i^2 (after n steps of decay b, (1-b)/(1+b) * (1+b^n)/(1-b^n)):

    variance        = (sum w_i ||g_i||^2 - ||m||^2) / (1 - c)
    signal^2        = max(||m||^2 - c * variance, tiny * c * variance)
    noise_to_signal = variance / signal^2

If the g_i are independent with mean mu and E||g_i - mu||^2 = V, then variance
estimates V and signal^2 estimates ||mu||^2, both without bias. Without the two
corrections the ratio saturates at 1/c - 1 (198 at decay 0.99), which is where
the layers of real networks are. The corrections are our decision, and so is
tiny = 0.01: a signal that small beside the noise left in ||m||^2 cannot be told
from 0, and noise_to_signal ends at 100/c.

The g_i of a network in training are not independent for long. Over an epoch
||m||^2 falls below c * variance: momentum swings back, and the batches of an
epoch, drawn without replacement, cancel each other's noise. So a long average
finds no signal in any layer. A short one (decay 0.5) does, but from a handful
of steps; `average` then takes the mean of what it finds over many of them.

What is kept of m, the `memory`: "full" is all of it, 4 bytes for each weight of
the tracked kernels (ResNet-110: 6.9 MB). "sketch" is 1,024 sums with fixed
random signs, 4 KiB a layer; ||m||^2 is then estimated with a relative standard
error of at most sqrt(2/1024) = 4.4 %, and exactly for kernels of up to 1,024
weights. "norm" is nothing: variance and noise_to_signal are NaN.
"""

import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpc_jax.policy import kernels as kernels_lib
from dpc_jax.policy import sketch

MEMORIES = ("full", "sketch", "norm")

# Relative to c * variance; and of float32, where all is 0.
_TINY = 0.01
_SMALLEST = float(np.finfo(np.float32).tiny)
# With room for round-off below inf, which a moving average keeps for good.
_LARGEST = 1e38


class GradientStatistics(NamedTuple):
  """Statistics of one layer; shape (), or (layers,) of a stacked one.

  Attributes:
    norm: sqrt(E||g||^2), float32.
    variance: E||g - E g||^2, the sum over the kernel's entries of their
      variances across steps, float32 >= 0; 0 while count < 2.
    noise_to_signal: variance / ||E g||^2, float32 >= 0; very large where the
      mean gradient is lost in the noise.
    count: int32 (), the steps taken in; 0: nothing is known yet, all are 0.
    skipped: int32 (), the steps left out because a gradient was not finite.
    is_resolved: bool, whether the signal is more than the noise that is left
      in it; where not, noise_to_signal is at its end, a bound and no estimate.
    within_variance: E of the variance of the entries of g about their own
      mean, float32 >= 0; None unless it is tracked.
  """

  norm: Any
  variance: Any
  noise_to_signal: Any
  count: Any
  skipped: Any = None
  is_resolved: Any = None
  within_variance: Any = None


class GradientStatisticsState(NamedTuple):
  """Running sums; one structure from `init` on.

  Attributes:
    count: int32 (), steps taken in.
    skipped: int32 (), steps left out.
    weight: float32 (), sum of the weights before they are normalized.
    weight_square: float32 (), sum of their squares.
    square: {path: float32 () or (layers,)}, weighted sum of ||g||^2.
    mean: {path: float32}, weighted sum of g: the kernel's shape ("full"),
      (1024,) or (layers, 1024) ("sketch"); {} ("norm").
    mean_square: {path: float32 () or (layers,)}, ||mean||^2; {} ("norm").
    within: {path: float32 () or (layers,)}, weighted sum of the variance
      within g; {} unless it is tracked.
    averaged: {path: float32 (3,) or (layers, 3)}, weighted sums of the squared
      norm, the variance and the squared signal; {} without `average`.
    averaged_weight: float32 (), the sum of their weights.
  """

  count: jax.Array
  skipped: jax.Array
  weight: jax.Array
  weight_square: jax.Array
  square: dict[str, jax.Array]
  mean: dict[str, jax.Array]
  mean_square: dict[str, jax.Array]
  within: dict[str, jax.Array]
  averaged: dict[str, jax.Array]
  averaged_weight: jax.Array


def track_gradient_statistics(
  decay: Any = 0.99,
  memory: str = "full",
  *,
  capacities: Mapping[str, Any] | None = None,
  within_tensor: bool = False,
  average: float | None = None,
) -> optax.GradientTransformation:
  """Tracks norm and variance of every kernel's gradient across steps.

  Updates pass through untouched. Put it first in `optax.chain`: it must see raw
  gradients (after Adam every layer has about the same norm, and clipping or
  weight decay mix in what is not noise). `gradient_statistics` reads it.

  Sums are float32 whatever the gradients are. A step with a gradient that is
  not finite, or whose squared norm exceeds 1e38, is counted as skipped and
  changes nothing else. With sharded gradients the statistics are those of the
  whole, the same on every device; inside `shard_map` average them first.

  Args:
    decay: of the moving average, in (0, 1); 1 - 1/n looks back on n steps. It
      may be injected, as optax does, with `hyperparam_dtype` float32.
    memory: "full", "sketch" or "norm", what is kept of the mean gradient; the
      module's docstring says what each costs and gives.
    capacities: the layers to track, {path: N_k} as `layer_capacities` gives
      them: what is stacked by `nn.scan` is told by an N_k of shape (layers,),
      and gets one statistic per layer. None: each leaf named `kernel` is one.
    within_tensor: whether to track the variance within a gradient as well.
    average: decay, in (0, 1), of a second moving average over what the first
      one finds at each step: of E||g||^2, of the variance, and of ||m||^2 -
      c * variance, before the ratio is taken. None: no second average.

  Returns:
    A transformation whose `init` raises ValueError where no kernel is tracked,
    or where a kernel does not have the stacked layers in front.

  Raises:
    ValueError: decay or average outside (0, 1), an unknown memory.
  """
  decay, average = _check(decay, "decay"), _check(average, "average")
  _check_memory(memory, average)

  def init(params: Any) -> GradientStatisticsState:
    return _init(
      kernels_lib.find(params, capacities), memory, within_tensor, average
    )

  def update(
    updates: Any, state: GradientStatisticsState, params: Any = None
  ) -> tuple[Any, GradientStatisticsState]:
    del params
    kernels = kernels_lib.find(updates, capacities)
    if kernels.keys() != state.square.keys():
      raise ValueError(
        f"updates: kernels at {sorted(kernels)}, but init saw"
        f" {sorted(state.square)}; pass gradients of the same parameters"
      )
    return updates, _advance(state, kernels, decay, memory, average)

  return optax.GradientTransformation(init, update)


def _check(decay: Any, name: str) -> Any:
  """A decay as a Python float, whose type gives way; None and arrays stay."""
  if not isinstance(decay, numbers.Real):
    return decay
  if not 0 < decay < 1:
    raise ValueError(
      f"{name} = {decay!r} must be in (0, 1), such as 1 - 1/steps_per_epoch"
    )
  return float(decay)


def _check_memory(memory: str, average: float | None) -> None:
  if memory not in MEMORIES:
    raise ValueError(f"memory = {memory!r}: use one of {', '.join(MEMORIES)}")
  if average is not None and memory == "norm":
    raise ValueError(
      f"average = {average!r}: memory = 'norm' has no variance to average"
    )


def _init(kernels, memory, within_tensor, average) -> GradientStatisticsState:
  if not kernels:
    raise ValueError(
      "params: no leaf named 'kernel' to track, at the paths of `capacities`"
      " where these are given"
    )

  def zeros(*end):
    # New ones at each call: a buffer that stands twice cannot be donated.
    return {
      path: jnp.zeros((*np.shape(kernel)[:lead], *end), jnp.float32)
      for path, (kernel, lead) in kernels.items()
    }

  mean = {}
  if memory == "sketch":
    mean = zeros(sketch.SIZE)
  elif memory == "full":
    # Like the kernel it is sharded like the kernel.
    mean = {
      path: jnp.zeros_like(kernel, jnp.float32)
      for path, (kernel, _) in kernels.items()
    }
  return GradientStatisticsState(
    count=jnp.int32(0),
    skipped=jnp.int32(0),
    weight=jnp.float32(0),
    weight_square=jnp.float32(0),
    square=zeros(),
    mean=mean,
    mean_square=zeros() if mean else {},
    within=zeros() if within_tensor else {},
    averaged={} if average is None else zeros(3),
    averaged_weight=jnp.float32(0),
  )


def _advance(state, kernels, decay, memory, average) -> GradientStatisticsState:
  """The state after one more gradient, {path: (g, stacked axes)}."""
  # Under inject_hyperparams they have the dtype of the parameters.
  decay, average = (
    x.astype(jnp.float32) if isinstance(x, jax.Array) else x
    for x in (decay, average)
  )
  kernels = {
    path: (jnp.asarray(g, jnp.float32), lead)
    for path, (g, lead) in kernels.items()
  }
  square = {path: _square(g, lead) for path, (g, lead) in kernels.items()}
  is_finite = jnp.all(
    jnp.stack([jnp.all(x <= _LARGEST) for x in square.values()])
  )

  def moving(old, new, decay=decay):
    return jnp.where(is_finite, decay * old + (1 - decay) * new, old)

  mean = {
    path: moving(
      old,
      kernels[path][0] if memory == "full" else sketch.sketch(*kernels[path]),
    )
    for path, old in state.mean.items()
  }
  weight_square = decay**2 * state.weight_square + (1 - decay) ** 2
  new = state._replace(
    count=state.count + is_finite,
    skipped=state.skipped + ~is_finite,
    weight=moving(state.weight, 1.0),
    weight_square=jnp.where(is_finite, weight_square, state.weight_square),
    square={p: moving(old, square[p]) for p, old in state.square.items()},
    mean=mean,
    mean_square={p: _square(m, kernels[p][1]) for p, m in mean.items()},
    within={
      p: moving(old, _within(*kernels[p])) for p, old in state.within.items()
    },
  )
  if average is None:
    return new
  # One step has no variance yet.
  is_known = is_finite & (new.count > 1)

  def averaged(old, found):
    return jnp.where(is_known, average * old + (1 - average) * found, old)

  return new._replace(
    averaged={
      path: averaged(old, jnp.stack(_moments(new, path), axis=-1))
      for path, old in state.averaged.items()
    },
    averaged_weight=averaged(state.averaged_weight, 1.0),
  )


def gradient_statistics(opt_state: Any) -> dict[str, GradientStatistics]:
  """The statistics of every tracked layer; jit-able.

  Args:
    opt_state: of an optax transformation with `track_gradient_statistics`
      anywhere in it: chained, masked, wrapped, or several for parts of the
      parameters.

  Returns:
    {path: GradientStatistics}; a path is the parent of a leaf named `kernel`,
    '/'-joined, the layer's path in `precision`.

  Raises:
    ValueError: there is no tracker, or two of them track one layer.
  """

  def is_tracker(node):
    return isinstance(node, GradientStatisticsState)

  result = {}
  for state in jax.tree.leaves(opt_state, is_leaf=is_tracker):
    if not is_tracker(state):
      continue
    for path in state.square:
      if path in result:
        raise ValueError(
          f"opt_state: two trackers for layer {path!r}; keep one"
        )
      result[path] = _statistics(state, path)
  if not result:
    raise ValueError(
      "opt_state: no gradient statistics in it; put"
      " track_gradient_statistics first in optax.chain"
    )
  return result


def _moments(state, path) -> tuple[jax.Array, jax.Array, jax.Array]:
  """E||g||^2, the variance, and ||m||^2 - c * variance, of either sign."""
  weight = jnp.where(state.count > 0, state.weight, 1.0)
  square = state.square[path] / weight
  mean_square = jnp.minimum(state.mean_square[path] / weight**2, _LARGEST)
  c = state.weight_square / weight**2
  # 1 - c is 0 up to round-off after one step, and where decay is near 0.
  spread = jnp.maximum(1 - c, 1e-6)
  variance = jnp.where(
    state.count > 1, jnp.maximum(square - mean_square, 0.0) / spread, 0.0
  )
  return square, variance, mean_square - c * variance


def _statistics(
  state: GradientStatisticsState, path: str
) -> GradientStatistics:
  weight = jnp.where(state.count > 0, state.weight, 1.0)
  if path in state.mean_square:
    square, variance, signal = _moments(state, path)
    if state.averaged:
      known = state.averaged_weight > 0
      sums = state.averaged[path] / jnp.where(known, state.averaged_weight, 1.0)
      square = jnp.where(known, sums[..., 0], square)
      variance, signal = sums[..., 1], sums[..., 2]
    least = _TINY * state.weight_square / weight**2 * variance
    ratio = variance / jnp.maximum(signal, least + _SMALLEST)
    is_resolved = signal > least
  else:
    square = state.square[path] / weight
    # Constants, so that a schedule sees at once that they are not tracked.
    variance = ratio = np.full(square.shape, np.nan, np.float32)
    is_resolved = None
  return GradientStatistics(
    norm=jnp.sqrt(square),
    variance=variance,
    noise_to_signal=ratio,
    count=state.count,
    skipped=state.skipped,
    is_resolved=is_resolved,
    within_variance=(
      state.within[path] / weight if path in state.within else None
    ),
  )


def _square(x: jax.Array, lead: int) -> jax.Array:
  """||x||^2 over all axes but the first `lead`."""
  return jnp.sum(x * x, axis=tuple(range(lead, x.ndim)))


def _within(x: jax.Array, lead: int) -> jax.Array:
  return jnp.var(x, axis=tuple(range(lead, x.ndim)))
