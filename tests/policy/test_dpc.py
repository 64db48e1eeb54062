"""dpc_bit_widths: Eq. 1, its options and its guards."""

import itertools
import math
import types

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.policy import dpc

# The quantized convolutions of ResNet-38 (n = 6, shortcuts included): how many
# there are of each N_k.
RESNET38 = {
  432: 1,
  2304: 12,
  4608: 1,
  512: 1,
  9216: 11,
  18432: 1,
  2048: 1,
  36864: 11,
}
TABLE_SIZES = (432, 2304, 4608, 9216, 18432, 36864)

_settings = hypothesis.settings(max_examples=150, deadline=None)
_counts = st.lists(st.integers(1, 10**9), min_size=1, max_size=40)
_bounds = st.tuples(st.integers(2, 16), st.integers(2, 16)).map(sorted)
_centers = st.sampled_from(dpc.CENTERS)
_deltas = st.floats(0, 1)


def _resnet38():
  return {f"{n}/{i}": n for n, count in RESNET38.items() for i in range(count)}


@pytest.mark.parametrize(
  ("center", "expected"),
  [
    ("median", (8, 7, 7, 6, 5, 5)),
    ("mean", (8, 7, 7, 6, 6, 5)),
    ("geometric_mean", (8, 7, 6, 6, 5, 5)),
    ("log_midpoint", (8, 7, 6, 5, 4, 3)),
  ],
)
def test_resnet38_table(center, expected):
  bits = dpc.dpc_bit_widths(_resnet38(), 3, 8, center=center)
  assert tuple(bits[f"{n}/0"] for n in TABLE_SIZES) == expected


def test_the_formula_written_out():
  # Three layers, median 100, r = max(1000/100, 100/20) = 10, B in [4, 8]:
  # 6 - 2 log10(N/100) = 7.398, 6, 4.
  assert dpc.dpc_bit_widths([20, 100, 1000], 4, 8) == [8, 6, 4]
  # delta = 0.5: 6 - log10(N/100) = 6.699, 6, 5.
  assert dpc.dpc_bit_widths([20, 100, 1000], 4, 8, delta=0.5) == [7, 6, 5]
  # delta = -1: 6 + 2 log10(N/100) = 4.602, 6, 8.
  assert dpc.dpc_bit_widths([20, 100, 1000], 4, 8, delta=-1) == [5, 6, 8]


def test_centers_written_out():
  counts = np.array([1.0, 2.0, 4.0, 512.0])
  assert dpc._center(counts, "median") == 3
  assert dpc._center(counts, "mean") == 129.75
  np.testing.assert_allclose(
    dpc._center(counts, "geometric_mean"), 4096 ** (1 / 4)
  )
  np.testing.assert_allclose(dpc._center(counts, "log_midpoint"), 512**0.5)


def test_product_form_written_out():
  # r = 10: 6 - 2 ln(10 N/100) = 6 - 2 ln 2 = 4.61, 6 - 2 ln 10 = 1.39 -> 4, and
  # 6 - 2 ln 100 -> 4.
  bits = dpc.dpc_bit_widths([20, 100, 1000], 4, 8, log_form="product")
  assert bits == [5, 4, 4]


def test_product_form_leaves_the_bounds_in_most_layers_of_resnet38():
  counts = list(_resnet38().values())
  middle = np.median(counts)
  r = max(max(counts) / middle, middle / min(counts))
  exact = 5.5 - 2.5 * np.log(r * np.array(counts) / middle)
  outside = (np.ceil(exact) < 3) | (np.ceil(exact) > 8)
  assert outside.mean() > 0.5
  bits = dpc.dpc_bit_widths(counts, 3, 8, log_form="product")
  np.testing.assert_array_equal(bits, np.clip(np.ceil(exact), 3, 8))


def test_a_layer_at_the_end_of_the_range_does_not_jump_a_bit():
  # Powers of 3 and 7 around their geometric mean: the ends are exactly +-1,
  # which no pair of logarithms says exactly.
  for base in (3, 7, 10, 49):
    counts = [base**k for k in range(5)]
    bits = dpc.dpc_bit_widths(counts, 3, 7, center="geometric_mean")
    assert bits == [7, 6, 5, 4, 3]


