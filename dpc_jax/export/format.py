"""The format of an export: a folder of a manifest and one file of bytes.

    manifest.json     what there is, JSON in UTF-8
    weights.bin       all numbers
    model.stablehlo   if asked for: see `dpc_jax.export.program`

Version 1. A reader that knows less refuses a higher version. Fields:

    format       "dpc_jax packed model"
    version      1
    versions     of the packages that wrote it
    model        {name, num_classes, sizes, quantization}: arguments of
                 `dpc_jax.models.create`; null of another model
    inputs       [{shape, dtype}], leading axes are the batch
    layers       {path: {bits: {weights, activations, gradients}, grids: {the
                 same three: {kind, granularity, rounding} or null}}}; a width
                 is an int, or a list of those of stacked layers
    kernels      [{name, kind, stack, shape, axes, parts}], see below
    tensors      [{name, dtype, shape, values}]
    about        free
    files        {name: {bytes, sha256}} of the other files
    checksum     SHA-256, in hex, of the manifest without this field, as JSON
                 with sorted keys, the separators "," and ":", and characters
                 other than ASCII escaped

`name` is the '/'-joined path of a variable, its collection first. A *section*,
[start, bytes], is a part of weights.bin; each starts at a multiple of four, and
zeros fill the gaps. Arrays are little-endian, in row-major order: `values` of a
tensor in its `dtype` (bool is a byte), the others float32.

A kernel has one entry in `parts`, or, where `stack` is [layers], one for each
layer; `shape` is that of one layer's kernel. An entry is {width, values}, width
32, or {width, codes, scale, offset}. `codes` is the stream of bits that
`dpc_jax.export.packing` describes, `scale` and `offset` (null of a symmetric
grid) have the shape of the kernel with 1 for every axis that is not in `axes`
(of a grid per tensor, which has no `axes`, for each). With c a stored code,

    kind affine       value = c * scale + offset
    kind symmetric    value = (c - (2^(width-1) - 1)) * scale

in float32. `quant_stats/PATH/lo` and `hi` are the running range that a layer's
input is quantized over at `activations` bits (`rhs_lo`, `rhs_hi` those of the
second operand of a product, at `weights` bits): the grid of
`dpc_jax.quant.grids`. Where `count` is 0 there is none yet, and each batch is
quantized over its own.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from dpc_jax.export import errors, freezing, packing, parsing
from dpc_jax.quant import grids

NAME = "dpc_jax packed model"
VERSION = 1
MANIFEST, WEIGHTS, PROGRAM = "manifest.json", "weights.bin", "model.stablehlo"
_ALIGNMENT = 4
_PACKAGES = ("dpc_jax", "jax", "flax", "numpy")
_AGAIN = "export the run again"


def save(
  packed: freezing.Packed,
  directory: str | os.PathLike[str],
  program: bytes | None = None,
) -> dict[str, Any]:
  """Writes a frozen model, whole or not at all.

  Args:
    packed: of `freeze`.
    directory: a new folder, or an empty one.
    program: of `program.stablehlo`, to be written beside it.

  Returns:
    The manifest.

  Raises:
    ExportError: the folder has something in it already, or cannot be written.
  """
  directory = pathlib.Path(directory)
  check_new(directory)
  weights = _Weights()
  manifest = _manifest(packed, weights)
  contents = {WEIGHTS: bytes(weights.data)}
  if program is not None:
    contents[PROGRAM] = program
  manifest["files"] = {
    name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for name, data in contents.items()
  }
  manifest["checksum"] = _checksum(manifest)
  text = json.dumps(manifest, indent=1, allow_nan=False) + "\n"
  contents[MANIFEST] = text.encode()
  temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
  try:
    temporary.mkdir(parents=True)
    for name, data in contents.items():
      with (temporary / name).open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(directory)
  except OSError as error:
    raise errors.ExportError(
      f"{directory}: cannot be written: {error.strerror}; use another folder"
    ) from None
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return manifest


def check_new(directory: pathlib.Path) -> None:
  """Refuses a folder that something is in, before anything is computed.

  Raises:
    ExportError: naming the folder.
  """
  if not directory.name:
    raise errors.ExportError(f"{directory}: names no new folder; use another")
  try:
    is_new = not directory.is_symlink() and not directory.exists()
    if not is_new and not (directory.is_dir() and not any(directory.iterdir())):
      raise errors.ExportError(
        f"{directory}: is there already; nothing is overwritten: use another"
        " folder"
      )
    above = next(path for path in directory.absolute().parents if path.exists())
  except OSError as error:
    raise errors.ExportError(
      f"{directory}: {error.strerror}; use another folder"
    ) from None
  if not above.is_dir() or not os.access(above, os.W_OK):
    raise errors.ExportError(
      f"{directory}: {above} is no folder that can be written in; use another"
    )


def read(
  directory: str | os.PathLike[str],
) -> tuple[freezing.Packed, dict[str, Any]]:
  """Reads and checks what `save` has written.

  Returns:
    (the frozen model, the manifest).

  Raises:
    ExportError: no export, one of a newer version, or a file that is missing,
      truncated or damaged, named.
  """
  directory = pathlib.Path(directory)
  manifest = _read_manifest(directory)
  try:
    data = {
      name: _read_file(directory / name, found)
      for name, found in manifest["files"].items()
    }
    return parsing.parse(manifest, data[WEIGHTS]), manifest
  except errors.ExportError:
    raise
  except (AttributeError, IndexError, KeyError, TypeError, ValueError):
    # Its checksum is right: another program has written it.
    raise errors.ExportError(
      f"{directory / MANIFEST}: does not follow the format; {_AGAIN}"
    ) from None


def read_program(directory: str | os.PathLike[str]) -> bytes:
  """The bytes of model.stablehlo, checked.

  Raises:
    ExportError: as `read`, or the export has none.
  """
  directory = pathlib.Path(directory)
  found = _read_manifest(directory)["files"].get(PROGRAM)
  if found is None:
    raise errors.ExportError(
      f"{directory}: has no {PROGRAM}; export the run with --stablehlo"
    )
  return _read_file(directory / PROGRAM, found)


class _Weights:
  """The bytes of weights.bin, as far as they are there."""

  def __init__(self):
    self.data = bytearray()

  def add(self, section: bytes) -> list[int]:
    self.data += bytes(-len(self.data) % _ALIGNMENT)
    start = len(self.data)
    self.data += section
    return [start, len(section)]

  def add_array(self, x: np.ndarray) -> list[int]:
    return self.add(x.astype(x.dtype.newbyteorder("<")).tobytes())


def _manifest(packed: freezing.Packed, weights: _Weights) -> dict[str, Any]:
  kernels = [
    {
      "name": name,
      "kind": kernel.kind,
      "stack": list(kernel.stack),
      "shape": list(kernel.parts[0].codes.shape),
      "axes": list(kernel.axes),
      "parts": [_part(part, weights) for part in kernel.parts],
    }
    for name, kernel in packed.kernels.items()
  ]
  tensors = [
    {
      "name": name,
      "dtype": x.dtype.name,
      "shape": list(x.shape),
      "values": weights.add_array(x),
    }
    for name, x in packed.tensors.items()
  ]
  return {
    "format": NAME,
    "version": VERSION,
    "versions": {name: _version(name) for name in _PACKAGES},
    "model": packed.model,
    "inputs": list(packed.inputs),
    "layers": {
      path: {"bits": layer._asdict(), "grids": packed.grids[path]}
      for path, layer in packed.bits.items()
    },
    "kernels": kernels,
    "tensors": tensors,
    "about": packed.about,
  }


def _part(part: freezing.Part, weights: _Weights) -> dict[str, Any]:
  if part.width == grids.FLOAT_WIDTH:
    return {"width": part.width, "values": weights.add_array(part.codes)}
  return {
    "width": part.width,
    "codes": weights.add(packing.pack(part.codes, part.width)),
    "scale": weights.add_array(part.scale),
    "offset": None if part.offset is None else weights.add_array(part.offset),
  }


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def _checksum(manifest: Mapping[str, Any]) -> str:
  text = json.dumps(
    {k: v for k, v in manifest.items() if k != "checksum"},
    sort_keys=True,
    separators=(",", ":"),
    allow_nan=False,
  )
  return hashlib.sha256(text.encode()).hexdigest()


def _read_manifest(directory: pathlib.Path) -> dict[str, Any]:
  path = directory / MANIFEST
  if not path.is_file():
    what = f"holds no export, which has a {MANIFEST}"
    if not directory.exists():
      what = "there is no such folder"
    raise errors.ExportError(f"{directory}: {what}; give that of an export")
  data = _read_bytes(path)
  try:
    found = json.loads(data, parse_constant=_refuse)
    # Also refuses 1e999, which is read as infinity.
    checksum = _checksum(found) if isinstance(found, dict) else None
  except (RecursionError, ValueError):
    found = None
  if not isinstance(found, dict):
    raise errors.ExportError(f"{path}: is damaged; {_AGAIN}")
  if found.get("format") != NAME:
    raise errors.ExportError(
      f"{path}: is of another format than {NAME!r}; give an export's folder"
    )
  version = found.get("version")
  if isinstance(version, int) and version > VERSION:
    raise errors.ExportError(
      f"{path}: is of version {version}, and this program reads up to"
      f" {VERSION}; use a newer dpc_jax"
    )
  if (
    found.get("checksum") != checksum
    or version != VERSION
    or not _are_files(found.get("files"))
  ):
    raise errors.ExportError(f"{path}: is damaged; {_AGAIN}")
  return found


def _are_files(files: Any) -> bool:
  """Whether these are the files of an export, no others."""
  return (
    isinstance(files, dict)
    and {WEIGHTS} <= files.keys() <= {WEIGHTS, PROGRAM}
    and all(
      isinstance(file, dict) and isinstance(file.get("bytes"), int)
      for file in files.values()
    )
  )


def _refuse(text: str) -> None:
  raise ValueError(f"{text} is not JSON")


def _read_file(path: pathlib.Path, found: Mapping[str, Any]) -> bytes:
  if not path.is_file():
    raise errors.ExportError(f"{path}: is missing; {_AGAIN}")
  data = _read_bytes(path)
  if len(data) != found["bytes"]:
    raise errors.ExportError(
      f"{path}: has {len(data):,} bytes in place of {found['bytes']:,};"
      f" {_AGAIN}"
    )
  if hashlib.sha256(data).hexdigest() != found.get("sha256"):
    raise errors.ExportError(f"{path}: is damaged; {_AGAIN}")
  return data


def _read_bytes(path: pathlib.Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as error:
    raise errors.ExportError(
      f"{path}: cannot be read: {error.strerror}; see to it, and try again"
    ) from None
