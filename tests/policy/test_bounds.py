"""precision_bounds: similarities, the widths they give, and what is refused."""

import flax
import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import dpc_jax as dpc
from dpc_jax.models import stacking
from dpc_jax.policy import bounds
from dpc_jax.quant import grids


def gaussian(*shape, seed=0):
  values = np.random.default_rng(seed).normal(size=shape)
  return values.astype(np.float32)


def widths_of(*shape):
  return {name: jnp.full(shape, 8) for name in grids.LayerBits._fields}


def alone(kernel):
  return {"params": {"layer": {"kernel": kernel}}}


def cosine(kernel, width, *, channels=1, kind="affine"):
  """Written out in float64: quantize, then <x, q> / (|x| |q|)."""
  x = np.asarray(kernel, np.float64)
  inner = tuple(range(x.ndim - channels))
  lo, hi = x.min(inner, keepdims=True), x.max(inner, keepdims=True)
  if kind == "affine":
    step = np.maximum((hi - lo) / (2**width - 1), 1e-8)
    q = np.round((x - lo) / step) * step + lo
  else:
    top = 2 ** (width - 1) - 1
    step = np.maximum(np.maximum(abs(lo), abs(hi)) / top, 1e-8)
    q = np.clip(np.round(x / step), -top, top) * step
  return np.sum(x * q) / np.sqrt(np.sum(x * x) * np.sum(q * q))


@pytest.mark.parametrize("kind", ["affine", "symmetric"])
def test_similarity_is_that_of_a_written_out_reference(kind):
  shapes = {"conv": (3, 3, 8, 12), "dense": (37, 5), "one": (50, 1)}
  kernels = {k: 0.02 * gaussian(*shape) for k, shape in shapes.items()}
  kernels["dense"] += 0.05
  params = {name: {"kernel": kernel} for name, kernel in kernels.items()}
  found = bounds.cosine_similarities(
    {"params": params}, widths=range(2, 17), grid=grids.Grid(kind, "channel")
  )
  assert list(found) == list(shapes)
  for name, kernel in kernels.items():
    for width, value in found[name].items():
      assert type(value) is float
      want = cosine(kernel, width, kind=kind)
      # A value at a tie may fall to the other side in float32.
      assert 1 - value == pytest.approx(1 - want, rel=2e-3, abs=1e-11), width


def test_many_weights_are_summed_without_loss():
  """A million terms: plain float32 sums would lose the digits behind 0.9999."""
  kernel = gaussian(2048, 512)
  found = bounds.cosine_similarities(alone(kernel), widths=[7, 8, 12])["layer"]
  for width, value in found.items():
    want = 1 - cosine(kernel, width)
    assert 1 - value == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-6, 1e25])
def test_the_scale_of_the_weights_does_not_matter(scale):
  kernel = gaussian(64, 8)
  plain = bounds.cosine_similarities(alone(kernel), widths=[3, 8])["layer"]
  scaled = bounds.cosine_similarities(
    alone(kernel * np.float32(scale)), widths=[3, 8]
  )["layer"]
  for width in (3, 8):
    assert 1 - scaled[width] == pytest.approx(1 - plain[width], rel=2e-2)


@pytest.mark.parametrize("shape", [(3, 3, 32, 16), (3, 3, 64, 64), (1024, 64)])
def test_gaussian_kernels_have_the_design_s_figures(shape):
  means = bounds.precision_bounds(alone(gaussian(*shape)), tau_max=0.999).mean
  for width, low, high in (
    (2, 0.83, 0.90),
    (3, 0.957, 0.978),
    (4, 0.990, 0.995),
    (5, 0.998, 0.999),
  ):
    assert low < means[width] < high
  assert means[8] > 0.99995


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.integers(0, 2**32 - 1), st.floats(-3, 3))
def test_more_bits_are_closer(seed, exponent):
  kernel = gaussian(32, 8, seed=seed) * np.float32(10**exponent)
  found = bounds.cosine_similarities(alone(kernel), widths=range(2, 13))
  values = list(found["layer"].values())
  assert values == sorted(values)
  assert 0 < values[0] < values[-1] <= 1


