"""layer_costs: every product of a model, counted by hand beside it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.cost import bitops, macs
from dpc_jax.quant import layers

LayerCost = bitops.LayerCost


def _input(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def test_dense_at_the_root_per_sample():
  costs = macs.layer_costs(nn.Dense(5), _input(8, 3))
  assert costs == {"": LayerCost(macs=15, weights=15, layers=1)}
  assert all(type(value) is int for value in costs[""])
  # Rank 1 is one sample; further axes than the batch's are positions.
  assert macs.layer_costs(nn.Dense(5), _input(3))[""].macs == 15
  assert macs.layer_costs(nn.Dense(5), _input(8, 7, 3))[""].macs == 7 * 15


def test_arrays_and_shapes_give_the_same():
  model = nn.Dense(5)
  assert macs.layer_costs(model, np.ones((8, 3), np.float32)) == (
    macs.layer_costs(model, jnp.ones((8, 3)))
  )


@pytest.mark.parametrize(
  ("options", "out", "channels"),
  [
    ({}, (10, 12), 4),
    ({"strides": 2}, (5, 6), 4),
    ({"padding": "VALID"}, (8, 10), 4),
    ({"kernel_dilation": 2, "padding": "VALID"}, (6, 8), 4),
    ({"feature_group_count": 2}, (10, 12), 2),
    ({"feature_group_count": 4}, (10, 12), 1),
    ({"strides": (1, 2), "padding": ((1, 1), (1, 1))}, (10, 6), 4),
  ],
)
def test_conv(options, out, channels):
  model = nn.Conv(8, (3, 3), **options)
  costs = macs.layer_costs(model, _input(2, 10, 12, 4))
  weights = 3 * 3 * channels * 8
  assert costs == {"": LayerCost(weights * out[0] * out[1], weights)}


def test_conv_along_one_axis_and_transposed():
  costs = macs.layer_costs(nn.Conv(8, (5,)), _input(2, 10, 4))
  assert costs == {"": LayerCost(5 * 4 * 8 * 10, 5 * 4 * 8)}
  model = nn.ConvTranspose(8, (3, 3), strides=(2, 2))
  costs = macs.layer_costs(model, _input(2, 5, 5, 4))
  assert costs == {"": LayerCost(3 * 3 * 4 * 8 * 100, 3 * 3 * 4 * 8)}


def test_dense_general_and_einsum_layers():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      y = nn.DenseGeneral((2, 3), axis=(-2, -1), name="general")(x)
      return y, nn.Einsum((4, 6, 5), "bsh,shd->bsd", name="einsum")(x)

  assert macs.layer_costs(Net(), _input(7, 4, 6)) == {
    "general": LayerCost(24 * 6, 24 * 6),
    "einsum": LayerCost(4 * 6 * 5, 4 * 6 * 5),
  }


def test_attention_products_have_their_names():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      attention = nn.MultiHeadDotProductAttention(2, name="attention")
      return attention(x, x)

  dense = LayerCost(7 * 16 * 16, 16 * 16)
  product = LayerCost(7 * 7 * 16, 0)
  assert macs.layer_costs(Net(), _input(3, 7, 16)) == {
    "attention/query": dense,
    "attention/key": dense,
    "attention/value": dense,
    "attention/qk": product,
    "attention/av": product,
    "attention/out": dense,
  }


class _LinearAttention(nn.Module):
  products: int

  @nn.compact
  def __call__(self, x):
    weights = jnp.einsum("bqd,bkd->bqk", x, x)
    for i in range(1, self.products):
      weights = jnp.einsum("bqk,bkd->bqd", weights, jnp.ones((2, 3, 3 + i)))
      weights = weights[..., :3]
    return weights


def test_only_two_products_are_scores_and_values_in_this_order():
  costs = macs.layer_costs(_LinearAttention(2), _input(2, 3, 5))
  assert costs == {"qk": LayerCost(45, 0), "av": LayerCost(36, 0)}
  costs = macs.layer_costs(_LinearAttention(3), _input(2, 3, 5))
  assert list(costs) == ["product0", "product1", "product2"]


def test_attention_called_twice_sums_by_name():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      attention = nn.MultiHeadDotProductAttention(2, name="attention")
      return attention(attention(x, x), x)

  costs = macs.layer_costs(Net(), _input(3, 7, 16))
  assert len(costs) == 6
  assert costs["attention/qk"] == LayerCost(2 * 7 * 7 * 16, 0)
  assert costs["attention/out"] == LayerCost(2 * 7 * 256, 256)


def test_tied_embedding_counts_its_product_only():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, ids):
      embed = nn.Embed(11, 6, name="embed")
      return embed.attend(embed(ids))

  costs = macs.layer_costs(Net(), _input(2, 7, dtype=jnp.int32))
  assert costs == {"embed": LayerCost(7 * 6 * 11, 66)}


def test_products_outside_layers_are_found():
  class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
      return jnp.einsum("bi,bj->bij", x, x) @ jnp.ones((4, 9))

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Dense(4, name="dense")(x)
      weight = self.param("other", nn.initializers.orthogonal(), (4, 4))
      return Inner(name="inner")(jnp.dot(x, weight))

  assert macs.layer_costs(Net(), _input(5, 3)) == {
    "dense": LayerCost(12, 12),
    "product0": LayerCost(16, 0),
    "inner/product0": LayerCost(16, 0),
    "inner/product1": LayerCost(4 * 4 * 9, 0),
  }


class _Block(nn.Module):
  train: bool = False

  @nn.compact
  def __call__(self, x, _):
    attention = nn.remat(nn.MultiHeadDotProductAttention)
    x = attention(2, name="attention")(x, x)
    x = nn.BatchNorm(use_running_average=not self.train)(x)
    return layers.QuantDense(16, name="dense")(x), None


class _Stack(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    stack = nn.scan(
      _Block,
      variable_axes={
        "params": 0,
        "batch_stats": 0,
        "precision": 0,
        "quant_stats": 0,
      },
      split_rngs={"params": True, "quant": True},
      length=3,
    )
    x, _ = stack(train, name="blocks")(x, None)
    return nn.Dense(5, name="head")(x)


def test_stacked_layers_give_the_cost_of_one():
  costs = macs.layer_costs(_Stack(), _input(2, 7, 16), train=False)
  dense = LayerCost(7 * 256, 256, 3)
  assert costs.pop("head") == LayerCost(7 * 80, 80)
  assert costs["blocks/dense"] == costs["blocks/attention/out"] == dense
  assert costs["blocks/attention/qk"] == LayerCost(7 * 7 * 16, 0, 3)
  assert {cost.layers for cost in costs.values()} == {3}
  variables = jax.eval_shape(_Stack().init, jax.random.key(0), _input(2, 7, 16))
  precision = variables["precision"]["blocks"]["dense"]
  assert precision["weights"].shape == (costs["blocks/dense"].layers,)


def test_recurrent_layers_count_every_step_but_are_not_stacked():
  model = nn.RNN(nn.SimpleCell(8), name="rnn")
  costs = macs.layer_costs(model, _input(2, 5, 3))
  assert set(costs.values()) == {LayerCost(5 * 24, 24), LayerCost(5 * 64, 64)}
  assert all(path.endswith(("/i", "/h")) for path in costs)


def test_products_of_a_recurrent_cell_without_its_own_kernel():
  model = nn.RNN(nn.OptimizedLSTMCell(8), name="rnn")
  costs = macs.layer_costs(model, _input(2, 5, 3))
  assert set(costs.values()) == {
    LayerCost(5 * 3 * 32, 0),
    LayerCost(5 * 8 * 32, 0),
  }


def test_vmapped_layers_are_stacked():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      many = nn.vmap(
        nn.Dense,
        in_axes=None,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        axis_size=5,
      )
      return many(6, name="many")(x)

  assert macs.layer_costs(Net(), _input(4, 7)) == {"many": LayerCost(42, 42, 5)}


def test_shared_layer_sums_and_remat_counts_once():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      shared = nn.remat(nn.Dense)(3, name="shared")
      return shared(shared(shared(x)))

  costs = macs.layer_costs(Net(), _input(4, 3))
  assert costs == {"shared": LayerCost(27, 9)}


def test_setup_and_helper_methods_belong_to_their_module():
  class Net(nn.Module):
    def setup(self):
      self.first = nn.Dense(4)

    def helper(self, x):
      return x @ jnp.ones((4, 6))

    def __call__(self, x):
      x = self.first(x) @ jnp.ones((4, 4))
      return self.helper(x)

  assert macs.layer_costs(Net(), _input(2, 3)) == {
    "first": LayerCost(12, 12),
    "product0": LayerCost(16, 0),
    "product1": LayerCost(24, 0),
  }


@pytest.mark.parametrize("kind", ["dense", "conv", "depthwise"])
def test_quantized_layers_cost_what_float_ones_do(kind):
  quantized, plain, shape = {
    "dense": (layers.QuantDense(6), nn.Dense(6), (2, 4)),
    "conv": (
      layers.QuantConv(6, (3, 3), strides=2),
      nn.Conv(6, (3, 3), strides=2),
      (2, 8, 8, 4),
    ),
    "depthwise": (
      layers.QuantConv(4, (3, 3), feature_group_count=4),
      nn.Conv(4, (3, 3), feature_group_count=4),
      (2, 8, 8, 4),
    ),
  }[kind]
  costs = macs.layer_costs(quantized, _input(*shape))
  assert costs == macs.layer_costs(plain, _input(*shape))
  assert list(costs) == [""]


def test_jitted_helpers_are_named_after_their_caller():
  helper = jax.jit(lambda x: x @ jnp.ones((3, 3)))

  class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
      return helper(x)

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      return Inner(name="a")(x) + Inner(name="b")(x)

  product = LayerCost(9, 0)
  expected = {"a/product0": product, "b/product0": product}
  assert macs.layer_costs(Net(), _input(2, 3)) == expected


def test_a_condition_costs_its_largest_branch():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      small = lambda: x @ jnp.ones((3, 3))  # noqa: E731
      large = lambda: x @ jnp.ones((3, 7)) @ jnp.ones((7, 3))  # noqa: E731
      return jax.lax.cond(x.sum() > 0, large, small)

  costs = macs.layer_costs(Net(), _input(2, 3))
  assert sum(cost.macs for cost in costs.values()) == 42


def test_a_loop_of_unknown_length_is_refused():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      return jax.lax.while_loop(
        lambda x: x.sum() > 0, lambda x: x @ jnp.ones((3, 3)), x
      )

  with pytest.raises(ValueError, match=r"module '': cannot count.*'while'"):
    macs.layer_costs(Net(), _input(2, 3))


def test_a_product_without_a_batch_is_refused():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      table = jnp.ones((3, 3)) @ jnp.ones((3, 3))
      return x @ table

  with pytest.raises(ValueError, match="'product0': 27 MACs do not divide"):
    macs.layer_costs(Net(), _input(2, 3))
  costs = macs.layer_costs(Net(), _input(1, 3))
  assert costs["product0"].macs == 27


def test_a_layer_that_jit_hides_is_refused():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      jitted = nn.jit(layers.QuantDense)
      return jitted(3, name="a")(x) + jitted(3, name="b")(x)

  with pytest.raises(ValueError, match=r"layer '[ab]' has widths but no prod"):
    macs.layer_costs(Net(), _input(2, 3))


def test_no_array_among_the_inputs_is_refused():
  with pytest.raises(ValueError, match="inputs: no array"):
    macs.layer_costs(nn.Dense(3), None)


def test_nothing_is_allocated_or_computed():
  # 2^40 weights would be 4 TiB.
  model = nn.Dense(2**20, use_bias=False)
  costs = macs.layer_costs(model, _input(1, 2**20))
  assert costs == {"": LayerCost(2**40, 2**40)}


def test_products_that_a_trace_does_not_size_are_refused():
  class Sharded(nn.Module):
    @nn.compact
    def __call__(self, x):
      mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
      spec = jax.sharding.PartitionSpec("data")
      return jax.shard_map(
        lambda x: x @ jnp.ones((3, 3)), mesh=mesh, in_specs=spec, out_specs=spec
      )(x)

  class Ragged(nn.Module):
    @nn.compact
    def __call__(self, x):
      return jax.lax.ragged_dot(
        x, jnp.ones((1, 3, 3)), jnp.array([x.shape[0]], jnp.int32)
      )

  for model, name in ((Sharded(), "shard_map"), (Ragged(), "ragged_dot")):
    with pytest.raises(ValueError, match=f"cannot count.*'{name}"):
      macs.layer_costs(model, _input(2, 3))
