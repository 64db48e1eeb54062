"""Ranges of the step before: one collective a step over a batch's devices.

On many devices the range of a batch is known after a reduction over all of
them, in every layer and pass: small messages whose latency adds up. With
`Quantization(ranges="delayed")` a training step quantizes activations and
output gradients over the ranges that the step before has measured, and a
layer reports its own ranges row by row, for which no device has to know of
another's rows. `settle` then joins the ranges of all layers at once: over the
devices that share the rows, a mesh's data and fsdp, there is one collective,
however many layers, and one for each number of rows that is no multiple of the
others'. Where rows themselves are split (tensor) their ranges are still joined
over those devices in every layer. A step:

    probes = delayed.probes(model, variables, x)
    def loss(params, probes):
      y, updates = model.apply({**variables, **probes, "params": params}, x,
                               mutable=["quant_stats", *probes])
      return loss_of(y), updates
    grads, updates = jax.grad(loss, (0, 1), has_aux=True)(params, probes)
    variables = {**variables, **delayed.settle(updates, grads[1])}

With ranges="batch" both functions change nothing, and the step is as always.

A layer's `quant_stats` also holds `previous_lo`, `previous_hi` (`rhs_` before
them for a second operand), `gradient_lo` and `gradient_hi`, float32. Our
decisions:

    the grid of a row spans the previous range [lo, hi] of all rows, and is
    wider where the row reaches beyond it: no value is clipped. A clipped
    gradient would keep its old size on the way down, and a jump of the scale
    take as many steps to arrive as there are layers;
    a previous range that is empty (lo >= hi: before the first step, after
    activations or gradients that were all equal), not finite or wider than
    float32 does not serve: for that step every row has a grid over its own
    range, with the same number of levels, and a row of one number, the
    grid's end, is not quantized;
    a row that is not finite gives NaN: its outputs, or all that its gradient
    reaches.
"""

import collections
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from dpc_jax.quant import ranges, spans

PROBES = ranges.PROBES


def _is_delayed(variables: Mapping[str, Any]) -> bool:
  """Whether any layer in the collection `quant_stats` has previous ranges."""
  stats = _flat(variables.get("quant_stats", {}))
  return any(path[-1] in ("previous_lo", "gradient_lo") for path in stats)


def probes(
  module: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any
) -> dict[str, Any]:
  """What a training step adds to its variables, to differentiate by.

  The gradient by it is no gradient: it is what `settle` takes. It is made of
  zeros, float32 (rows, 2) for the output of every layer, their shapes found by
  tracing the call; nothing is computed.

  Args:
    module: the model.
    variables: all of its variables.
    *args: of the step's call.
    **kwargs: of the step's call: `train`, `rngs` and the like, all but
      `mutable`.

  Returns:
    {"quant_probe": tree}; {} where no range is delayed.

  Raises:
    ValueError: a layer that is called several times in a step.
  """
  if not _is_delayed(variables):
    return {}
  fixed = ("params", "precision")
  mutable = [name for name in variables if name not in fixed] + [PROBES]

  def reports():
    _, found = module.apply(variables, *args, mutable=mutable, **kwargs)
    return found.get(PROBES, {})

  flat = _flat(jax.eval_shape(reports))
  if not flat:
    return {}  # variables of a delayed module in one that is not
  zeros = {
    path: jnp.zeros(leaf.shape, leaf.dtype)
    for path, leaf in flat.items()
    if path[-1] == "gradient"
  }
  return {PROBES: traverse_util.unflatten_dict(zeros)}


def settle(
  updates: Mapping[str, Any], found: Mapping[str, Any]
) -> dict[str, Any]:
  """Joins the ranges of a step over all rows and keeps them for the next one.

  Args:
    updates: the mutable collections after the step's call, `quant_stats` and
      `quant_probe` among them.
    found: the "gradient" of `probes`; {} leaves the gradients' ranges empty.

  Returns:
    `updates` without `quant_probe`. In `quant_stats` the previous ranges are
    this step's, and the running ranges have counted its batch (decay 0.9; the
    first batch sets them), in trees of the same structure.
  """
  updates = dict(updates)
  if PROBES not in updates:
    return updates
  stats = _flat(updates["quant_stats"])
  # Activations in float have no running range.
  reports = {
    path: leaf
    for path, leaf in _flat(updates.pop(PROBES)).items()
    if path[-1] != "gradient" and (*path[:-1], "count") in stats
  } | _flat(found.get(PROBES, {}))
  new = dict(stats)
  with jax.named_scope(spans.SCOPE):
    for path, (lo, hi) in _joined(reports).items():
      layer, name = path[:-1], path[-1]
      if name == "gradient":
        new |= {(*layer, "gradient_lo"): lo, (*layer, "gradient_hi"): hi}
        continue
      prefix, count = name.removesuffix("rows"), (*layer, "count")
      new[count] = stats[count] + 1
      for field, end in (("lo", lo), ("hi", hi)):
        running = (*layer, prefix + field)
        new[running] = ranges.averaged(stats[running], end, stats[count] == 0)
        new[(*layer, f"{prefix}previous_{field}")] = end
  updates["quant_stats"] = traverse_util.unflatten_dict(new)
  return updates


def _joined(reports):
  """{path: (lo, hi)} of reports (..., rows, 2), joined over rows.

  By one reduction for all layers whose rows are those of most layers (the
  batch), or a multiple of them such as batch * positions, and one for each
  other number of rows, which may divide by no number of devices.
  """
  if not reports:
    return {}
  counts = collections.Counter(leaf.shape[-2] for leaf in reports.values())
  batch = min(counts, key=lambda rows: (-counts[rows], rows))
  groups = {}
  for path, leaf in reports.items():
    rows = leaf.shape[-2]
    group = groups.setdefault(rows if rows % batch else batch, {})
    group[path] = leaf
  joined = {}
  for rows, group in groups.items():
    joined |= _reduced(group, rows)
  return joined


def _reduced(reports, rows):
  """As `_joined`, of reports whose rows are multiples of `rows`, by one."""
  columns = []
  for leaf in reports.values():
    leaf = leaf.reshape(*leaf.shape[:-2], rows, -1, 2)
    columns.append(jnp.moveaxis(jnp.max(leaf, -2), -2, 0).reshape(rows, -1))
  ends = jnp.max(jnp.concatenate(columns, axis=1), axis=0)
  joined, start = {}, 0
  for path, leaf in reports.items():
    shape = (*leaf.shape[:-2], 2)
    stop = start + math.prod(shape)
    own = ends[start:stop].reshape(shape)
    joined[path] = (-own[..., 0], own[..., 1])
    start = stop
  return joined


def _flat(tree) -> dict[tuple[str, ...], Any]:
  return traverse_util.flatten_dict(_plain(tree))


def _plain(tree):
  """Nested dicts, of whatever mappings."""
  if isinstance(tree, Mapping):
    return {name: _plain(child) for name, child in tree.items()}
  return tree
