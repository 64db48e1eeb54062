"""Schedules: what they choose, and the contract of their state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.policy import dpc, schedules
from dpc_jax.quant import grids

CAPACITIES = {"z/conv": 20, "": 100, "blocks": np.full(3, 1000, np.int64)}

_SCHEDULES = {
  "constant int": lambda: schedules.constant(6),
  "constant bits": lambda: schedules.constant(grids.LayerBits(4, 5, 6)),
  "constant mapping": lambda: schedules.constant(
    {"": 3, "z/conv": 4, "blocks": grids.LayerBits(np.arange(3, 6), 8, 32)}
  ),
  "dpc": lambda: schedules.dpc(3, 8),
  "dpc weights only": lambda: schedules.dpc(3, 8, activations=32, gradients=32),
}


def _ints(bits):
  return {path: tuple(np.asarray(b).tolist() for b in bits[path])
          for path in bits}  # fmt: skip


def _bits(schedule):
  bits, _ = schedule.update(schedule.init(CAPACITIES), step=jnp.int32(0))
  return _ints(bits)


def _signature(tree):
  leaves, treedef = jax.tree.flatten(tree)
  return treedef, [(x.shape, x.dtype, x.weak_type) for x in leaves]


@pytest.mark.parametrize("name", _SCHEDULES)
def test_state_and_bits_keep_structure_shapes_and_types(name):
  schedule = _SCHEDULES[name]()
  traces = []

  @jax.jit
  def update(state, step):
    traces.append(step)
    return schedule.update(state, step=step)

  state = first = schedule.init(CAPACITIES)
  signature = _signature(state)
  for step in range(20):
    bits, state = update(state, jnp.int32(step))
    assert _signature(state) == signature
  assert len(traces) == 1
  eager, after = schedule.update(first, step=jnp.int32(0), statistics=None)
  assert _signature(after) == signature
  assert _signature(eager) == _signature(bits)
  jax.tree.map(np.testing.assert_array_equal, eager, bits)
  assert set(bits) == set(CAPACITIES)
  for path, layer in bits.items():
    assert isinstance(layer, grids.LayerBits)
    for width in layer:
      assert width.dtype == jnp.int32
      assert width.shape == np.shape(CAPACITIES[path])


def test_constant_int_means_gradients_at_8_and_32_float():
  assert _bits(schedules.constant(6)) == {
    "z/conv": (6, 6, 8),
    "": (6, 6, 8),
    "blocks": ([6] * 3, [6] * 3, [8] * 3),
  }
  assert _bits(schedules.constant(32))[""] == (32, 32, 32)


def test_constant_mapping_sets_layers_singly():
  bits = _bits(_SCHEDULES["constant mapping"]())
  assert bits == {
    "z/conv": (4, 4, 8),
    "": (3, 3, 8),
    "blocks": ([3, 4, 5], [8] * 3, [32] * 3),
  }


def test_dpc_gives_eq_1_to_weights_and_activations():
  expected = dpc.dpc_bit_widths(
    CAPACITIES, 3, 8, delta=-1, center="log_midpoint"
  )
  bits = _bits(schedules.dpc(3, 8, delta=-1, center="log_midpoint"))
  assert len(set(map(str, bits.values()))) == 3
  for path, b in expected.items():
    b = np.asarray(b)
    g = np.full_like(b, 8)
    assert bits[path] == (b.tolist(), b.tolist(), g.tolist())


def test_dpc_passes_the_log_form_on():
  bits = _bits(schedules.dpc(4, 8, log_form="product"))
  expected = dpc.dpc_bit_widths(CAPACITIES, 4, 8, log_form="product")
  assert bits["z/conv"][0] == expected["z/conv"]
  assert expected["z/conv"] != dpc.dpc_bit_widths(CAPACITIES, 4, 8)["z/conv"]


@pytest.mark.parametrize("operand", grids.LayerBits._fields)
def test_dpc_sets_each_operand_by_itself(operand):
  own = dpc.dpc_bit_widths(CAPACITIES, 3, 8)["z/conv"]
  default = {"weights": own, "activations": own, "gradients": 8}
  for width, expected in ((5, 5), (32, 32), (None, own)):
    bits = _bits(schedules.dpc(3, 8, **{operand: width}))["z/conv"]
    assert bits == tuple((default | {operand: expected}).values())


@pytest.mark.parametrize(
  ("build", "message"),
  [
    (lambda: schedules.constant(1), "1"),
    (lambda: schedules.constant({"a": 17}), "17"),
    (lambda: schedules.dpc(9, 8), "b_min=9 is above b_max=8"),
    (lambda: schedules.dpc(3, 8, delta=2), "delta=2"),
    (lambda: schedules.dpc(3, 8, center="mode"), "center='mode'"),
    (lambda: schedules.dpc(3, 8, log_form="ln"), "log_form='ln'"),
    (lambda: schedules.dpc(3, 8, weights=1), "weights = 1 "),
    (lambda: schedules.dpc(3, 8, activations=31), "activations = 31 "),
    (lambda: schedules.dpc(3, 8, gradients=8.0), r"gradients = 8\.0 "),
    (lambda: schedules.dpc(3, 8, weights=(4, 4)), r"weights=\(4, 4\)"),
  ],
)
def test_parameters_are_checked_where_the_schedule_is_built(build, message):
  with pytest.raises(ValueError, match=message):
    build()


@pytest.mark.parametrize(
  ("bits", "message"),
  [
    ({"": 3, "z/conv": 4, "blocks": 5, "nowhere": 6}, "no layer 'nowhere'"),
    ({"": 3, "z/conv": 4}, "layer 'blocks' is missing"),
    (
      {"": 3, "z/conv": 4, "blocks": grids.LayerBits(np.full(2, 4), 8, 8)},
      r"layer 'blocks': widths of shape \(2,\)",
    ),
    (
      {"": grids.LayerBits(np.full(3, 4), 8, 8), "z/conv": 4, "blocks": 4},
      r"layer '': widths of shape \(3,\)",
    ),
  ],
)
def test_layers_are_checked_in_init(bits, message):
  with pytest.raises(ValueError, match=message):
    schedules.constant(bits).init(CAPACITIES)


def test_dpc_gives_b_max_to_products_and_no_part_in_the_center():
  products = {"qk": 0, "blocks/qk": np.zeros(3, np.int64)}
  init = schedules.dpc(3, 8).init
  bits = _ints(init(CAPACITIES | products).bits)
  assert bits.pop("qk") == (8, 8, 8)
  assert bits.pop("blocks/qk") == ([8] * 3, [8] * 3, [8] * 3)
  assert bits == _ints(init(CAPACITIES).bits)
  # Both operands are activations.
  for operand, width, expected in (
    ("weights", 5, (8, 8, 8)),
    ("activations", 32, (32, 32, 8)),
    ("gradients", 6, (8, 8, 6)),
  ):
    bits = schedules.dpc(3, 8, **{operand: width}).init(CAPACITIES | products)
    for path in products:
      got = [np.unique(w).tolist() for w in bits.bits[path]]
      assert got == [[w] for w in expected]
  with pytest.raises(ValueError, match=r"\['qk'\]=0, and no other"):
    init({"qk": 0})


def test_dpc_refuses_a_model_without_layers():
  with pytest.raises(ValueError, match="no layer"):
    schedules.dpc(3, 8).init({})
