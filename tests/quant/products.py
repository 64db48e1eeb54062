"""The products that the tests of `ops` run, quantized, plain and expected."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dpc_jax.quant import grids, ops
from tests.quant import reference

NEAREST = grids.Quantization(gradients=grids.Grid())
SYMMETRIC = grids.Quantization(
  weights=grids.Grid("symmetric", "channel"),
  activations=grids.Grid("symmetric"),
  gradients=grids.Grid("symmetric"),
)
ALL_CHANNELS = grids.Quantization(
  *(grids.Grid(granularity="channel") for _ in range(3))
)


class Dot(NamedTuple):
  """An einsum, and the same as dimension numbers (None: `ops.einsum`)."""

  subscripts: str
  x: tuple[int, ...]
  w: tuple[int, ...]
  numbers: tuple | None = None

  def quantized(self, x, w, **options):
    if self.numbers is None:
      return ops.einsum(self.subscripts, x, w, **options)
    return ops.dot_general(x, w, self.numbers, **options)

  def plain(self, x, w):
    if self.numbers is None:
      return jnp.einsum(self.subscripts, x, w)
    return lax.dot_general(x, w, self.numbers)

  def expected(self, x, w, g):
    return reference.dot(self.subscripts, x, w, g)

  def weight_axes(self):
    operands, output = self.subscripts.split("->")
    letters = operands.split(",")[1]
    return tuple(i for i, c in enumerate(letters) if c in output)

  def gradient_axes(self):
    operands, output = self.subscripts.split("->")
    left, right = operands.split(",")
    free = [i for i, c in enumerate(output) if c in right]
    if self.numbers is not None:
      free = [i for i in free if output[i] not in left]
    return tuple(free)


class Conv(NamedTuple):
  """An NHWC, HWIO convolution."""

  x: tuple[int, ...]
  w: tuple[int, ...]
  stride: int = 1
  padding: tuple[int, int] = (0, 0)
  rhs_dilation: int = 1
  lhs_dilation: int = 1
  groups: int = 1

  def options(self):
    return {
      "window_strides": (self.stride,) * 2,
      "padding": (self.padding,) * 2,
      "rhs_dilation": (self.rhs_dilation,) * 2,
      "lhs_dilation": (self.lhs_dilation,) * 2,
      "feature_group_count": self.groups,
      "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    }

  def quantized(self, x, w, **options):
    return ops.conv_general_dilated(x, w, **self.options(), **options)

  def plain(self, x, w):
    return lax.conv_general_dilated(x, w, **self.options())

  def expected(self, x, w, g):
    return reference.convolution(x, w, g, **self._asdict_of_options())

  def _asdict_of_options(self):
    return {k: v for k, v in self._asdict().items() if k not in "xw"}

  def weight_axes(self):
    return (3,)

  def gradient_axes(self):
    return (3,)


CASES = {
  "dense": Dot("nhi,io->nho", (3, 4, 6), (6, 5), (((2,), (0,)), ((), ()))),
  "batch": Dot(
    "bnid,bmid->bnm",
    (2, 3, 4, 5),
    (2, 6, 4, 5),
    (((2, 3), (2, 3)), ((0,),) * 2),
  ),
  "einsum": Dot("abc,bcd->bad", (4, 3, 5), (3, 5, 6)),
  "conv": Conv((2, 6, 7, 4), (3, 3, 4, 5), padding=(1, 1)),
  "stride": Conv((2, 8, 7, 3), (3, 2, 3, 4), stride=2, padding=(1, 2)),
  "dilation": Conv((2, 9, 8, 3), (3, 3, 3, 4), padding=(2, 1), rhs_dilation=2),
  "transposed": Conv(
    (2, 4, 5, 3), (3, 3, 3, 4), padding=(2, 1), lhs_dilation=2
  ),
  "groups": Conv((2, 6, 5, 6), (3, 3, 2, 9), padding=(1, 1), groups=3),
  "depthwise": Conv((2, 6, 5, 6), (3, 3, 1, 6), stride=2, groups=6),
}


def arrays(case, dtype=np.float32):
  random = np.random.default_rng(len(case.x))
  x = random.normal(0.3, 1, case.x).astype(np.float32)
  w = random.normal(0, 0.4, case.w).astype(np.float32)
  shape = jax.eval_shape(case.plain, x, w).shape
  g = random.normal(0, 0.1, shape).astype(np.float32)
  return jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(g, dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def quantized(case, quantization, bits, x, w, g, key=None):
  product = functools.partial(
    case.quantized, bits=bits, quantization=quantization, key=key
  )
  y, vjp = jax.vjp(product, x, w)
  return y, *vjp(g)


@functools.partial(jax.jit, static_argnums=0)
def plain(case, x, w, g):
  y, vjp = jax.vjp(case.plain, x, w)
  return y, *vjp(g)


def widths(weights, activations=None, gradients=None):
  activations = weights if activations is None else activations
  gradients = weights if gradients is None else gradients
  return grids.LayerBits(*map(jnp.int32, (weights, activations, gradients)))


def relative_error(got, want):
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  return np.max(np.abs(got - want)) / np.max(np.abs(want))
