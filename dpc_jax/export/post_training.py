"""From float parameters to a quantized model, without training.

Widths come from the weights alone, ranges of activations from a few batches of
*training* data: the test set is for the accuracy that this costs.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpc_jax.export import description, errors
from dpc_jax.policy import bounds, capacity, dpc
from dpc_jax.quant import grids, precision

CHOICES = ("dpc", "cosine")
# Our decision: between the thresholds of B_min and B_max, 5 bits of Gaussian
# weights.
TAU = 0.999


def choose_bits(
  variables: Mapping[str, Any],
  choice: str = "dpc",
  *,
  b_min: int | None = None,
  b_max: int | None = None,
  tau: float = TAU,
  activations: int | None = None,
  grid: grids.Grid = bounds.WEIGHT_GRID,
) -> dict[str, grids.LayerBits]:
  """Widths of every layer, by its weights.

  Args:
    variables: of the quantized model, `params` trained.
    choice: "dpc", Eq. 1 between b_min and b_max; or "cosine", for each layer
      the smallest width at which its quantized weights have a cosine similarity
      of at least `tau` to themselves (our decision: the paper takes the mean
      over layers, and for its bounds alone).
    b_min: smallest width of "dpc"; None takes that of `precision_bounds`. Of
      "cosine" the smallest that is tried, 2.
    b_max: largest, likewise; of "cosine" 16.
    tau: of "cosine", in (0, 1].
    activations: width of all activations; None is that of the layer's weights.
    grid: of the weights.

  Returns:
    {path: LayerBits}, gradients 8. A product of two activations, which has no
    weights, gets the largest width of all (our decision; for "dpc" b_max).

  Raises:
    ValueError: an unknown choice, a width or threshold out of its range, or
      a threshold that a layer does not reach, named.
  """
  if choice not in CHOICES:
    raise ValueError(f"choice = {choice!r}: use one of {', '.join(CHOICES)}")
  if activations is not None:
    grids.check_width(activations, "activations")
  if choice == "dpc":
    widths = _by_equation(variables, b_min, b_max, grid)
  else:
    widths = _by_cosine(variables, b_min, b_max, tau, grid)
  largest = max(int(np.max(width)) for width in widths.values())
  return {
    path: _layer_bits(count, widths.get(path, largest), largest, activations)
    for path, count in capacity.layer_capacities(variables).items()
  }


def _layer_bits(count, width, largest, activations) -> grids.LayerBits:
  """Of a layer of N_k = `count` weights, in its shape."""
  if not np.any(count):
    width = largest if activations is None else activations
  widths = (
    width,
    width if activations is None else activations,
    grids.DEFAULT_GRADIENT_WIDTH,
  )
  return grids.LayerBits(
    *(np.broadcast_to(np.int32(w), np.shape(count)) for w in widths)
  )


def quantize_trained(
  model: nn.Module,
  variables: Mapping[str, Any],
  batches: Iterable[Any],
  bits: Any = "dpc",
  **options: Any,
) -> dict[str, Any]:
  """Variables of a quantized model, from those of a trained one.

  Args:
    model: the quantized model, its parameters those of the float model.
    variables: trained: `params` and what the model has besides, such as
      `batch_stats`; widths and ranges in it are not looked at.
    batches: inputs of training data, of which at least one; each an array, or
      a tuple of the arrays that the model takes.
    bits: a choice of `choose_bits`, or what `dpc.assign_bits` takes.
    **options: of `choose_bits`.

  Returns:
    All collections, for `freeze`.

  Raises:
    ExportError: no batch, or an array in place of a list; a model without
      quantized layers; ranges that are not finite.
    ValueError: as `choose_bits` and `dpc.assign_bits`.
  """
  _check_batches(batches)
  batches = iter(batches)
  first = next(batches, None)
  if first is None:
    raise errors.ExportError("batches: none; give at least one to calibrate by")
  shapes = jax.eval_shape(model.init, jax.random.key(0), *_inputs(first))
  if "precision" not in shapes:
    raise errors.ExportError(
      "model: has no quantized layer; create it with a quantization"
    )
  added = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    {name: shapes[name] for name in ("precision", "quant_stats")},
  )
  variables = flax.core.unfreeze(nn.meta.unbox({**variables, **added}))
  if isinstance(bits, str):
    options = {"grid": _weight_grid(model)} | options
    bits = choose_bits(variables, bits, **options)
  elif options:
    raise ValueError(
      f"{next(iter(options))}: means nothing beside bits = {bits!r}; leave it"
      " out"
    )
  variables = precision.assign_bits(variables, bits)

  def again():
    yield first
    yield from batches

  return calibrate(model, variables, again())


def _check_batches(batches) -> None:
  """An array would be taken apart, each of its rows for a batch."""
  if hasattr(batches, "shape"):
    raise errors.ExportError(
      f"batches: one array of shape {batches.shape}; give a list, [array]"
    )


def calibrate(
  model: nn.Module, variables: Mapping[str, Any], batches: Iterable[Any]
) -> dict[str, Any]:
  """Variables with running ranges of activations of these batches alone.

  The model evaluates them at its widths; batch statistics of normalizations
  are used and stay. The range is the moving average that training keeps: decay
  0.9, the first batch sets it.

  Args:
    model: quantized.
    variables: all collections; not changed.
    batches: as of `quantize_trained`.

  Raises:
    ExportError: no batch, an array in place of a list, or a range that is
      not finite, named.
  """
  model = description.for_inference(model)

  @jax.jit
  def update(variables, inputs):
    _, updates = model.apply(variables, *inputs, mutable=["quant_stats"])
    return updates["quant_stats"]

  _check_batches(batches)
  variables = dict(variables)
  ranges = jax.tree.map(jnp.zeros_like, variables["quant_stats"])
  count = 0
  for batch in batches:
    ranges = update({**variables, "quant_stats": ranges}, _inputs(batch))
    count += 1
  if not count:
    raise errors.ExportError("batches: none; give at least one to calibrate by")
  variables["quant_stats"] = flax.core.unfreeze(ranges)
  flat = flax.traverse_util.flatten_dict(variables["quant_stats"], sep="/")
  for name, value in flat.items():
    if not np.all(np.isfinite(value)):
      raise errors.ExportError(
        f"layer {name.rpartition('/')[0]!r}: the range of its input is not"
        " finite on these batches; take parameters from before the run diverged"
      )
  return variables


def _inputs(batch: Any) -> tuple[Any, ...]:
  return batch if isinstance(batch, tuple) else (batch,)


def _weight_grid(model) -> grids.Grid:
  """Of the model, to nearest; the default of one that does not say."""
  quantization = getattr(model, "quantization", None)
  grid = getattr(quantization, "weights", None) or bounds.WEIGHT_GRID
  return dataclasses.replace(grid, rounding="nearest")


def _by_equation(variables, b_min, b_max, grid) -> dict[str, Any]:
  if b_min is None or b_max is None:
    found = bounds.precision_bounds(variables, grid=grid)
    b_min = found.b_min if b_min is None else b_min
    b_max = found.b_max if b_max is None else b_max
  return dpc.dpc_bit_widths(capacity.layer_capacities(variables), b_min, b_max)


def _by_cosine(variables, b_min, b_max, tau, grid) -> dict[str, Any]:
  bounds.check_thresholds(tau, tau)
  low = grids.MIN_WIDTH if b_min is None else b_min
  high = grids.MAX_WIDTH if b_max is None else b_max
  if low > high:
    raise ValueError(f"b_min={low} is above b_max={high}; swap or equal them")
  cosine = bounds.cosine_similarities(
    variables, widths=range(low, high + 1), grid=grid
  )
  found = {}
  for path, by_width in cosine.items():
    reached = np.stack([np.asarray(c) >= tau for c in by_width.values()])
    if not np.all(reached[-1]):
      raise ValueError(
        f"tau = {tau}: layer {path!r} does not reach it with {high} bits; lower"
        " tau or raise b_max"
      )
    # The first width that reaches it, of each stacked layer.
    found[path] = low + np.argmax(reached, axis=0)
  return found
