"""Noise for stochastic rounding: cheap, counter-based, sharding-invariant."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Uniform float32 numbers in [0, 1), multiples of 2^-24, for rounding.

  A counter-based generator: two rounds of a 32-bit integer mixer (lowbias32,
  C. Wellons, public domain) over the element's index and the key's words. It
  fuses into the rounding loop and depends on the element's place in the whole
  tensor alone, so it is the same on any number of devices. Rounding
  2 million elements takes 0.7 to 1.4 ms with it on 2 CPU cores, and 9 to 24 ms
  with jax.random's threefry. Our decision; not for any use beyond rounding.
  """
  words = jax.random.key_data(key).reshape(-1)
  index = jnp.zeros(shape, jnp.uint32)
  stride = 1
  for axis in range(len(shape) - 1, -1, -1):
    index += lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(
      stride % 2**32
    )
    stride *= shape[axis]
  mixed = _mix(_mix(index + words[0]) ^ words[-1])
  return (mixed >> 8).astype(jnp.float32) * np.float32(2**-24)


def _mix(h: jax.Array) -> jax.Array:
  h = (h ^ (h >> 16)) * np.uint32(0x7FEB352D)
  h = (h ^ (h >> 15)) * np.uint32(0x846CA68B)
  return h ^ (h >> 16)
