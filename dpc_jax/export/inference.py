"""An export as a function again."""

import functools
import os
from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax

from dpc_jax.export import description, errors, format, freezing

# What a model raises on sizes or inputs that are not its own.
_MISFITS = (
  ArithmeticError,
  AttributeError,
  LookupError,
  TypeError,
  ValueError,
  flax.errors.FlaxError,
)


class Inference:
  """A function of inputs, compiled at its first call for a shape.

  It computes in float: kernels are decoded once, when it is made. What an
  export saves is space on a disk, not memory or time of an evaluation.

  Attributes:
    model: the module, without 8-bit storage; its kernels are values on their
      grids, its activations are quantized at the widths and over the running
      ranges that they were frozen with.
    variables: all collections, JAX arrays; yours to put on devices.
    manifest: of the export, {} of one that was not read from a disk.
  """

  def __init__(
    self,
    model: nn.Module,
    variables: Mapping[str, Any],
    manifest: Mapping[str, Any],
  ):
    """See `load` and `restore`, which check that these fit."""
    self.model = model
    self.variables = variables
    self.manifest = manifest
    self._apply = jax.jit(functools.partial(_apply, model))

  def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
    """What the model evaluates to: logits, or (log-probabilities, carry).

    Args:
      *inputs: arrays, as the model's `__call__` takes them: images are
        normalized as in training.
      **kwargs: further arrays or trees of them, such as the `carry` of
        `lstm_lm`; no flags, which a compiled function cannot branch on.
    """
    return self._apply(self.variables, inputs, kwargs)


def load(
  directory: str | os.PathLike[str], model: nn.Module | None = None
) -> Inference:
  """Reads an export; every file is checked against its checksum.

  Args:
    directory: that `save` wrote.
    model: the module that was frozen, quantized; None builds it from the
      manifest, which knows the models of `dpc_jax.models`.

  Returns:
    The function. It gives what the frozen model did in evaluation; where both
    are compiled for one device and shape, mostly bit for bit, unless that model
    had an integer `backend`: products here are simulated, and sums of floats
    differ in the last bits. No export holds `jax.default_matmul_precision`:
    set what the model was evaluated with.

  Raises:
    ExportError: what `format.read` refuses; an export of another model without
      `model`; a `model` with other variables.
  """
  packed, manifest = format.read(directory)
  try:
    return restore(packed, model, manifest)
  except errors.ExportError as error:
    raise errors.ExportError(f"{directory}: {error}") from None


def restore(
  packed: freezing.Packed,
  model: nn.Module | None = None,
  manifest: Mapping[str, Any] | None = None,
) -> Inference:
  """The same of a frozen model in memory.

  Args:
    packed: of `freeze`.
    model: see `load`.
    manifest: its manifest, if it was read from a disk.

  Raises:
    ExportError: as `load`.

  Example:
    >>> import jax.numpy as jnp
    >>> from dpc_jax.export import freezing
    >>> from dpc_jax.quant import layers
    >>> x = jnp.ones((1, 3))
    >>> model = layers.QuantDense(2)
    >>> variables = model.init(jax.random.key(0), x)
    >>> packed = freezing.freeze(model, variables, x)
    >>> packed.kernels["params/kernel"].parts[0].codes.dtype
    dtype('uint16')
    >>> run = restore(packed, model)
    >>> bool(jnp.allclose(run(x), model.apply(variables, x), atol=1e-5))
    True
  """
  if model is None:
    model = _build(packed.model)
  model = description.for_inference(model)
  variables = freezing.thaw(packed)
  _check(model, variables, packed)
  return Inference(model, variables, manifest or {})


def _apply(model, variables, inputs, kwargs):
  return model.apply(variables, *inputs, **kwargs, mutable=False)


def _build(found: Mapping[str, Any] | None) -> nn.Module:
  if found is None:
    raise errors.ExportError(
      "is of a model that dpc_jax.models does not have; pass it:"
      " load(directory, model=...)"
    )
  try:
    return description.build(found)
  except _MISFITS as error:
    raise errors.ExportError(
      f"its model cannot be built ({_in_one_line(error)}); use the dpc_jax that"
      " wrote it"
    ) from None


def _check(model, variables, packed) -> None:
  """Refuses variables that are another model's, and 8-bit storage."""
  inputs = freezing.abstract_inputs(packed.inputs)
  try:
    wanted = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  except _MISFITS as error:
    raise errors.ExportError(
      f"model: cannot be called with inputs of {_shapes(inputs)}:"
      f" {_in_one_line(error)}"
    ) from None
  wanted = flax.traverse_util.flatten_dict(
    flax.core.unfreeze(nn.meta.unbox(dict(wanted))), sep="/"
  )
  found = flax.traverse_util.flatten_dict(variables, sep="/")
  for name in sorted(wanted.keys() | found.keys()):
    here, there = (
      None if name not in tree else tree[name].shape for tree in (found, wanted)
    )
    # Collections that evaluation does not read need not be there.
    if here != there and (here is not None or _is_read(name)):
      raise errors.ExportError(
        f"model: does not fit the export: {name} is"
        f" {'absent' if there is None else f'of shape {there}'} in the model,"
        f" {'absent' if here is None else f'of shape {here}'} in the export;"
        " give the model that was frozen"
      )
  for path, layer in description.quantized_layers(
    model, variables, inputs
  ).items():
    if layer.quantization.storage_bits is not None:
      raise errors.ExportError(
        f"model: layer {path!r} has storage_bits ="
        f" {layer.quantization.storage_bits}, which decoded weights do not fit;"
        " build the model with storage_bits=None"
      )


def _is_read(name) -> bool:
  return name.split("/")[0] not in ("intermediates", "quant_probe")


def _in_one_line(error) -> str:
  return " ".join(str(error).split())


def _shapes(inputs) -> str:
  return ", ".join(f"shape {x.shape} and {x.dtype}" for x in inputs)
