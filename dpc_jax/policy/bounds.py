"""Precision bounds: the smallest widths that leave weights as they were.

The paper bounds its widths by the cosine similarity between full-precision
and quantized weights. B_min is the smallest width whose similarity, averaged
over layers, reaches `tau_min`, and B_max the smallest that reaches `tau_max`.
The thresholds and the default range of widths are our decision.

With x all weights of a layer's kernel and q = fake_quantize(x, width, grid):

    similarity = <x, q> / (|x| |q|)

Output channels, which have a range each, are the axes that the layer's bias
has (several in a `nn.DenseGeneral`), and the last one where there is no bias:
those of every dense layer and convolution here. Variables do not tell those
of a `nn.Einsum`, or of a `nn.DenseGeneral` without bias.

Weights are quantized and summed in float32, on the devices where they are,
with one program per shape that serves all widths; the ratio is taken in
float64. Near 1 the errors of the sums matter 1 - similarity times.

An all-zero kernel has similarity 1, as the grid holds 0; one that the grid
rounds to zero (symmetric, all weights below its smallest step) has 0: our
decisions.
"""

import functools
import itertools
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dpc_jax.policy import capacity
from dpc_jax.quant import grids

TAU_MIN = 0.95
TAU_MAX = 0.9999
WIDTHS = range(2, 9)
# Affine, one range per output channel.
WEIGHT_GRID = grids.Quantization().weights

# {path: {width: similarity}}: a float, or a float64 array of stacked layers.
Cosine = Mapping[str, Mapping[int, Any]]


class PrecisionBounds(NamedTuple):
  """The bounds, and what they were chosen by.

  Attributes:
    b_min: smallest width whose mean similarity reaches `tau_min`.
    b_max: smallest width whose mean similarity reaches `tau_max`.
    cosine: {path: {width: similarity}}, a float, or a float64 array of shape
      (layers,) of a layer stacked by `nn.scan`.
  """

  b_min: int
  b_max: int
  cosine: dict[str, dict[int, Any]]

  @property
  def mean(self) -> dict[int, float]:
    """{width: similarity averaged over layers}; see `mean`."""
    return mean(self.cosine)

  @property
  def worst(self) -> dict[int, tuple[str, float]]:
    """{width: (layer, similarity)} of the least similar; see `worst`."""
    return worst(self.cosine)


def precision_bounds(
  variables: Mapping[str, Any],
  *,
  tau_min: float = TAU_MIN,
  tau_max: float = TAU_MAX,
  widths: Iterable[int] = WIDTHS,
  grid: grids.Grid = WEIGHT_GRID,
) -> PrecisionBounds:
  """Bounds of a model's widths from the similarity of its quantized weights.

  With C(b) the similarity at width b, averaged over layers:

      b_min = min {b : C(b) >= tau_min}      b_max = min {b : C(b) >= tau_max}

  `cosine_similarities` says what the layers are and how they are measured.
  A function of the host: call it outside `jax.jit`.

  Args:
    variables: all collections, as `model.init` returns them.
    tau_min: threshold of b_min, in (0, 1].
    tau_max: threshold of b_max, in [tau_min, 1].
    widths: increasing widths to choose from, each in 2..16.
    grid: of the weights; rounds to nearest.

  Returns:
    PrecisionBounds, with b_min <= b_max.

  Raises:
    ValueError: a threshold out of its range, or one that no width reaches
      (naming the best width and its similarity); and as
      `cosine_similarities`.

  Example:
    >>> import dpc_jax as dpc
    >>> kernel = np.random.RandomState(0).randn(64, 16)
    >>> variables = {"params": {"hidden": {"kernel": kernel}}}
    >>> bounds = dpc.precision_bounds(variables)
    >>> bounds.b_min, bounds.b_max
    (3, 7)
  """
  check_thresholds(tau_min, tau_max)
  cosine = cosine_similarities(variables, widths=widths, grid=grid)
  b_min, b_max = (
    smallest_width(cosine, tau, name)
    for name, tau in (("tau_min", tau_min), ("tau_max", tau_max))
  )
  return PrecisionBounds(b_min, b_max, cosine)


