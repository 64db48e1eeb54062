"""Codes of any width as a stream of bits, and back.

Code i of width b takes the bits i*b .. i*b + b - 1 of the stream, its lowest
bit first; bit k of the stream is bit k mod 8 of byte k // 8, counted from the
lowest. The last byte is filled up with zeros. So eight codes take b bytes:

    >>> pack(np.array([1, 2, 3, 0, 0, 0, 0, 0]), 3).hex(" ")
    'd1 00 00'
"""

from types import ModuleType
from typing import Any

import numpy as np

from dpc_jax.quant import grids

# Codes that are spread into single bits at a time: a multiple of 8.
_CHUNK = 1 << 20


def packed_size(count: int, width: int) -> int:
  """Bytes that `count` codes of a width take: ceil(count * width / 8)."""
  return -(-count * width // 8)


def pack(codes: np.ndarray, width: int) -> bytes:
  """The stream of the codes, in row-major order.

  Args:
    codes: integers in 0 .. 2^width - 1, of any shape.
    width: 2..16.

  Raises:
    ValueError: a width outside 2..16, or a code that does not fit it.
  """
  _check(width)
  flat = np.asarray(codes).reshape(-1)
  if flat.size and (flat.min() < 0 or flat.max() >> width):
    raise ValueError(
      f"codes: {flat.min()}..{flat.max()} do not fit {width} bits"
    )
  places = np.arange(width, dtype=np.uint16)
  parts = []
  for start in range(0, flat.size, _CHUNK):
    rows = flat[start : start + _CHUNK, None].astype(np.uint16)
    bits = ((rows >> places[None]) & 1).astype(np.uint8)
    parts.append(np.packbits(bits.reshape(-1), bitorder="little").tobytes())
  return b"".join(parts)


def unpack(data: bytes, width: int, count: int) -> np.ndarray:
  """The codes of a stream, uint16 (count,).

  Args:
    data: of `pack`.
    width: 2..16.
    count: number of codes.

  Raises:
    ValueError: a width outside 2..16, or bytes that are not as many as
      `packed_size` says.
  """
  _check(width)
  size = packed_size(count, width)
  if len(data) != size:
    raise ValueError(
      f"data: {len(data)} bytes, but {count} codes of {width} bits take {size}"
    )
  codes = unpack_groups(np, padded(data, width), width)
  return codes[:count].astype(np.uint16)


def padded(data: bytes, width: int) -> np.ndarray:
  """The stream as uint8, zeros added up to whole groups of eight codes."""
  flat = np.frombuffer(data, np.uint8)
  return np.pad(flat, (0, -flat.size % width))


def unpack_groups(xp: ModuleType, data: Any, width: int) -> Any:
  """The codes of whole groups of eight, uint32, in NumPy or JAX.

  Args:
    xp: `numpy` or `jax.numpy`.
    data: uint8 (groups * width,), of `padded`.
    width: 2..16, static.

  Returns:
    uint32 (groups * 8,).
  """
  groups = data.reshape(-1, width).astype(xp.uint32)
  columns = []
  for i in range(8):
    first, shift = divmod(i * width, 8)
    # A code reaches over three bytes at most: 7 bits and its own 16.
    last = (i * width + width - 1) // 8
    word = groups[:, first]
    for place in range(first + 1, last + 1):
      word = word | (groups[:, place] << xp.uint32(8 * (place - first)))
    columns.append((word >> xp.uint32(shift)) & xp.uint32((1 << width) - 1))
  return xp.stack(columns, axis=1).reshape(-1)


def _check(width: int) -> None:
  if not grids.MIN_WIDTH <= width <= grids.MAX_WIDTH:
    raise ValueError(
      f"width = {width}: use {grids.MIN_WIDTH}..{grids.MAX_WIDTH}"
    )
