"""Steps with delayed ranges, written out, and a small network for them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dpc_jax.models import stacking
from dpc_jax.quant import delayed, grids, layers
from tests.quant import running

DELAYED = grids.Quantization(ranges="delayed")
BATCH = grids.Quantization()
NEAREST = grids.Quantization(gradients=grids.Grid(), ranges="delayed")


def make_step(model, key=None):
  """(variables, x, g) -> (y, gradients of params and x, new variables)."""
  rngs = {} if key is None else {"quant": key}

  def step(variables, x, g):
    probes = delayed.probes(model, variables, *x, rngs=rngs)

    def loss(params, x, probes):
      y, updates = model.apply(
        {**variables, **probes, "params": params},
        *x,
        mutable=["quant_stats", *probes],
        rngs=rngs,
      )
      return jnp.sum(y * g), (y, updates)

    params = variables.get("params", {})
    gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    (dw, dx, found), (y, updates) = gradient(params, x, probes)
    updates = delayed.settle(updates, found)
    return y, (dw, dx), {**variables, **updates}

  return step


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


class Net(nn.Module):
  """`depth` equal blocks between two layers, unrolled or scanned."""

  quantization: grids.Quantization = NEAREST
  depth: int = 2
  scan: bool = False

  @nn.compact
  def __call__(self, x):
    dense = functools.partial(layers.QuantDense, quantization=self.quantization)
    x = dense(6, name="first")(x)
    x = stacking.run_blocks(
      lambda name: Block(self.quantization, name=name),
      range(self.depth),
      x,
      scan=self.scan,
    )
    # Other rows than the layers before: batch * positions.
    return dense(4, name="last")(x.reshape(-1, 6))


class Block(nn.Module):
  quantization: grids.Quantization

  @nn.compact
  def __call__(self, x):
    dense = layers.QuantDense(6, quantization=self.quantization, name="layer")
    return nn.tanh(dense(x)) + x


def net(scan=False, quantization=NEAREST, depth=2):
  model = Net(quantization, depth, scan)
  x, g = normal(0, 16, 2, 5), normal(1, 32, 4)
  return model, running.init(model, x), x, g


def on_eight(variables, x, g):
  mesh = jax.make_mesh((8,), ("data",))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  copied = NamedSharding(mesh, PartitionSpec())
  return (
    jax.device_put(variables, copied),
    (jax.device_put(x, rows),),
    jax.device_put(g, rows),
  )


def small():
  layer = layers.QuantDense(5, use_bias=False, quantization=NEAREST)
  x, g = normal(0, 8, 6), normal(1, 8, 5)
  return layer, running.init(layer, x), x, g, jax.jit(make_step(layer))
