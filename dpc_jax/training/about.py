"""What a checkpoint says of the program that wrote it: format and versions."""

import importlib.metadata
import json
import pathlib
from typing import Any

# Raised by one for a change that an older program could not read.
FORMAT = 2
# The item of a checkpoint.
NAME = "about"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def written() -> dict[str, Any]:
  """What this program writes: the format, and its packages' versions."""
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return {"format": FORMAT, "versions": {"dpc_jax": _own(), **versions}}


def _own() -> str:
  # The program may run from its source tree, not installed.
  try:
    return importlib.metadata.version("dpc_jax")
  except importlib.metadata.PackageNotFoundError:
    return "of a source tree"


def too_new(checkpoint: pathlib.Path) -> int | None:
  """A checkpoint's format if it is above `FORMAT`, or None.

  None, too, where it does not say: format 1 did not, and whether a file is
  damaged is not for this to judge.

  Raises:
    OSError: the file is there, but cannot be read now.
  """
  try:
    found = json.loads(_path(checkpoint).read_bytes())["format"]
  except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
    return None
  except (KeyError, TypeError, ValueError):
    return None
  return found if isinstance(found, int) and found > FORMAT else None


def origin(checkpoint: pathlib.Path) -> str:
  """What wrote a checkpoint, in words."""
  path = _path(checkpoint)
  if not path.exists():
    return "format 1"
  try:
    about = json.loads(path.read_text())
    names = ("dpc_jax", "jax", "flax", "optax")
    versions = [f"{name} {about['versions'][name]}" for name in names]
    return ", ".join([f"format {about['format']}", *versions])
  except (KeyError, TypeError, ValueError):
    return "a program that its damaged about/ does not tell"


def _path(checkpoint: pathlib.Path) -> pathlib.Path:
  return checkpoint / NAME / "metadata"
