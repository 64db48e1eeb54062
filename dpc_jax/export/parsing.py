"""A manifest and its numbers as a frozen model: the format, read.

A checksum tells damage, not another program's mistake: nothing is believed.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax
import jax.numpy as jnp
import numpy as np

from dpc_jax.export import freezing, packing
from dpc_jax.quant import grids


def parse(manifest: Mapping[str, Any], data: bytes) -> freezing.Packed:
  """The frozen model of a manifest and the bytes of weights.bin.

  Raises:
    AttributeError, IndexError, KeyError, TypeError, ValueError: the manifest
      does not follow the format.
  """
  layers = manifest["layers"]
  freezing.abstract_inputs(manifest["inputs"])
  names = [x["name"] for x in (*manifest["kernels"], *manifest["tensors"])]
  # Raises where they are no paths of one tree.
  flax.traverse_util.unflatten_dict(dict.fromkeys(names), sep="/")
  return freezing.Packed(
    model=manifest["model"],
    inputs=tuple(manifest["inputs"]),
    bits={
      path: grids.as_layer_bits(grids.LayerBits(**layer["bits"]))
      for path, layer in layers.items()
    },
    grids={path: layer["grids"] for path, layer in layers.items()},
    kernels={x["name"]: _parse_kernel(x, data) for x in manifest["kernels"]},
    tensors={
      x["name"]: _array(data, x["values"], x["shape"], x["dtype"])
      for x in manifest["tensors"]
    },
    about=manifest["about"],
  )


def _parse_kernel(found: Mapping[str, Any], data: bytes) -> freezing.Kernel:
  shape, axes = found["shape"], found["axes"]
  stack = tuple(found["stack"])
  # In Python's integers, which do not overflow.
  if not found["parts"] or len(found["parts"]) != math.prod(stack):
    raise ValueError(f"{found['name']}: parts do not fit the stack")
  if min(shape, default=0) < 0:
    raise ValueError(f"{found['name']}: shape {shape}")
  if found["kind"] not in grids.KINDS:
    raise ValueError(f"{found['name']}: no kind {found['kind']!r}")
  reduced = [n if i in axes else 1 for i, n in enumerate(shape)]
  parts = []
  for part in found["parts"]:
    if part["width"] == grids.FLOAT_WIDTH:
      values = _array(data, part["values"], shape, "float32")
      parts.append(freezing.Part(grids.FLOAT_WIDTH, values, None, None))
      continue
    codes = packing.unpack(
      _section(data, part["codes"]), part["width"], math.prod(shape)
    )
    if (part["offset"] is None) != (found["kind"] == "symmetric"):
      raise ValueError(f"{found['name']}: an affine grid alone has an offset")
    scale = _array(data, part["scale"], reduced, "float32")
    offset = part["offset"]
    if offset is not None:
      offset = _array(data, offset, reduced, "float32")
    parts.append(
      freezing.Part(part["width"], codes.reshape(shape), scale, offset)
    )
  return freezing.Kernel(found["kind"], stack, tuple(axes), tuple(parts))


def _section(data: bytes, section: list[int]) -> bytes:
  start, size = section
  if not 0 <= start <= start + size <= len(data):
    raise ValueError(f"{section}: outside of the numbers")
  return data[start : start + size]


def _array(data, section, shape, name) -> np.ndarray:
  if name not in freezing.DTYPES:
    raise ValueError(f"dtype {name!r} is unknown")
  dtype = jnp.dtype(name)
  flat = np.frombuffer(_section(data, section), dtype.newbyteorder("<"))
  return flat.astype(dtype).reshape(shape)