def test_bounds_are_the_smallest_widths_that_reach_the_thresholds():
  params = {
    f"layer{i}": {"kernel": gaussian(n, 16, seed=i)}
    for i, n in enumerate((20, 200, 1000))
  }
  found = bounds.precision_bounds({"params": params})
  means = {
    w: np.mean([cosine(layer["kernel"], w) for layer in params.values()])
    for w in range(2, 9)
  }
  assert found.mean == pytest.approx(means)
  assert means[found.b_min] >= 0.95 > means[found.b_min - 1]
  assert means[found.b_max] >= 0.9999 > means[found.b_max - 1]
  # Reached exactly is reached, and the next number above is not.
  tau = found.mean[5]
  at = bounds.precision_bounds({"params": params}, tau_min=tau, tau_max=tau)
  assert (at.b_min, at.b_max) == (5, 5)
  above = np.nextafter(tau, 1)
  at = bounds.precision_bounds({"params": params}, tau_min=tau, tau_max=above)
  assert (at.b_min, at.b_max) == (5, 6)
  at = bounds.precision_bounds(
    {"params": params}, tau_min=0.5, tau_max=0.99, widths=(4, 8)
  )
  assert (at.b_min, at.b_max) == (4, 4)


def test_worst_names_the_layer():
  params = {
    "small": {"kernel": gaussian(8, 16)},
    "large": {"kernel": gaussian(4096, 16)},
  }
  found = bounds.precision_bounds({"params": params}, tau_max=0.999)
  for width, (layer, value) in found.worst.items():
    assert layer == "large"
    assert value == found.cosine["large"][width]


def test_layers_of_precision_alone_count_and_products_do_not():
  variables = {
    "params": {
      "a": {"kernel": gaussian(16, 4), "bias": np.ones(4, np.float32)},
      "head": {"kernel": np.full((16, 4), np.nan, np.float32)},
    },
    "precision": {"qk": widths_of(), "a": widths_of()},
  }
  found = bounds.precision_bounds(variables, tau_max=0.99)
  assert list(found.cosine) == ["a"]
  frozen = bounds.precision_bounds(flax.core.freeze(variables), tau_max=0.99)
  assert frozen == found
  root = {"params": variables["params"]["a"], "precision": widths_of()}
  assert bounds.precision_bounds(root, tau_max=0.99).cosine == {
    "": found.cosine["a"]
  }


def test_stacked_layers_have_a_grid_each():
  kernels = np.stack([gaussian(24, 6, seed=i) * 10.0**i for i in range(3)])
  stacked = {
    "params": {"blocks": {"kernel": kernels.astype(np.float32)}},
    "precision": {"blocks": widths_of(3)},
  }
  single = {"params": {f"b{i}": {"kernel": kernels[i]} for i in range(3)}}
  found = bounds.precision_bounds(stacked)
  apart = bounds.precision_bounds(single)
  assert found[:2] == apart[:2]
  assert found.mean == pytest.approx(apart.mean, abs=1e-9)
  for width in range(2, 9):
    values = found.cosine["blocks"][width]
    assert (values.shape, values.dtype) == ((3,), np.float64)
    want = [apart.cosine[f"b{i}"][width] for i in range(3)]
    np.testing.assert_allclose(values, want, atol=1e-9)
    i = int(np.argmin(want))
    assert found.worst[width][0] == f"blocks[{i}]"


def test_a_scanned_resnet_is_the_unrolled_one():
  model = dpc.models.create("resnet14", num_classes=10, width=4, scan=True)
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))
  )
  random = np.random.default_rng(0)
  arrays = jax.tree.map(
    lambda x: random.normal(size=x.shape).astype(x.dtype),
    {name: shapes[name] for name in ("params", "precision")},
  )
  stacked = bounds.precision_bounds(arrays)
  unrolled = bounds.precision_bounds(stacking.unstack_blocks(arrays))
  assert any(np.ndim(row[2]) for row in stacked.cosine.values())
  assert not any(np.ndim(row[2]) for row in unrolled.cosine.values())
  assert len(unrolled.cosine) == 15
  assert stacked[:2] == unrolled[:2]
  assert stacked.mean == pytest.approx(unrolled.mean, abs=1e-9)


