"""What is wrong with a checkpoint that has no checksums, by reading it.

orbax reads all arrays at once. Of one that it cannot read, it leaves the others
under way, and they fill the terminal with tracebacks, minutes later, too.
"""

import errno
import json
import os
import pathlib
import re
from typing import Any

import tensorstore

from dpc_jax.training import peers

# Of a file that is gone, or another thing in its place: damage. Any other
# error of the system tells of the disk, and the file may be as it should.
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# What TensorStore raises, by the kind of its status.
_ERRORS = (ValueError, KeyError, IndexError, OSError, NotImplementedError)
_KINDS = ("jax.Array", "np.ndarray")
# Where orbax begins to quote TensorStore, in the form of a Python object.
_QUOTED = re.compile(r"\.? See full TensorStore details.*")


def problem(folder: pathlib.Path) -> str | None:
  """What of a checkpoint's state cannot be read, the first of it, or None.

  It reads all arrays, one after the other, so that one is held in memory. What
  else is damaged is left to orbax, which says so before it reads an array.

  Args:
    folder: of the step.

  Raises:
    OSError: a file is there, but cannot be read now. That is no damage.
  """
  state = folder / "state"
  for path in (state / "_sharding", *state.glob("array_metadatas/*")):
    if path.is_file() and _json(path) is None:
      return f"{path.relative_to(folder)} cannot be read"
  there = _json(state / "_METADATA")
  names = None if there is None else _names(there)
  if names is None:
    return "state/_METADATA cannot be read"
  store = {"driver": "ocdbt", "base": f"{state.absolute().as_uri()}/"}
  for name in names:
    spec = {"driver": "zarr", "kvstore": store | {"path": f"{name}/"}}
    try:
      tensorstore.open(spec, open=True).result().read().result()
    except _ERRORS as error:
      refused = refusal(error, folder)
      if refused is not None:
        raise refused from error
      where = _place(error, folder)
      return f"{where} cannot be read, nor can the array {name}"
  return None


def _json(path: pathlib.Path) -> Any:
  """What a file holds; None if it is damaged."""
  try:
    return json.loads(path.read_bytes())
  except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
    return None


def _names(there: Any) -> list[str] | None:
  """The arrays' names in the store; None if they are not told.

  [] where the store is another one than `problem` reads.
  """
  try:
    if not there["use_ocdbt"] or there["use_zarr3"]:
      return []
    return sorted(
      ".".join(str(key["key"]) for key in leaf["key_metadata"])
      for leaf in there["tree_metadata"].values()
      if leaf["value_metadata"]["value_type"] in _KINDS
    )
  except (AttributeError, KeyError, TypeError):
    return None


def _place(error: BaseException, folder: pathlib.Path) -> str:
  """The file, if TensorStore says which."""
  # Its paths are absolute; those of folders, of the store itself, end in /.
  found = re.findall(
    rf'"{re.escape(str(folder))}/([^"\\]*[^"\\/])"', str(error)
  )
  return found[-1] if found else "a file in state/"


def refusal(error: BaseException, folder: pathlib.Path) -> OSError | None:
  """The error of a disk that does not answer; None if a file is damaged.

  Args:
    error: of TensorStore or orbax.
    folder: what it is about if the error does not say.
  """
  found = peers.system_error(error)
  if found is None or found.errno in _MISSING:
    return None
  name = found.filename or str(folder)
  return OSError(found.errno, os.strerror(found.errno), name)


def text(error: BaseException) -> str:
  """orbax's words, in one line, shortened."""
  return _QUOTED.sub("", " ".join(str(error).split()))[:200]
