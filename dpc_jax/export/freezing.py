"""A trained state as integer codes, and its values again.

In evaluation a layer quantizes its kernel anew, by its own range, at each
call. So codes, scales and offsets, found once, are all that it needs:

    value = code * scale                    symmetric
    value = code * scale + offset           affine

with the codes, scales and offsets of `quant.grids.encode`. A layer at width
32, or without a grid of weights, keeps its values.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpc_jax.export import description, errors
from dpc_jax.quant import grids, ops, precision

# Of the elements of arrays that are kept as they are.
DTYPES = (
  *("float32", "bfloat16", "float16", "bool"),
  *("int8", "int16", "int32", "uint8", "uint16", "uint32"),
)
# What a training step hands through, and no evaluation reads. Widths are kept
# apart.
_NOT_KEPT = ("precision", "intermediates", "quant_probe")
# Of `quant_stats`; the others are ranges for the next step of training.
_RANGES = ("lo", "hi", "rhs_lo", "rhs_hi", "count")


class Part(NamedTuple):
  """The kernel of one layer; of a stack, of one of its layers.

  Attributes:
    width: of its weights; 32 has values in place of codes.
    codes: uint16, 0 .. 2^width - 1, in the kernel's shape: those of the grid,
      from the lowest on, which is 0 (affine) or -(2^(width-1) - 1)
      (symmetric); at width 32 the float32 values.
    scale: float32, broadcastable to the kernel; None at width 32.
    offset: likewise, the value of code 0 of an affine grid, else None.
  """

  width: int
  codes: np.ndarray
  scale: np.ndarray | None
  offset: np.ndarray | None


class Kernel(NamedTuple):
  """A leaf `kernel` of the parameters, on its grid.

  Attributes:
    kind: of the grid, "affine" or "symmetric".
    stack: (layers,) under `nn.scan`, else ().
    axes: output channels, axes of one layer's kernel.
    parts: one for each layer of the stack, in order.
  """

  kind: str
  stack: tuple[int, ...]
  axes: tuple[int, ...]
  parts: tuple[Part, ...]


class Packed(NamedTuple):
  """A frozen model: all that `save` writes, on the host.

  Attributes:
    model: how `models.create` builds it; None: `load` must be given it.
    inputs: {"shape", "dtype"} of what it is called with; the leading axis of
      each is the batch.
    bits: {path: LayerBits} of ints, or lists of the stacked layers'.
    grids: {path: {operand: grid or None}}, as `description.grids_to_json`.
    kernels: {"params/.../kernel": Kernel}, of the layers that have widths.
    tensors: {"collection/.../name": array}, all other variables.
    about: what the caller wants to have written down; JSON can hold it.
  """

  model: dict[str, Any] | None
  inputs: tuple[dict[str, Any], ...]
  bits: dict[str, grids.LayerBits]
  grids: dict[str, dict[str, Any]]
  kernels: dict[str, Kernel]
  tensors: dict[str, np.ndarray]
  about: dict[str, Any]


def freeze(
  model: nn.Module,
  variables: Mapping[str, Any],
  *inputs: Any,
  about: Mapping[str, Any] | None = None,
) -> Packed:
  """Replaces the kernels of quantized layers by integer codes.

  The widths are those in `variables`: assign those of evaluation first.
  Kernels are quantized as an evaluation does it, over their own ranges and to
  nearest, so what `load` returns computes what the model does. Parameters of
  other kinds, `batch_stats`, running ranges and any other collection stay as
  they are; widths and ranges of activations stay in force.

  Args:
    model: a quantized model, of `models.create` or your own.
    variables: all of its collections, arrays; not changed.
    *inputs: what `model.__call__` takes to evaluate, arrays or
      `jax.ShapeDtypeStruct`s, each with the batch as its leading axis.
    about: further figures or words for the manifest; JSON must hold them.

  Returns:
    The frozen model.

  Raises:
    ExportError: no quantized layer, no input; a layer that is not called, of
      an unknown kind or dtype, or stacked along another axis than the first;
      weights that are not finite; what the format cannot hold.
  """
  variables = flax.core.unfreeze(nn.meta.unbox(dict(variables)))
  if "precision" not in variables:
    raise errors.ExportError(
      "variables: no collection 'precision', so no layer to pack; quantize the"
      " model (dpc.quantize) and its parameters (export.quantize_trained)"
    )
  if not inputs:
    raise errors.ExportError("inputs: none; pass what the model is called with")
  specs = tuple(_spec(x) for x in inputs)
  layers = description.quantized_layers(
    model, variables, tuple(_abstract(x) for x in inputs)
  )
  bits = _bits(variables, layers)
  flat = _flat(variables)
  kernels = {}
  for path, widths in bits.items():
    if layers[path].shape is not None:
      name = f"params/{path}/kernel" if path else "params/kernel"
      kernels[name] = _freeze_kernel(path, layers[path], widths, flat.pop(name))
  return Packed(
    model=description.describe(model),
    inputs=specs,
    bits=bits,
    grids={
      path: description.grids_to_json(layers[path].quantization)
      for path in bits
    },
    kernels=kernels,
    tensors={name: _kept(name, leaf) for name, leaf in flat.items()},
    about=_checked_about(about),
  )


def _checked_about(about) -> dict[str, Any]:
  try:
    json.dumps(dict(about or {}), allow_nan=False)
  except (TypeError, ValueError) as error:
    raise errors.ExportError(
      f"about: a JSON file cannot hold it: {error}"
    ) from None
  return dict(about or {})


def _bits(variables, layers) -> dict[str, grids.LayerBits]:
  """The widths, as ints or lists of ints."""
  found = {}
  for path, widths in precision.layer_bits(variables).items():
    if path not in layers:
      raise errors.ExportError(
        f"layer {path!r}: has widths, but an evaluation on these inputs does"
        " not call it as a dense layer, a convolution or a product; leave it in"
        " float"
      )
    widths = jax.device_get(widths)
    found[path] = grids.LayerBits(*(np.asarray(w).tolist() for w in widths))
  return found


def _flat(variables) -> dict[str, Any]:
  """{path: leaf} of what evaluation reads, but for widths."""
  kept = {k: v for k, v in variables.items() if k not in _NOT_KEPT}
  return {
    name: leaf
    for name, leaf in flax.traverse_util.flatten_dict(kept, sep="/").items()
    if not name.startswith("quant_stats/") or name.split("/")[-1] in _RANGES
  }


def thaw(packed: Packed) -> dict[str, Any]:
  """Variables that evaluate to what the frozen ones do.

  Decoded kernels are float32, and the weights of their layers have the width
  32, which passes them on bit for bit; products of two activations keep both
  widths.

  Returns:
    All collections, JAX arrays.
  """
  flat = flat_variables(packed)
  for name, kernel in packed.kernels.items():
    rows = [decode(part, kernel.kind) for part in kernel.parts]
    flat[name] = jnp.stack(rows).reshape(*kernel.stack, *rows[0].shape)
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def flat_variables(packed: Packed) -> dict[str, jax.Array]:
  """The variables of `thaw` by path, all but the kernels."""
  flat = {name: jnp.asarray(leaf) for name, leaf in packed.tensors.items()}
  for path, layer in packed.bits.items():
    prefix = f"{path}/" if path else ""
    if f"params/{prefix}kernel" in packed.kernels:
      shape = np.shape(layer.weights)
      layer = layer._replace(weights=np.full(shape, grids.FLOAT_WIDTH))
    for field, width in layer._asdict().items():
      flat[f"precision/{prefix}{field}"] = jnp.asarray(width, jnp.int32)
  return flat


def decode(part: Part, kind: str) -> jax.Array:
  """The values of a part, float32, as the layers' products take them."""
  if part.width == grids.FLOAT_WIDTH:
    return jnp.asarray(part.codes)
  codes = jnp.asarray(part.codes.astype(np.int32) + lowest(part.width, kind))
  return _decode(grids.Quantized(codes, part.scale, part.offset))


