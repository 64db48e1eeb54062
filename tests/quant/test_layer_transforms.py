"""Quantized layers under jit, vmap, remat, scan and on 8 devices."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dpc_jax.quant import grids, layers, precision
from tests.quant import running

NEAREST = grids.Quantization(gradients=grids.Grid())


class Stack(nn.Module):
  """A dense layer, a convolution's worth of reshaping, another layer."""

  quantization: grids.Quantization = NEAREST

  @nn.compact
  def __call__(self, x):
    x = layers.QuantDense(8, quantization=self.quantization, name="first")(x)
    x = nn.relu(x)
    return layers.QuantDense(4, quantization=self.quantization, name="last")(x)


def test_100_bit_settings_trace_once():
  model, x = Stack(), jax.random.normal(jax.random.key(0), (8, 6))
  variables = running.init(model, x)
  traces = []

  @jax.jit
  def step(variables):
    traces.append(None)

    def loss(params):
      y, updates = model.apply(
        {**variables, "params": params}, x, mutable=["quant_stats"]
      )
      return jnp.sum(y**2), updates

    return jax.grad(loss, has_aux=True)(variables["params"])

  seen = set()
  random = np.random.default_rng(0)
  for _ in range(100):
    bits = {
      path: grids.LayerBits(*(int(b) for b in random.integers(2, 17, 3)))
      for path in ("first", "last")
    }
    gradient, _ = step(precision.assign_bits(variables, bits))
    seen.add(float(gradient["last"]["kernel"][0, 0]))
  step(precision.assign_bits(variables, 32))
  assert len(traces) == 1
  assert len(seen) > 90


def test_vmap_and_remat_agree_with_the_plain_call():
  model, x = Stack(), jax.random.normal(jax.random.key(0), (5, 8, 6))
  variables = precision.assign_bits(running.init(model, x[0]), 5)
  run = jax.jit(model.apply)
  rows = [run(variables, row) for row in x]
  # Each example of a vmap has a range of its own.
  batched = jax.jit(jax.vmap(model.apply, in_axes=(None, 0)))(variables, x)
  np.testing.assert_allclose(batched, jnp.stack(rows), atol=1e-6)

  key = jax.random.key(3)
  noisy = Stack(quantization=grids.Quantization())
  remat = nn.remat(Stack)(quantization=grids.Quantization())
  running.assert_same(running.init(noisy, x[0]), running.init(remat, x[0]))
  for a, b in zip(
    jax.tree.leaves(running.forward_and_backward(noisy, variables, x[0], key)),
    jax.tree.leaves(running.forward_and_backward(remat, variables, x[0], key)),
    strict=True,
  ):
    # The same noise: another draw would differ by whole levels.
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


class Block(nn.Module):
  quantization: grids.Quantization = NEAREST

  @nn.compact
  def __call__(self, x, _):
    y = layers.QuantDense(6, quantization=self.quantization, name="layer")(x)
    return nn.tanh(y), None


def scanned(quantization=NEAREST):
  return nn.scan(
    Block,
    variable_axes={"params": 0, "precision": 0, "quant_stats": 0},
    split_rngs={"params": True, "quant": True},
    length=3,
  )(quantization=quantization)


def test_scan_is_the_unrolled_layers():
  model, x = scanned(), jax.random.normal(jax.random.key(0), (8, 6))
  variables = jax.jit(model.init)(jax.random.key(0, impl="rbg"), x, None)
  for path, bits in precision.layer_bits(variables).items():
    assert path == "layer"
    assert all(width.shape == (3,) for width in bits)
  assert variables["quant_stats"]["layer"]["lo"].shape == (3,)

  @jax.jit
  def scan(variables, params, x):
    def loss(params):
      (y, _), updates = model.apply(
        {**variables, "params": params}, x, None, mutable=["quant_stats"]
      )
      return jnp.sum(y**2), (y, updates)

    return jax.grad(loss, has_aux=True)(params)

  @jax.jit
  def unrolled(variables, params, x):
    def loss(params):
      y, stats = x, []
      for i in range(3):
        one = {**variables, "params": params}
        one = jax.tree.map(lambda v, i=i: v[i], one)
        (y, _), updates = Block().apply(one, y, None, mutable=["quant_stats"])
        stats.append(updates)
      stats = jax.tree.map(lambda *v: jnp.stack(v), *stats)
      return jnp.sum(y**2), (y, stats)

    return jax.grad(loss, has_aux=True)(params)

  outputs = {}
  for name, bits in {
    "float": 32,
    "mixed": (np.array([8, 2, 32]), np.array([4, 8, 32]), np.array([8, 4, 32])),
    "other": (np.array([2, 8, 32]), np.array([4, 8, 32]), np.array([8, 4, 32])),
  }.items():
    bits = bits if name == "float" else {"layer": grids.LayerBits(*bits)}
    variables = precision.assign_bits(variables, bits)
    got = scan(variables, variables["params"], x)
    want = unrolled(variables, variables["params"], x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)
    outputs[name] = got[1][0]
  assert not np.allclose(outputs["mixed"], outputs["other"], atol=1e-2)


class Fan(nn.Module):
  """A layer applied to the carry, which it leaves as it is."""

  @nn.compact
  def __call__(self, x, _):
    return x, layers.QuantDense(16, use_bias=False, name="layer")(x)


@pytest.mark.parametrize("split", [True, False])
def test_the_layers_of_a_scan_differ_in_noise_if_the_stream_is_split(split):
  model = nn.scan(
    Fan,
    variable_axes={"params": 0, "precision": 0, "quant_stats": 0},
    split_rngs={"params": True, "quant": split},
    length=3,
  )()
  x, g = jnp.eye(16), jax.random.normal(jax.random.key(1), (3, 16, 16))
  g = jnp.broadcast_to(g[0], g.shape)
  variables = jax.jit(model.init)(jax.random.key(0, impl="rbg"), x, None)
  variables = precision.assign_bits(variables, grids.LayerBits(32, 32, 3))

  @jax.jit
  def gradient(params):
    _, vjp = jax.vjp(
      lambda params: model.apply(
        {**variables, "params": params},
        x,
        None,
        rngs={"quant": jax.random.key(4)},
      )[1],
      params,
    )
    return vjp(g)[0]["layer"]["kernel"]

  # With the identity as input this is the rounded gradient itself.
  first, second, third = gradient(variables["params"])
  for a, b in ((first, second), (second, third), (first, third)):
    assert (0.2 < np.mean(np.abs(a - b) > 0.1) < 0.45) == split


def test_the_range_is_that_of_the_global_batch():
  mesh = jax.make_mesh((8,), ("data",))
  layer = layers.QuantDense(4, quantization=NEAREST)
  x = jax.random.normal(jax.random.key(0), (16, 6)).at[13, 2].set(9.0)
  variables = running.init(layer, x)
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  train = jax.jit(functools.partial(layer.apply, mutable=["quant_stats"]))
  want, stats = train(variables, x)
  got, sharded_stats = train(variables, jax.device_put(x, sharding))
  assert len(got.sharding.device_set) == 8
  running.assert_same(stats, sharded_stats)
  assert stats["quant_stats"]["hi"] == 9.0
  np.testing.assert_allclose(got, want, atol=1e-6)
