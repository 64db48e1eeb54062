"""The examples in the docstrings run, and give what they say."""

import doctest
import importlib
import pkgutil

import pytest

import dpc_jax
from tests import test_architecture

# The rooms that `pip install .` suffices for.
ROOMS = sorted(set(test_architecture.ALLOWED) - test_architecture.IO_ROOMS)
MODULES = [
  module.name
  for module in pkgutil.walk_packages(dpc_jax.__path__, "dpc_jax.")
  if module.name.split(".")[1] in ROOMS
]
# What a reader of the README meets first.
WITH_EXAMPLE = (
  "assign_bits bitops dpc_bit_widths fake_quantize layer_bits layer_capacities"
  " layer_costs models.create precision_bounds quantize schedules.adaptive"
  " schedules.constant schedules.cyclic schedules.cyclic_dpc schedules.dpc"
  " schedules.progressive schedules.random_layerwise schedules.reversed_dpc"
  " schedules.uniform"
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name):
  result = doctest.testmod(importlib.import_module(name), verbose=False)
  assert result.failed == 0


@pytest.mark.parametrize("name", WITH_EXAMPLE.split())
def test_there_is_an_example_of(name):
  function = dpc_jax
  for part in name.split("."):
    function = getattr(function, part)
  module = importlib.import_module(function.__module__)
  examples = [
    example.source
    for test in doctest.DocTestFinder().find(module)
    for example in test.examples
  ]
  assert any(f"{function.__name__}(" in source for source in examples)
