"""What a model is: its name and sizes, and what its layers do to kernels."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpc_jax import models
from dpc_jax.export import errors
from dpc_jax.quant import grids, layers, products, wrap

# Attributes of a model that `models.create` has arguments of its own for, and
# Flax's.
_NOT_SIZES = ("num_classes", "quantization", "parent", "name")
_DTYPES = {
  "bfloat16": jnp.bfloat16,
  "float16": jnp.float16,
  "float32": jnp.float32,
}


class Layer(NamedTuple):
  """A quantized layer, as one evaluation of the model meets it.

  Attributes:
    quantization: its grids.
    shape: of its kernel, inside of any stack; None of a product of two
      activations.
    dtype: of the kernel as the product takes it.
    axes: of the kernel's output channels.
  """

  quantization: grids.Quantization
  shape: tuple[int, ...] | None
  dtype: Any
  axes: tuple[int, ...]


def describe(model: nn.Module) -> dict[str, Any] | None:
  """How `models.create` builds a model, in a form that JSON can hold.

  Returns:
    {"name", "num_classes", "sizes", "quantization"}, sizes being those that
    differ from the name's; None of a model that `models.create` does not
    build.
  """
  if not {f.name for f in dataclasses.fields(model)} >= {
    "num_classes",
    "quantization",
  }:
    return None
  found = {}
  for name in _candidates(model):
    sizes = _sizes_of(name, model)
    if sizes is not None:
      found[name] = sizes
  if not found:
    return None
  name = min(found, key=lambda name: len(found[name]))
  return {
    "name": name,
    "num_classes": model.num_classes,
    "sizes": found[name],
    "quantization": grids_to_json(model.quantization),
  }


def build(description: Mapping[str, Any]) -> nn.Module:
  """The model of a description, for inference: as `for_inference`.

  Raises:
    ValueError: a name, a size or a grid that this version does not know.
  """
  return models.create(
    description["name"],
    num_classes=description["num_classes"],
    quantization=grids_from_json(description["quantization"]),
    **{k: _from_json(k, v) for k, v in description["sizes"].items()},
  )


def grids_to_json(
  quantization: grids.Quantization | None,
) -> dict[str, Any] | None:
  """{"weights", "activations", "gradients"}: kind, granularity, rounding."""
  if quantization is None:
    return None
  found = {f: getattr(quantization, f) for f in grids.LayerBits._fields}
  return {
    field: None if grid is None else dataclasses.asdict(grid)
    for field, grid in found.items()
  }


def grids_from_json(
  found: Mapping[str, Any] | None,
) -> grids.Quantization | None:
  """The inverse of `grids_to_json`; all else has its default.

  Raises:
    ValueError: a grid of a kind that this version does not know.
  """
  if found is None:
    return None
  return grids.Quantization(
    **{
      field: None if found[field] is None else grids.Grid(**found[field])
      for field in grids.LayerBits._fields
    }
  )


def for_inference(model: nn.Module) -> nn.Module:
  """The same model with grids alone: no 8-bit storage, no integer products.

  Delayed ranges, which are of training, are left out too. A width of 32,
  which decoded weights have, does not fit 8-bit storage. Models without an
  attribute `quantization` are returned as they are.
  """
  quantization = getattr(model, "quantization", None)
  if not isinstance(quantization, grids.Quantization):
    return model
  plain = grids_from_json(grids_to_json(quantization))
  return model.clone(quantization=plain)


def quantized_layers(
  model: nn.Module, variables: Mapping[str, Any], inputs: tuple[Any, ...]
) -> dict[str, Layer]:
  """The layers with widths that an evaluation calls, {path: Layer}.

  Evaluated abstractly: nothing is computed.

  Args:
    model: quantized.
    variables: its own, arrays or shapes.
    inputs: what it is called with, arrays or shapes.

  Raises:
    ExportError: a layer that would compute in another dtype with a kernel of
      float32, which decoded ones are.
  """
  found: dict[str, Layer] = {}
  wrapped: list[grids.Quantization] = []

  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    if isinstance(module, wrap.Quantized):
      wrapped.append(module.quantization)
      try:
        return next_fun(*args, **kwargs)
      finally:
        wrapped.pop()
    if context.method_name == "__call__" and module.has_variable(
      "precision", "weights"
    ):
      layer = _layer(module, args, kwargs, wrapped)
      if layer is not None:
        found["/".join(module.path)] = layer
    return next_fun(*args, **kwargs)

  def apply(variables, inputs):
    with nn.intercept_methods(interceptor):
      return model.apply(variables, *inputs, mutable=False)

  jax.eval_shape(apply, variables, inputs)
  return found


def _layer(module, args, kwargs, wrapped) -> Layer | None:
  """What is met, None of a module that is no layer by itself."""
  quantization = getattr(module, "quantization", None)
  if quantization is None and wrapped:
    quantization = wrapped[-1]
  if isinstance(module, products.QuantProduct):
    return Layer(quantization, None, None, ())
  is_own = isinstance(module, layers.QuantDense | layers.QuantConv)
  is_linear = isinstance(
    module, nn.Dense | nn.DenseGeneral | nn.Einsum | nn.Conv
  )
  if not (is_own or is_linear) or quantization is None:
    return None
  kernel = nn.meta.unbox(module.get_variable("params", "kernel"))
  bias = nn.meta.unbox(module.get_variable("params", "bias"))
  inputs = args[0] if args else kwargs["inputs"]
  dtype = nn.dtypes.canonicalize_dtype(inputs, kernel, bias, dtype=module.dtype)
  loaded = nn.dtypes.canonicalize_dtype(
    inputs, kernel.astype(jnp.float32), bias, dtype=module.dtype
  )
  if loaded != dtype:
    raise errors.ExportError(
      f"layer {'/'.join(module.path)!r}: computes in {dtype} since its kernel"
      f" is of {kernel.dtype}, and an export's are float32; set the layer's"
      " dtype"
    )
  axes = _channel_axes(module, kernel.ndim, args, kwargs)
  return Layer(quantization, kernel.shape, dtype, axes)


def _channel_axes(module, ndim, args, kwargs) -> tuple[int, ...]:
  """Axes of a kernel that are not contracted, as `quant.ops` takes them."""
  if isinstance(module, nn.Einsum):
    text = args[1] if len(args) > 1 else kwargs.get("einsum_str")
    text = nn.merge_param("einsum_str", module.einsum_str, text)
    operands, output = text.replace(" ", "").split("->")
    kernel = operands.split(",")[1]
    return tuple(i for i, c in enumerate(kernel) if c in output)
  if isinstance(module, nn.DenseGeneral):
    features, batch = (
      len(x) if isinstance(x, tuple | list) else int(x is not None)
      for x in (module.features, module.batch_dims)
    )
    return (*range(batch), *range(ndim - features, ndim))
  return (ndim - 1,)


def _candidates(model) -> Iterator[str]:
  yield from models.names()
  blocks = getattr(model, "blocks", None)
  if isinstance(blocks, int):
    yield f"resnet{6 * blocks + 2}"


def _sizes_of(name, model) -> dict[str, Any] | None:
  """The sizes with which a name gives just this model, or None."""
  arguments = {
    "num_classes": model.num_classes,
    "quantization": model.quantization,
  }
  try:
    plain = models.create(name, **arguments)
    if type(plain) is not type(model):
      return None
    own, others = _attributes(model), _attributes(plain)
    sizes = {k: value for k, value in own.items() if value != others[k]}
    again = models.create(
      name, **arguments, **{k: _from_json(k, v) for k, v in sizes.items()}
    )
  except ValueError:
    return None
  return sizes if _attributes(again) == own else None


def _attributes(model) -> dict[str, Any]:
  return {
    field.name: _to_json(field.name, getattr(model, field.name))
    for field in dataclasses.fields(model)
    if field.name not in _NOT_SIZES
  }


def _to_json(name, value) -> Any:
  if name == "dtype" and value is not None:
    value = jnp.dtype(value).name
    if value not in _DTYPES:
      raise errors.ExportError(f"dtype = {value}: use one of {list(_DTYPES)}")
    return value
  if isinstance(value, tuple | list):
    return [_to_json("", x) for x in value]
  if value is None or isinstance(value, bool | int | float | str):
    return value
  raise errors.ExportError(f"{name} = {value!r}: a JSON file cannot hold it")


def _from_json(name, value) -> Any:
  if name == "dtype" and value is not None:
    if value not in _DTYPES:
      raise errors.ExportError(f"dtype = {value!r}: use one of {list(_DTYPES)}")
    return _DTYPES[value]
  if isinstance(value, list):
    return tuple(_from_json("", x) for x in value)
  return value
