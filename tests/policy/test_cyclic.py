"""Cyclic precision: the formula at every step, and the schedules' contract."""

import fractions
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.policy import cyclic, dpc, schedules
from dpc_jax.quant import grids

CAPACITIES = {"z/conv": 20, "": 100, "blocks": np.array([20, 100, 1000])}
PRODUCTS = {"qk": 0, "blocks/qk": np.zeros(3, np.int64)}
BOUNDS = ((3, 8), (4, 8), (5, 8), (2, 16), (2, 8), (7, 13), (6, 6))


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, None, 0))
def _bits_at(update, state, step):
  return update(state, step=step)[0]


def _run(schedule, steps, capacities=CAPACITIES):
  """{path: LayerBits} of arrays with a leading axis of steps."""
  state = schedule.init(capacities)
  bits = _bits_at(schedule.update, state, jnp.arange(steps, dtype=jnp.int32))
  return jax.device_get(bits)


def _formula(low, high, phase, period):
  """CPT's formula in float64; `test_float64_tells_ties` says why 9 decimals."""
  angle = np.pi * phase / period + np.pi
  exact = low + (high - low) / 2 * (1 + np.cos(angle))
  return np.rint(np.round(exact, 9)).astype(np.int32)


def _int_lists(bits):
  return {path: [np.asarray(w).tolist() for w in bits[path]] for path in bits}


def test_a_cycle_written_out():
  # T = 8, cos(pi*t/8 + pi) = -1, -.9239, -.7071, -.3827, 0, .3827, .7071,
  # .9239: 5.5 + 2.5 of it is 3, 3.19, 3.73, 4.54, 5.5, 6.46, 7.27, 7.81.
  bits = _run(cyclic.cyclic(3, 8, steps=16, cycles=2), 20)
  expected = [3, 3, 4, 5, 6, 6, 7, 8]
  assert bits["z/conv"].weights.tolist() == (expected * 3)[:20]
  # Bounds 4, 8: 6 + 2 of it is 4, 4.15, 4.59, 5.23, 6, 6.77, 7.41, 7.85.
  bits = _run(cyclic.cyclic(4, 8, steps=8, cycles=1), 8)
  assert bits[""].activations.tolist() == [4, 4, 5, 5, 6, 7, 7, 8]


