"""Fixed random sums of a tensor that keep its norm on average."""

import jax
import jax.numpy as jnp

SIZE = 1024


def sketch(x: jax.Array, lead: int = 0) -> jax.Array:
  """1,024 signed sums with E||sketch||^2 = ||x||^2, linear in x.

  The entries are laid in rows of 1,024; each gets a fixed random sign, each row
  is turned by a fixed random amount, and the rows are added. Two entries of
  different rows meet with probability 1/1024, two of one row never: the
  variance of ||sketch||^2 is at most 2/1024 ||x||^4 (a count sketch, Charikar,
  Chen and Farach-Colton 2002, made of shifts).

  Args:
    x: float32, any shape.
    lead: how many of its leading axes are kept: a sketch for each place in
      them, all with the same signs and shifts.

  Returns:
    float32 (1024,), with the kept axes in front.
  """
  stack = x.shape[:lead]
  flat = x.reshape(*stack, -1)
  rows = -(-flat.shape[-1] // SIZE)
  padding = rows * SIZE - flat.shape[-1]
  flat = jnp.pad(flat, [(0, 0)] * lead + [(0, padding)])
  table = flat.reshape(*stack, rows, SIZE)
  sign_key, turn_key = jax.random.split(jax.random.key(0, impl="threefry2x32"))
  words = jax.random.bits(sign_key, (rows, SIZE // 32), jnp.uint32)
  places = jnp.arange(32, dtype=jnp.uint32)[None, None]
  bits = (words[..., None] >> places) & 1
  signs = 1.0 - 2.0 * bits.reshape(rows, SIZE).astype(jnp.float32)
  turns = jax.random.randint(turn_key, (rows, 1), 0, SIZE)
  columns = (jnp.arange(SIZE)[None] + turns) % SIZE

  def add(table):
    return jnp.sum(jnp.take_along_axis(signs * table, columns, axis=1), axis=0)

  for _ in range(lead):
    add = jax.vmap(add)
  return add(table)