def test_equal_layers_get_the_middle():
  for center in dpc.CENTERS:
    for log_form in dpc.LOG_FORMS:
      options = {"center": center, "log_form": log_form}
      assert dpc.dpc_bit_widths([7, 7, 7], 3, 8, **options) == [6, 6, 6]
      assert dpc.dpc_bit_widths([10**9 + 7] * 3, 4, 8, **options) == [6] * 3
  assert dpc.dpc_bit_widths({"only": 5}, 3, 8) == {"only": 6}


@_settings
@hypothesis.given(_counts, _bounds, _centers, _deltas)
def test_within_bounds(counts, bounds, center, delta):
  bits = dpc.dpc_bit_widths(counts, *bounds, center=center, delta=delta)
  assert all(bounds[0] <= b <= bounds[1] for b in bits)
  # Not thanks to the clip: Eq. 1 itself stays inside.
  term = dpc.log_term(np.array(counts, float), center, "base")
  assert np.abs(term).max() == (len(set(counts)) > 1)


@_settings
@hypothesis.given(
  _counts, _bounds, _centers, _deltas, st.sampled_from(dpc.LOG_FORMS)
)
def test_non_increasing_in_capacity(counts, bounds, center, delta, log_form):
  counts = sorted(counts)
  bits = dpc.dpc_bit_widths(
    counts, *bounds, center=center, delta=delta, log_form=log_form
  )
  assert bits == sorted(bits, reverse=True)
  layers = zip(counts, bits, strict=True)
  for (m, b), (n, c) in itertools.pairwise(layers):
    assert m != n or b == c


@_settings
@hypothesis.given(_counts, _bounds, _centers)
def test_negative_delta_reverses(counts, bounds, center):
  counts = sorted(counts)
  bits = dpc.dpc_bit_widths(counts, *bounds, center=center, delta=-1.0)
  assert bits == sorted(bits)


@_settings
@hypothesis.given(
  _counts,
  _bounds,
  _centers,
  st.floats(-1, 1),
  st.sampled_from(dpc.LOG_FORMS),
  st.integers(1, 5),
)
def test_layers_without_weights_get_b_max_and_move_no_other(
  counts, bounds, center, delta, log_form, products
):
  options = {"center": center, "delta": delta, "log_form": log_form}
  layers = {f"layer{i}": n for i, n in enumerate(counts)}
  bits = dpc.dpc_bit_widths(layers, *bounds, **options)
  stacked = np.zeros(products, np.int64)
  zeros = {"a": 0, "stack": stacked} | {f"z{i}": 0 for i in range(products)}
  more = dpc.dpc_bit_widths(zeros | layers, *bounds, **options)
  assert {path: more[path] for path in layers} == bits
  np.testing.assert_array_equal(more["stack"], [bounds[1]] * products)
  assert more["stack"].dtype == np.int64
  for path in zeros.keys() - {"stack"}:
    assert type(more[path]) is int and more[path] == bounds[1]


@_settings
@hypothesis.given(_counts, _bounds, _centers, _deltas, st.integers(1, 10**6))
def test_scale_free(counts, bounds, center, delta, factor):
  options = {"center": center, "delta": delta}
  bits = dpc.dpc_bit_widths(counts, *bounds, **options)
  scaled = dpc.dpc_bit_widths([n * factor for n in counts], *bounds, **options)
  assert bits == scaled


@_settings
@hypothesis.given(_counts, _centers, st.randoms())
def test_order_free(counts, center, random):
  layers = {f"layer{i}": n for i, n in enumerate(counts)}
  bits = dpc.dpc_bit_widths(layers, 3, 8, center=center)
  names = list(layers)
  random.shuffle(names)
  shuffled = {name: layers[name] for name in names}
  again = dpc.dpc_bit_widths(shuffled, 3, 8, center=center)
  assert again == bits
  assert list(again) == names


@_settings
@hypothesis.given(_counts, _bounds, _centers)
def test_delta_zero_is_uniform(counts, bounds, center):
  bits = dpc.dpc_bit_widths(counts, *bounds, center=center, delta=0)
  assert set(bits) == {math.ceil(sum(bounds) / 2)}


