"""Less memory: what normalization layers and ReLUs keep for the backward pass.

Integer codes (`Quantization(storage_bits=8)`) save little by themselves, since
the normalization and the ReLU around a quantized product keep float tensors of
their own. Within `norms` they do not; the backward pass computes them anew:

    with remat.norms():
      y, updates = model.apply(variables, x, mutable=["batch_stats"])

The normalization layers may be those of any Flax module. All is decided while
the call is traced, as with `nn.intercept_methods`: what was compiled outside of
`norms` stays as it is.

XLA:CPU drops optimization barriers, and without them keeps the float tensors
all the same. `compiler_options` makes it heed them:

    jax.jit(step).lower(...).compile(remat.compiler_options("cpu"))
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dpc_jax.quant import grids, spans

# And what is derived from them.
NORMS = (
  nn.BatchNorm,
  nn.LayerNorm,
  nn.RMSNorm,
  nn.GroupNorm,
  nn.InstanceNorm,
)
# What a recipe may ask for, and the `storage_bits` of `norms` that it means.
POLICIES = {"norms": None, "norms8": 8}

# Of the codes that stand for an input: a range for each feature.
_GRID = grids.Grid(granularity="channel")
_FLOAT_WIDTH = grids.FLOAT_WIDTH
# Width that inputs of normalizations are kept at; 0 outside of `norms`.
_width = contextvars.ContextVar("width", default=0)


def compiler_options(platform: str) -> dict[str, str]:
  """Options of `.compile()` with which a platform heeds barriers.

  Args:
    platform: such as "cpu" or "gpu": `jax.Device.platform`.

  Returns:
    {} where it heeds them anyway.
  """
  if platform != "cpu":
    return {}
  return {"xla_disable_hlo_passes": "cse_barrier_expander"}


@contextlib.contextmanager
def norms(storage_bits: int | None = None) -> Iterator[None]:
  """Within it, normalization layers keep their input alone, and `relu` a mask.

  Outputs and updated collections are what they are without it. Of a layer in
  `NORMS` with the input x, reverse-mode gradients are

    None   those of the plain layer, computed from the same numbers: x is kept
           in its own dtype;
    8      those at the decoded codes of x, 8 bits, nearest-even, on an affine
           grid over the range of each feature (the last axis): an
           approximation, our decision. The statistics and normalized values of
           the backward pass are off by up to half a step, (hi - lo) / 510.
           Devices that share the rows of a batch join the ranges in each layer.

  Args:
    storage_bits: None or 8.

  Raises:
    ValueError: another `storage_bits`.
  """
  if storage_bits not in POLICIES.values():
    raise ValueError(
      f"storage_bits = {storage_bits!r}: use None, which keeps the inputs of"
      " normalizations as they are, or 8"
    )
  copies = []

  def intercept(next_fun, args, kwargs, context):
    module = context.module
    is_norm = isinstance(module, NORMS) and context.method_name == "__call__"
    if not is_norm or module.is_initializing() or copies:
      return next_fun(*args, **kwargs)
    return _rematerialized(module, storage_bits, args, kwargs, copies)

  token = _width.set(storage_bits or _FLOAT_WIDTH)
  try:
    with nn.intercept_methods(intercept):
      yield
  finally:
    _width.reset(token)


def relu(x: jax.Array, *, of_norm: bool = False) -> jax.Array:
  """`nn.relu`, which within `norms` keeps a boolean mask, a byte per element.

  Output and gradient are those of `nn.relu`; reverse mode only within `norms`.

  Args:
    x: any shape.
    of_norm: True says that `x` follows from a normalization and what the
      backward pass has anyway. It computes x again then, unless the input of
      the normalization is kept as codes, and keeps no mask.
  """
  width = _width.get()
  if not width or (of_norm and width == _FLOAT_WIDTH):
    return nn.relu(x)
  return _masked_relu(x)


@jax.custom_vjp
def _masked_relu(x):
  return nn.relu(x)


def _relu_forward(x):
  return nn.relu(x), x > 0


def _relu_backward(mask, gradient):
  mask, gradient = lax.optimization_barrier((mask, gradient))
  return (jnp.where(mask, gradient, 0),)


_masked_relu.defvjp(_relu_forward, _relu_backward)


def _rematerialized(module, storage_bits, args, kwargs, copies):
  """The call of a bound module, as a pure function of its variables and x."""
  kwargs = dict(kwargs)
  x, *rest = args or (kwargs.pop("x"),)
  variables = module.variables
  # What it makes by itself, such as what it sows, is no variable yet.
  mutable = module.scope.mutable or []
  pure = module.clone(parent=None)
  masks = {k: v for k, v in kwargs.items() if isinstance(v, jax.Array)}
  static = {k: v for k, v in kwargs.items() if k not in masks}

  def call(variables, masks, x):
    copies.append(pure)  # whose own call is the plain one
    try:
      return pure.apply(variables, x, *rest, mutable=mutable, **masks, **static)
    finally:
      copies.pop()

  if storage_bits is None:
    call = jax.checkpoint(call)
  else:
    call = _from_codes(call, x.dtype)
  y, updates = call(variables, masks, x)
  for collection, leaves in updates.items():
    for name, value in leaves.items():
      module.put_variable(collection, name, value)
  return y


def _from_codes(call: Callable[..., Any], dtype: Any) -> Callable[..., Any]:
  """`call`, with the gradient at the decoded codes of its last argument."""

  def forward(variables, masks, x):
    limits = spans.value_range(x, grids.channel_axes(_GRID, None))
    codes = grids.storage_codes(grids.encode(x, 8, _GRID, limits), _GRID)
    return call(variables, masks, x), (variables, masks, codes)

  def backward(residuals, gradients):
    variables, masks, codes = residuals
    # Else a compiler may see that x is at hand, and keep it.
    codes, gradients = lax.optimization_barrier((codes, gradients))
    x = grids.decode(codes, dtype)
    return jax.vjp(call, variables, masks, x)[1](gradients)

  wrapped = jax.custom_vjp(call)
  wrapped.defvjp(forward, backward)
  return wrapped
