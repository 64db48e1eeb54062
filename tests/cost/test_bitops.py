"""bitops and the cost of a run: exact integers, and published figures."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.cost import bitops
from dpc_jax.quant import grids

LayerBits = grids.LayerBits
LayerCost = bitops.LayerCost

# The quantized convolutions of ResNet-38 on 32x32 images (n = 6, 1x1 shortcut
# convolutions at the two stride-2 blocks): how many, weights, output positions.
RESNET38 = (
  (1, 432, 32 * 32),
  (12, 2304, 32 * 32),
  (1, 4608, 16 * 16),
  (11, 9216, 16 * 16),
  (1, 512, 16 * 16),
  (1, 18432, 8 * 8),
  (11, 36864, 8 * 8),
  (1, 2048, 8 * 8),
)
# Their widths by Eq. 1 with bounds 3 and 8, in the same order.
CENTERS = {
  "median": (8, 7, 7, 6, 8, 5, 5, 7),
  "mean": (8, 7, 7, 6, 8, 6, 5, 7),
  "geometric_mean": (8, 7, 6, 6, 8, 5, 5, 7),
  "log_midpoint": (8, 7, 6, 5, 8, 4, 3, 7),
}
STEPS = 64_000


def _costs(extra=None):
  costs = {
    f"{weights}/{i}": LayerCost(weights * positions, weights)
    for count, weights, positions in RESNET38
    for i in range(count)
  }
  return costs | (extra or {})


def _widths(per_size):
  return {
    f"{weights}/{i}": width
    for (count, weights, _), width in zip(RESNET38, per_size, strict=True)
    for i in range(count)
  }


def _saving(bits):
  costs = _costs()
  static = bitops.bitops(costs, dict.fromkeys(costs, 8)).total
  return 100 * (1 - bitops.bitops(costs, bits).total / static)


def test_the_formula_written_out():
  costs = {"a": LayerCost(100, 7), "b": LayerCost(10, 3)}
  result = bitops.bitops(costs, {"a": LayerBits(3, 5, 7)}, samples=2)
  a, b = result.layers["a"], result.layers["b"]
  assert a == (2 * 100 * 3 * 5, 2 * 100 * 7 * 3, 2 * 100 * 7 * 5)
  assert (a.forward, a.input_gradient, a.weight_gradient) == a
  assert a.backward == 2 * 100 * 7 * 8
  assert b == (2 * 10 * 1024,) * 3
  assert result.forward == a.forward + b.forward
  assert result.backward == a.backward + b.backward
  assert result.total == a.total + b.total == sum(a) + sum(b)
  assert result.float_layers == ("b",)
  assert all(type(value) is int for value in (*a, *b, result.total))


def test_widths_as_ints_arrays_and_none():
  costs = {"a": LayerCost(100, 7)}
  expected = bitops.bitops(costs, {"a": LayerBits(6, 6, 8)})
  array = LayerBits(jnp.int32(6), np.int32(6), 8)
  assert bitops.bitops(costs, {"a": 6}) == expected
  assert bitops.bitops(costs, {"a": array}) == expected
  assert type(bitops.bitops(costs, {"a": array}).total) is int
  floats = bitops.bitops(costs, None)
  assert floats.total == 100 * 3 * 1024
  assert floats.float_layers == ("a",)
  assert bitops.bitops(costs, {"a": 32}).total == floats.total


def test_stacked_layers_count_each_with_its_widths():
  costs = {"a": LayerCost(100, 7, layers=2)}
  bits = LayerBits(jnp.array([3, 4]), jnp.array([5, 6]), 8)
  layer = bitops.bitops(costs, {"a": bits}).layers["a"]
  assert layer == (100 * (15 + 24), 100 * 8 * 7, 100 * 8 * 11)
  one = bitops.bitops({"a": LayerCost(100, 7)}, {"a": 6})
  assert bitops.bitops(costs, {"a": 6}).total == 2 * one.total
  assert bitops.bitops(costs, None).total == 2 * 100 * 3 * 1024


def test_counts_beyond_64_bits_stay_exact():
  costs = {"a": LayerCost(10**18 + 1, 7)}
  total = bitops.bitops(costs, {"a": 6}, samples=10**6 + 1).total
  assert total == (10**18 + 1) * (10**6 + 1) * (36 + 96)


def test_guards_name_the_value():
  costs = {"a": LayerCost(100, 7), "b": LayerCost(100, 7, 2)}
  with pytest.raises(ValueError, match="bits: no layer 'c' in the costs"):
    bitops.bitops(costs, {"c": 8})
  with pytest.raises(ValueError, match="17"):
    bitops.bitops(costs, {"a": 17})
  wide = LayerBits(np.full(3, 8), 8, 8)
  for path, layers in (("a", 1), ("b", 2)):
    with pytest.raises(ValueError, match=f"3 widths for {layers} .* '{path}'"):
      bitops.bitops(costs, {path: wide})


def test_resnet38_has_the_published_size():
  assert round(sum(c.macs for c in _costs().values()) / 1e6, 1) == 83.3


@pytest.mark.parametrize(
  ("center", "saving"),
  [
    ("median", 30.2),
    ("mean", 30.0),
    ("geometric_mean", 30.5),
    ("log_midpoint", 42.8),
  ],
)
def test_dpc_on_resnet38(center, saving):
  assert round(_saving(_widths(CENTERS[center])), 1) == saving


def test_uniform_widths_on_resnet38():
  assert _saving(dict.fromkeys(_costs(), 6)) == 31.25
  assert _saving(dict.fromkeys(_costs(), LayerBits(6, 6, 6))) == 43.75


def test_resnet38_static_8_run():
  costs = _costs()
  bits = dict.fromkeys(costs, 8)
  total = bitops.bitops(costs, bits, samples=STEPS * 128).total
  assert float(f"{total / 1e9:.3e}") == 1.310e8


def _run(state, steps, bits_at):
  @jax.jit
  def loop(state):
    def body(state, step):
      return bitops.accumulate(state, bits_at(step)), None

    return jax.lax.scan(body, state, jnp.arange(steps))[0]

  return loop(state)


def _layer(w, a, g):
  return LayerBits(*(jnp.asarray(x, jnp.int32) for x in (w, a, g)))


@pytest.mark.parametrize(
  ("b_min", "saving"), [(3, 36.67), (4, 30.1), (5, 23.2)]
)
def test_cpt_over_a_whole_run(b_min, saving):
  period = STEPS // 32
  phase = 1 + np.cos(np.pi * (np.arange(STEPS) % period) / period + np.pi)
  schedule = np.rint(b_min + (8 - b_min) / 2 * phase).astype(int)
  costs = _costs()
  table = jnp.asarray(schedule, jnp.int32)

  def bits_at(step):
    return {"36864/0": _layer(table[step], table[step], 8)}

  state = bitops.init_run_cost(bits_at(0))
  state = _run(state, STEPS, bits_at)
  # Every layer has the same width: one sum serves all of them.
  state = bitops.RunCost(dict.fromkeys(costs, state.sums["36864/0"]))
  result = bitops.run_bitops(costs, state, steps=STEPS, batch_size=128)
  exact = sum(b * b + 2 * b * 8 for b in schedule.tolist())
  macs = sum(cost.macs for cost in costs.values())
  assert result.total == exact * 128 * macs
  decimals = len(str(saving).split(".")[1])
  assert round(100 * result.saving_vs_static, decimals) == saving
  np.testing.assert_allclose(result.mean_bits, schedule.mean(), rtol=1e-12)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_accumulation_is_exact_across_the_carry(shape):
  start = 2**32 - 2000
  bits = {"a": _layer(np.full(shape, 16), np.full(shape, 32), 7)}
  bits["a"] = bits["a"]._replace(gradients=jnp.full(shape, 7, jnp.int32))
  state = bitops.init_run_cost(bits)
  assert state.sums["a"].shape == (*shape, 4, 2)
  low = state.sums["a"].at[..., 0].set(start)
  state = _run(bitops.RunCost({"a": low}), 1000, lambda step: bits)
  words = np.asarray(state.sums["a"], object)
  sums = words[..., 0] + words[..., 1] * 2**32
  expected = [start + 1000 * x for x in (16 * 32, 7 * 16, 7 * 32, 16)]
  assert (sums == np.broadcast_to(np.array(expected, object), sums.shape)).all()
  # A sum that lands on 2^32 exactly has carried too.
  edge = bitops.init_run_cost(bits).sums["a"].at[..., 0].set(2**32 - 16 * 32)
  words = bitops.accumulate(bitops.RunCost({"a": edge}), bits).sums["a"]
  np.testing.assert_array_equal(words[..., 0, :], np.tile([0, 1], (*shape, 1)))


def test_state_keeps_its_structure_and_traces_once():
  traces = []

  @jax.jit
  def step(state, bits):
    traces.append(1)
    return bitops.accumulate(state, bits)

  def bits(b):
    return {"": _layer(b, b, 8), "s": _layer([b, 4], [b, 4], [8, 8])}

  state = bitops.init_run_cost(bits(3))
  signature = jax.tree.map(lambda x: (x.shape, x.dtype), state)
  eager = state
  for b in range(2, 17):
    state = step(state, bits(b))
    eager = bitops.accumulate(eager, bits(b))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == signature
  assert len(traces) == 1
  jax.tree.map(np.testing.assert_array_equal, state, eager)
  assert state.sums["s"].dtype == jnp.uint32
  squares = sum(b * b for b in range(2, 17))
  assert state.sums[""][:, 0].tolist() == [
    squares,
    *(8 * sum(range(2, 17)),) * 2,
    sum(range(2, 17)),
  ]


def test_a_run_equals_the_sum_of_its_steps():
  costs = {
    "a": LayerCost(100, 7),
    "s": LayerCost(10, 5, 2),
    "float": LayerCost(3, 3),
  }
  plan = [
    {"a": LayerBits(3, 4, 5), "s": LayerBits(np.array([3, 9]), 6, 8)},
    {"a": LayerBits(8, 32, 32), "s": LayerBits(np.array([2, 7]), 5, 8)},
  ]
  arrays = [
    {
      "a": _layer(*bits["a"]),
      "s": _layer(*(np.broadcast_to(x, (2,)) for x in bits["s"])),
    }
    for bits in plan
  ]
  state = bitops.init_run_cost(arrays[0])
  for bits in arrays:
    state = bitops.accumulate(state, bits)
  result = bitops.run_bitops(
    costs, state, steps=2, batch_size=16, static_bits=LayerBits(6, 6, 6)
  )
  steps = [bitops.bitops(costs, bits, samples=16) for bits in plan]
  assert result.total == sum(step.total for step in steps)
  for path in costs:
    for phase in bitops.LayerBitops._fields:
      assert getattr(result.layers[path], phase) == sum(
        getattr(step.layers[path], phase) for step in steps
      )
  static = {"a": LayerBits(6, 6, 6), "s": LayerBits(6, 6, 6)}
  assert result.static_total == bitops.bitops(costs, static, samples=32).total
  assert result.float_total == 3 * 1024 * 32 * (100 + 20 + 3)
  ratio = result.total / result.static_total
  assert math.isclose(result.relative_to_static, ratio)
  assert math.isclose(result.saving_vs_static, 1 - ratio)
  assert math.isclose(
    result.saving_vs_float, 1 - result.total / result.float_total
  )
  # (3 + 8) of one layer and (3 + 9 + 2 + 7) of two, over 2 steps.
  assert result.mean_bits == (11 + 21) / 6
  assert result.float_layers == ("float",)


def test_a_static_run_saves_nothing_and_a_float_run_has_32_bits():
  costs = _costs({"head": LayerCost(640, 640)})
  bits = {path: _layer(8, 8, 8) for path in _costs()}
  state = bitops.accumulate(bitops.init_run_cost(bits), bits)
  result = bitops.run_bitops(costs, state, steps=1, batch_size=128)
  assert result.saving_vs_static == 0 and result.relative_to_static == 1
  assert result.mean_bits == 8
  assert result.float_layers == ("head",)
  floats = bitops.run_bitops(
    costs, bitops.init_run_cost({}), steps=5, batch_size=128
  )
  assert floats.total == floats.float_total == floats.static_total
  assert floats.mean_bits == 32
  assert floats.saving_vs_float == floats.saving_vs_static == 0
  floats = bitops.run_bitops(
    costs,
    bitops.init_run_cost({}),
    steps=5,
    batch_size=128,
    static_bits=dict.fromkeys(_costs(), 8),
  )
  assert floats.static_total == 5 * 128 * bitops.bitops(costs, bits).total
  assert floats.relative_to_static == floats.total / floats.static_total > 1


def test_a_run_reads_both_words():
  steps = 2**30 + 1
  bits = (8, 4, 16)
  w, a, g = bits
  sums = [steps * x for x in (w * a, g * w, g * a, w)]
  words = np.array([[x % 2**32, x // 2**32] for x in sums], np.uint32)
  costs = {"a": LayerCost(100, 7)}
  result = bitops.run_bitops(
    costs, bitops.RunCost({"a": words}), steps=steps, batch_size=3
  )
  expected = bitops.bitops(costs, {"a": LayerBits(*bits)}, samples=3 * steps)
  assert result.layers == expected.layers
  assert result.mean_bits == 8


def test_run_guards_name_the_value():
  costs = {"a": LayerCost(100, 7)}
  bits = {"a": _layer(8, 8, 8)}
  state = bitops.accumulate(bitops.init_run_cost(bits), bits)
  with pytest.raises(ValueError, match="steps=0"):
    bitops.run_bitops(costs, state, steps=0, batch_size=1)
  with pytest.raises(ValueError, match="batch_size=-1"):
    bitops.run_bitops(costs, state, steps=1, batch_size=-1)
  with pytest.raises(ValueError, match=r"steps=9 does not fit .* 'a'"):
    bitops.run_bitops(costs, state, steps=9, batch_size=1)
  with pytest.raises(ValueError, match="state: no layer 'a' in the costs"):
    bitops.run_bitops({}, state, steps=1, batch_size=1)
  with pytest.raises(ValueError, match="1 layers at 'a', the costs have 2"):
    stacked = {"a": LayerCost(100, 7, 2)}
    bitops.run_bitops(stacked, state, steps=1, batch_size=1)
  for other in ({}, {**bits, "b": bits["a"]}):
    with pytest.raises(ValueError, match=r"layer '[ab]' is not in both"):
      bitops.accumulate(state, other)


def test_one_width_for_all_layers():
  costs = _costs()
  each = bitops.bitops(costs, dict.fromkeys(costs, 4))
  assert bitops.bitops(costs, 4) == each
  assert bitops.bitops(costs, grids.LayerBits(4, 4, 8)) == each
