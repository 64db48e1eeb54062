"""The quantizer written out in numpy, float64 (range and step as given)."""

import numpy as np


def axes_to_reduce(ndim: int, kept: tuple[int, ...] | None) -> tuple[int, ...]:
  kept = () if kept is None else tuple(a % ndim for a in kept)
  return tuple(a for a in range(ndim) if a not in kept)


def quantize(
  x: np.ndarray,
  bits: int,
  kind: str = "affine",
  kept: tuple[int, ...] | None = None,
  *,
  floor: float | None = 1e-8,
) -> np.ndarray:
  """Nearest-even values of `x` on the grid over its own range."""
  x = np.asarray(x, np.float64)
  if bits == 32:
    return x
  reduced = axes_to_reduce(x.ndim, kept)
  lo, hi = x.min(reduced, keepdims=True), x.max(reduced, keepdims=True)
  if kind == "affine":
    bottom, top, offset, span = 0, 2**bits - 1, lo, hi - lo
  else:
    top = 2 ** (bits - 1) - 1
    bottom, offset, span = -top, 0.0, np.maximum(np.abs(lo), np.abs(hi))
  step = span / top
  step = np.where(step == 0, 1.0, step) if floor is None else step.clip(floor)
  codes = np.clip(np.rint((x - offset) / step), bottom, top)
  return codes * step + offset


def step_size(
  x: np.ndarray,
  bits: int,
  kind: str = "affine",
  kept: tuple[int, ...] | None = None,
) -> np.ndarray:
  """Distance of two neighboring levels."""
  x = np.asarray(x, np.float64)
  reduced = axes_to_reduce(x.ndim, kept)
  if kind == "affine":
    return np.ptp(x, axis=reduced, keepdims=True) / (2**bits - 1)
  return np.abs(x).max(reduced, keepdims=True) / (2 ** (bits - 1) - 1)


def dot(subscripts, x, w, g):
  """Output and both gradients of a two-operand einsum, in float64."""
  operands, output = subscripts.split("->")
  left, right = operands.split(",")
  return (
    np.einsum(subscripts, x, w),
    np.einsum(f"{output},{right}->{left}", g, w),
    np.einsum(f"{left},{output}->{right}", x, g),
  )


def convolution(
  x, w, g, *, stride=1, padding=(0, 0), rhs_dilation=1, lhs_dilation=1, groups=1
):
  """Output and both gradients of an NHWC, HWIO convolution, in float64.

  Without `g`, the output alone.
  """
  n, height, width, channels = x.shape
  spread = [(size - 1) * lhs_dilation + 1 for size in (height, width)]
  padded = np.zeros((n, *(size + sum(padding) for size in spread), channels))
  inner = (
    slice(None),
    *(slice(padding[0], padding[0] + size, lhs_dilation) for size in spread),
  )
  padded[inner] = x
  reach = [(k - 1) * rhs_dilation + 1 for k in w.shape[:2]]
  out = [
    (size - r) // stride + 1
    for size, r in zip(padded.shape[1:3], reach, strict=True)
  ]
  y = np.zeros((n, *out, w.shape[3]))
  dpadded, dw = np.zeros_like(padded), np.zeros(w.shape)
  inputs, outputs = channels // groups, w.shape[3] // groups
  for i in range(w.shape[0]):
    for j in range(w.shape[1]):
      for group in range(groups):
        ins = slice(group * inputs, (group + 1) * inputs)
        outs = slice(group * outputs, (group + 1) * outputs)
        rows = slice(i * rhs_dilation, i * rhs_dilation + out[0] * stride)
        columns = slice(j * rhs_dilation, j * rhs_dilation + out[1] * stride)
        window = padded[:, rows, columns, ins][:, ::stride, ::stride]
        y[..., outs] += window @ w[i, j, :, outs]
        if g is not None:
          dw[i, j, :, outs] = np.einsum("nhwi,nhwo->io", window, g[..., outs])
          target = dpadded[:, rows, columns, ins][:, ::stride, ::stride]
          target += g[..., outs] @ w[i, j, :, outs].T
  return y if g is None else (y, dpadded[inner], dw)