def lowest(width: int, kind: str) -> int:
  """The grid's lowest code, which is stored as 0."""
  return 0 if kind == "affine" else 1 - (1 << (width - 1))


def flat_bits(packed: Packed) -> dict[str, list[int]]:
  """{layer: three widths}; the layers of a stack are `path[i]` each."""
  found = {}
  for path, layer in packed.bits.items():
    shape = np.shape(layer.weights)
    for index in np.ndindex(shape):
      name = path + "".join(f"[{i}]" for i in index)
      found[name] = [
        int(np.broadcast_to(width, shape)[index]) for width in layer
      ]
  return found


# In one compiled program, as the layers do it: a compiler may join the product
# and the sum, which rounds once.
_decode = jax.jit(functools.partial(grids.decode, dtype=jnp.float32))


@functools.partial(jax.jit, static_argnames=("grid", "axes", "dtype"))
def _encode(kernel, width, *, grid, axes, dtype):
  kernel = kernel.astype(dtype)
  limits = ops.operand_range(kernel, grid, axes)
  found = grids.encode(kernel, width, grid, limits)
  finite = jnp.all(jnp.isfinite(kernel)) & jnp.all(jnp.isfinite(found.scale))
  return found, finite


def _freeze_kernel(path, layer, widths, leaf) -> Kernel:
  stack = np.shape(widths.weights)
  if np.shape(leaf) != (*stack, *layer.shape):
    raise errors.ExportError(
      f"layer {path!r}: its kernel of shape {np.shape(leaf)} is not stacked"
      f" along its first axis, as its widths of shape {stack} are; give its"
      " scan variable_axes={'params': 0, ...}"
    )
  grid = layer.quantization.weights
  rows = jnp.asarray(leaf).reshape(math.prod(stack), *layer.shape)
  parts = [
    _freeze_part(path, layer, grid, int(width), row)
    for width, row in zip(np.ravel(widths.weights), rows, strict=True)
  ]
  has_channels = grid is not None and grid.granularity == "channel"
  return Kernel(
    "affine" if grid is None else grid.kind,
    stack,
    layer.axes if has_channels else (),
    tuple(parts),
  )


