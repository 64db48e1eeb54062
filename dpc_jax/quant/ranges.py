"""Which range a layer quantizes over, and what it keeps of ranges.

The collection `quant_stats` of a layer holds its running range, `lo`, `hi` and
`count`, for evaluation. In training the batch's own range serves, or that of
the step before: see `dpc_jax.quant.delayed`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dpc_jax.quant import grids, ops, spans

# Weight of the past in the running range (CPT's value).
RANGE_DECAY = 0.9
# What a training step with delayed ranges hands in and takes out.
PROBES = "quant_probe"

# (array -> its range) -> {prefix of an operand's variables: its range}.
Measure = Callable[[Callable[[jax.Array], spans.Range]], dict[str, spans.Range]]


class LayerRanges(NamedTuple):
  """The ranges of one call of a layer.

  Attributes:
    limits: {prefix: range}, "" the first operand, "rhs_" the second of a
      product of two activations; {} where they stay in float.
    gradient: that of the output's gradient; None is its own.
  """

  limits: dict[str, spans.Range]
  gradient: ops.PreviousGradient | None = None


def layer_path(module: nn.Module) -> str:
  """The layer path of a bound module: '/'-joined names, '' at the root."""
  return "/".join(module.path)


def variable(
  module: nn.Module,
  collection: str,
  name: str,
  shape: tuple[int, ...],
  value: Any,
  dtype: Any,
) -> nn.Variable:
  """A layer's variable, made by `init` alone.

  Raises:
    ValueError: `apply` without it.
  """
  # Mutable is not enough: widths made up in `apply` would be a silent reset.
  if not (
    (module.is_initializing() and module.is_mutable_collection(collection))
    or module.has_variable(collection, name)
  ):
    has_others = bool(module.variables.get(collection))
    missing = f"{name!r} of the collection" if has_others else "collection"
    raise ValueError(
      f"{layer_path(module) or type(module).__name__}: no {missing}"
      f" {collection!r} in apply's variables; pass all that init returned, not"
      " params alone, and name it in the variable_axes of an nn.scan or nn.vmap"
    )
  return module.variable(collection, name, jnp.full, shape, value, dtype)


def layer_ranges(
  module: nn.Module,
  quantization: grids.Quantization,
  measure: Measure,
  product: Callable[[], jax.Array],
) -> LayerRanges:
  """The ranges that a layer's call quantizes over; keeps its statistics.

  Where `quant_stats` is mutable (training) and ranges are the batch's,
  updates the running ranges; `init` does not count its batch.

  Args:
    module: a bound module, inside its compact call.
    quantization: the grids; without one of activations there are no limits.
    measure: measures the operands, by the function that it is given.
    product: the call itself, for the shape of its output.

  Raises:
    ValueError: `apply` without the collections that it needs.
  """
  batch = {}
  if quantization.activations is not None:
    batch = measure(lambda x: ops.operand_range(x, quantization.activations))
  is_training = _is_training(module)
  # Evaluation needs no previous range, and takes variables without any.
  if quantization.ranges == "delayed" and (
    is_training or module.is_initializing()
  ):
    previous = _previous_ranges(module, quantization, tuple(batch))
    if previous and is_training:
      rows = measure(_range_of_rows)
      return _delayed(module, rows, previous, product)
  if not batch:
    return LayerRanges({})
  running = running_ranges(module, batch)
  if running is None:
    # Checked: a product that measured them again would reduce them again.
    running = {p: spans.guarded(own, own) for p, own in batch.items()}
  return LayerRanges(running)


def running_ranges(
  module: nn.Module, batch: dict[str, spans.Range]
) -> dict[str, spans.Range] | None:
  """Ranges that serve in place of the batch's own, one for each operand.

  Where `quant_stats` is mutable (training), updates the running ranges and
  returns None: the batch's own serve. `init` does not count its batch.

  Args:
    module: a bound module, inside its compact call.
    batch: {prefix: range of this batch}, prefix "" for the first operand; the
      running range is in the variables `<prefix>lo` and `<prefix>hi`, and
      `count` is that of all operands.

  Returns:
    In evaluation, the running ranges, or those of `batch` while no batch was
    counted; in training None.

  Raises:
    ValueError: `apply` without the collection.
  """
  running = {
    prefix: _range_variables(module, prefix, own.lo.shape)
    for prefix, own in batch.items()
  }
  count = variable(module, "quant_stats", "count", (), 0, jnp.int32)
  is_first = count.value == 0
  if not module.is_mutable_collection("quant_stats"):
    return {
      prefix: spans.Range(
        *(
          jnp.where(is_first, new, old.value)
          for old, new in zip(running[prefix], own, strict=True)
        )
      )
      for prefix, own in batch.items()
    }
  if not module.is_initializing():
    for prefix, own in batch.items():
      for old, new in zip(running[prefix], own, strict=True):
        old.value = averaged(old.value, new, is_first)
    count.value = count.value + 1
  return None


def averaged(old: jax.Array, new: jax.Array, is_first: Any) -> jax.Array:
  """An end of the running range after one more batch."""
  average = RANGE_DECAY * old + (1 - RANGE_DECAY) * new
  return jnp.where(is_first, new, average)


def _range_variables(module, prefix, shape):
  """(variable of lo, variable of hi)."""
  return tuple(
    variable(module, "quant_stats", prefix + field, shape, 0, jnp.float32)
    for field in spans.Range._fields
  )


def _is_training(module) -> bool:
  return (
    module.is_mutable_collection("quant_stats") and not module.is_initializing()
  )


def _range_of_rows(x):
  return spans.row_range(lax.stop_gradient(x))


def _previous_ranges(module, quantization, prefixes):
  """{what: range of the step before}; `init` sets them empty: (0, 0)."""
  names = {prefix: f"{prefix}previous_" for prefix in prefixes}
  if quantization.gradients is not None:
    names["gradient"] = "gradient_"
  has_place = module.is_mutable_collection(PROBES)
  if names and module.is_initializing() and not has_place:
    _refuse(module)
  return {
    name: spans.Range(*(v.value for v in _range_variables(module, start, ())))
    for name, start in names.items()
  }


def _delayed(module, rows, previous, product) -> LayerRanges:
  """Over the ranges of the step before; reports this step's, row by row."""
  if not module.is_mutable_collection(PROBES) or module.has_variable(
    PROBES, "rows"
  ):
    _refuse(module)
  limits = {
    prefix: spans.guarded(spans.widened(previous[prefix], own), own)
    for prefix, own in rows.items()
    if prefix in previous
  }
  for prefix, own in rows.items():
    report = ops.packed(own)
    module.variable(PROBES, f"{prefix}rows", lambda r=report: r)
  if "gradient" not in previous:
    return LayerRanges(limits)

  def zeros():
    shape = jax.eval_shape(product).shape
    return jnp.zeros((max(1, shape[0]) if shape else 1, 2), jnp.float32)

  probe = module.variable(PROBES, "gradient", zeros).value
  gradient = ops.PreviousGradient(previous["gradient"], probe)
  return LayerRanges(limits, gradient)


def _refuse(module):
  raise ValueError(
    f"{layer_path(module) or type(module).__name__}: ranges = 'delayed' needs"
    f" the collection {PROBES!r} of `quant.delayed.probes`, mutable, new in"
    " each step, and in the variable_axes of an nn.scan or nn.vmap; a layer"
    " called several times in a step (a loop over time) needs ranges = 'batch'"
  )