def test_ties_round_half_to_even():
  # Exactly 5.5 in the middle of a cycle of 3..8, 6.5 of 4..9.
  for bounds, expected in (((3, 8), 6), ((4, 9), 6), ((2, 3), 2), ((3, 4), 4)):
    for period in (2, 62, 2000):
      bits = _run(cyclic.cyclic(*bounds, steps=period, cycles=1), period)
      assert bits[""].weights[period // 2] == expected
  # cos = +-1/2 at 1/3 and 2/3: 2..4 gives 2.5 and 3.5, 3..9 gives 4.5, 7.5.
  for bounds, third, two in (((2, 4), 2, 4), ((3, 9), 4, 8), ((3, 5), 4, 4)):
    bits = _run(cyclic.cyclic(*bounds, steps=900, cycles=1), 900)
    assert bits[""].weights[[300, 600]].tolist() == [third, two]


def test_the_rational_phases_in_exact_arithmetic():
  cosines = {(1, 3): (1, 2), (1, 2): (0, 1), (2, 3): (-1, 2), (0, 1): (1, 1)}
  for (p, q), (num, den) in cosines.items():
    for low in range(2, 17):
      for high in range(low, 17):
        value = low + fractions.Fraction(high - low, 2) * (
          1 - fractions.Fraction(num, den)
        )
        period = 6 * 7
        phase = period * p // q
        assert _widths(low, high, period)[phase] == round(value)


def _widths(low, high, period):
  """All widths of a cycle, in numpy, from the table that the state holds."""
  begins = cyclic._begins(period)[low % 2, high - low]
  return low + (np.arange(period)[:, None] >= begins[None]).sum(1)


def test_float64_tells_ties():
  # Nothing in these ranges lies between 1e-12 and 1e-8 of a tie, so float64
  # rounded to 9 decimals is exact, and the nearest miss is below float32.
  nearest = 1.0
  for period in range(1, 2501):
    f = 0.5 * (1 + np.cos(np.pi * np.arange(period) / period + np.pi))
    values = np.arange(1, 15)[:, None] * f[None]
    gap = np.abs(values - np.floor(values) - 0.5)
    nearest = min(nearest, gap[gap > 1e-12].min(initial=1))
  assert 1e-8 < nearest < 1e-7


def test_every_cycle_length_equals_the_formula():
  steps = jnp.arange(2500, dtype=jnp.int32)
  low, high = (
    {f"{low}-{high}": grids.LayerBits(*[b] * 3) for low, high, b in ends}
    for ends in (((*b, b[0]) for b in BOUNDS), ((*b, b[1]) for b in BOUNDS))
  )
  update = cyclic.cyclic(3, 8, steps=1).update
  template = jax.tree.map(np.int32, cyclic.CyclicState(low, high, 1, 1))
  phases = np.asarray(steps)
  for period in range(1, 2501):
    state = template._replace(
      period=np.int32(period), begins=cyclic._begins(period)
    )
    bits = jax.device_get(_bits_at(update, state, steps))
    for path, (b_min, b_max) in zip(low, BOUNDS, strict=True):
      expected = _formula(b_min, b_max, phases % period, period)
      np.testing.assert_array_equal(bits[path].weights, expected, f"{period}")


def test_the_state_holds_what_that_test_sets():
  state = cyclic.cyclic(3, 8, steps=1000, cycles=7).init({"a": 1})
  assert state.period == 142 == 1000 // 7
  np.testing.assert_array_equal(state.begins, cyclic._begins(142))
  assert _int_lists(state.low) == {"a": [3, 3, 8]}
  assert _int_lists(state.high) == {"a": [8, 8, 8]}


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("period", [18_769, 1_000_003, 999_999, 2**20])
def test_long_cycles_equal_the_formula(bounds, period):
  low, high = bounds
  phase = np.arange(period)
  exact = low + (high - low) / 2 * (1 + np.cos(np.pi * phase / period + np.pi))
  expected = np.rint(np.round(exact, 11))
  np.testing.assert_array_equal(_widths(low, high, period), expected)


def test_more_cycles_than_steps_stay_at_b_min():
  schedule = cyclic.cyclic(3, 8, steps=31, cycles=32)
  assert set(_run(schedule, 40)[""].weights.tolist()) == {3}
  # T = 2: 3 and the tie 5.5.
  schedule = cyclic.cyclic(3, 8, steps=64, cycles=32)
  assert _run(schedule, 6)[""].weights.tolist() == [3, 6] * 3


@pytest.mark.parametrize(
  ("bounds", "saving"), [((3, 8), 36.67), ((4, 8), 30.1), ((5, 8), 23.2)]
)
def test_cost_of_a_run(bounds, saving):
  bits = _run(cyclic.cyclic(*bounds, steps=64_000), 64_000, {"": 1})[""]
  w, a, g = (np.asarray(width, np.int64) for width in bits)
  cost = (w * a + g * w + g * a).sum() / (64_000 * 3 * 64)
  assert 100 * (1 - cost) == pytest.approx(
    saving, abs=0.005 if bounds == (3, 8) else 0.05
  )


def test_gradients_are_constant_and_evaluation_is_at_the_top():
  schedule = cyclic.cyclic(4, 8, steps=100, cycles=5)
  bits = _run(schedule, 100)
  for path in CAPACITIES:
    assert np.unique(bits[path].gradients).tolist() == [8]
    np.testing.assert_array_equal(bits[path].weights, bits[path].activations)
  evaluation = schedule.evaluation(schedule.init(CAPACITIES))
  assert _int_lists(evaluation)["blocks"] == [[8] * 3] * 3


@pytest.mark.parametrize("operand", grids.LayerBits._fields)
@pytest.mark.parametrize("build", [cyclic.cyclic, cyclic.cyclic_dpc])
def test_each_operand_by_itself(build, operand):
  default = _run(build(3, 8, steps=60, cycles=1), 60)["z/conv"]._asdict()
  for width in (5, 32, None):
    schedule = build(3, 8, steps=60, cycles=1, **{operand: width})
    got = _run(schedule, 60)["z/conv"]._asdict()
    top = schedule.evaluation(schedule.init(CAPACITIES))["z/conv"]._asdict()
    own = default["weights"] if width is None else np.full(60, width)
    np.testing.assert_array_equal(got.pop(operand), own)
    assert top[operand] == (own.max() if width is None else width)
    for name, rest in got.items():
      np.testing.assert_array_equal(rest, default[name])


def test_products_stay_at_b_max():
  for build in (cyclic.cyclic, cyclic.cyclic_dpc):
    bits = _run(build(3, 8, steps=60, cycles=1), 60, CAPACITIES | PRODUCTS)
    for path in PRODUCTS:
      assert all(set(w.ravel().tolist()) == {8} for w in bits[path])
    assert set(bits["z/conv"].weights.tolist()) == set(range(3, 9))
  # Both operands are activations.
  schedule = cyclic.cyclic(3, 8, steps=60, weights=5, activations=6)
  assert _int_lists(schedule.init(PRODUCTS).high)["qk"] == [6, 6, 8]
  assert _int_lists(schedule.init(PRODUCTS).low)["qk"] == [6, 6, 8]


def test_cyclic_dpc_climbs_to_the_width_of_eq_1():
  schedule = cyclic.cyclic_dpc(
    3, 8, steps=1000, cycles=10, center="log_midpoint"
  )
  own = dpc.dpc_bit_widths(CAPACITIES, 3, 8, center="log_midpoint")
  bits = _run(schedule, 1000)
  phase = np.arange(1000) % 100
  for path in ("z/conv", ""):
    expected = _formula(3, own[path], phase, 100)
    np.testing.assert_array_equal(bits[path].weights, expected)
  for i, top in enumerate(own["blocks"]):
    expected = _formula(3, int(top), phase, 100)
    np.testing.assert_array_equal(bits["blocks"].weights[:, i], expected)
  # The largest layer has B_k = b_min, and stays there.
  assert own["blocks"].tolist() == [8, 6, 3]
  evaluation = schedule.evaluation(schedule.init(CAPACITIES))
  static = schedules.dpc(3, 8, center="log_midpoint").init(CAPACITIES).bits
  assert _int_lists(evaluation) == _int_lists(static)


def test_one_compiled_step_serves_all_cyclic_runs():
  runs = (
    cyclic.cyclic(3, 8, steps=640),
    cyclic.cyclic(4, 6, steps=64_000, cycles=8, gradients=None),
    cyclic.cyclic_dpc(3, 8, steps=640),
    cyclic.cyclic_dpc(2, 16, steps=99, cycles=3, delta=-1, weights=32),
  )
  traces = []

  def count(state, step):
    traces.append(step)
    return runs[0].update(state, step=step)

  update = jax.jit(count, donate_argnums=0)
  for schedule in runs:
    state = schedule.init(CAPACITIES)
    signature = _signature(state)
    eager, _ = schedule.update(state, step=jnp.int32(7), statistics=None)
    bits, after = update(jax.tree.map(jnp.copy, state), jnp.int32(7))
    jax.tree.map(np.testing.assert_array_equal, eager, bits)
    assert _signature(eager) == _signature(bits)
    for _ in range(3):
      assert _signature(after) == signature
      _, after = update(after, jnp.int32(8))
    jax.tree.map(np.testing.assert_array_equal, state, after)
    update(state, jnp.int32(9))
    for path, layer in bits.items():
      assert isinstance(layer, grids.LayerBits)
      assert all(w.dtype == jnp.int32 for w in layer)
      assert all(w.shape == np.shape(CAPACITIES[path]) for w in layer)
  assert len(traces) == 1


def _signature(tree):
  leaves, treedef = jax.tree.flatten(tree)
  return treedef, [(x.shape, x.dtype, x.weak_type) for x in leaves]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"b_min": 9}, "b_min=9 is above b_max=8"),
    ({"b_max": 17}, "b_max=17 is not a width"),
    ({"steps": 0}, "steps=0 is out of range; use an int >= 1"),
    ({"steps": 10.0}, "steps=10.0 is out of range"),
    ({"cycles": 0}, "cycles=0 is out of range"),
    ({"cycles": True}, "cycles=True is out of range"),
    ({"steps": 2**31, "cycles": 1}, "use more cycles"),
    ({"weights": 1}, "weights = 1 "),
    ({"gradients": 8.0}, r"gradients = 8\.0 "),
  ],
)
@pytest.mark.parametrize("build", [cyclic.cyclic, cyclic.cyclic_dpc])
def test_parameters_are_checked(build, options, message):
  with pytest.raises(ValueError, match=message) as error:
    build(**({"b_min": 3, "b_max": 8, "steps": 100} | options))
  assert "\n" not in str(error.value)


def test_eq_1_and_its_counts_are_checked():
  with pytest.raises(ValueError, match="center='mode'"):
    cyclic.cyclic_dpc(3, 8, steps=1, center="mode")
  with pytest.raises(ValueError, match="no layer"):
    cyclic.cyclic_dpc(3, 8, steps=1).init({})


def test_the_longest_run_that_int32_counts():
  schedule = cyclic.cyclic(3, 8, steps=2**31 - 1, cycles=1)
  state = schedule.init({"a": 1})
  for step, expected in ((0, 3), (2**30, 6), (2**31 - 2, 8)):
    bits, _ = schedule.update(state, step=jnp.int32(step))
    assert bits["a"].weights == expected
  # 3.5 is reached at acos(0.8) / pi of a cycle.
  first = math.floor((2**31 - 1) * math.acos(0.8) / math.pi) + 1
  for step, expected in ((first - 1, 3), (first, 4)):
    bits, _ = schedule.update(state, step=jnp.int32(step))
    assert bits["a"].weights == expected
