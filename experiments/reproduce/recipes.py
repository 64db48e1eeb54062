"""The recipes of the tables, by name."""

from typing import Any

import ml_collections

from configs import (
  cifar10_mobilenet_v2,
  cifar10_resnet8,
  cifar10_resnet38,
  cifar10_resnet74,
  cifar10_resnet110,
  cifar10_wide_resnet38,
  cifar100_mobilenet_v2,
  cifar100_resnet38,
  cifar100_resnet74,
  cifar100_resnet110,
  cifar100_wide_resnet38,
  digits_resnet8,
  imagenet_resnet18,
  imagenet_resnet34,
  imagenet_resnet50,
  ptb_lstm,
  wikitext2_transformer,
  wikitext103_transformer,
)

_MODULES: dict[str, Any] = {
  "cifar100_mobilenet_v2": cifar100_mobilenet_v2,
  "cifar100_resnet110": cifar100_resnet110,
  "cifar100_resnet38": cifar100_resnet38,
  "cifar100_resnet74": cifar100_resnet74,
  "cifar100_wide_resnet38": cifar100_wide_resnet38,
  "cifar10_mobilenet_v2": cifar10_mobilenet_v2,
  "cifar10_resnet110": cifar10_resnet110,
  "cifar10_resnet38": cifar10_resnet38,
  "cifar10_resnet74": cifar10_resnet74,
  "cifar10_resnet8": cifar10_resnet8,
  "cifar10_wide_resnet38": cifar10_wide_resnet38,
  "digits_resnet8": digits_resnet8,
  "imagenet_resnet18": imagenet_resnet18,
  "imagenet_resnet34": imagenet_resnet34,
  "imagenet_resnet50": imagenet_resnet50,
  "ptb_lstm": ptb_lstm,
  "wikitext103_transformer": wikitext103_transformer,
  "wikitext2_transformer": wikitext2_transformer,
}


def get_config(recipe: str, argument: str = "dpc") -> ml_collections.ConfigDict:
  """The config of configs/RECIPE.py; `argument` as after a flag's colon."""
  return _MODULES[recipe].get_config(argument)
