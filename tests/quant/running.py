"""What the tests of layers and of whole models share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def init(module, *args):
  # Threefry's initial values would take longer to compile than the layer.
  return jax.jit(module.init)(jax.random.key(0, impl="rbg"), *args)


def assert_same(a, b):
  """Same tree, shapes, dtypes and bits."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for one, two in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert one.dtype == two.dtype
    np.testing.assert_array_equal(one, two)


@functools.partial(jax.jit, static_argnums=0)
def step(module, variables, x, g, key=None):
  """Output, gradients of parameters and input, updates of `quant_stats`."""

  def function(params, x):
    return module.apply(
      {**variables, "params": params},
      x,
      mutable=[c for c in variables if c == "quant_stats"],
      rngs=None if key is None else {"quant": key},
    )

  y, vjp, updates = jax.vjp(function, variables["params"], x, has_aux=True)
  return y, vjp(g), updates


def forward_and_backward(module, variables, x, key=None):
  """Output and gradients for a fixed cotangent."""
  shape = jax.eval_shape(
    functools.partial(module.apply, mutable=True), variables, x
  )[0]
  # An argument: XLA would fold a constant into one product, not the other.
  g = jnp.sin(jnp.arange(shape.size, dtype=jnp.float32)).reshape(shape.shape)
  return step(module, variables, x, g.astype(shape.dtype), key)[:2]
