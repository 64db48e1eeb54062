"""Blocks in a row: both layouts, the way between them, what each row owns."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.cost import macs
from dpc_jax.models import stacking
from dpc_jax.policy import capacity
from dpc_jax.quant import grids, layers, precision
from tests.models import checks

NEAREST = grids.Quantization(gradients=grids.Grid())


class Block(nn.Module):
  """A quantized layer and a float one, on a pair of arrays."""

  @nn.compact
  def __call__(self, pair: Any, shift: jax.Array) -> Any:
    x, total = pair
    y = layers.QuantDense(x.shape[-1], quantization=NEAREST, name="inner")(
      x + shift
    )
    y = nn.LayerNorm(name="norm")(y)
    return x + y, total + jnp.sum(jnp.sin(y))


class Model(nn.Module):
  """`blocks` equal blocks from number `first` on, after a first unlike one."""

  blocks: int
  first: int = 0
  scan: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    for i in range(self.first):
      x = layers.QuantDense(6 + i, quantization=NEAREST, name=f"block{i}")(x)
    x, total = stacking.run_blocks(
      lambda name: Block(name=name),
      range(self.first, self.first + self.blocks),
      (x, jnp.float32(0)),
      jnp.float32(0.5),
      scan=self.scan,
    )
    return x.sum(-1) + total


def case(blocks, first):
  def build(scan=False):
    return Model(blocks, first, scan)

  def inputs(n):
    random = np.random.default_rng(n)
    return (jnp.asarray(random.normal(size=(n, 5)), jnp.float32),)

  return checks.Case(build, inputs, lambda y, _: jnp.sum(jnp.sin(y)))


@functools.cache
def shared(first):
  return case(4, first)


@pytest.mark.parametrize("first", [0, 1])
def test_scanned_is_unrolled(first):
  checks.check_scan_is_unroll(shared(first))


@pytest.mark.parametrize("first", [0, 1])
def test_each_row_has_its_own_width(first):
  checks.check_stacked_widths(shared(first), "blocks/inner")


def names(model):
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 5)))
  return set(shapes["params"])


def test_one_block_alone_is_not_stacked():
  assert names(Model(1, scan=True)) == {"block0"}
  assert names(Model(1, 1, scan=True)) == {"block0", "block1"}
  assert names(Model(2, scan=True)) == {"blocks"}
  assert names(Model(2, 1, scan=True)) == {"block0", "blocks"}
  assert names(Model(2)) == {"block0", "block1"}
  assert names(Model(0, 1, scan=True)) == {"block0"}


class Noise(nn.Module):
  """Adds a number from a stream of random numbers."""

  stream: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    noise = jax.random.uniform(self.make_rng(self.stream))
    self.sow("intermediates", "noise", noise)
    return x + noise


class Noises(nn.Module):
  stream: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return stacking.run_blocks(
      lambda name: Noise(self.stream, name=name), range(3), x, scan=True
    )


@pytest.mark.parametrize("stream", ["quant", "dropout"])
def test_every_row_draws_its_own_noise(stream):
  _, updates = Noises(stream).apply(
    {}, jnp.zeros(()), rngs={stream: checks.KEY}, mutable=["intermediates"]
  )
  (noise,) = updates["intermediates"]["blocks"]["noise"]
  assert noise.shape == (3,) and len(set(noise.tolist())) == 3


def test_initial_values_differ_from_row_to_row():
  built = shared(0)
  kernel = checks.initial(built, built.build(scan=True))["params"]["blocks"][
    "inner"
  ]["kernel"]
  assert kernel.shape == (4, 5, 5)
  assert len({row.tobytes() for row in np.asarray(kernel)}) == 4


def tree(*shapes, names=None):
  """`params` of blocks with one kernel each, filled with their number."""
  return {
    name: {"kernel": np.full(shape, i, np.float32)}
    for i, (name, shape) in enumerate(
      zip(
        names or [f"block{i}" for i in range(len(shapes))], shapes, strict=True
      )
    )
  }


def test_the_longest_run_of_equal_blocks_at_the_end():
  a, b = (2, 3), (3, 3)
  assert set(stacking.stack_blocks(tree(a, b, b))) == {"block0", "blocks"}
  assert set(stacking.stack_blocks(tree(b, b))) == {"blocks"}
  # Equal blocks that others follow stay: only the end is a stack.
  for shapes in [(b,), (a, b), (b, b, a), ()]:
    checks.assert_same(stacking.stack_blocks(tree(*shapes)), tree(*shapes))
  mixed = stacking.stack_blocks(tree(b, b, a, b, b))
  assert set(mixed) == {"block0", "block1", "block2", "blocks"}
  np.testing.assert_array_equal(mixed["blocks"]["kernel"][:, 0, 0], [3, 4])


def test_dtypes_names_and_numbers_decide():
  other = tree((3, 3), (3, 3))
  other["block0"]["kernel"] = other["block0"]["kernel"].astype(np.float16)
  assert set(stacking.stack_blocks(other)) == {"block0", "block1"}
  other = tree((3, 3), (3, 3))
  other["block0"] = {"weight": other["block0"]["kernel"]}
  assert set(stacking.stack_blocks(other)) == {"block0", "block1"}
  # By number, not by spelling; a name that only starts alike is no block.
  many = tree(*[(1,)] * 12) | {"blocked": {"kernel": np.zeros(1)}}
  stacked = stacking.stack_blocks(dict(sorted(many.items())))
  assert set(stacked) == {"blocks", "blocked"}
  np.testing.assert_array_equal(
    stacked["blocks"]["kernel"], np.arange(12.0)[:, None]
  )


def test_one_plan_for_all_collections():
  # Blocks that look the same in `precision` and are not: `params` decide.
  variables = {
    "precision": tree((), (), ()),
    "params": tree((2, 3), (3, 3), (3, 3)),
  }
  stacked = stacking.stack_blocks(variables)
  for collection in stacked.values():
    assert set(collection) == {"block0", "blocks"}
  checks.assert_same(stacking.unstack_blocks(stacked), variables)
  # A collection without the first block: the others keep their numbers.
  del variables["precision"]["block0"]
  stacked = stacking.stack_blocks(variables)
  assert set(stacked["precision"]) == {"blocks"}
  checks.assert_same(stacking.unstack_blocks(stacked), variables)


def test_stacks_in_stacks_and_in_other_modules():
  inner = tree((2, 2), (2, 2), (2, 2))
  variables = {"stage": tree((1,)) | {"block1": inner, "block2": inner}}
  stacked = stacking.stack_blocks(variables)
  assert stacked["stage"]["blocks"]["blocks"]["kernel"].shape == (2, 3, 2, 2)
  checks.assert_same(stacking.unstack_blocks(stacked), variables)


def test_abstract_variables():
  built = shared(1)
  variables = checks.initial(built, built.build())
  abstract = jax.eval_shape(lambda: variables)
  stacked = stacking.stack_blocks(abstract)
  assert checks.form(stacked) == checks.form(stacking.stack_blocks(variables))
  back = stacking.unstack_blocks(stacked)
  assert checks.form(back) == checks.form(abstract)


def test_capacities_widths_and_costs_count_every_row():
  x = jax.ShapeDtypeStruct((1, 5), jnp.float32)
  model = Model(4, 1, scan=True)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  sizes = capacity.layer_capacities(shapes)
  assert sizes["block0"] == 30
  assert sizes["blocks/inner"].tolist() == [36] * 4
  cost = macs.layer_costs(model, x)["blocks/inner"]
  assert (cost.macs, cost.weights, cost.layers) == (36, 36, 4)
  assert precision.layer_bits(shapes)["blocks/inner"].weights.shape == (4,)
