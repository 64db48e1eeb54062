"""The bench of single products: every format is timed, operations counted."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import matmul


def test_operations_of_the_products():
  found = matmul.products(batch=2, tokens=8, width=4)
  macs = {name: product.macs for name, product in found.items()}
  assert macs["ResNet 3x3, 16 channels at 32x32"] == 2 * 32**2 * 16 * 16 * 9
  assert macs["Transformer mlp1, 4 x 16"] == 8 * 4 * 16
  assert len(found) == 6


@pytest.mark.usefixtures("fast_compiler")
def test_every_format_is_timed(monkeypatch):
  some = {k: matmul.formats()[k] for k in (matmul.BASE, "ours, int8")}
  monkeypatch.setattr(matmul, "formats", lambda: some)
  chosen = {"dense": matmul.Product((8, 16), 4)}
  results = matmul.measure(chosen, rounds=2, steps=1)
  for passes, products in (("forward", 1), ("forward + backward", 3)):
    found = results["products"]["dense"][passes]
    assert list(found) == list(some)
    for own in found.values():
      operations = 2 * products * 8 * 16 * 4
      rate = operations / own["milliseconds"] / 1e6
      assert own["gops"] == pytest.approx(rate)
    assert found[matmul.BASE]["ratio"] == 1
  assert "dense" in matmul.table(results)


@pytest.mark.usefixtures("fast_compiler")
def test_formats_multiply_the_same_numbers():
  product = matmul.Product((32, 16), 8)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 16)), jnp.float32)
  results = {}
  for name, (dtype, *options) in matmul.formats().items():
    one = matmul.compile_format(product, dtype, *options, backward=False)
    _, y = one.step(one.state, x.astype(dtype))
    results[name] = np.asarray(y, np.float32)
  for name, y in results.items():
    off = np.abs(y - results[matmul.BASE]).max() / np.abs(y).max()
    # 8 bits of mantissa, or of a grid.
    assert off < (1e-6 if "float32" in name else 2e-2), name