def test_all_channel_axes_of_a_general_dense_layer_have_their_range():
  """As the layer itself has: features of several axes, told by the bias."""

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.DenseGeneral((3, 4), name="heads")(x)

  model = dpc.quantize(Net(), grids.Quantization(activations=None))
  x = jnp.eye(10)
  variables = model.init(jax.random.key(0), x)
  heads = jnp.array([1, 10, 100], jnp.float32)[None, :, None]
  kernel = variables["params"]["heads"]["kernel"] * heads
  params = {"heads": {**variables["params"]["heads"], "kernel": kernel}}
  variables = dpc.assign_bits({**variables, "params": params}, 2)
  value = bounds.cosine_similarities(variables, widths=[2])["heads"][2]
  assert value == pytest.approx(cosine(kernel, 2, channels=2), abs=1e-6)
  # The identity as input makes the layer's output its quantized kernel.
  q = np.asarray(model.apply(variables, x), np.float64)
  kernel = np.asarray(kernel, np.float64)
  want = np.sum(q * kernel) / np.sqrt(np.sum(q * q) * np.sum(kernel**2))
  assert value == pytest.approx(want, abs=1e-6)


def test_boxed_narrow_and_wide_parameters():
  init = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
  boxed = nn.Dense(6, kernel_init=init).init(jax.random.key(0), jnp.ones(40))
  plain = nn.unbox(boxed)
  assert isinstance(boxed["params"]["kernel"], nn.Partitioned)
  found = bounds.cosine_similarities(boxed)
  assert found == bounds.cosine_similarities(plain)
  kernel = plain["params"]["kernel"]
  wide = np.asarray(kernel, np.float64)
  assert bounds.cosine_similarities({"params": {"kernel": wide}}) == found
  # Of what a narrow dtype holds, computed in float32.
  narrow = kernel.astype(jnp.bfloat16)
  value = bounds.cosine_similarities({"params": {"kernel": narrow}})[""][4]
  want = cosine(narrow.astype(jnp.float32), 4)
  assert value == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("axes", [("x", None), (None, "x")])
def test_sharded_arrays(axes):
  mesh = jax.make_mesh((8,), ("x",))
  kernel = gaussian(64, 16)
  sharded = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec(*axes)))
  assert not sharded.is_fully_replicated
  here = bounds.precision_bounds(alone(kernel))
  there = bounds.precision_bounds(alone(sharded))
  assert there[:2] == here[:2]
  for width, value in here.mean.items():
    assert 1 - there.mean[width] == pytest.approx(1 - value, rel=1e-5)
  sums = bounds._sums(
    sharded, np.array([2]), grid=bounds.WEIGHT_GRID, axes=(-1,), depth=0
  )
  # So that each of several processes can read them.
  assert all(x.is_fully_replicated for x in sums)


def test_one_program_per_shape_serves_all_widths(monkeypatch):
  traces = []
  quantize = grids.fake_quantize

  def counted(x, *args, **kwargs):
    traces.append(x.shape)
    return quantize(x, *args, **kwargs)

  monkeypatch.setattr(grids, "fake_quantize", counted)
  params = {
    f"layer{i}": {"kernel": gaussian(*shape, seed=i)}
    for i, shape in enumerate([(11, 7), (11, 7), (13, 7)])
  }
  bounds.cosine_similarities({"params": params}, widths=range(2, 9))
  assert traces == [(11, 7), (13, 7)]
  bounds.cosine_similarities({"params": params}, widths=range(3, 10))
  assert len(traces) == 2


def test_zero_and_constant_kernels_are_exact():
  zero = np.zeros((5, 3), np.float32)
  found = bounds.precision_bounds(alone(zero), tau_min=1.0, tau_max=1.0)
  assert found == (2, 2, {"layer": dict.fromkeys(range(2, 9), 1.0)})
  constant = np.full((5, 3), 0.3, np.float32)
  assert bounds.precision_bounds(alone(constant), tau_max=1.0).b_max == 2
  one_channel = gaussian(5, 3)
  one_channel[:, 1] = 0
  value = bounds.cosine_similarities(alone(one_channel))["layer"][3]
  assert value == pytest.approx(cosine(one_channel, 3), abs=1e-6)


def test_weights_that_all_round_to_zero_have_similarity_0():
  kernel = np.full((4, 2), 1e-9, np.float32)
  found = bounds.cosine_similarities(
    alone(kernel), grid=grids.Grid("symmetric", "channel")
  )
  assert set(found["layer"].values()) == {0.0}


def test_a_lost_majority_is_measured_too():
  """One weight hides the others: the quantized kernel is far from its own."""
  kernel = np.full((400, 1), 0.1, np.float32)
  kernel[0] = 1
  grid = grids.Grid("symmetric", "channel")
  value = bounds.cosine_similarities(alone(kernel), widths=[2], grid=grid)
  assert value["layer"][2] == pytest.approx(1 / np.sqrt(4.99), rel=1e-6)


