"""Integer residuals: `storage_bits=8`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.quant import grids
from tests.quant import products


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["einsum", "depthwise"])
def test_integer_residuals_give_the_same_numbers(name, dtype):
  case = products.CASES[name]
  x, w, g = products.arrays(case, dtype)
  for base in (products.SYMMETRIC, grids.Quantization()):
    stored = grids.Quantization(
      base.weights, base.activations, base.gradients, storage_bits=8
    )
    key = jax.random.key(0)
    for bits in (2, 5, 8):
      want = products.quantized(case, base, products.widths(bits), x, w, g, key)
      got = products.quantized(
        case, stored, products.widths(bits), x, w, g, key
      )
      for a, b in zip(want, got, strict=True):
        assert a.dtype == b.dtype == dtype
        assert products.relative_error(b, a) < (
          1e-6 if dtype == jnp.float32 else 2e-2
        )


@pytest.mark.parametrize("name", ["dense", "conv"])
def test_what_the_backward_pass_keeps(name):
  case = products.CASES[name]
  x, w, _ = products.arrays(case)

  def kept(quantization):
    _, vjp = jax.vjp(
      functools.partial(
        case.quantized, bits=products.widths(8), quantization=quantization
      ),
      x,
      w,
    )
    return {
      leaf.shape: leaf.dtype
      for leaf in jax.tree.leaves(vjp)
      if leaf.size >= w.size
    }

  assert kept(products.NEAREST) == {x.shape: jnp.float32, w.shape: jnp.float32}
  codes = grids.Quantization(storage_bits=8)
  assert kept(codes) == {x.shape: jnp.uint8, w.shape: jnp.uint8}
  signed = grids.Quantization(
    products.SYMMETRIC.weights, products.SYMMETRIC.activations, storage_bits=8
  )
  assert kept(signed) == {x.shape: jnp.int8, w.shape: jnp.int8}


def test_storage_refuses_wider_widths():
  case = products.CASES["dense"]
  x, w, g = products.arrays(case)
  stored = grids.Quantization(storage_bits=8)
  for field in ("weights", "activations"):
    for bits in (9, 16, 32):
      wide = products.widths(8)._replace(**{field: bits})
      with pytest.raises(ValueError, match=f"{field} = {bits} does not fit"):
        case.quantized(x, w, bits=wide, quantization=stored)
      y, _, _ = products.quantized(
        case,
        stored,
        products.widths(8)._replace(**{field: jnp.int32(bits)}),
        x,
        w,
        g,
      )
      assert np.all(np.isnan(y))
  # Nothing of the gradient is stored, so its width is free.
  _, dx, dw = products.quantized(
    case, stored, products.widths(8, 8, 32), x, w, g
  )
  assert np.all(np.isfinite(dx)) and np.all(np.isfinite(dw))


def test_an_operand_without_a_grid_may_have_32_bits():
  case = products.CASES["dense"]
  x, w, _ = products.arrays(case)
  bits = grids.LayerBits(32, 8, 8)  # concrete: the check reads it
  y, want = (
    case.quantized(
      x,
      w,
      bits=bits,
      quantization=grids.Quantization(weights=None, storage_bits=storage),
    )
    for storage in (8, None)
  )
  assert products.relative_error(y, want) < 1e-6