def cosine_similarities(
  variables: Mapping[str, Any],
  *,
  widths: Iterable[int] = WIDTHS,
  grid: grids.Grid = WEIGHT_GRID,
) -> dict[str, dict[int, Any]]:
  """Cosine similarity of every layer's weights to themselves, quantized.

  The module's docstring says how it is measured. Layers are those of
  `layer_capacities`: of the collection `precision` where there is one, else
  every leaf named `kernel`. Products of two activations have no weights and
  are left out. Layers stacked by `nn.scan` are measured one by one, each on
  its own grid; a float model does not say what is stacked, and there a stack
  is one layer.

  Args:
    variables: all collections, as `model.init` returns them; arrays may be
      boxed, sharded, or numpy's.
    widths: increasing, each in 2..16.
    grid: of the weights; rounds to nearest.

  Returns:
    {path: {width: similarity}}, a float, or a float64 array of shape (layers,)
    of a stacked layer.

  Raises:
    ValueError: widths that are none, or not increasing; a grid that rounds
      stochastically; no layer with weights; a kernel that is not of floats, or
      not stacked along its first axis as its widths are, or whose weights (or
      their range) are not finite in float32, named.
  """
  widths = check_widths(widths)
  if grid.rounding != "nearest":
    raise ValueError(
      f"grid.rounding = {grid.rounding!r}: the similarity would be a matter of"
      " chance; use 'nearest'"
    )
  kernels = {
    path: _kernel(path, layer)
    for path, layer in capacity.layers(variables).items()
    if layer.parameters
  }
  kernels = {path: k for path, k in kernels.items() if np.size(k.value)}
  if not kernels:
    raise ValueError(
      "variables: no layer has weights; pass all that init returned of a model"
      " with quantized layers, or with leaves named 'kernel'"
    )
  # All under way on the devices before the host waits for the first.
  sums = {
    path: _sums(
      k.value, np.array(widths, np.int32), grid=grid, axes=k.axes, depth=k.depth
    )
    for path, k in kernels.items()
  }
  return {
    path: _by_width(path, jax.device_get(s), widths, kernels[path])
    for path, s in sums.items()
  }


def smallest_width(cosine: Cosine, tau: float, name: str = "tau") -> int:
  """The smallest width whose mean similarity reaches `tau`.

  Args:
    cosine: of `cosine_similarities`.
    tau: the threshold.
    name: of the threshold, for the message.

  Raises:
    ValueError: none reaches it.
  """
  means = mean(cosine)
  for width in sorted(means):
    if means[width] >= tau:
      return width
  best = max(means, key=means.get)
  raise ValueError(
    f"{name} = {tau}: no width of {', '.join(map(str, means))} reaches it; the"
    f" best, {best} bits, has a mean similarity of {means[best]:.8g}; lower"
    f" {name} or allow wider widths"
  )


def single_layers(cosine: Cosine) -> dict[str, dict[int, float]]:
  """{layer: {width: similarity}}; a stacked layer gives `path[i]` each."""
  singles = {}
  for path, by_width in cosine.items():
    shape = np.shape(next(iter(by_width.values())))
    for index in np.ndindex(shape):
      name = path + "".join(f"[{i}]" for i in index)
      singles[name] = {
        width: float(np.asarray(value)[index])
        for width, value in by_width.items()
      }
  return singles


def mean(cosine: Cosine) -> dict[int, float]:
  """{width: similarity averaged over layers}, each stacked one counting."""
  singles = single_layers(cosine).values()
  return {
    width: float(np.mean([layer[width] for layer in singles]))
    for width in next(iter(singles))
  }


def worst(cosine: Cosine) -> dict[int, tuple[str, float]]:
  """{width: (layer, similarity)} of the least similar layer.

  Of stacked layers, named `path[i]`; of equal ones, the first.
  """
  singles = single_layers(cosine)
  return {
    width: min(
      ((name, layer[width]) for name, layer in singles.items()),
      key=lambda pair: pair[1],
    )
    for width in next(iter(singles.values()))
  }


def check_thresholds(tau_min: float, tau_max: float) -> None:
  """Checks the two thresholds.

  Raises:
    ValueError: one outside (0, 1], or tau_min above tau_max.
  """
  for name, tau in (("tau_min", tau_min), ("tau_max", tau_max)):
    is_real = isinstance(tau, numbers.Real) and not isinstance(tau, bool)
    if not is_real or not 0 < tau <= 1:
      raise ValueError(f"{name} = {tau!r} is no similarity; use one in (0, 1]")
  if tau_min > tau_max:
    raise ValueError(
      f"tau_min = {tau_min} is above tau_max = {tau_max}; swap or equal them"
    )


def check_widths(widths: Iterable[int]) -> tuple[int, ...]:
  """The widths as a tuple of ints.

  Raises:
    ValueError: none, one that is no int in 2..16, or not increasing.
  """
  values = tuple(widths)
  if not values:
    raise ValueError("widths is empty; give at least one, in 2..16")
  for width in values:
    if (
      not isinstance(width, int | np.integer)
      or isinstance(width, bool)
      or not grids.MIN_WIDTH <= width <= grids.MAX_WIDTH
    ):
      raise ValueError(
        f"widths: {width!r} is not a width; use ints in"
        f" {grids.MIN_WIDTH}..{grids.MAX_WIDTH}"
      )
  for low, high in itertools.pairwise(values):
    if low >= high:
      raise ValueError(
        f"widths: {high} comes after {low}; give each once, in rising order"
      )
  return tuple(map(int, values))