def test_a_threshold_that_no_width_reaches():
  variables = alone(gaussian(1000, 8))
  match = (
    r"tau_max = 0\.99999: no width of 2, 3, 4, 5, 6, 7, 8 reaches it; the"
    r" best, 8 bits, has a mean similarity of 0\.9999\d+; lower tau_max or"
  )
  with pytest.raises(ValueError, match=match):
    bounds.precision_bounds(variables, tau_max=0.99999)
  with pytest.raises(ValueError, match=r"tau_min = 0\.95: .* 2 bits, has"):
    bounds.precision_bounds(variables, widths=[2])
  found = bounds.precision_bounds(
    variables, tau_max=0.99999, widths=range(2, 17)
  )
  assert found.b_max > 8


NAN, INF = np.float32(np.nan), np.float32(np.inf)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_weights_that_are_not_finite_are_named(value):
  params = {
    "fine": {"kernel": gaussian(6, 4)},
    "broken": {"kernel": gaussian(6, 4)},
  }
  params["broken"]["kernel"][2, 3] = value
  with pytest.raises(ValueError, match="layer 'broken': its weights"):
    bounds.precision_bounds({"params": params})
  kernels = np.stack([gaussian(6, 4)] * 3)
  kernels[1, 2, 3] = value
  stacked = {
    "params": {"blocks": {"kernel": kernels}},
    "precision": {"blocks": widths_of(3)},
  }
  with pytest.raises(ValueError, match=r"layer 'blocks\[1\]': its weights"):
    bounds.precision_bounds(stacked)


@pytest.mark.parametrize("largest", [3e38, 1.8e38])
def test_a_range_wider_than_float32_is_named(largest):
  kernel = np.array([[largest], [-largest], [1]], np.float32)
  with pytest.raises(ValueError, match=r"layer 'layer': .* range, are not fin"):
    bounds.precision_bounds(alone(kernel))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"tau_min": 0.99, "tau_max": 0.98}, "tau_min = 0.99 is above tau_max"),
    ({"tau_min": 0}, r"tau_min = 0 is no similarity; use one in \(0, 1\]"),
    ({"tau_max": 1.01}, "tau_max = 1.01 is no similarity"),
    ({"tau_min": float("nan")}, "tau_min = nan is no similarity"),
    ({"tau_max": "high"}, "tau_max = 'high' is no similarity"),
    ({"tau_max": True}, "tau_max = True is no similarity"),
    ({"widths": ()}, "widths is empty"),
    ({"widths": (4, 3)}, "widths: 3 comes after 4"),
    ({"widths": (3, 3)}, "widths: 3 comes after 3"),
    ({"widths": (1, 3)}, "widths: 1 is not a width; use ints in 2..16"),
    ({"widths": (8, 32)}, "widths: 32 is not a width"),
    ({"widths": (4.0,)}, "widths: 4.0 is not a width"),
    ({"grid": grids.Grid(rounding="stochastic")}, "grid.rounding = 'stoch"),
  ],
)
def test_mistakes_in_arguments(options, message):
  with pytest.raises(ValueError, match=message) as error:
    bounds.precision_bounds(alone(gaussian(4, 4)), **options)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("variables", "message"),
  [
    ({"params": {}}, "no layer has weights"),
    ({"params": {}, "precision": {"qk": widths_of()}}, "no layer has weights"),
    (alone(np.zeros((0, 4), np.float32)), "no layer has weights"),
    (alone(np.ones((4, 4), np.int8)), "'layer': its kernel is of int8"),
    (
      alone(jax.ShapeDtypeStruct((4, 4), jnp.float32)),
      "'layer': its kernel is abstract",
    ),
    (
      alone(gaussian(4, 2, 3)) | {"precision": {"layer": widths_of(2)}},
      r"'layer': a kernel of shape \(4, 2, 3\) for widths of shape \(2,\)",
    ),
    ({"layer": {"kernel": gaussian(4, 4)}}, "no collection 'params'"),
  ],
)
def test_mistakes_in_variables(variables, message):
  with pytest.raises(ValueError, match=message) as error:
    bounds.precision_bounds(variables)
  assert "\n" not in str(error.value)