def _freeze_part(path, layer, grid, width, kernel) -> Part:
  if grid is None or width == grids.FLOAT_WIDTH:
    values = np.asarray(jax.device_get(kernel.astype(jnp.float32)))
    if not np.all(np.isfinite(values)):
      raise _not_finite(path)
    return Part(grids.FLOAT_WIDTH, values, None, None)
  found, finite = jax.device_get(
    _encode(kernel, width, grid=grid, axes=layer.axes, dtype=layer.dtype)
  )
  if not finite:
    raise _not_finite(path)
  codes = found.codes.astype(np.int32) - lowest(width, grid.kind)
  return Part(width, codes.astype(np.uint16), found.scale, found.offset)


def _not_finite(path) -> errors.ExportError:
  return errors.ExportError(
    f"layer {path!r}: its weights, or their range, are not finite in float32;"
    " take them from before the run diverged"
  )


def _kept(name, leaf) -> np.ndarray:
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or (
    jnp.dtype(leaf.dtype).name not in DTYPES
  ):
    raise errors.ExportError(
      f"{name}: an array of {leaf.dtype}; use one of {', '.join(DTYPES)}, or"
      " leave the collection out"
    )
  return np.asarray(jax.device_get(leaf))


def _spec(x: Any) -> dict[str, Any]:
  x = _abstract(x)
  if not x.shape:
    raise errors.ExportError(
      "inputs: a scalar; the leading axis of each is the batch"
    )
  return {"shape": list(x.shape), "dtype": jnp.dtype(x.dtype).name}


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
  if not isinstance(x, jax.ShapeDtypeStruct):
    x = jnp.asarray(x)
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def abstract_inputs(
  inputs: Sequence[Mapping[str, Any]],
) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Shapes and dtypes of the inputs of a frozen model, one row each."""
  return tuple(
    jax.ShapeDtypeStruct((1, *x["shape"][1:]), jnp.dtype(x["dtype"]))
    for x in inputs
  )
