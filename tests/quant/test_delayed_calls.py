"""Delayed ranges: what is refused, and modules of the other mode."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpc_jax as dpc
from dpc_jax.quant import delayed, grids, layers, ops
from tests.quant import delayed_steps as steps
from tests.quant import running

pytestmark = pytest.mark.usefixtures("fast_compiler")


def test_without_delayed_ranges_both_functions_do_nothing():
  layer = layers.QuantDense(5)
  variables = running.init(layer, jnp.ones((2, 3)))
  assert delayed.probes(layer, variables, jnp.ones((2, 3))) == {}
  updates = {"quant_stats": variables["quant_stats"]}
  assert delayed.settle(updates, {}) == updates


def test_a_module_evaluates_with_variables_of_either_mode():
  x = steps.normal(0, 4, 6)
  one, other = (
    layers.QuantDense(5, quantization=q) for q in (steps.DELAYED, steps.BATCH)
  )
  variables, others = running.init(one, x), running.init(other, x)
  want = other.apply(others, x)
  for layer in (one, other):
    for given in (variables, others):
      running.assert_same(layer.apply(given, x), want)


def test_training_with_variables_of_the_other_mode():
  x, g = steps.normal(0, 4, 6), steps.normal(1, 4, 5)
  one, other = (
    layers.QuantDense(5, quantization=q) for q in (steps.NEAREST, steps.BATCH)
  )
  variables, others = running.init(one, x), running.init(other, x)
  # Previous ranges are left alone by a module that has no use for them.
  assert delayed.probes(other, variables, x) == {}
  want = jax.jit(steps.make_step(other))(others, (x,), g)
  got = jax.jit(steps.make_step(other))(variables, (x,), g)
  running.assert_same(got[:2], want[:2])
  stats = variables["quant_stats"] | want[2]["quant_stats"]
  running.assert_same(got[2]["quant_stats"], stats)
  message = (
    "^QuantDense: no 'previous_lo' of the collection 'quant_stats' in apply's"
    " variables; pass all that init returned"
  )
  with pytest.raises(ValueError, match=message):
    steps.make_step(one)(others, (x,), g)


def test_a_gradient_in_float_gives_a_probe_none():
  quantization = grids.Quantization(gradients=None)
  limits = grids.Range(jnp.float32(-1), jnp.float32(1))

  def loss(probe):
    return jnp.sum(
      ops.dot_general(
        steps.normal(0, 4, 6),
        steps.normal(1, 6, 5),
        (((1,), (0,)), ((), ())),
        bits=grids.LayerBits(8, 8, 32),
        quantization=quantization,
        gradient=ops.PreviousGradient(limits, probe),
      )
    )

  np.testing.assert_array_equal(jax.grad(loss)(jnp.ones((4, 2))), 0)


class Shared(nn.Module):
  @nn.compact
  def __call__(self, x):
    layer = layers.QuantDense(6, quantization=steps.DELAYED, name="twice")
    return layer(layer(x))


class Looped(nn.Module):
  @nn.compact
  def __call__(self, x):
    loop = nn.scan(
      lambda layer, carry, _: (layer(carry), None),
      variable_broadcast=("params", "precision"),
      variable_carry="quant_stats",
      split_rngs={"params": False},
      length=3,
    )
    layer = layers.QuantDense(6, quantization=steps.DELAYED, name="loop")
    return loop(layer, layer(x), None)[0]


def test_refusals_are_one_line_with_the_remedy():
  x = jnp.ones((2, 6))
  remedy = r"needs ranges = 'batch'"
  with pytest.raises(ValueError, match=f"^twice: .*{remedy}"):
    delayed.probes(Shared(), running.init(Shared(), x), x)
  with pytest.raises(ValueError, match=f"^loop: .*{remedy}"):
    Looped().init(jax.random.key(0), x)
  cell = dpc.QuantLSTMCell(6, steps.DELAYED)
  carry = cell.initialize_carry(None, x.shape)
  with pytest.raises(ValueError, match=f"^recurrent: .*{remedy}"):
    cell.init(jax.random.key(0), carry, x[:, None], method="unroll")
  layer = layers.QuantDense(6, quantization=steps.DELAYED)
  with pytest.raises(ValueError, match=f"^QuantDense: .*{remedy}"):
    layer.apply(running.init(layer, x), x, mutable=["quant_stats"])
  with pytest.raises(ValueError, match=r"ranges = 'late': use one of"):
    grids.Quantization(ranges="late")
  for field in ("activations", "gradients"):
    grid = {field: grids.Grid(granularity="channel")}
    with pytest.raises(ValueError, match=rf"{field} = .*use granularity"):
      grids.Quantization(**grid, ranges="delayed")