class _Kernel(NamedTuple):
  """A layer's weights, axes of its output channels, axes that are stacked."""

  value: Any
  axes: tuple[int, ...]
  depth: int


def _kernel(path: str, layer: capacity.Layer) -> _Kernel:
  value = capacity.unboxed(layer.parameters["kernel"])
  shape, depth = np.shape(value), len(layer.stack)
  is_abstract = isinstance(value, jax.ShapeDtypeStruct)
  if is_abstract or not jnp.issubdtype(value.dtype, jnp.floating):
    what = "abstract" if is_abstract else f"of {value.dtype}"
    raise ValueError(
      f"layer {path!r}: its kernel is {what}; pass arrays of floats"
    )
  if shape[:depth] != layer.stack:
    raise ValueError(
      f"layer {path!r}: a kernel of shape {shape} for widths of shape"
      f" {layer.stack}; stack both along their first axis"
    )
  channels = 1
  if "bias" in layer.parameters:
    bias = np.shape(capacity.unboxed(layer.parameters["bias"]))[depth:]
    if bias and bias == shape[depth:][-len(bias) :]:
      channels = len(bias)
  return _Kernel(value, tuple(range(-channels, 0)), depth)


@functools.partial(jax.jit, static_argnames=("grid", "axes", "depth"))
def _sums(kernel, widths, *, grid, axes, depth):
  """Sums over the weights of each stacked layer, float32.

  Args:
    kernel: weights x; the first `depth` axes are stacked, n layers in all.
    widths: (w,) int32.
    grid: of the weights.
    axes: of the output channels, from the end.
    depth: 0, or number of axes that are stacked.

  Returns:
    The largest |x|, (n,), and, of x, q and e = q - x divided by it, (w, n, 5):
    <x, x>, <x, e>, <e, e>, <x, q> and <q, q>.
  """
  x = kernel.astype(jnp.float32).reshape(-1, *kernel.shape[depth:])
  inner = tuple(range(1, x.ndim))
  peak = jnp.max(jnp.abs(x), inner, keepdims=True)
  # No square leaves the range of float32 then.
  unit = jnp.where(peak == 0, 1, peak)

  def at(width):
    q = jax.vmap(lambda y: grids.fake_quantize(y, width, grid, axis=axes))(x)
    a, b, e = x / unit, q / unit, (q - x) / unit
    products = ((a, a), (a, e), (e, e), (a, b), (b, b))
    return jnp.stack([jnp.sum(u * v, inner) for u, v in products], -1)

  return peak.reshape(-1), lax.map(at, widths)


def _by_width(path, sums, widths, kernel):
  """{width: similarity} out of `_sums`."""
  peak, sums = sums
  similarity = _similarity(peak, np.asarray(sums, np.float64))
  finite = np.all(np.isfinite(similarity), 0)
  if not np.all(finite):
    index = f"[{np.argmin(finite)}]" if kernel.depth else ""
    raise ValueError(
      f"layer {path + index!r}: its weights, or their range, are not finite in"
      " float32; take them from before the run diverged"
    )
  stack = np.shape(kernel.value)[: kernel.depth]
  return {
    width: row.reshape(stack) if stack else float(row[0])
    for width, row in zip(widths, similarity, strict=True)
  }


def _similarity(peak: np.ndarray, sums: np.ndarray) -> np.ndarray:
  """<x, q> / (|x| |q|) of sums (..., n, 5), in float64; NaN of no number."""
  xx, xe, ee, xq, qq = np.moveaxis(sums, -1, 0)
  is_zero = peak == 0
  # A peak so large that its reciprocal underflows leaves a sum of 0.
  xx = np.where(is_zero, 1, np.where(xx == 0, np.nan, xx))
  # Where q is near x: <x, q> = xx + xe and <q, q> = xx + 2 xe + ee, in which
  # the rounding of float32 sums matters 1 - similarity times.
  is_near = ee < xx / 4
  c, d = np.where(is_near, xe / xx, 0), np.where(is_near, ee / xx, 0)
  near = (1 + c) / np.sqrt(1 + 2 * c + d)
  far = xq / np.sqrt(xx * np.where(qq == 0, 1, qq))
  return np.where(is_zero, 1.0, np.minimum(np.where(is_near, near, far), 1.0))
