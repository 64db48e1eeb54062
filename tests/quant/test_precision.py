"""The collection `precision`: reading and assigning widths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.quant import grids, precision


def layer(*shape, value=8):
  return {
    field: jnp.full(shape, value, jnp.int32)
    for field in grids.LayerBits._fields
  }


def variables():
  return {
    "params": {"stem": {"kernel": jnp.ones((3, 3))}},
    "precision": {
      "stem": layer(),
      "stage1": {"block0": {"conv1": layer(), "conv2": layer()}},
      "scanned": {"layer": layer(3)},
    },
    "batch_stats": {"norm": {"mean": jnp.zeros(3)}},
  }


PATHS = ("stem", "stage1/block0/conv1", "stage1/block0/conv2", "scanned/layer")


def as_ints(bits):
  return {
    path: tuple(np.asarray(width).tolist() for width in widths)
    for path, widths in bits.items()
  }


def assert_same_structure(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for one, two in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert one.dtype == two.dtype and one.shape == two.shape


def test_the_layers_and_their_paths():
  bits = precision.layer_bits(variables())
  assert set(bits) == set(PATHS)
  assert as_ints(bits)["stem"] == (8, 8, 8)
  assert as_ints(bits)["scanned/layer"] == ([8] * 3, [8] * 3, [8] * 3)
  assert all(isinstance(b, grids.LayerBits) for b in bits.values())
  for bit in jax.tree.leaves(bits):
    assert bit.dtype == jnp.int32


def test_assigning_and_reading_is_a_round_trip():
  before = variables()
  bits = {
    "stem": grids.LayerBits(2, 3, 4),
    "stage1/block0/conv1": 5,
    "stage1/block0/conv2": 32,
    "scanned/layer": grids.LayerBits(np.array([2, 16, 32]), 7, [4, 5, 6]),
  }
  after = precision.assign_bits(before, bits)
  assert as_ints(precision.layer_bits(after)) == {
    "stem": (2, 3, 4),
    "stage1/block0/conv1": (5, 5, 8),
    "stage1/block0/conv2": (32, 32, 32),
    "scanned/layer": ([2, 16, 32], [7, 7, 7], [4, 5, 6]),
  }
  assert_same_structure(before, after)
  again = precision.assign_bits(after, precision.layer_bits(after))
  jax.tree.map(np.testing.assert_array_equal, after, again)
  # Everything else is the same object, and the argument is as it was.
  assert after["params"] is before["params"]
  assert after["batch_stats"] is before["batch_stats"]
  assert as_ints(precision.layer_bits(before))["stem"] == (8, 8, 8)


@pytest.mark.parametrize(
  ("width", "expected"),
  [
    (4, (4, 4, 8)),
    (32, (32, 32, 32)),
    (np.int64(6), (6, 6, 8)),
    (jnp.int32(32), (32, 32, 32)),
    (grids.LayerBits(3, 4, 5), (3, 4, 5)),
    ((3, 4, 5), (3, 4, 5)),
  ],
)
def test_one_width_for_all(width, expected):
  bits = as_ints(
    precision.layer_bits(precision.assign_bits(variables(), width))
  )
  assert bits["stem"] == bits["stage1/block0/conv2"] == expected
  assert bits["scanned/layer"] == tuple([b] * 3 for b in expected)


def test_one_width_for_each_layer_of_a_scan():
  bits = dict.fromkeys(PATHS, 8) | {"scanned/layer": np.array([4, 32, 5])}
  after = precision.assign_bits(variables(), bits)
  assert as_ints(precision.layer_bits(after))["scanned/layer"] == (
    [4, 32, 5],
    [4, 32, 5],
    [8, 32, 8],
  )


def test_the_root_layer_has_the_empty_path():
  root = {"precision": layer()}
  assert set(precision.layer_bits(root)) == {""}
  after = precision.assign_bits(root, {"": 3})
  assert as_ints(precision.layer_bits(after)) == {"": (3, 3, 8)}


def test_traced_widths():
  before = variables()

  @jax.jit
  def assign(before, width, widths):
    bits = dict.fromkeys(PATHS, width)
    return precision.assign_bits(before, bits | {"scanned/layer": widths})

  for width, gradient in ((3, 8), (32, 32)):
    after = assign(before, width, jnp.array([2, 3, 4]))
    assert_same_structure(before, after)
    bits = as_ints(precision.layer_bits(after))
    assert bits["stem"] == (width, width, gradient)
    assert bits["scanned/layer"] == ([2, 3, 4], [2, 3, 4], [8, 8, 8])
  assert_same_structure(before, jax.eval_shape(assign, before, 3, np.ones(3)))


def test_errors_name_the_layer_and_the_value():
  bits = dict.fromkeys(PATHS, 8)
  cases = {
    "no quantized layer 'steam'; the layers are 'stem'": bits | {"steam": 4},
    "layer 'scanned/layer' is missing; name all 4": (
      dict.fromkeys(PATHS[:-1], 8)
    ),
    "layer 'stem': bits = 1 is not a bit-width": bits | {"stem": 1},
    "layer 'stem': bits = 17 is not": bits | {"stem": 17},
    "layer 'stem': bits = 4.0 is not": bits | {"stem": 4.0},
    "layer 'stem': gradients = 33 is not": bits | {"stem": (4, 4, 33)},
    r"layer 'stem': bits = \(4, 4\) must be": bits | {"stem": (4, 4)},
    r"layer 'stem': weights has shape \(3,\)": bits | {"stem": np.full(3, 4)},
    r"layer 'scanned/layer': weights has shape \(2,\); use an int or shape": (
      bits | {"scanned/layer": np.full(2, 4)}
    ),
  }
  for message, wrong in cases.items():
    with pytest.raises(ValueError, match=message) as error:
      precision.assign_bits(variables(), wrong)
    assert "\n" not in str(error.value)
  with pytest.raises(ValueError, match="no collection 'precision'"):
    precision.layer_bits({"params": {}})
  with pytest.raises(ValueError, match="no collection 'precision'"):
    precision.assign_bits({"params": {}}, 8)
