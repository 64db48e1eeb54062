"""Layer capacities: the number of weights N_k of every layer (paper Eq. 1)."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from dpc_jax.quant import grids


def layer_capacities(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Number of weights N_k of every layer, in the order of the mapping.

  A layer is a dict in the collection `precision` that holds the leaves
  `weights`, `activations` and `gradients`; its path is the '/'-joined module
  path, '' for a layer at the root. N_k is the size of its `kernel` in
  `params`: no bias, no normalization (our decision). A layer without any
  parameter, as the product of two activations is, has N_k = 0. Without the
  collection (a float model) every leaf named `kernel` is a layer.

  A layer stacked by `nn.scan` holds widths of shape (layers,). It gives an
  array of that shape, so that it counts once per stacked layer in a median or
  a mean. A float model does not say what is stacked: there the whole kernel
  counts as one layer.

  Args:
    variables: all collections, as `model.init` returns them. Arrays, abstract
      arrays (`jax.eval_shape`), boxed parameters and frozen dicts will do.

  Returns:
    {path: N_k}, N_k an int, or an int64 array of shape (layers,).

  Raises:
    ValueError: there is no collection `params`, or a layer has parameters or
      the one running range of a kernel's input but no kernel, or its kernel
      does not divide into its stacked layers.

  Example:
    >>> import dpc_jax as dpc
    >>> hidden = {"kernel": np.zeros((64, 256)), "bias": np.zeros(256)}
    >>> dpc.layer_capacities({"params": {"hidden": hidden}})
    {'hidden': 16384}
  """
  return {
    path: _capacity(path, layer) for path, layer in layers(variables).items()
  }


class Layer(NamedTuple):
  """Where a layer's parameters are.

  Attributes:
    parameters: its mapping in `params`, with the leaf `kernel`; empty for a
      product of two activations.
    stack: shape of its widths: (layers,) where `nn.scan` stacks it, else ().
  """

  parameters: Mapping[str, Any]
  stack: tuple[int, ...]


def layers(variables: Mapping[str, Any]) -> dict[str, Layer]:
  """The layers that `layer_capacities` counts, {path: Layer}, in its order.

  Raises:
    ValueError: as there, but for kernels that do not divide.
  """
  if "params" not in variables:
    raise ValueError(
      f"variables: no collection 'params' in {sorted(variables)}; "
      "pass the whole dict that model.init returns"
    )
  params = variables["params"]
  precision = variables.get("precision")
  if not precision:
    return {
      path: Layer(node, ())
      for path, node in _nodes(params)
      if _is_leaf(node, "kernel")
    }
  return {
    path: Layer(
      _parameters(path, variables), np.shape(unboxed(node["weights"]))
    )
    for path, node in _nodes(precision)
    if all(_is_leaf(node, name) for name in grids.LayerBits._fields)
  }


def unboxed(leaf: Any) -> Any:
  """The array of a leaf; a boxed parameter is a tree of one leaf."""
  (value,) = jax.tree.leaves(leaf)
  return value


def _parameters(path: str, variables: Mapping) -> Mapping[str, Any]:
  """The mapping in `params` of a layer that has widths."""
  node = _at(variables["params"], path)
  ranges = _at(variables.get("quant_stats", {}), path)
  # A product of two activations has no parameters and two ranges.
  is_product = not node and not ("lo" in ranges and "rhs_lo" not in ranges)
  if not is_product and not _is_leaf(node, "kernel"):
    raise ValueError(
      f"layer {path!r} has widths but no 'kernel' in params; "
      "pass variables of one model"
    )
  return node


def _capacity(path: str, layer: Layer) -> Any:
  """N_k of a layer."""
  node, stack = layer
  size = math.prod(np.shape(unboxed(node["kernel"]))) if node else 0
  if not stack:
    return size
  if size % math.prod(stack):
    raise ValueError(
      f"layer {path!r}: a kernel of {size} weights does not divide into "
      f"widths of shape {stack}; stack both along the same axis"
    )
  return np.full(stack, size // math.prod(stack), np.int64)


def _at(tree: Mapping[str, Any], path: str) -> Mapping[str, Any]:
  """The mapping at a path, {} if there is none."""
  for name in path.split("/") if path else ():
    tree = tree.get(name, {}) if isinstance(tree, Mapping) else {}
  return tree if isinstance(tree, Mapping) else {}


def _nodes(
  tree: Mapping[str, Any], path: str = ""
) -> Iterator[tuple[str, Mapping[str, Any]]]:
  """Every mapping of a nested mapping with its path, parents first."""
  yield path, tree
  for name, child in tree.items():
    if isinstance(child, Mapping):
      yield from _nodes(child, f"{path}/{name}" if path else name)


def _is_leaf(node: Mapping[str, Any], name: str) -> bool:
  return name in node and not isinstance(node[name], Mapping)
