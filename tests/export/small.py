"""Models with trained-looking variables, made without compiling anything."""

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import dpc_jax as dpc
from tests.training import tiny

IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 6), jnp.int32)


def tiny_model(**quantization: Any) -> nn.Module:
  """conv, BatchNorm, conv, float dense; in the table as "tiny"."""
  return tiny.Tiny(3, quantization=dpc.Quantization(**quantization))


def made_up(model: nn.Module, inputs: Any, *, seed: int = 0) -> dict[str, Any]:
  """Variables of a model: random values, ranges -3..3, widths of DPC.

  Args:
    model: quantized or not.
    inputs: shape and dtype of what it is called with.
    seed: of the values.
  """
  shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)
  random = np.random.default_rng(seed)
  flat = {}
  for name, leaf in flax.traverse_util.flatten_dict(shapes, sep="/").items():
    last = name.rpartition("/")[2]
    value = random.normal(size=leaf.shape) / 3
    if name.startswith("quant_stats/"):
      value = {"lo": -3, "hi": 3, "rhs_lo": -2, "rhs_hi": 2}.get(last, 1)
    elif last in ("var", "scale"):
      value = 0.5 + random.uniform(size=leaf.shape)
    flat[name] = jnp.asarray(np.broadcast_to(value, leaf.shape), leaf.dtype)
  variables = flax.traverse_util.unflatten_dict(flat, sep="/")
  if "precision" not in variables:
    return variables
  counts = dpc.layer_capacities(variables)
  return dpc.assign_bits(variables, dpc.dpc_bit_widths(counts, 3, 8))


def example(spec: Any, seed: int = 1) -> jax.Array:
  """An input: normal, or tokens below 10."""
  random = np.random.default_rng(seed)
  if jnp.issubdtype(spec.dtype, jnp.integer):
    return jnp.asarray(random.integers(0, 10, spec.shape), spec.dtype)
  return jnp.asarray(random.normal(size=spec.shape), spec.dtype)


def flat(tree: Any) -> dict[str, np.ndarray]:
  """{path: array}."""
  return {
    name: np.asarray(leaf)
    for name, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items()
  }
