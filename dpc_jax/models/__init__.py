"""The models, and the table name -> constructor."""

import dataclasses
import difflib
import functools
import numbers
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from dpc_jax.models import (
  lstm,
  mobilenet_v2,
  resnet,
  resnet_imagenet,
  stacking,
  transformer,
  vit,
  wide_resnet,
)
from dpc_jax.quant import grids

DEFAULT_QUANTIZATION = grids.Quantization()

stack_blocks = stacking.stack_blocks
unstack_blocks = stacking.unstack_blocks

# Names of the models that read tokens, not images.
LANGUAGE_MODELS = ("lstm_lm", "transformer_lm")

_CONSTRUCTORS: dict[str, Callable[..., nn.Module]] = {
  **{
    f"resnet{6 * n + 2}": functools.partial(resnet.ResNet, blocks=n)
    for n in (1, 2, 3, 5, 6, 7, 9, 12, 18)
  },
  "wide_resnet38": functools.partial(wide_resnet.wide_resnet, blocks=6),
  **{
    f"resnet{depth}_imagenet": functools.partial(
      resnet_imagenet.ResNetImageNet, blocks=blocks, bottleneck=bottleneck
    )
    for depth, blocks, bottleneck in (
      (18, (2, 2, 2, 2), False),
      (34, (3, 4, 6, 3), False),
      (50, (3, 4, 6, 3), True),
    )
  },
  "mobilenet_v2": mobilenet_v2.mobilenet_v2,
  "mobilenet_v2_imagenet": mobilenet_v2.mobilenet_v2_imagenet,
  "vit_tiny": vit.vit_tiny,
  "vit_small": vit.vit_small,
  "vit_tiny_imagenet": vit.vit_tiny_imagenet,
  "vit_small_imagenet": vit.vit_small_imagenet,
  "lstm_lm": lstm.LSTMLM,
  "transformer_lm": transformer.TransformerLM,
}
# Sizes that may be 0.
_RATES = (
  "dropout",
  "attention_dropout",
  "activation_dropout",
  "tail_dropout",
)


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
    num_classes: number of classes; of a language model, words of the
      vocabulary.
    quantization: the grids; None is the plain float model with the same
      parameters, layer for layer.
    **sizes: further attributes of the model, such as `width`; a list is taken
      as a tuple.

  Raises:
    ValueError: an unknown name or size, a size below 1, one that is no integer
      where the model counts, or one that the model's name sets.

  Example:
    >>> model = create("resnet8", num_classes=10, width=4)
    >>> model.blocks, model.width
    (1, 4)
  """
  constructor = _constructor(name)
  # Modules are hashed.
  sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
  for field, value in {"num_classes": num_classes, **sizes}.items():
    is_size = isinstance(value, int) and not isinstance(value, bool)
    if is_size and value < 1 and field not in _RATES:
      raise ValueError(f"{field} = {value}: must be at least 1")
    if field in getattr(constructor, "keywords", ()):
      raise ValueError(f"{field}: the model's name sets it; leave it out")
  try:
    model = constructor(
      num_classes=num_classes, quantization=quantization, **sizes
    )
  except TypeError as error:
    unknown = re.search(r"unexpected keyword argument ('\w+')", str(error))
    reason = f"has no size {unknown[1]}; leave it out" if unknown else error
    raise ValueError(f"model {name!r}: {reason}") from None
  _check_integers(model)
  return model


def _check_integers(model: nn.Module) -> None:
  for field in dataclasses.fields(model):
    value = getattr(model, field.name)
    is_integer = isinstance(value, numbers.Integral)
    if field.type is int and (not is_integer or isinstance(value, bool)):
      raise ValueError(f"{field.name} = {value!r}: must be an integer")


def _constructor(name: str) -> Callable[..., nn.Module]:
  if name in _CONSTRUCTORS:
    return _CONSTRUCTORS[name]
  depth = re.fullmatch(r"resnet(\d+)", str(name))
  if depth and int(depth[1]) >= 8 and (int(depth[1]) - 2) % 6 == 0:
    return functools.partial(resnet.ResNet, blocks=(int(depth[1]) - 2) // 6)
  close = difflib.get_close_matches(str(name).lower(), names(), n=1)
  meant = f"did you mean {close[0]!r}? " if close else ""
  raise ValueError(
    f"model.name = {name!r} is unknown; {meant}use one of"
    f" {', '.join(names())}, or resnet<6n+2> for another n"
  )
