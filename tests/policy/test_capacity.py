"""layer_capacities: N_k out of the collections of a model."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.policy import capacity


def _width(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def _precision(*shape):
  return {
    "weights": _width(*shape),
    "activations": _width(*shape),
    "gradients": _width(*shape),
  }


def _layer(*shape):
  return {
    "kernel": jax.ShapeDtypeStruct(shape, jnp.float32),
    "bias": jax.ShapeDtypeStruct(shape[-1:], jnp.float32),
  }


def test_only_layers_in_precision_count_and_keep_their_order():
  variables = {
    "params": {
      "stem": _layer(3, 3, 3, 16),
      "block": {"conv2": _layer(3, 3, 16, 16), "conv1": _layer(5, 7)},
      "head": _layer(64, 10),
    },
    "precision": {
      "stem": _precision(),
      "block": {"conv2": _precision(), "conv1": _precision()},
    },
  }
  found = capacity.layer_capacities(variables)
  assert list(found.items()) == [
    ("stem", 432),
    ("block/conv2", 2304),
    ("block/conv1", 35),
  ]
  assert all(type(count) is int for count in found.values())
  frozen = capacity.layer_capacities(flax.core.freeze(variables))
  assert frozen == found


def test_a_layer_at_the_root_has_the_empty_path():
  variables = {"params": _layer(4, 6), "precision": _precision()}
  assert capacity.layer_capacities(variables) == {"": 24}


def test_stacked_layers_count_one_layer_each():
  variables = {
    "params": {"blocks": {"conv": _layer(5, 3, 3, 4, 4)}},
    "precision": {"blocks": {"conv": _precision(5)}},
  }
  found = capacity.layer_capacities(variables)["blocks/conv"]
  assert found.dtype == np.int64
  np.testing.assert_array_equal(found, [144] * 5)


def test_float_model_counts_every_kernel():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Conv(4, (3, 3), name="conv")(x)
      x = nn.BatchNorm(use_running_average=True)(x)
      return nn.Dense(3, name="head")(x)

  x = jax.ShapeDtypeStruct((1, 8, 8, 2), jnp.float32)
  variables = jax.eval_shape(Net().init, jax.random.key(0), x)
  assert capacity.layer_capacities(variables) == {"conv": 72, "head": 12}


def test_boxed_parameters_count():
  init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
  model = nn.Dense(3, kernel_init=init)
  params = model.init(jax.random.key(0), jnp.ones((1, 2)))["params"]
  assert isinstance(params["kernel"], nn.Partitioned)
  variables = {"params": params, "precision": _precision()}
  assert capacity.layer_capacities(variables) == {"": 6}


def test_a_module_named_like_an_operand_is_no_layer():
  variables = {
    "params": {"weights": _layer(4, 6), "gradients": _layer(2, 2)},
    "precision": {"weights": _precision(), "gradients": {"weights": _width()}},
  }
  assert capacity.layer_capacities(variables) == {"weights": 24}


def test_a_layer_without_a_kernel_is_named():
  params = {"a": {"b": {"bias": _width(3)}}}
  variables = {"params": params, "precision": {"a": {"b": _precision()}}}
  match = "'a/b' has widths but no 'kernel'"
  with pytest.raises(ValueError, match=match):
    capacity.layer_capacities(variables)


def test_a_product_is_told_from_a_layer_whose_parameters_are_elsewhere():
  """Of another model, or of its other layout: one running range, not two."""
  variables = {
    "params": {"a": _layer(4, 6)},
    "precision": {"a": _precision(), "b": _precision()},
    "quant_stats": {"b": {"lo": _width(), "hi": _width(), "count": _width()}},
  }
  with pytest.raises(ValueError, match="'b' has widths but no 'kernel'"):
    capacity.layer_capacities(variables)
  variables["quant_stats"]["b"]["rhs_lo"] = _width()
  assert capacity.layer_capacities(variables) == {"a": 24, "b": 0}


def test_a_product_without_parameters_has_no_weights():
  params = {"a": {"dense": _layer(4, 6)}, "blocks": {"dense": _layer(5, 2, 3)}}
  variables = {
    "params": params,
    "precision": {
      "a": {"dense": _precision(), "qk": _precision()},
      "blocks": {"dense": _precision(5), "qk": _precision(5)},
      "alone": _precision(),
    },
  }
  found = capacity.layer_capacities(variables)
  stacked = found.pop("blocks/qk")
  assert stacked.dtype == np.int64
  np.testing.assert_array_equal(stacked, np.zeros(5))
  np.testing.assert_array_equal(found.pop("blocks/dense"), [6] * 5)
  assert found == {"a/dense": 24, "a/qk": 0, "alone": 0}
  assert type(found["a/qk"]) is int


def test_widths_that_do_not_divide_the_kernel_are_refused():
  variables = {"params": {"a": _layer(4, 6)}, "precision": {"a": _precision(5)}}
  with pytest.raises(ValueError, match="'a': a kernel of 24 weights"):
    capacity.layer_capacities(variables)


def test_parameters_alone_are_refused():
  with pytest.raises(ValueError, match=r"no collection 'params' in \['a'\]"):
    capacity.layer_capacities({"a": _layer(4, 6)})
