"""Dot products and convolutions of integer codes whose sums are exact.

A sum of K products of codes up to a and b in absolute value is exact where
K * a * b is no more than the accumulator holds: 2^31 - 1 in int32, 2^24 in
float32. A longer one is split along a contracted axis into the fewest equal
parts that fit, which are added in float32. What cannot be split is refused.

A convolution with a window larger than its output, as every weight gradient is,
is computed as one dot product per place of the output, which all kinds of
device can do with integers.
"""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# A sum is split into at most so many parts, written out up to the second
# number; parts are computed together while their results are no more than the
# third (elements: 16 MiB).
MAX_PARTS = 1024
UNROLLED = 8
TOGETHER = 2**22
# A convolution is at most so many dot products.
MAX_PLACES = 64


class InexactSumError(ValueError):
  """A layer whose sums of codes cannot be exact, in one line."""


class Backend(NamedTuple):
  """How codes are multiplied.

  Attributes:
    name: as in `Quantization.backend`.
    codes: dtype of the operands.
    sums: dtype of the sums.
    largest: up to which absolute value all integers are exact in `sums`.
  """

  name: str
  codes: Any
  sums: Any
  largest: int


class Term(NamedTuple):
  """Codes, or a sum of products of them, and a bound of absolute values."""

  codes: jax.Array
  peak: int


