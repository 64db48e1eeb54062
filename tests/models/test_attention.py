"""Self-attention and its block: against Flax's, masks, dropout."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.models import attention
from dpc_jax.quant import grids, precision
from tests.models import checks
from tests.quant import reference

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 12)), jnp.float32)


@functools.cache
def initial(module):
  return jax.jit(module.init)(jax.random.key(0, impl="rbg"), X)


@pytest.fixture
def product_calls():
  """Operands of every product, by its name, while the fixture is on."""
  seen = {}

  def spy(call, args, kwargs, context):
    if context.module.name in ("qk", "av"):
      seen[context.module.name] = args
    return call(*args, **kwargs)

  with nn.intercept_methods(spy):
    yield seen


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_in_float_it_is_flax_attention(causal, heads):
  module = attention.SelfAttention(heads, causal, quantization=None)
  params = initial(module)["params"]

  def project(name, x):
    return x @ params[name]["kernel"] + params[name]["bias"][None, None]

  q, k, v = (
    project(name, X).reshape(2, 6, heads, 12 // heads)
    for name in ("query", "key", "value")
  )
  mask = nn.make_causal_mask(X[..., 0]) if causal else None
  y = nn.dot_product_attention(q, k, v, mask=mask)
  want = project("out", y.reshape(X.shape))
  got = module.apply({"params": params}, X)
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


def test_its_six_layers():
  variables = initial(attention.SelfAttention(3))
  names = ["av", "key", "out", "qk", "query", "value"]
  assert sorted(precision.layer_bits(variables)) == names
  # Beside the products' two ranges, the projections' one.
  stats = variables["quant_stats"]
  assert set(stats) == set(names)
  assert all(("rhs_lo" in stats[n]) == (n in ("av", "qk")) for n in names)
  plain = initial(attention.SelfAttention(3, quantization=None))
  assert set(plain) == {"params"}
  assert jax.tree.structure(plain["params"]) == jax.tree.structure(
    variables["params"]
  )


def test_the_query_is_scaled_before_the_product(product_calls):
  module = attention.SelfAttention(3, quantization=None)
  params = initial(module)["params"]
  product_calls.clear()
  module.apply({"params": params}, X)
  q, k = product_calls["qk"]
  assert q.shape == k.shape == (2, 6, 3, 4)
  want = X @ params["query"]["kernel"] / 2  # sqrt(4)
  np.testing.assert_allclose(q.reshape(X.shape), want, rtol=1e-5, atol=1e-6)


def test_masked_probabilities_are_zeros_and_stay_zeros(product_calls):
  module = attention.SelfAttention(3, causal=True)
  variables = precision.assign_bits(initial(module), 2)
  train = functools.partial(module.apply, mutable=["quant_stats"])
  # A single position has no masked one, and so no zero in its batch.
  _, updates = train(variables, X[:, :1])
  assert updates["quant_stats"]["av"]["lo"] == 0
  product_calls.clear()
  module.apply({**variables, **updates}, X)
  p, v = product_calls["av"]
  masked = np.triu(np.ones((6, 6), bool), 1)
  assert np.all(np.asarray(p)[:, :, masked] == 0)
  np.testing.assert_allclose(np.sum(p, -1), 1, rtol=1e-5)
  # The first position sees itself alone: its output is its own value.
  product = attention.products.QuantProduct(
    "nhqk,nkhd->nqhd", non_negative=True
  )
  state = {
    "precision": variables["precision"]["av"],
    "quant_stats": updates["quant_stats"]["av"],
  }
  y = product.apply(state, p, v)
  alone = product.apply(state, p[:, :, :1, :1], v[:, :1])
  np.testing.assert_array_equal(y[:, :1], alone)


def parted(x):
  """(2, 6, 12) as (2, 6, heads, 4)."""
  return x.reshape(2, 6, 3, 4)


def with_zero(p, bits):
  """Quantized over [0, largest value]: a range that holds 0."""
  return reference.quantize(np.append(p, 0), bits)[:-1].reshape(p.shape)


def written_out(params, x, g, bits):
  """Output and gradients (of the parameters, of x), in float64."""
  kernels = {name: layer["kernel"] for name, layer in params.items()}
  q, k, v = (
    parted(x @ kernels[name] + params[name]["bias"])
    for name in ("query", "key", "value")
  )
  q = reference.quantize(q / 2, bits.activations)  # sqrt(4)
  k, v = (reference.quantize(operand, bits.weights) for operand in (k, v))
  p = np.exp(np.einsum("nqhd,nkhd->nhqk", q, k))
  p /= p.sum(-1, keepdims=True)
  rounded = with_zero(p, bits.activations)
  y = np.einsum("nhqk,nkhd->nqhd", rounded, v).reshape(x.shape)
  # Backward: each product's output gradient is rounded once, used twice.
  dy = reference.quantize(
    parted(g @ kernels["out"].T), bits.gradients, floor=None
  )
  dp = np.einsum("nqhd,nkhd->nhqk", dy, v)
  dlogits = reference.quantize(
    p * (dp - np.sum(p * dp, -1, keepdims=True)), bits.gradients, floor=None
  )
  outputs = {
    "query": np.einsum("nhqk,nkhd->nqhd", dlogits, k) / 2,
    "key": np.einsum("nhqk,nqhd->nkhd", dlogits, q),
    "value": np.einsum("nhqk,nqhd->nkhd", rounded, dy),
    "out": g,
  }
  outputs = {name: d.reshape(x.shape) for name, d in outputs.items()}
  grads = {
    name: {
      "kernel": np.einsum("nti,nto->io", y if name == "out" else x, d),
      "bias": d.sum((0, 1)),
    }
    for name, d in outputs.items()
  }
  dx = sum(outputs[n] @ kernels[n].T for n in ("query", "key", "value"))
  return y @ kernels["out"] + params["out"]["bias"], (grads, dx)


def test_both_products_quantized_against_attention_written_out():
  nearest = grids.Quantization(gradients=grids.Grid())
  module = attention.SelfAttention(3, quantization=nearest)
  bits = grids.LayerBits(weights=5, activations=3, gradients=6)
  widths = dict.fromkeys(("query", "key", "value", "out"), 32)
  variables = precision.assign_bits(
    initial(module), widths | {"qk": bits, "av": bits}
  )
  # Larger than the initial ones, so that the softmax is far from uniform.
  random = np.random.default_rng(2)
  params = jax.tree.map(
    lambda leaf: random.normal(0, 0.4, leaf.shape).astype(np.float32),
    variables["params"],
  )
  g = random.normal(size=X.shape).astype(np.float32)

  @jax.jit
  def run(params, x):
    def function(params, x):
      return module.apply(
        {**variables, "params": params}, x, mutable=["quant_stats"]
      )

    y, vjp, _ = jax.vjp(function, params, x, has_aux=True)
    return y, vjp(g)

  got = run(params, X)
  as_double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  want = written_out(as_double, np.asarray(X, np.float64), g, bits)
  # A sum that cancels, the gradient of the key bias, has the largest error.
  checks.assert_near(got, want, 1e-4)


def test_the_softmax_is_in_float32(product_calls):
  module = attention.SelfAttention(3, quantization=None, dtype=jnp.bfloat16)
  text = str(
    jax.make_jaxpr(module.apply)(
      jax.eval_shape(module.init, jax.random.key(0), X), X
    )
  )
  assert all("bf16" not in line for line in text.splitlines() if "exp " in line)
  assert product_calls["av"][0].dtype == jnp.bfloat16
  y = jax.eval_shape(module.apply, initial(module), X)
  assert y.dtype == jnp.bfloat16


def test_dropout_is_on_the_probabilities_in_training_alone(product_calls):
  module = attention.SelfAttention(3, dropout=0.5, quantization=None)
  variables = initial(module)
  module.apply(variables, X)
  p = product_calls["av"][0]
  assert np.all(p > 0)
  module.apply(variables, X, True, rngs={"dropout": jax.random.key(1)})
  dropped = product_calls["av"][0]
  assert 0.3 < np.mean(dropped == 0) < 0.7
  kept = dropped != 0
  np.testing.assert_allclose(dropped[kept], 2 * p[kept], rtol=1e-6)


def test_heads_must_divide_the_width():
  with pytest.raises(
    ValueError, match=r"heads = 5: must divide .* which is 12"
  ):
    initial(attention.SelfAttention(5))


def test_the_block_written_out():
  block = attention.Block(3, 20, nn.relu, quantization=None, epsilon=1e-2)
  params = initial(block)["params"]

  def norm(name, x):
    return nn.LayerNorm(epsilon=1e-2).apply({"params": params[name]}, x)

  def dense(name, x):
    return x @ params[name]["kernel"]

  inner = attention.SelfAttention(3, quantization=None)
  x = X + inner.apply({"params": params["attention"]}, norm("norm1", X))
  want = x + dense("mlp2", nn.relu(dense("mlp1", norm("norm2", x))))
  got = block.apply({"params": params}, X)
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
  "field", ["dropout", "attention_dropout", "activation_dropout"]
)
def test_each_dropout_of_the_block(field):
  quiet = attention.Block(3, 20, nn.relu, quantization=None)
  block = quiet.clone(**{field: 0.5})
  variables = initial(quiet)
  want = quiet.apply(variables, X)
  np.testing.assert_array_equal(block.apply(variables, X), want)
  rngs = {"dropout": jax.random.key(1)}
  np.testing.assert_array_equal(quiet.apply(variables, X, True), want)
  got = block.apply(variables, X, True, rngs=rngs)
  assert np.mean(got != want) > 0.3


def test_the_grids_reach_every_layer():
  off = grids.Quantization(activations=None)
  variables = initial(attention.Block(3, 20, nn.relu, quantization=off))
  bits = precision.layer_bits(variables)
  assert "quant_stats" not in variables
  assert {path: int(b.weights) for path, b in bits.items()} == {
    f"attention/{name}": 8 for name in ("query", "key", "value", "out")
  } | {"mlp1": 8, "mlp2": 8, "attention/qk": 32, "attention/av": 32}
