"""Every recipe, with every method that its docstring names."""

import importlib
import pathlib

import jax
import numpy as np
import pytest

from configs import default
from dpc_jax.data import sources
from dpc_jax.training import build, optimizer
from dpc_jax.training import config as config_lib

ROOT = pathlib.Path(__file__).parent.parent.parent
NAMES = sorted(
  path.stem
  for path in (ROOT / "configs").glob("*.py")
  if path.stem != "__init__"
)
METHODS = ("float", "static8", "dpc")


def get_config(name, method):
  return importlib.import_module(f"configs.{name}").get_config(method)


def flat(config):
  return set(config_lib._flat(config.to_dict()))


def test_the_recipes_are_there():
  assert {
    "cifar10_resnet8",
    "cifar10_resnet20",
    "cifar10_resnet38",
    "cifar10_resnet74",
    "cifar10_resnet110",
    "default",
    "digits_resnet8",
  } <= set(NAMES)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_recipe(name, method):
  config = get_config(name, method)
  assert config.precision.method == method
  assert flat(config) == flat(default.get_config())
  if name == "default":
    config.steps = 10
  config_lib.validate(config)
  build.make_model(config, num_classes=10)
  build.make_schedule(config)
  if config.data.name == "digits":
    check_build(config)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "default"])
def test_docstring_has_the_command(name):
  doc = importlib.import_module(f"configs.{name}").__doc__
  assert f"python -m experiments.train --config=configs/{name}.py:dpc" in doc
  assert all(method in doc for method in METHODS)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("cifar10_")])
def test_recipe_builds_on_images_like_its_own(name):
  """The images themselves are the business of the tests of `data`."""
  check_build(get_config(name, "dpc"), cifar_like())


def cifar_like():
  split = sources.Split(
    np.zeros((45_000, 1, 1, 3), np.uint8), np.zeros(45_000, np.int32)
  )
  return sources.ImageData(
    splits={"train": split, "validation": split, "test": split},
    num_classes=10,
    image_shape=(32, 32, 3),
    mean=(0.5,) * 3,
    std=(0.2,) * 3,
    class_names=tuple("abcdefghij"),
    augment=True,
  )


def check_build(config, data=None):
  parts = build.build(config, data)
  assert parts.config.steps >= 1
  state = jax.eval_shape(parts.init, jax.random.key(0))
  quantized = config.precision.method != "float"
  assert ("precision" in state.model_state) == quantized
  assert bool(state.cost.sums) == quantized
  assert set(state.cost.sums) <= set(parts.costs)
  schedule = optimizer.learning_rate(parts.config)
  assert float(schedule(parts.config.steps - 1)) < 0.1


def test_cpts_recipe():
  config = get_config("cifar10_resnet38", "dpc")
  assert (config.steps, config.batch_size) == (64_000, 128)
  assert config.optimizer.to_dict() == {
    "name": "sgd",
    "learning_rate": 0.1,
    "weight_decay": 1e-4,
    "momentum": 0.9,
    "schedule": "steps",
    "warmup": 0.0,
    "boundaries": (0.5, 0.75),
  }