def dot_general(
  name: str, backend: Backend, numbers: Any, lhs: Term, rhs: Term
) -> Term:
  """`lax.dot_general` of codes: in the dtype of sums, or float32 if split.

  Raises:
    InexactSumError: `name` has sums that are too long, and cannot be split.
  """
  (left, right), _ = numbers
  sizes = [rhs.codes.shape[axis] for axis in right]
  length = math.prod(sizes)
  split = _split(name, backend, (lhs, rhs), length, sizes)
  product = functools.partial(
    lax.dot_general, preferred_element_type=backend.sums
  )
  if split is None:
    total = product(lhs.codes, rhs.codes, numbers)
  else:
    chosen, parts = split
    axes = left[chosen], right[chosen]
    plain = functools.partial(product, dimension_numbers=numbers)
    whole = jax.eval_shape(plain, lhs.codes, rhs.codes)
    together = _largest_divisor(parts, TOGETHER // max(1, whole.size))

    def of_parts(a: jax.Array, b: jax.Array) -> jax.Array:
      sums = product(a, b, _with_parts(numbers, axes))
      return sums.astype(jnp.float32).sum(0)

    codes = lhs.codes, rhs.codes
    total = _sum_of_parts(of_parts, codes, axes, parts // together, together)
  return Term(total, length * lhs.peak * rhs.peak)


def conv_general_dilated(
  name: str,
  backend: Backend,
  params: Mapping[str, Any],
  places: tuple[int, ...],
  lhs: Term,
  rhs: Term,
) -> Term:
  """A convolution of codes; dtypes and errors as of `dot_general`.

  Args:
    name: of the layer.
    backend: what multiplies.
    params: of the primitive `conv_general_dilated`.
    places: spatial sizes of the output.
    lhs: the input.
    rhs: the kernel.
  """
  numbers = params["dimension_numbers"]
  shape = rhs.codes.shape
  feature, *spatial = numbers.rhs_spec[1:]
  window = math.prod(shape[axis] for axis in spatial)
  is_grouped = params["feature_group_count"] > 1
  if math.prod(places) < min(window, MAX_PLACES + 1) and not is_grouped:
    return _dots(name, backend, params, places, lhs, rhs)
  length = window * shape[feature]
  sizes = () if is_grouped else (shape[feature],)
  split = _split(name, backend, (lhs, rhs), length, sizes)
  params = dict(params, precision=None, preferred_element_type=backend.sums)
  bind = functools.partial(lax.conv_general_dilated_p.bind, **params)
  if split is None:
    total = bind(lhs.codes, rhs.codes)
  else:
    axes = numbers.lhs_spec[1], feature

    def of_parts(a: jax.Array, b: jax.Array) -> jax.Array:
      a, b = a.squeeze(axes[0] + 1), b.squeeze(axes[1] + 1)
      return bind(a, b).astype(jnp.float32)

    codes = lhs.codes, rhs.codes
    total = _sum_of_parts(of_parts, codes, axes, split[1], 1)
  return Term(total, length * lhs.peak * rhs.peak)


def _dots(name, backend, params, places, lhs, rhs):
  """A convolution without feature groups, as a dot product for each place."""
  numbers = params["dimension_numbers"]
  batch, _, *spatial = numbers.lhs_spec
  groups = params["batch_group_count"]
  padding = [(0, 0, 0)] * lhs.codes.ndim
  for axis, (lo, hi), dilation in zip(
    spatial, params["padding"], params["lhs_dilation"], strict=True
  ):
    padding[axis] = (lo, hi, dilation - 1)
  padded = lax.pad(lhs.codes, jnp.zeros((), lhs.codes.dtype), padding)
  window = [rhs.codes.shape[axis] for axis in numbers.rhs_spec[2:]]
  output = numbers.rhs_spec[0]
  kernel = rhs._replace(codes=_grouped(rhs.codes, output, groups))
  # Behind the axis of groups others have moved by one.
  contracted = tuple(
    [axis + (axis > first) for axis in spec[1:]]
    for first, spec in ((batch, numbers.lhs_spec), (output, numbers.rhs_spec))
  )
  found = []
  for place in itertools.product(*map(range, places)):
    start, stop, step = [0] * padded.ndim, list(padded.shape), [1] * padded.ndim
    for axis, i, stride, size, dilation in zip(
      spatial,
      place,
      params["window_strides"],
      window,
      params["rhs_dilation"],
      strict=True,
    ):
      start[axis], step[axis] = i * stride, dilation
      stop[axis] = start[axis] + (size - 1) * dilation + 1
    seen = lax.slice(padded, start, stop, step)
    seen = lhs._replace(codes=_grouped(seen, batch, groups))
    dot = (contracted, ([batch], [output]))
    found.append(dot_general(name, backend, dot, seen, kernel))
  # (places, groups, batch, output) to (batch, groups * output, places).
  sums = jnp.stack([term.codes for term in found]).transpose(2, 1, 3, 0)
  sums = sums.reshape(sums.shape[0], -1, *places)
  return Term(sums.transpose(np.argsort(numbers.out_spec)), found[0].peak)


def _grouped(codes, axis, groups):
  """With an axis of groups before `axis`, which is split into them."""
  shape = codes.shape
  return codes.reshape(*shape[:axis], groups, -1, *shape[axis + 1 :])


def _split(name, backend, terms, length, sizes):
  """None if the sums fit, else (which of `sizes` to split, parts)."""
  peaks = [term.peak for term in terms]
  longest = backend.largest // max(1, math.prod(peaks))
  if length <= longest:
    return None
  # The longest axis first: in a batch's gradient, that of the batch.
  for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
    for parts in range(2, min(sizes[i], MAX_PARTS) + 1):
      if sizes[i] % parts == 0 and length // parts <= longest:
        return i, parts
  raise InexactSumError(
    f"{name}: sums of {length} products of codes up to {peaks[0]} and"
    f" {peaks[1]} are not exact with backend = {backend.name!r}, and cannot be"
    " split into parts that are; use a smaller batch or image, or backend"
    " 'simulated'"
  )


def _largest_divisor(number, limit):
  return max(
    d for d in range(1, number + 1) if number % d == 0 and d <= max(1, limit)
  )


def _with_parts(numbers, axes):
  """Dimension numbers with an axis of parts behind each of `axes`."""
  contracted, batch = (
    tuple(
      [d + (d > axis) for d in dims]
      for dims, axis in zip(pair, axes, strict=True)
    )
    for pair in numbers
  )
  parts = ([axis + 1] for axis in axes)
  return contracted, tuple(p + b for p, b in zip(parts, batch, strict=True))


def _sum_of_parts(product, codes, axes, rounds, together):
  """The sum of all parts, `together` at once, added in float32.

  `product` takes both operands with an axis of parts behind the split one.
  """
  # A part is spread over the axis: devices that share it share every part.
  codes = [
    c.reshape(*c.shape[:axis], -1, rounds, together, *c.shape[axis + 1 :])
    for c, axis in zip(codes, axes, strict=True)
  ]

  def part(i):
    return product(
      *(
        lax.dynamic_index_in_dim(c, i, axis + 1, keepdims=False)
        for c, axis in zip(codes, axes, strict=True)
      )
    )

  if rounds <= UNROLLED:
    return sum(part(i) for i in range(rounds))
  return lax.fori_loop(1, rounds, lambda i, total: total + part(i), part(0))
