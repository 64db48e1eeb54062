"""QuantDense and QuantConv: against Flax, their state, under transforms."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.quant import grids, layers, precision
from tests.quant import running

NEAREST = grids.Quantization(gradients=grids.Grid())

# Name: (float class, attributes, input shape).
LAYERS = {
  "dense": (nn.Dense, {"features": 5}, (3, 4, 6)),
  "dense_plain": (nn.Dense, {"features": 5, "use_bias": False}, (6,)),
  "dense_bfloat16": (nn.Dense, {"features": 5, "dtype": jnp.bfloat16}, (3, 6)),
  "conv": (
    nn.Conv,
    {"features": 6, "kernel_size": (3, 3), "strides": (2, 1)},
    (2, 7, 6, 4),
  ),
  "conv_bfloat16": (
    nn.Conv,
    {"features": 6, "kernel_size": (3, 3), "dtype": jnp.bfloat16},
    (2, 7, 6, 4),
  ),
  "conv_groups_circular": (
    nn.Conv,
    {
      "features": 6,
      "kernel_size": (3, 3),
      "feature_group_count": 2,
      "padding": "CIRCULAR",
      "kernel_dilation": 2,
    },
    (2, 7, 6, 4),
  ),
  "conv_one_image": (
    nn.Conv,
    {"features": 6, "kernel_size": (3, 3)},
    (7, 6, 4),
  ),
  "conv_1d_causal": (
    nn.Conv,
    {"features": 6, "kernel_size": (3,), "padding": "CAUSAL"},
    (2, 7, 4),
  ),
}


def pair(name, quantization=grids.Quantization()):  # noqa: B008
  """The float layer, the quantized one, an input."""
  cls, attributes, shape = LAYERS[name]
  ours = layers.QuantDense if cls is nn.Dense else layers.QuantConv
  x = jax.random.normal(jax.random.key(1), shape)
  return cls(**attributes), ours(**attributes, quantization=quantization), x


@pytest.mark.parametrize("name", LAYERS)
def test_width_32_is_the_flax_layer_bit_for_bit(name):
  plain, quantized, x = pair(name)
  want, got = running.init(plain, x), running.init(quantized, x)
  running.assert_same(want["params"], got["params"])
  got = precision.assign_bits(got, 32)
  # A float checkpoint in the quantized layer, and the other way.
  got, want = (
    {**got, "params": want["params"]},
    {**want, "params": got["params"]},
  )
  key = jax.random.key(2)
  running.assert_same(
    running.forward_and_backward(plain, want, x),
    running.forward_and_backward(quantized, got, x, key),
  )


@pytest.mark.parametrize("name", ["dense", "conv"])
def test_no_quantization_is_the_flax_layer(name):
  plain, quantized, x = pair(name, None)
  running.assert_same(running.init(plain, x), running.init(quantized, x))
  variables = running.init(plain, x)
  running.assert_same(
    running.forward_and_backward(plain, variables, x),
    running.forward_and_backward(quantized, variables, x),
  )


@pytest.mark.parametrize("name", ["dense", "conv_bfloat16"])
def test_the_collections(name):
  _, quantized, x = pair(name)
  variables = running.init(quantized, x)
  assert set(variables) == {"params", "precision", "quant_stats"}
  assert set(variables["precision"]) == set(grids.LayerBits._fields)
  for width in variables["precision"].values():
    assert width.shape == () and width.dtype == jnp.int32 and width == 8
  stats = variables["quant_stats"]
  assert set(stats) == {"lo", "hi", "count"}
  assert stats["lo"].dtype == stats["hi"].dtype == jnp.float32
  assert stats["count"].dtype == jnp.int32
  assert all(value.shape == () and value == 0 for value in stats.values())


def test_only_what_is_quantized_has_statistics_and_channels_keep_theirs():
  x = jnp.ones((2, 3))
  weights_only = layers.QuantDense(
    4, quantization=grids.Quantization(activations=None)
  )
  assert "quant_stats" not in running.init(weights_only, x)
  per_feature = layers.QuantDense(
    4,
    quantization=grids.Quantization(
      activations=grids.Grid(granularity="channel")
    ),
  )
  stats = running.init(per_feature, x)["quant_stats"]
  assert stats["lo"].shape == stats["hi"].shape == (1, 3)
  assert stats["count"].shape == ()


def test_the_running_range():
  layer = layers.QuantDense(4, quantization=NEAREST)
  random = np.random.default_rng(0)
  batches = [
    jnp.asarray(random.normal(0, 1 + i, (16, 6)), jnp.float32) for i in range(4)
  ]
  variables = running.init(layer, batches[0])
  train = jax.jit(functools.partial(layer.apply, mutable=["quant_stats"]))
  evaluate = jax.jit(layer.apply)

  def by_hand(x, limits):
    on_grid = grids.fake_quantize(x, 8, NEAREST.activations, limits=limits)
    kernel = variables["params"]["kernel"]
    return on_grid @ grids.fake_quantize(kernel, 8, NEAREST.weights)

  # While nothing is counted, evaluation takes the batch's range.
  np.testing.assert_allclose(
    evaluate(variables, batches[3]), by_hand(batches[3], None), atol=1e-5
  )
  lo = hi = None
  for i, x in enumerate(batches):
    y, updates = train(variables, x)
    assert set(updates) == {"quant_stats"}
    np.testing.assert_allclose(y, by_hand(x, None), atol=1e-5)
    lo = x.min() if i == 0 else 0.9 * lo + 0.1 * x.min()
    hi = x.max() if i == 0 else 0.9 * hi + 0.1 * x.max()
    stats = updates["quant_stats"]
    assert stats["count"] == i + 1
    np.testing.assert_allclose([stats["lo"], stats["hi"]], [lo, hi], rtol=1e-6)
    variables = {**variables, **updates}
  # Evaluation clips to the running range and leaves it alone.
  wide = batches[3] * 3
  assert wide.max() > hi
  limits = grids.Range(jnp.float32(lo), jnp.float32(hi))
  np.testing.assert_allclose(
    evaluate(variables, wide), by_hand(wide, limits), atol=1e-5
  )
  bad = wide.at[0, 0].set(jnp.nan)
  assert np.all(np.isnan(evaluate(variables, bad)))


@pytest.mark.parametrize("name", ["dense", "conv"])
def test_missing_collections_are_one_line(name):
  _, quantized, x = pair(name)
  variables = running.init(quantized, x)
  for collection in ("precision", "quant_stats"):
    rest = {k: v for k, v in variables.items() if k != collection}
    with pytest.raises(ValueError, match=f"no collection '{collection}'") as e:
      quantized.apply(rest, x)
    assert "\n" not in str(e.value) and type(quantized).__name__ in str(e.value)


def test_a_product_of_the_users_own_is_refused():
  layer = layers.QuantDense(3, dot_general=jax.lax.dot_general)
  with pytest.raises(ValueError, match="QuantDense: dot_general is set"):
    layer.init(jax.random.key(0), jnp.ones((2, 3)))


def test_noise_follows_the_quant_stream():
  _, layer, _ = pair("dense")
  x = jax.random.normal(jax.random.key(5), (64, 6))
  variables = precision.assign_bits(
    running.init(layer, x), grids.LayerBits(8, 8, 3)
  )

  def gradient(key):
    return running.forward_and_backward(layer, variables, x, key)[1][0][
      "kernel"
    ]

  none = gradient(None)
  np.testing.assert_array_equal(none, gradient(None))
  nearest = layers.QuantDense(5, quantization=NEAREST)
  np.testing.assert_array_equal(
    none, running.forward_and_backward(nearest, variables, x)[1][0]["kernel"]
  )
  first, second = gradient(jax.random.key(0)), gradient(jax.random.key(1))
  np.testing.assert_array_equal(first, gradient(jax.random.key(0)))
  assert not np.array_equal(first, second)
  assert not np.array_equal(first, none)
  # Raw keys serve as well.
  np.testing.assert_array_equal(first, gradient(jax.random.PRNGKey(0)))


def test_an_operand_without_a_grid_starts_at_32():
  layer = layers.QuantDense(
    4, quantization=grids.Quantization(activations=None, gradients=None)
  )
  variables = layer.init(jax.random.key(0), jnp.ones((2, 3)))
  assert precision.layer_bits(variables)[""] == (8, 32, 32)


def test_widths_are_not_made_up_in_apply():
  layer = layers.QuantDense(4)
  variables = layer.init(jax.random.key(0), jnp.ones((2, 3)))
  with pytest.raises(ValueError, match="no collection 'precision'"):
    layer.apply({"params": variables["params"]}, jnp.ones((2, 3)), mutable=True)


def test_an_empty_batch():
  layer = layers.QuantDense(4)
  variables = layer.init(jax.random.key(0), jnp.ones((2, 3)))
  assert layer.apply(variables, jnp.ones((0, 3))).shape == (0, 4)
