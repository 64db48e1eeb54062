"""The collection `precision`: the bit-widths of every layer, read and set.

A layer is a dict in the collection that holds the int32 leaves `weights`,
`activations` and `gradients`; its path is the '/'-joined module path, the same
as in `params`, and '' at the root.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpc_jax.quant import grids


def layer_bits(variables: Mapping[str, Any]) -> dict[str, grids.LayerBits]:
  """Returns the widths of every layer, {path: LayerBits}.

  Args:
    variables: a model's variables, with the collection `precision`.

  Returns:
    The collection's own arrays, int32 of shape (), or (layers,) for a layer
    under `nn.scan`, in the collection's order.

  Raises:
    ValueError: no collection `precision`.
  """
  return {
    path: grids.LayerBits(*(layer[f] for f in grids.LayerBits._fields))
    for path, layer in _layers(_collection(variables))
  }


def assign_bits(
  variables: Mapping[str, Any],
  bits: "int | grids.LayerBits | Mapping[str, int | grids.LayerBits]",
) -> dict[str, Any]:
  """Returns `variables` with other widths; shapes and dtypes stay.

  Works under `jax.jit`, with traced widths; nothing is recompiled by it.

  Args:
    variables: a model's variables, with the collection `precision`.
    bits: {path: width} for every layer, or one width for all. An int b means
      (b, b, 8), and 32 means (32, 32, 32); LayerBits sets all three. Under
      `nn.scan`, where a layer's widths have shape (layers,), a scalar sets
      them all.

  Raises:
    ValueError: an unknown path, a missing layer, a width outside 2..16 and
      32, or a shape that does not fit, named.

  Example:
    >>> import dpc_jax as dpc
    >>> variables = dpc.QuantDense(2).init(jax.random.key(0), jnp.ones((1, 3)))
    >>> variables = dpc.assign_bits(variables, 4)
    >>> [int(width) for width in dpc.layer_bits(variables)[""]]
    [4, 4, 8]
  """
  collection = _collection(variables)
  paths = [path for path, _ in _layers(collection)]
  if not isinstance(bits, Mapping):
    bits = dict.fromkeys(paths, bits)
  unknown = [path for path in bits if path not in paths]
  if unknown:
    raise ValueError(
      f"bits: no quantized layer {unknown[0]!r}; the layers are"
      f" {', '.join(map(repr, paths))}"
    )
  missing = [path for path in paths if path not in bits]
  if missing:
    raise ValueError(
      f"bits: layer {missing[0]!r} is missing; name all {len(paths)} layers,"
      " or pass one width for all"
    )
  return {
    **variables,
    "precision": _assigned(collection, (), dict(bits)),
  }


def is_layer(node: Any) -> bool:
  """Whether a node of the collection is a layer: it holds the three widths."""
  return isinstance(node, Mapping) and all(
    field in node and not isinstance(node[field], Mapping)
    for field in grids.LayerBits._fields
  )


def _collection(variables) -> Mapping[str, Any]:
  if "precision" not in variables:
    raise ValueError(
      "variables: no collection 'precision'; pass all that init of a quantized"
      " model returned, not params alone"
    )
  return variables["precision"]


def _layers(
  node: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[str, Mapping[str, Any]]]:
  if is_layer(node):
    yield "/".join(path), node
  for name, child in node.items():
    if isinstance(child, Mapping):
      yield from _layers(child, (*path, name))


def _assigned(node, path, bits):
  layer = {}
  if is_layer(node):
    name = "/".join(path)
    try:
      new = grids.as_layer_bits(bits[name])
    except ValueError as error:
      raise ValueError(f"layer {name!r}: {error}") from None
    for field, width in zip(grids.LayerBits._fields, new, strict=True):
      layer[field] = _like(width, node[field], f"layer {name!r}: {field}")
  return {
    key: layer[key]
    if key in layer
    else _assigned(child, (*path, key), bits)
    if isinstance(child, Mapping)
    else child
    for key, child in node.items()
  }


def _like(width, old, name):
  shape = np.shape(old)
  if np.shape(width) not in ((), shape):
    raise ValueError(
      f"{name} has shape {np.shape(width)}; use an int or shape {shape}"
    )
  if isinstance(width, jax.core.Tracer):
    return jnp.broadcast_to(width.astype(jnp.int32), shape)
  return jnp.asarray(np.broadcast_to(np.asarray(width, np.int32), shape))
