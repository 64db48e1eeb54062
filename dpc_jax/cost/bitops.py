"""BitOPs: what the products of a network cost at given bit-widths.

Per sample and layer with M multiply-accumulates in the forward pass and bits
w, a, g of its weights, activations and gradients (CPT's convention; CPT's own
formula b*b + 2*b*g is the case w = a = b):

    forward M*w*a    input gradient M*g*w    weight gradient M*g*a

An operand in float32 counts as 32 bits. Left out: biases, BatchNorm and other
normalization, activation functions, pooling, embedding look-ups, the loss, the
optimizer and the quantizer itself. The input gradient of the first layer is
counted although nothing needs it, as CPT does.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpc_jax.quant import grids

_FLOAT = grids.LayerBits(32, 32, 32)


class LayerCost(NamedTuple):
  """Size of one layer.

  Attributes:
    macs: multiply-accumulates of one forward pass of one sample.
    weights: number of weights (kernel only); 0 for a product without any.
    layers: how many equal layers share the path, stacked by `nn.scan`; `macs`
      and `weights` are those of one of them.
  """

  macs: int
  weights: int
  layers: int = 1


class LayerBitops(NamedTuple):
  """BitOPs of one path, all its stacked layers together.

  Attributes:
    forward: M*w*a.
    input_gradient: M*g*w.
    weight_gradient: M*g*a.
  """

  forward: int
  input_gradient: int
  weight_gradient: int

  @property
  def backward(self) -> int:
    """Both gradients."""
    return self.input_gradient + self.weight_gradient

  @property
  def total(self) -> int:
    """Forward and backward."""
    return sum(self)


class Bitops(NamedTuple):
  """BitOPs of a network; exact ints.

  Attributes:
    layers: {path: LayerBitops}, in the order of the costs.
    float_layers: paths without widths, counted at 32/32/32.
  """

  layers: dict[str, LayerBitops]
  float_layers: tuple[str, ...]

  @property
  def forward(self) -> int:
    """Of the forward pass."""
    return sum(layer.forward for layer in self.layers.values())

  @property
  def backward(self) -> int:
    """Of both gradients."""
    return sum(layer.backward for layer in self.layers.values())

  @property
  def total(self) -> int:
    """Forward and backward."""
    return self.forward + self.backward


def bitops(
  costs: Mapping[str, LayerCost],
  bits: int | grids.LayerBits | Mapping[str, int | grids.LayerBits] | None,
  *,
  samples: int = 1,
) -> Bitops:
  """BitOPs of one training step per sample.

  For a layer with M multiply-accumulates and widths w, a, g: forward M*w*a,
  input gradient M*g*w, weight gradient M*g*a (CPT's convention).

  Args:
    costs: {path: LayerCost}, as `layer_costs` gives them.
    bits: {path: widths}, or widths for every path of `costs`; an int b means
      (b, b, 8), 32 is float, and stacked layers may have widths of shape
      (layers,). A path of `costs` that is absent counts as float and is named
      in the result; None is all float.
    samples: multiplies everything, such as steps * batch size.

  Returns:
    A `Bitops`. A consumer that only runs forward reads `forward`.

  Raises:
    ValueError: a path in `bits` that is not in `costs`, widths outside 2..16
      and 32, or widths that do not fit the stacked layers.

  Example:
    >>> costs = {"hidden": LayerCost(macs=16_384, weights=16_384)}
    >>> cost = bitops(costs, 4)  # 4 bits, and 8 of the gradient
    >>> cost.forward, cost.total
    (262144, 1310720)
  """
  bits = {} if bits is None else bits
  if not isinstance(bits, Mapping):
    bits = dict.fromkeys(costs, bits)
  _check_paths(costs, bits, "bits")
  layers = {}
  for path, cost in costs.items():
    widths = grids.as_layer_bits(bits.get(path, _FLOAT))
    w, a, g = (_per_layer(path, width, cost.layers) for width in widths)
    layers[path] = LayerBitops(
      *(samples * cost.macs * _dot(*pair) for pair in ((w, a), (g, w), (g, a)))
    )
  return Bitops(layers, tuple(path for path in costs if path not in bits))


class RunCost(NamedTuple):
  """What a run has cost so far: a part of the train state.

  Exact for 2^54 steps, and without a layer's size: MACs come in on the host.

  Attributes:
    sums: {path: uint32 array of shape (4, 2), or (layers, 4, 2)}: sums over
      steps of w*a, g*w, g*a and w, each as a low and a high word.
  """

  sums: dict[str, jax.Array]


def init_run_cost(bits: Mapping[str, grids.LayerBits]) -> RunCost:
  """A run that has taken no step; `bits` gives the paths and shapes only."""
  return RunCost(
    {
      path: jnp.zeros((*np.shape(widths.weights), 4, 2), jnp.uint32)
      for path, widths in bits.items()
    }
  )


def accumulate(state: RunCost, bits: Mapping[str, grids.LayerBits]) -> RunCost:
  """Adds one step at the given widths; pure, jit-able, exact.

  Args:
    state: from `init_run_cost`; its structure never changes.
    bits: {path: LayerBits} of the same paths and shapes, integers.

  Returns:
    The new state.

  Raises:
    ValueError: other paths than those of the state.
  """
  for path in {**state.sums, **bits}:
    if path not in state.sums or path not in bits:
      raise ValueError(
        f"bits: layer {path!r} is not in both the run's cost and the bits; "
        "give init_run_cost and accumulate the same layers"
      )
  return RunCost(
    {path: _add(words, bits[path]) for path, words in state.sums.items()}
  )


def _add(words: jax.Array, bits: grids.LayerBits) -> jax.Array:
  """One step's w*a, g*w, g*a, w on top of the two-word sums of a path."""
  w, a, g = (jnp.asarray(width, jnp.uint32) for width in bits)
  step = jnp.stack(jnp.broadcast_arrays(w * a, g * w, g * a, w), axis=-1)
  low = words[..., 0] + step
  # Unsigned sums wrap: a sum below its summand has carried.
  high = words[..., 1] + (low < step).astype(jnp.uint32)
  return jnp.stack([low, high], axis=-1)


class RunBitops(NamedTuple):
  """Cost of a run; BitOPs are exact ints, ratios are floats.

  Attributes:
    layers: {path: LayerBitops} over the whole run.
    total: BitOPs of the run, forward and backward.
    static_total: the same run at the static widths.
    float_total: the same run in float32.
    relative_to_static: total / static_total.
    saving_vs_static: 1 - relative_to_static.
    saving_vs_float: 1 - total / float_total.
    mean_bits: mean width of the weights over the layers that have widths,
      stacked ones counted singly, and over steps; 32 for a float run.
    float_layers: paths without widths, counted at 32/32/32 everywhere.
  """

  layers: dict[str, LayerBitops]
  total: int
  static_total: int
  float_total: int
  relative_to_static: float
  saving_vs_static: float
  saving_vs_float: float
  mean_bits: float
  float_layers: tuple[str, ...]


def run_bitops(
  costs: Mapping[str, LayerCost],
  state: RunCost,
  *,
  steps: int,
  batch_size: int,
  static_bits: int | grids.LayerBits | Mapping[str, int | grids.LayerBits] = 8,
) -> RunBitops:
  """Cost of a run from its accumulated widths, on the host.

  Args:
    costs: {path: LayerCost}, as `layer_costs` gives them.
    state: from `accumulate`, one call for each of the `steps`.
    steps: training steps so far, at least 1.
    batch_size: samples of a step, over all devices.
    static_bits: the static training to compare with: B_max; an int b means
      (b, b, 8). It applies to the layers of `state`; a mapping {path: widths}
      names the layers itself, as a float run needs, which has none in `state`.

  Returns:
    A `RunBitops`.

  Raises:
    ValueError: a path of the state that is not in `costs` or whose stacked
      layers differ, steps or batch_size below 1, or sums that `steps` steps
      cannot have made.
  """
  for name, value in (("steps", steps), ("batch_size", batch_size)):
    if value < 1:
      raise ValueError(f"{name}={value} is too small; a run has at least 1")
  _check_paths(costs, state.sums, "state")
  samples = steps * batch_size
  layers = {}
  width_sum, width_count = 0, 0
  for path, cost in costs.items():
    if path not in state.sums:
      layers[path] = bitops({path: cost}, None, samples=samples).layers[path]
      continue
    *products, width = _sums(path, state.sums[path], cost.layers, steps)
    layers[path] = LayerBitops(*(batch_size * cost.macs * p for p in products))
    width_sum += width
    width_count += steps * cost.layers
  static = static_bits
  if not isinstance(static, Mapping):
    static = dict.fromkeys(state.sums, static_bits)
  total = sum(layer.total for layer in layers.values())
  static_total = bitops(costs, static, samples=samples).total
  float_total = bitops(costs, None, samples=samples).total
  return RunBitops(
    layers=layers,
    total=total,
    static_total=static_total,
    float_total=float_total,
    relative_to_static=total / static_total,
    saving_vs_static=(static_total - total) / static_total,
    saving_vs_float=(float_total - total) / float_total,
    mean_bits=width_sum / width_count if width_count else 32.0,
    float_layers=tuple(path for path in costs if path not in state.sums),
  )


def _sums(path: str, words: Any, layers: int, steps: int) -> list[int]:
  """The four sums of a path over its stacked layers, as checked ints."""
  words = np.asarray(words)
  if words.size != layers * 8:
    raise ValueError(
      f"state: {words.size // 8} layers at {path!r}, the costs have {layers}; "
      "use costs and widths of one model"
    )
  singles = words.reshape(layers, 4, 2).tolist()
  sums = [
    sum(low + (high << 32) for low, high in column)
    for column in zip(*singles, strict=True)
  ]
  if not 2 * steps * layers <= sums[-1] <= 32 * steps * layers:
    raise ValueError(
      f"steps={steps} does not fit the widths summed for layer {path!r}; "
      "accumulate once a step"
    )
  return sums


def _check_paths(
  costs: Mapping[str, LayerCost], paths: Mapping[str, Any], field: str
) -> None:
  for path in paths:
    if path not in costs:
      raise ValueError(
        f"{field}: no layer {path!r} in the costs; known are "
        f"{', '.join(map(repr, costs))}"
      )


def _per_layer(path: str, width: Any, layers: int) -> list[int]:
  """One width for each stacked layer of a path, as ints."""
  widths = np.asarray(width).ravel().tolist()
  if np.ndim(width) == 0:
    return widths * layers
  if len(widths) != layers:
    raise ValueError(
      f"bits: {len(widths)} widths for {layers} layers at {path!r}; "
      "give one width, or one for each layer"
    )
  return widths


def _dot(left: list[int], right: list[int]) -> int:
  return sum(x * y for x, y in zip(left, right, strict=True))
