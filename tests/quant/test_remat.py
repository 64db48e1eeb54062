"""Normalizations and ReLUs that are computed anew in the backward pass."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpc_jax as dpc
from dpc_jax.models import stacking
from dpc_jax.quant import grids, remat
from tests import compiling


class Norms(nn.Module):
  """Each normalization once, with a ReLU of either kind between them."""

  @nn.compact
  def __call__(self, x, mask=None):
    x = nn.Dense(8, use_bias=False, name="dense")(x)
    x = nn.BatchNorm(False, momentum=0.9, name="batch")(x, mask=mask)
    x = remat.relu(x, of_norm=True)
    x = remat.relu(nn.LayerNorm(name="layer")(x) + 0.1)
    x = nn.RMSNorm(name="rms")(x)
    return nn.GroupNorm(2, name="group")(x)


def gradients(model, variables, x, policy, **kwargs):
  """((output, updates), gradients of parameters and input), compiled."""

  def loss(params, x):
    y, updates = model.apply(
      {**variables, "params": params}, x, mutable=["batch_stats"], **kwargs
    )
    return jnp.sum(jnp.sin(y) * y), (y, updates)

  def run(params, x):
    found = jax.grad(loss, (0, 1), has_aux=True)
    if policy is None:
      return found(params, x)
    with remat.norms(remat.POLICIES[policy]):
      return found(params, x)

  grads, outputs = jax.jit(run)(variables["params"], x)
  return outputs, grads


def closeness(a, b):
  """Largest difference of two trees' leaves, relative to the largest value."""
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return max(
    float(np.max(np.abs(p - q)) / (np.max(np.abs(q)) + 1e-12)) for p, q in pairs
  )


@pytest.mark.parametrize("masked", [False, True])
def test_exact_recomputation_changes_no_number(masked):
  model, x = Norms(), jax.random.normal(jax.random.key(0), (16, 6))
  variables = model.init(jax.random.key(1), x)
  mask = (
    jnp.broadcast_to(jnp.arange(16)[:, None] < 12, (16, 8)) if masked else None
  )
  want = gradients(model, variables, x, None, mask=mask)
  got = gradients(model, variables, x, "norms", mask=mask)
  assert closeness(got, want) < 1e-5
  # Outside of it nothing is kept apart.
  assert closeness(gradients(model, variables, x, None, mask=mask), want) == 0


@pytest.mark.parametrize("make", [nn.LayerNorm, lambda: nn.BatchNorm(False)])
def test_codes_give_the_gradient_at_the_decoded_input(make):
  model = make()
  x = 3 + jax.random.normal(jax.random.key(0), (32, 5))
  variables = model.init(jax.random.key(1), x)
  cotangent = jax.random.normal(jax.random.key(2), x.shape)

  def pulled(x):
    def call(params, x):
      return model.apply(
        {**variables, "params": params}, x, mutable=["batch_stats"]
      )[0]

    y, vjp = jax.vjp(call, variables["params"], x)
    return y, vjp(cotangent)

  y, exact = pulled(x)
  # Written out: round to 255 steps between each feature's ends.
  x = np.asarray(x)
  lo, hi = np.min(x, 0), np.max(x, 0)
  step = (hi - lo) / np.float32(255)
  decoded = np.round((x - lo) / step) * step + lo
  _, want = pulled(decoded)
  with remat.norms(8):
    got_y, got = pulled(x)
  np.testing.assert_array_equal(got_y, y)
  assert closeness(got, want) < 1e-5
  # An approximation, and a near one.
  assert 1e-5 < closeness(got, exact) < 2e-2


def test_updates_of_the_collections_are_those_of_the_plain_layer():
  model, x = Norms(), jax.random.normal(jax.random.key(0), (16, 6))
  variables = model.init(jax.random.key(1), x)
  with compiling.fast():
    (y, updates), _ = gradients(model, variables, x, None)
  for policy in remat.POLICIES:
    with compiling.fast():
      (got_y, got), _ = gradients(model, variables, x, policy)
    assert jax.tree.structure(got) == jax.tree.structure(updates)
    assert closeness((got_y, got), (y, updates)) < 1e-6
  assert "batch_stats" in updates
  # In evaluation, and in init, it changes nothing.
  with remat.norms(8):
    again = model.init(jax.random.key(1), x)
  assert closeness(again, variables) == 0


