"""The models, and the table name -> constructor."""

import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from dpc_jax.models import resnet
from dpc_jax.quant import grids

DEFAULT_QUANTIZATION = grids.Quantization()

_CONSTRUCTORS: dict[str, Callable[..., nn.Module]] = {
  f"resnet{6 * n + 2}": functools.partial(resnet.ResNet, blocks=n)
  for n in (1, 2, 3, 5, 6, 7, 9, 12, 18)
}


def names() -> tuple[str, ...]:
  """Names that `create` knows; `resnet<6n+2>` is known for any n >= 1."""
  return tuple(_CONSTRUCTORS)


def create(
  name: str,
  *,
  num_classes: int,
  quantization: grids.Quantization | None = DEFAULT_QUANTIZATION,
  **sizes: Any,
) -> nn.Module:
  """Builds a model by name.

  Args:
    name: one of `names()`, such as "resnet38".
    num_classes: number of classes.
    quantization: the grids; None is the plain float model with the same
      parameters, layer for layer.
    **sizes: further attributes of the model, such as `width`.

  Raises:
    ValueError: an unknown name, a number of classes below 1, or an unknown
      size.
  """
  for field, value in {"num_classes": num_classes, **sizes}.items():
    if isinstance(value, int) and value < 1:
      raise ValueError(f"{field} = {value}: must be at least 1")
  if "blocks" in sizes:
    raise ValueError("blocks: the model's name sets the depth")
  try:
    return _constructor(name)(
      num_classes=num_classes, quantization=quantization, **sizes
    )
  except TypeError as error:
    raise ValueError(f"model {name!r}: {error}") from None


def _constructor(name: str) -> Callable[..., nn.Module]:
  if name in _CONSTRUCTORS:
    return _CONSTRUCTORS[name]
  depth = re.fullmatch(r"resnet(\d+)", name)
  if depth and int(depth[1]) >= 8 and (int(depth[1]) - 2) % 6 == 0:
    return functools.partial(resnet.ResNet, blocks=(int(depth[1]) - 2) // 6)
  raise ValueError(
    f"model.name = {name!r} is unknown; use one of {', '.join(names())}, or"
    " resnet<6n+2> for another n"
  )
