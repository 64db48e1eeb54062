"""Ranges of tensors: found, joined with ranges from elsewhere, checked."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Name scope of whatever finds a range.
SCOPE = "range"


class Range(NamedTuple):
  """Smallest and largest value, float32, broadcastable to the tensor."""

  lo: jax.Array
  hi: jax.Array


class CheckedRange(Range):
  """A range that is NaN already where the tensor is not finite."""


def value_range(x: jax.Array, axis: tuple[int, ...] | None = None) -> Range:
  """Range of `x` over all axes but those in `axis`, which are kept.

  Returns float32 arrays of shape () if axis is None, else of x's rank. NaN
  anywhere gives NaN; an `x` without elements gives 0.
  """
  x = x.astype(jnp.float32)
  if x.size == 0:
    x = jnp.zeros([max(1, n) for n in x.shape], jnp.float32)
  # The name tells a compiled program's collectives for ranges from others.
  with jax.named_scope(SCOPE):
    if axis is None:
      return Range(jnp.min(x), jnp.max(x))
    kept = {a % x.ndim for a in axis}
    reduced = tuple(a for a in range(x.ndim) if a not in kept)
    return Range(
      jnp.min(x, reduced, keepdims=True), jnp.max(x, reduced, keepdims=True)
    )


def row_range(x: jax.Array) -> Range:
  """Range of each row of `x`, (rows, 1, ...), as `value_range`.

  Rows are along the leading axis, and a scalar is a row by itself.
  """
  return value_range(x, (0,) if x.ndim else None)


def widened(limits: Range, own: Range) -> Range:
  """`limits`, made wider where `own` lies outside of them; nothing is clipped.

  `own` alone where `limits` are empty (lo >= hi), or where the result is not
  finite or wider than float32: finite ends may be farther apart than that.
  """
  lo, hi = jnp.minimum(limits.lo, own.lo), jnp.maximum(limits.hi, own.hi)
  usable = jnp.isfinite(hi - lo) & (limits.lo < limits.hi)
  return Range(jnp.where(usable, lo, own.lo), jnp.where(usable, hi, own.hi))


def guarded(limits: Range, own: Range) -> CheckedRange:
  """`limits`, or NaN where the tensor's own range is not finite.

  Clipping to a range from elsewhere would turn inf, and 8-bit codes NaN too,
  into numbers.
  """
  finite = jnp.isfinite(own.lo) & jnp.isfinite(own.hi)
  return CheckedRange(*(jnp.where(finite, limit, jnp.nan) for limit in limits))
