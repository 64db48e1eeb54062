"""A product that is linear in both operands: its axes, and its transposes."""

import string
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
from jax import lax

Product = Callable[[jax.Array, jax.Array], jax.Array]
Axes = tuple[int, ...]


class Bilinear(NamedTuple):
  """A product of x and w, and what is known of its axes.

  Attributes:
    product: (x, w) -> y, made of dot products and convolutions.
    name: of the layer, for errors; "" where none is known.
    channels: (axes of w, axes of y): those of w that y has too, in the order
      of w's axes, and where y has them.
    x_free: axes of x that y has and w has not, where a y of an x that is
      constant along them is constant too (so, no axis of a window).
    w_free: likewise of w.
    x_shared: axes that are summed over, in x; not those of groups or windows.
    w_shared: the same axes in w.
  """

  product: Product
  name: str
  channels: tuple[Axes, Axes]
  x_free: Axes = ()
  w_free: Axes = ()
  x_shared: Axes = ()
  w_shared: Axes = ()

  def along_output(self, scale: jax.Array, rank: int) -> jax.Array:
    """A scale of w, with one entry or one per channel, along the axes of y.

    Args:
      scale: shape () or of w's rank, 1 along axes without channels.
      rank: of y.
    """
    if scale.ndim == 0:
      return scale
    order = sorted(zip(*self.channels[::-1], strict=True))
    kept = [axis for _, axis in order]
    rest = [a for a in range(scale.ndim) if a not in kept]
    shape = [1] * rank
    for of_output, of_w in order:
      shape[of_output] = scale.shape[of_w]
    return scale.transpose(kept + rest).reshape(shape)

  def output(self, x_shape: Axes, w_shape: Axes) -> jax.ShapeDtypeStruct:
    """Shape and dtype of y, of float32 operands of these shapes."""
    return jax.eval_shape(self.product, *_float_operands(x_shape, w_shape))

  def trace(
    self, x_shape: Axes, w_shape: Axes, into: int | None = None
  ) -> jex_core.ClosedJaxpr:
    """The product for float32 operands of these shapes, traced.

    Args:
      x_shape: of x.
      w_shape: of w.
      into: None: the product itself, of (x, w). 0: its transpose into x, of
        (w, the gradient of y); 1: into w, of (x, the gradient of y).
    """
    operands = _float_operands(x_shape, w_shape)
    if into is None:
      return jax.make_jaxpr(self.product)(*operands)

    def transposed(other: jax.Array, g: jax.Array) -> jax.Array:
      def linear(v: jax.Array) -> jax.Array:
        return self.product(*((v, other) if into == 0 else (other, v)))

      return jax.linear_transpose(linear, operands[into])(g)[0]

    y = self.output(x_shape, w_shape)
    return jax.make_jaxpr(transposed)(operands[1 - into], y)


def _float_operands(*shapes):
  return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def of_dot_general(
  product: Product, name: str, ranks: tuple[int, int], numbers: Any
) -> Bilinear:
  """A `lax.dot_general` with these dimension numbers, of operands x and w."""
  (x_shared, w_shared), (x_batch, w_batch) = numbers
  x_free = _others(ranks[0], x_shared, x_batch)
  w_free = _others(ranks[1], w_shared, w_batch)
  # Its output has the axes of the batch, then those of x, then those of w.
  of_w = [*w_batch, *w_free]
  of_output = [*range(len(w_batch))]
  of_output += [len(w_batch) + len(x_free) + i for i in range(len(w_free))]
  pairs = sorted(zip(of_w, of_output, strict=True))
  channels = (tuple(w for w, _ in pairs), tuple(y for _, y in pairs))
  return Bilinear(
    product, name, channels, x_free, w_free, tuple(x_shared), tuple(w_shared)
  )


def _others(rank, *axes):
  named = {axis for some in axes for axis in some}
  return tuple(axis for axis in range(rank) if axis not in named)


def of_conv(
  product: Product,
  name: str,
  numbers: lax.ConvDimensionNumbers,
  feature_group_count: int = 1,
  batch_group_count: int = 1,
) -> Bilinear:
  """A `lax.conv_general_dilated` of x and w; numbers as it has them."""
  batch, x_feature, *_ = numbers.lhs_spec
  w_output, w_feature, *_ = numbers.rhs_spec
  channels = (w_output,), (numbers.out_spec[1],)
  # Where features are in groups, one of each cannot stand for all.
  grouped = feature_group_count > 1
  batched = batch_group_count > 1
  return Bilinear(
    product,
    name,
    channels,
    x_free=() if batched else (batch,),
    w_free=() if grouped or batched else (w_output,),
    x_shared=() if grouped else (x_feature,),
    w_shared=() if grouped else (w_feature,),
  )


def of_einsum(product: Product, name: str, subscripts: str) -> Bilinear:
  """A `jnp.einsum` of x and w; explicit, without an ellipsis."""
  operands, output = subscripts.split("->")
  left, right = operands.split(",")
  kept = tuple(i for i, c in enumerate(right) if c in output)
  shared = [c for c in left if c in right and c not in output]
  return Bilinear(
    product,
    name,
    (kept, tuple(output.index(right[i]) for i in kept)),
    x_free=_where(left, lambda c: c in output and c not in right),
    w_free=_where(right, lambda c: c in output and c not in left),
    x_shared=tuple(left.index(c) for c in shared),
    w_shared=tuple(right.index(c) for c in shared),
  )


def _where(letters, condition):
  return tuple(i for i, c in enumerate(letters) if condition(c))


def explicit(subscripts: str, lhs_rank: int) -> str:
  """`subscripts` without spaces, and letters in place of an ellipsis in x."""
  subscripts = subscripts.replace(" ", "")
  left = subscripts.split(",")[0]
  count = lhs_rank - len(left.replace("...", ""))
  unused = [c for c in string.ascii_letters if c not in subscripts]
  return subscripts.replace("...", "".join(unused[: max(0, count)]))