def test_structure_in_structure_out():
  counts = {"z": (20, [100]), "a": {"k": np.full(3, 1000)}}
  bits = dpc.dpc_bit_widths(counts, 4, 8)
  # The median counts a stacked layer once for each of the stack.
  flat = dpc.dpc_bit_widths([20, 100, 1000, 1000, 1000], 4, 8)
  assert list(bits) == ["z", "a"]
  assert bits["z"] == (flat[0], [flat[1]])
  assert type(bits["z"][0]) is int
  assert bits["a"]["k"].dtype == np.int64
  np.testing.assert_array_equal(bits["a"]["k"], flat[2:])


@pytest.mark.parametrize("integer", [np.int32, np.int64, np.uint8, jnp.int32])
def test_other_integers_are_counts(integer):
  counts = [integer(20), integer(100), integer(200)]
  assert dpc.dpc_bit_widths(counts, np.int64(4), 8) == dpc.dpc_bit_widths(
    [20, 100, 200], 4, 8
  )


def test_a_mapping_that_jax_does_not_know():
  counts = types.MappingProxyType({"b": 20, "a": 1000})
  bits = dpc.dpc_bit_widths(counts, 4, 8)
  assert bits == {"b": 8, "a": 6}


def test_large_counts_close_to_each_other_keep_their_order():
  # Symmetric around the median, so that the ends are at -1 and +1.
  for middle in (10**12 + 7, 3 * 10**12 + 1, 7 * 10**12):
    counts = [middle - 2, middle - 1, middle, middle + 1, middle + 2]
    assert dpc.dpc_bit_widths(counts, 3, 7) == [7, 6, 5, 4, 3]


def test_large_counts_do_not_overflow():
  for center in dpc.CENTERS:
    bits = dpc.dpc_bit_widths([1, 2**62, 2**63 - 1], 3, 8, center=center)
    assert bits[0] == 8 and bits[2] >= 3


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"b_min": 9, "b_max": 8}, "b_min=9 is above b_max=8"),
    ({"b_min": 1}, "b_min=1 is not a width"),
    ({"b_min": -3}, "b_min=-3 is not a width"),
    ({"b_max": 17}, "b_max=17 is not a width"),
    ({"b_max": 32}, "b_max=32 is not a width"),
    ({"b_min": 3.0}, r"b_min=3\.0 is not a width"),
    ({"b_min": True}, "b_min=True is not a width"),
    ({"b_max": "8"}, "b_max='8' is not a width"),
    ({"capacities": {}}, "no layer in {}"),
    ({"capacities": [np.zeros(0, int)]}, "no layer in"),
    ({"capacities": {"a": {"b": 0}}}, r"capacities\['a'\]\['b'\]=0"),
    ({"capacities": {"a": 0, "b": np.zeros(2, int)}}, r"\['a'\]=0, and no oth"),
    ({"capacities": {"a": 5, "b": np.array([0, 3])}}, r"\['b'\]=0 .* 1\.\."),
    ({"capacities": {"a": -5}}, r"\['a'\]=-5"),
    ({"capacities": {"a": 2.5}}, r"\['a'\]=2\.5"),
    ({"capacities": {"a": 2.0}}, r"\['a'\]=2\.0"),
    ({"capacities": {"a": math.inf}}, r"\['a'\]=inf"),
    ({"capacities": {"a": math.nan}}, r"\['a'\]=nan"),
    ({"capacities": {"a": True}}, r"\['a'\]=True"),
    ({"capacities": {"a": None}}, r"\['a'\]=None"),
    ({"capacities": {"a": "7"}}, r"\['a'\]='7'"),
    ({"capacities": {"a": 2**63}}, r"\['a'\]=9223372036854775808"),
    ({"capacities": {"a": np.array([3, 0])}}, r"\['a'\]=0"),
    ({"capacities": {"a": np.array([3.0])}}, r"\['a'\]=array"),
    ({"delta": 1.001}, r"delta=1\.001"),
    ({"delta": -2}, "delta=-2"),
    ({"delta": math.nan}, "delta=nan"),
    ({"delta": "1"}, "delta='1'"),
    ({"delta": True}, "delta=True"),
    ({"center": "mode"}, "center='mode'.*median, mean, geometric_mean, log_mi"),
    ({"log_form": "ln"}, "log_form='ln'.*base, product"),
  ],
)
def test_guards_name_the_value_in_one_line(arguments, message):
  arguments = {"capacities": {"a": 10}, "b_min": 3, "b_max": 8} | arguments
  with pytest.raises(ValueError, match=message) as error:
    dpc.dpc_bit_widths(**arguments)
  assert "\n" not in str(error.value)
