"""Controls of DPC: equal cost, the bits they promise, one shared trace."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpc_jax
from dpc_jax.policy import controls, dpc, schedules
from dpc_jax.quant import grids

IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((1, 16), jnp.int32)
_SIZES = {"cutoffs": (8, 20), "width": 16, "heads": 2, "mlp_width": 40}
MODELS = {
  "resnet8": ("resnet8", 10, {}, IMAGE),
  "resnet38": ("resnet38", 10, {}, IMAGE),
  "mobilenet_v2": ("mobilenet_v2", 10, {}, IMAGE),
  "transformer": ("transformer_lm", 40, {**_SIZES, "layers": 4}, TOKENS),
  "stacked transformer": (
    "transformer_lm",
    40,
    {**_SIZES, "layers": 6, "scan": True},
    TOKENS,
  ),
}
BUILDS = {
  "uniform": controls.uniform,
  "reversed_dpc": controls.reversed_dpc,
  "random_layerwise": controls.random_layerwise,
}

_settings = hypothesis.settings(max_examples=60, deadline=None)
_network = st.lists(
  st.tuples(st.integers(1, 10**9), st.integers(1, 10**12)),
  min_size=1,
  max_size=30,
)


@functools.cache
def network(name):
  """(costs, capacities) of a model, found abstractly."""
  model, num_classes, sizes, inputs = MODELS[name]
  model = dpc_jax.models.create(model, num_classes=num_classes, **sizes)
  variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
  return (
    dpc_jax.layer_costs(model, inputs),
    dpc_jax.layer_capacities(variables),
  )


def made_up(layers):
  """(capacities, macs) of a list of pairs, and some stacked layers."""
  capacities = {f"layer{i}": n for i, (n, _) in enumerate(layers)}
  macs = {f"layer{i}": m for i, (_, m) in enumerate(layers)}
  capacities |= {"blocks": np.array([30, 300, 3000]), "qk": 0}
  return capacities, macs | {"blocks": 7_000, "qk": 10**6, "float": 3}


def singles(bits, capacities):
  """(path, index, N_k, width) of every layer that has weights."""
  return [
    (path, i, int(n), int(np.ravel(bits[path].weights)[i]))
    for path, count in capacities.items()
    for i, n in enumerate(np.ravel(count))
    if n
  ]


@pytest.mark.parametrize("center", ["median", "log_midpoint"])
@pytest.mark.parametrize("b_min", [3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_cost_is_that_of_dpc(name, b_min, center):
  costs, capacities = network(name)
  macs = {path: cost.macs for path, cost in costs.items()}
  quantized = {path: costs[path] for path in capacities}
  reference = schedules.dpc(b_min, 8, center=center).init(capacities).bits
  target = dpc_jax.bitops(quantized, reference).total
  assert controls.cost(reference, macs) == target
  for build in BUILDS.values():
    bits = build(b_min, 8, macs=macs, center=center).init(capacities).bits
    total = dpc_jax.bitops(quantized, bits).total
    assert abs(total / target - 1) < 0.01
    relative = controls.relative_cost(bits, reference, macs)
    assert relative == pytest.approx(total / target, rel=1e-12)
    for path in capacities:
      widths = np.asarray(bits[path].weights)
      assert widths.min() >= b_min
      assert widths.max() <= 8
      np.testing.assert_array_equal(bits[path].activations, widths)
      assert np.unique(bits[path].gradients).tolist() == [8]
      if not np.any(capacities[path]):
        assert np.unique(widths).tolist() == [8]


def test_cost_written_out():
  bits = {"a": grids.LayerBits(3, 5, 7), "b": grids.LayerBits(4, 4, 8)}
  bits["c"] = grids.LayerBits(np.array([2, 3]), np.array([2, 3]), np.full(2, 8))
  # 100*(15 + 21 + 35), 10*(16 + 32 + 32), 1*(4 + 16 + 16 + 9 + 24 + 24).
  macs = {"a": 100, "b": 10, "c": 1, "float": 10**9}
  assert controls.cost(bits, macs) == 7100 + 800 + 93
  half = {**bits, "a": grids.LayerBits(1, 1, 35)}
  assert controls.relative_cost(half, bits, macs) == (7100 + 893) / 7993


def test_uniform_written_out():
  # Equal layers: DPC gives ceil(5.5) to all, and so does the control.
  capacities = dict.fromkeys("abcd", 7)
  macs = dict.fromkeys(capacities, 10)
  bits = controls.uniform(3, 8, macs=macs).init(capacities).bits
  assert [int(b.weights) for b in bits.values()] == [6] * 4
  # 8, 6, 4 bits at 1, 1, 8 MACs are 192 + 132 + 640 (b*b + 16*b each): all
  # at 4 are 800, and 164 are missing. A bit more costs 25, 25 and 200.
  capacities = {"a": 20, "b": 100, "c": 1000}
  macs = {"a": 1, "b": 1, "c": 8}
  bits = controls.uniform(4, 8, macs=macs).init(capacities).bits
  assert [int(b.weights) for b in bits.values()] == [4, 4, 5]


def test_the_mix_is_spread_over_the_network():
  # Equal prices, capacities that rise with the path: DPC's cost is that of 5
  # bits in all layers and of 6 in some, 26 to 27 % of a step dearer each.
  for count in (20, 33, 60):
    capacities = {f"layer{i:02}": 10 + i * i for i in range(count)}
    macs = dict.fromkeys(capacities, 100)
    options = {"delta": 0.9, "center": "mean"}
    bits = controls.uniform(3, 8, macs=macs, **options).init(capacities).bits
    widths = np.array([int(b.weights) for b in bits.values()])
    raised = np.flatnonzero(widths == widths.max())
    assert 2 < len(raised) < count - 2
    # Every stretch of the network has its share, but for two layers.
    share = np.cumsum(widths == widths.max()) / len(raised)
    even = np.arange(1, count + 1) / count
    assert np.abs(share - even).max() <= 2 / len(raised)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("center", ["median", "log_midpoint"])
def test_reversed_rises_with_capacity_but_for_the_bit_of_the_mix(name, center):
  costs, capacities = network(name)
  macs = {path: cost.macs for path, cost in costs.items()}
  schedule = controls.reversed_dpc(3, 8, macs=macs, center=center)
  layers = singles(schedule.init(capacities).bits, capacities)
  for (*_, n, b), (*_, more, other) in itertools.product(layers, repeat=2):
    if n < more:
      assert b <= other + 1
  smallest, largest = min(x[2] for x in layers), max(x[2] for x in layers)
  mean = {
    size: np.mean([b for *_, n, b in layers if n == size])
    for size in (smallest, largest)
  }
  assert mean[largest] > mean[smallest] + 1


def test_reversed_is_eq_1_turned_round():
  # log10(N/100) = -0.7, 0, 1 and bounds 2..16: 9 + 7 log10 is 4.107, 9 and 16,
  # and DPC has 14, 9, 2 bits. The middle layer alone has a price worth the
  # name: it keeps its width, so the shift is less than a bit.
  capacities = {"a": 20, "b": 100, "c": 1000}
  macs = {"a": 1, "b": 10**6, "c": 1}
  for delta, ends in ((1, (4.107, 16)), (-1, (13.893, 2)), (0.5, (6.55, 12.5))):
    schedule = controls.reversed_dpc(2, 16, macs=macs, delta=delta)
    bits = schedule.init(capacities).bits
    a, b, c = (int(layer.weights) for layer in bits.values())
    assert b == 9
    assert abs(a - ends[0]) < 2
    assert abs(c - ends[1]) < 2


def test_random_has_seeds():
  costs, capacities = network("resnet38")
  macs = {path: cost.macs for path, cost in costs.items()}

  def draw(seed):
    schedule = controls.random_layerwise(3, 8, macs=macs, seed=seed)
    return [x[-1] for x in singles(schedule.init(capacities).bits, capacities)]

  assert draw(0) == draw(0)
  draws = [draw(seed) for seed in range(20)]
  assert len(set(map(tuple, draws))) == 20
  # No layer has a width of its own.
  means = np.mean(draws, axis=0)
  assert means.std() < 0.6
  assert np.std(draws) > 1


@pytest.mark.parametrize("name", BUILDS)
def test_order_of_dicts_plays_no_part(name):
  costs, capacities = network("stacked transformer")
  macs = {path: cost.macs for path, cost in costs.items()}
  bits = BUILDS[name](3, 8, macs=macs).init(capacities).bits
  turned = BUILDS[name](3, 8, macs=dict(reversed(macs.items()))).init(
    dict(reversed(capacities.items()))
  )
  jax.tree.map(np.testing.assert_array_equal, bits, turned.bits)


@_settings
@hypothesis.given(
  _network,
  st.tuples(st.integers(2, 16), st.integers(2, 16)).map(sorted),
  st.sampled_from(dpc.CENTERS),
  st.sampled_from(dpc.LOG_FORMS),
  st.floats(-1, 1),
  st.integers(0, 2**32),
)
def test_any_network(layers, bounds, center, log_form, delta, seed):
  capacities, macs = made_up(layers)
  options = {"center": center, "log_form": log_form, "delta": delta}
  reference = schedules.dpc(*bounds, **options).init(capacities).bits
  # A bit in the layer with most MACs costs at most this.
  bit = max(macs[path] for path in capacities if path != "qk") * (
    bounds[1] ** 2 - (bounds[1] - 1) ** 2 + 16
  )
  target = controls.cost(reference, macs)
  for name, build in BUILDS.items():
    more = {"seed": seed} if name == "random_layerwise" else {}
    bits = build(*bounds, macs=macs, **options, **more).init(capacities).bits
    assert list(bits) == list(reference)
    widths = [b for *_, b in singles(bits, capacities)]
    assert bounds[0] <= min(widths)
    assert max(widths) <= bounds[1]
    missed = abs(controls.cost(bits, macs) - target)
    assert missed <= bit / 2 + 2 * bit * len(widths) ** 2 / controls._CELLS
    assert name != "uniform" or max(widths) - min(widths) <= 1


@_settings
@hypothesis.given(
  st.lists(st.integers(0, 40), min_size=1, max_size=8), st.floats(0, 1)
)
def test_subset_is_the_nearest(sizes, fraction):
  goal = round(fraction * sum(sizes))
  subset = controls._subset(sizes, goal)
  assert subset == sorted(set(subset))
  sums = {
    sum(chosen)
    for n in range(len(sizes) + 1)
    for chosen in itertools.combinations(sizes, n)
  }
  got = sum(sizes[k] for k in subset)
  nearest = min(sums, key=lambda s: (abs(s - goal), s))
  assert got == nearest


def test_the_layers_nearest_to_their_next_bit_go_up_first():
  real = np.array([3.2, 3.5, 3.5, 3.5])
  for target, expected in ((1, [3, 4, 3, 3]), (2, [3, 4, 4, 3])):
    assert controls.match_widths(real, [range(6)] * 4, 3, target) == expected


def test_subset_prefers_the_first_of_equals():
  assert controls._subset([5, 5, 5, 5], 10) == [0, 1]
  assert controls._subset([5, 7, 2, 5], 12) == [0, 1]
  assert controls._subset([5, 7], 6) == [0]  # of two as near the smaller
  # No common divisor worth the name, sums beyond the table's cells.
  sizes = [10**12 + 1, 3 * 10**11 + 7, 10**11 + 9, 17]
  assert controls._subset(sizes, 4 * 10**11) == [1, 2]


@_settings
@hypothesis.given(
  st.lists(st.floats(-20, 20), min_size=1, max_size=7), st.data()
)
def test_matched_widths_are_the_nearest_mix(real, data):
  real = np.array(real) // 0.125 * 0.125  # sums are exact
  macs = data.draw(
    st.lists(st.integers(1, 50), min_size=len(real), max_size=len(real))
  )
  prices = [[m * (b * b + 16 * b) for b in range(3, 9)] for m in macs]
  low, high = (sum(row[i] for row in prices) for i in (0, -1))
  target = data.draw(st.integers(low, high))
  widths = controls.match_widths(real, prices, 3, target)

  def price(widths):
    return sum(m * (b * b + 16 * b) for m, b in zip(macs, widths, strict=True))

  # Some shift has both ends around the target, and no mix of them is nearer.
  missed, found = abs(price(widths) - target), False
  shifts = [b - x for x in real for b in range(3, 10)]
  for shift in [low - 2**-20 for low in shifts] + shifts + [-40.0]:
    lower = np.floor(real + shift)
    mix = [
      np.unique(np.clip([b, b + 1], 3, 8)).astype(int).tolist() for b in lower
    ]
    if not all(w in m for w, m in zip(widths, mix, strict=True)):
      continue
    if price([m[0] for m in mix]) <= target <= price([m[-1] for m in mix]):
      best = min(abs(price(w) - target) for w in itertools.product(*mix))
      found = found or missed <= best
  assert found


def test_a_tiny_net_takes_the_nearest_and_says_so():
  capacities, macs = {"a": 20, "b": 1000}, {"a": 1000, "b": 900}
  reference = schedules.dpc(3, 8).init(capacities).bits
  for name, build in BUILDS.items():
    bits = build(3, 8, macs=macs).init(capacities).bits
    ratio = controls.relative_cost(bits, reference, macs)
    assert abs(ratio - 1) < 0.1
    assert name != "uniform" or abs(ratio - 1) > 0.01


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("operand", grids.LayerBits._fields)
def test_operands_are_overruled_in_the_cost_too(name, operand):
  costs, capacities = network("transformer")
  macs = {path: cost.macs for path, cost in costs.items()}
  for width in (5, 32, None):
    options = {operand: width}
    reference = schedules.dpc(3, 8, **options).init(capacities).bits
    bits = BUILDS[name](3, 8, macs=macs, **options).init(capacities).bits
    assert abs(controls.relative_cost(bits, reference, macs) - 1) < 0.01
    for path in capacities:
      if width is not None and np.any(capacities[path]):
        assert set(np.ravel(getattr(bits[path], operand)).tolist()) == {width}
      if not np.any(capacities[path]):
        assert _ints(bits[path]) == _ints(reference[path])


def _ints(layer):
  return [np.asarray(width).tolist() for width in layer]


def test_nothing_to_match_where_all_operands_are_set():
  capacities, macs = made_up([(10, 100), (1000, 50)])
  options = {"weights": 4, "activations": 5, "gradients": 6}
  for build in BUILDS.values():
    bits = build(3, 8, macs=macs, **options).init(capacities).bits
    assert _ints(bits["layer0"]) == [4, 5, 6]
    assert _ints(bits["blocks"]) == [[4] * 3, [5] * 3, [6] * 3]


def test_one_compiled_step_serves_all_fixed_schedules():
  costs, capacities = network("stacked transformer")
  macs = {path: cost.macs for path, cost in costs.items()}
  runs = [schedules.constant(6), schedules.dpc(3, 8)]
  runs += [build(3, 8, macs=macs) for build in BUILDS.values()]
  traces = []

  def count(state, step):
    traces.append(step)
    return runs[0].update(state, step=step)

  update = jax.jit(count)
  seen = set()
  for schedule in runs:
    state = schedule.init(capacities)
    bits, after = update(state, jnp.int32(3))
    jax.tree.map(np.testing.assert_array_equal, bits, state.bits)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    seen.add(str(jax.device_get(bits)))
  assert len(traces) == 1
  assert len(seen) == len(runs)


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"b_min": 9}, "b_min=9 is above b_max=8"),
    ({"delta": 2}, "delta=2"),
    ({"center": "mode"}, "center='mode'"),
    ({"gradients": 1}, "gradients = 1 "),
    ({"macs": {"a": 0}}, r"macs\['a'\]=0 is no count; use an int >= 1"),
    ({"macs": {"a": 1.0}}, r"macs\['a'\]=1\.0 is no count"),
  ],
)
def test_parameters_are_checked_where_the_schedule_is_built(
  name, options, message
):
  with pytest.raises(ValueError, match=message) as error:
    BUILDS[name](**({"b_min": 3, "b_max": 8, "macs": {"a": 1}} | options))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", [-1, 0.0, True])
def test_seeds_are_checked(seed):
  with pytest.raises(ValueError, match=f"seed={seed} is out of range"):
    controls.random_layerwise(3, 8, macs={"a": 1}, seed=seed)


@pytest.mark.parametrize("build", BUILDS.values())
def test_layers_are_checked_in_init(build):
  schedule = build(3, 8, macs={"a": 1})
  with pytest.raises(ValueError, match="macs: layer 'b' is missing; give"):
    schedule.init({"a": 5, "b": 6})
  with pytest.raises(ValueError, match="macs: layer 'qk' is missing"):
    schedule.init({"a": 5, "qk": 0})
  with pytest.raises(ValueError, match="no layer"):
    schedule.init({})
  with pytest.raises(ValueError, match="macs: layer 'b' is missing"):
    controls.cost({"b": grids.LayerBits(3, 3, 8)}, {"a": 1})
