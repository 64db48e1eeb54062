"""dpc.quantize on models with an nn.scan or nn.vmap of their own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.quant import grids, precision, wrap
from tests.quant import running

KEY = jax.random.key(5)
NEAREST = grids.Quantization(gradients=grids.Grid())


def inputs(seed=1, shape=(2, 5, 4)):
  return jax.random.normal(jax.random.key(seed), shape)


class Body(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return nn.tanh(nn.Dense(4, name="layer")(x)), None


class Scanned(nn.Module):
  """A foreign nn.scan in a model."""

  axes: tuple[str, ...]
  rngs: tuple[str, ...]

  @nn.compact
  def __call__(self, x):
    stack = nn.scan(
      Body,
      variable_axes=dict.fromkeys(self.axes, 0),
      split_rngs=dict.fromkeys(self.rngs, True),
      length=3,
    )
    return stack(name="stack")(x, None)[0]


class Mapped(nn.Module):
  axes: tuple[str, ...]
  rngs: tuple[str, ...]

  @nn.compact
  def __call__(self, x):
    heads = nn.vmap(
      nn.Dense,
      in_axes=None,
      axis_size=3,
      variable_axes=dict.fromkeys(self.axes, 0),
      split_rngs=dict.fromkeys(self.rngs, True),
    )
    return heads(4, name="stack")(x)


ALL_AXES = ("params", "precision", "quant_stats")
ALL_RNGS = ("params", "quant")


@pytest.mark.parametrize("model", [Scanned, Mapped])
def test_a_lifted_transform_that_loses_state_is_refused(model):
  x = inputs()
  arguments = (
    r"variable_axes=\{.*'precision'.*'quant_stats'.*split_rngs=.*quant"
  )
  for axes in (("params",), ALL_AXES[:2], ("params", "quant_stats")):
    quantized = wrap.quantize(model(axes, ALL_RNGS))
    with pytest.raises(ValueError, match=arguments) as error:
      quantized.init(jax.random.key(0, impl="rbg"), x)
    assert "\n" not in str(error.value) and "'stack" in str(error.value)
  unsplit = wrap.quantize(model(ALL_AXES, ("params",)))
  variables = unsplit.init(jax.random.key(0, impl="rbg"), x)
  unsplit.apply(variables, x)
  with pytest.raises(ValueError, match=arguments):
    unsplit.apply(variables, x, rngs={"quant": jax.random.key(1)})
  with pytest.raises(ValueError, match=arguments):
    unsplit.init(
      {"params": jax.random.key(0, impl="rbg"), "quant": jax.random.key(1)}, x
    )
  # Nothing is rounded stochastically, so nothing is lost.
  nearest = wrap.quantize(model(ALL_AXES, ("params",)), NEAREST)
  nearest.apply(variables, x, rngs={"quant": jax.random.key(1)})


@pytest.mark.parametrize("model", [Scanned, Mapped])
def test_a_lifted_transform_that_carries_the_state(model):
  plain = model(ALL_AXES, ALL_RNGS)
  quantized = wrap.quantize(plain)
  x = inputs()
  want, got = running.init(plain, x), running.init(quantized, x)
  running.assert_same(want["params"], got["params"])
  (bits,) = precision.layer_bits(got).values()
  assert bits.weights.shape == (3,)
  g = inputs(2, jax.eval_shape(plain.apply, want, x).shape)
  for a, b in zip(
    jax.tree.leaves(running.step(plain, want, x, g, KEY)[:2]),
    jax.tree.leaves(
      running.step(quantized, precision.assign_bits(got, 32), x, g, KEY)[:2]
    ),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
  (path,) = precision.layer_bits(got)
  mixed = precision.assign_bits(got, {path: np.array([2, 8, 32])})
  y, (grads, _), updates = running.step(quantized, mixed, x, g, KEY)
  assert np.all(np.isfinite(y))
  assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(grads))
  (count,) = [v for v in jax.tree.leaves(updates) if v.dtype == jnp.int32]
  np.testing.assert_array_equal(count, 1)
