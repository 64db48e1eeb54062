"""Layers with an integer backend: transforms, devices, costs, choice."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import default
from dpc_jax.cost import macs
from dpc_jax.quant import grids, integer, layers
from dpc_jax.quant import products as quant_products
from dpc_jax.training import config as config_lib
from tests.quant import products, running

KEY = jax.random.key(2)
CHANNEL, TENSOR = (grids.Grid("symmetric", g) for g in ("channel", "tensor"))
SIGNED = grids.Quantization(
  CHANNEL,
  TENSOR,
  grids.Grid("symmetric", rounding="stochastic"),
  storage_bits=8,
  backend="int8",
  input_gradient="scaled",
)
AFFINE = grids.Quantization(storage_bits=8, backend="int8")


def simulated(quantization):
  return dataclasses.replace(quantization, backend="simulated")


class Block(nn.Module):
  quantization: grids.Quantization

  @nn.compact
  def __call__(self, x, _):
    y = layers.QuantConv(4, (3, 3), quantization=self.quantization, name="conv")
    return nn.tanh(y(x)), None


def scanned(quantization):
  return nn.scan(
    nn.remat(Block),
    variable_axes={"params": 0, "precision": 0, "quant_stats": 0},
    split_rngs={"params": True, "quant": True},
    length=3,
  )(quantization=quantization)


def gradients(quantization, variables, x):
  @jax.jit
  def run(variables, x):
    def loss(params, x):
      (y, _), updates = scanned(quantization).apply(
        {**variables, "params": params},
        x,
        None,
        mutable=["quant_stats"],
        rngs={"quant": KEY},
      )
      return jnp.sum(y * jnp.cos(jnp.arange(4.0)).reshape(1, 1, 1, 4)), updates

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(
      variables["params"], x
    )

  return run(variables, x)


@pytest.mark.usefixtures("fast_compiler")
@pytest.mark.parametrize("quantization", [SIGNED, AFFINE])
def test_in_a_scan_of_checkpointed_blocks(quantization):
  x = jax.random.normal(KEY, (2, 5, 5, 4))
  variables = running.init(scanned(quantization), x, None)
  got, want = (
    gradients(q, variables, x) for q in (quantization, simulated(quantization))
  )
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    # A value at a tie may be rounded the other way: a step of 8 bits.
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-2 * np.abs(b).max())
    assert np.mean(np.abs(a - b) > 1e-5 * np.abs(b).max()) < 0.1


@pytest.mark.usefixtures("fast_compiler")
def test_vmap_is_one_example_after_the_other():
  case = products.CASES["groups"]
  arrays = products.arrays(case)
  x = jnp.stack([arrays[0], 2 * arrays[0][::-1]])

  def run(x):
    product = functools.partial(
      case.quantized, bits=products.widths(6), quantization=AFFINE
    )
    y, vjp = jax.vjp(product, x, arrays[1])
    return y, *vjp(arrays[2])

  batched, single = jax.jit(jax.vmap(run)), jax.jit(run)
  for whole, *rows in zip(batched(x), *map(single, x), strict=True):
    np.testing.assert_allclose(whole, jnp.stack(rows), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("fast_compiler")
@pytest.mark.parametrize("is_split", [False, True])
def test_eight_devices_give_the_same_bits(is_split, monkeypatch):
  if is_split:  # 8 * 4 * 4 products of a weight's gradient, in two parts
    short = integer.BACKENDS["int8"]._replace(largest=64 * 127 * 127)
    monkeypatch.setitem(integer.BACKENDS, "int8", short)
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((8,), ("data",), axis_types=auto)
  rows = NamedSharding(mesh, PartitionSpec("data"))
  case = products.Conv((8, 4, 4, 4), (3, 3, 4, 4), padding=(1, 1))
  x, w, g = products.arrays(case)

  @jax.jit
  def run(x, w, g):
    product = functools.partial(
      case.quantized, bits=products.widths(8), quantization=SIGNED, key=KEY
    )
    y, vjp = jax.vjp(product, x, w)
    return y, *vjp(g)

  one = run(x, w, g)
  spread = run(jax.device_put(x, rows), w, jax.device_put(g, rows))
  assert spread[0].sharding.is_equivalent_to(rows, 4)
  running.assert_same(one, spread)


@pytest.mark.usefixtures("fast_compiler")
@pytest.mark.parametrize("quantization", [SIGNED, AFFINE])
def test_a_product_of_attention(quantization):
  lhs = jax.random.normal(KEY, (2, 3, 5, 6))
  rhs = jax.random.normal(jax.random.key(4), (2, 6, 3, 4))
  found = []
  for quantized in (quantization, simulated(quantization)):
    module = quant_products.QuantProduct(
      "nhqk,nkhd->nqhd", quantization=quantized
    )
    variables = running.init(module, lhs, rhs)

    @jax.jit
    def run(lhs, rhs, module=module, variables=variables):
      y, vjp, _ = jax.vjp(
        functools.partial(
          module.apply,
          variables,
          mutable=["quant_stats"],
          rngs={"quant": KEY},
        ),
        lhs,
        rhs,
        has_aux=True,
      )
      # Zeros, as behind a mask: they stay zeros.
      return y, *vjp(jnp.sin(y).at[:, 2:].set(0))

    found.append(run(lhs, rhs))
  for a, b in zip(*found, strict=True):
    assert products.relative_error(a, b) < 2e-6
  assert np.all(found[0][1][:, :, 2:] == 0)


def test_costs_are_those_of_the_plain_product():
  class Net(nn.Module):
    quantization: grids.Quantization | None

    @nn.compact
    def __call__(self, x):
      q = self.quantization
      x = layers.QuantConv(4, (3, 3), quantization=q, name="conv")(x)
      return layers.QuantDense(5, quantization=q, name="dense")(x)

  x = jax.ShapeDtypeStruct((2, 6, 6, 3), "float32")
  want = macs.layer_costs(Net(simulated(AFFINE)), x)
  assert macs.layer_costs(Net(AFFINE), x) == want
  assert macs.layer_costs(Net(SIGNED), x) == want


def test_auto_takes_what_was_measured(monkeypatch):
  assert integer.resolve("simulated") is None
  for platform, name in integer.FASTEST.items():
    monkeypatch.setattr(jax, "default_backend", lambda p=platform: p)
    assert integer.resolve("auto") == integer.resolve(name)
  monkeypatch.setitem(integer.FASTEST, "abacus", "int8")
  monkeypatch.setattr(jax, "default_backend", lambda: "abacus")
  assert integer.resolve("auto") == integer.BACKENDS["int8"]
  monkeypatch.setattr(jax, "default_backend", lambda: "loom")
  assert integer.resolve("auto") is None
  assert integer.resolve("bf16_codes").codes == jnp.bfloat16


REFUSED = {
  "Quantization.backend = 'int4': use one of": {"backend": "int4"},
  "storage_bits = None: backend = 'auto' needs 8": {
    "backend": "auto",
    "storage_bits": None,
  },
  "weights = None: backend = 'int8' needs a Grid": {"weights": None},
  "activations = None: backend = 'int8' needs a Grid": {"activations": None},
  "backend = 'int8' needs granularity 'tensor'": {"activations": CHANNEL},
  "gradients = Grid(kind='symmetric', granularity='channel'": {
    "gradients": CHANNEL
  },
  "ranges = 'delayed': backend = 'int8' needs 'batch'": {"ranges": "delayed"},
  "input_gradient = 'inexact': use one of": {"input_gradient": "inexact"},
  "storage_bits = None: input_gradient = 'scaled' needs 8": {
    "backend": "simulated",
    "storage_bits": None,
    "input_gradient": "scaled",
  },
  "input_gradient = 'scaled' needs kind 'symmetric'": {
    "input_gradient": "scaled"
  },
  "gradients = None: input_gradient = 'scaled' needs a Grid": {
    "gradients": None,
    "input_gradient": "scaled",
  },
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_quantization_that_has_no_codes_is_refused(message):
  with pytest.raises(ValueError) as caught:
    dataclasses.replace(AFFINE, **REFUSED[message])
  assert message in str(caught.value) and "\n" not in str(caught.value)


def test_without_a_grid_of_gradients_the_forward_product_is_of_codes():
  forward_only = dataclasses.replace(AFFINE, gradients=None)
  case = products.CASES["dense"]
  x, w, g = products.arrays(case)
  bits = products.widths(8, 8, 32)
  got, want = (
    products.quantized(case, q, bits, x, w, g)
    for q in (forward_only, simulated(forward_only))
  )
  for a, b in zip(got, want, strict=True):
    assert products.relative_error(a, b) < 1e-6
  text = products.quantized.lower(case, forward_only, bits, x, w, g).as_text()
  assert "xi8>" in text


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"backend": "int4"}, "config.precision.backend = 'int4': use one of"),
    ({"backend": "int8"}, "config.precision.backend = 'int8': needs storage"),
    (
      {"backend": "auto", "storage_bits": 8, "ranges": "delayed"},
      "config.precision.backend = 'auto': needs ranges = batch",
    ),
    (
      {"backend": "int8", "storage_bits": 8, "gradients": 9},
      "a width of 9 (gradients) does not fit",
    ),
    (
      {"input_gradient": "scaled", "storage_bits": 8},
      "config.precision.input_gradient = 'scaled': needs kind = symmetric",
    ),
  ],
)
def test_a_config_that_has_no_codes_is_refused(changes, message):
  config = default.get_config()
  config.precision.update(changes)
  with pytest.raises(config_lib.ConfigError) as caught:
    config_lib.validate(config)
  assert message in str(caught.value) and "\n" not in str(caught.value)