class Sowing(nn.LayerNorm):
  def __call__(self, x):
    self.sow("intermediates", "mean", jnp.mean(x))
    return super().__call__(x)


class ByKeyword(nn.Module):
  @nn.compact
  def __call__(self, x):
    return Sowing(name="layer")(x=x)


def test_an_input_by_keyword_and_what_a_layer_sows():
  model, x = ByKeyword(), jax.random.normal(jax.random.key(0), (4, 3))
  params = {"params": model.init(jax.random.key(1), x)["params"]}
  want, sown = model.apply(params, x, mutable=["intermediates"])
  for storage_bits in remat.POLICIES.values():
    with remat.norms(storage_bits):
      got, found = model.apply(params, x, mutable=["intermediates"])
      np.testing.assert_array_equal(model.apply(params, x), want)
    assert closeness((got, found), (want, sown)) < 1e-6


def test_relu_keeps_a_mask():
  x = jnp.array([-1.0, 0.0, -0.0, 2.0, jnp.nan])

  def kept(width, of_norm):
    with remat.norms(width):
      y, vjp = jax.vjp(lambda x: remat.relu(x, of_norm=of_norm), x)
    np.testing.assert_array_equal(y, nn.relu(x))
    np.testing.assert_array_equal(vjp(x)[0], jax.vjp(nn.relu, x)[1](x)[0])
    return str(jax.tree.map(lambda leaf: leaf.dtype, jax.tree.leaves(vjp)))

  for width, of_norm in ((None, False), (8, False), (8, True)):
    assert kept(width, of_norm) == "[dtype('bool')]"


class Stack(nn.Module):
  """Quantized convolution, normalization, ReLU; three times."""

  quantization: grids.Quantization | None
  scan: bool = False

  @nn.compact
  def __call__(self, x, mask=None):
    del mask
    return stacking.run_blocks(
      lambda name: Layer(self.quantization, name=name),
      range(3),
      x,
      scan=self.scan,
    )


class Layer(nn.Module):
  quantization: grids.Quantization | None

  @nn.compact
  def __call__(self, x):
    x = dpc.QuantConv(
      8, (3, 3), quantization=self.quantization, use_bias=False, name="conv"
    )(x)
    return remat.relu(nn.BatchNorm(False, name="norm")(x), of_norm=True)


def temporary_bytes(quantization, policy):
  """Of a compiled gradient of `Stack`."""
  model, x = Stack(quantization), jnp.ones((32, 16, 16, 8))
  variables = jax.eval_shape(model.init, jax.random.key(0), x)

  def loss(params, variables, x):
    y, updates = model.apply(
      {**variables, "params": params}, x, mutable=["batch_stats", "quant_stats"]
    )
    return jnp.sum(y**2), updates

  def step(variables, x):
    found = jax.grad(loss, has_aux=True)
    if policy is None:
      return found(variables["params"], variables, x)
    with remat.norms(remat.POLICIES[policy]):
      return found(variables["params"], variables, x)

  options = remat.compiler_options(jax.devices()[0].platform)
  compiled = jax.jit(step).lower(variables, x).compile(options)
  return compiled.memory_analysis().temp_size_in_bytes


def test_a_step_needs_less_memory():
  codes = dpc.Quantization(storage_bits=8)
  plain = temporary_bytes(None, None)
  needed = {
    policy: temporary_bytes(codes, policy) / plain for policy in remat.POLICIES
  }
  assert needed["norms"] < 0.7
  assert needed["norms8"] < needed["norms"] - 0.05


def test_it_goes_through_a_scan_of_blocks():
  quantization = dpc.Quantization(gradients=grids.Grid(), storage_bits=8)
  x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
  model = Stack(quantization, scan=True)
  variables = model.init(jax.random.key(1), x)
  with compiling.fast():
    want = gradients(model, variables, x, None)
    got = gradients(model, variables, x, "norms")
  assert closeness(got[0], want[0]) < 1e-6


def test_another_width_is_refused_in_one_line():
  with (
    pytest.raises(ValueError, match=r"^storage_bits = 4: use None, .* or 8$"),
    remat.norms(4),
  ):
    pass
