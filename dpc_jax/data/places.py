"""Where the data sets lie: the folder of all, and the versions of one."""

import os
import pathlib
import re

_DEFAULT = "tfds' default"
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")


def data_root(
  name: str, data_dir: str | os.PathLike[str] | None
) -> tuple[str, pathlib.Path]:
  """Returns the folder of all data sets, and where that choice comes from.

  Args:
    name: of the data set that is looked for.
    data_dir: None takes TFDS_DATA_DIR or else tfds' default,
      ~/tensorflow_datasets.

  Returns:
    The origin, as errors name it, and the absolute folder.

  Raises:
    ValueError: the folder is not a local one.
  """
  origin, folder = next(
    (origin, folder)
    for origin, folder in (
      ("data.dir", data_dir),
      ("TFDS_DATA_DIR", os.environ.get("TFDS_DATA_DIR")),
      (_DEFAULT, "~/tensorflow_datasets"),
    )
    if folder
  )
  if "://" in str(folder):
    raise ValueError(
      f"{origin}={folder} is not a local folder; copy {name} to one"
    )
  return origin, pathlib.Path(folder).expanduser().absolute()


def version_dirs(root: pathlib.Path, name: str) -> list[pathlib.Path]:
  """Returns the folders of a data set's prepared versions, the newest last."""
  found = {}
  for info in (root / name).glob("*/dataset_info.json"):
    version = _VERSION.fullmatch(info.parent.name)
    if version:
      found[tuple(int(part) for part in version.groups())] = info.parent
  return [found[version] for version in sorted(found)]


def wrong_folder(origin: str, root: pathlib.Path) -> str | None:
  """Returns what is wrong with what `data_root` found, or None.

  That tfds' default is not there yet is no mistake of anyone's.
  """
  if root.is_dir() or (origin == _DEFAULT and not root.exists()):
    return None
  what = "is a file, not a folder" if root.exists() else "does not exist"
  return f"{root} ({origin}) {what}; correct it"


def absence(name: str, origin: str, root: pathlib.Path) -> str:
  """Says that a set is not in a folder, as far as to the remedy."""
  wrong = wrong_folder(origin, root)
  if wrong:
    return f"{wrong}, or"
  absent = f"no prepared {name} in {root} ({origin})"
  # Of the set itself, or of one of its versions.
  for folder in (root.parent, root.parent.parent):
    if version_dirs(folder, name) and root.is_relative_to(folder / name):
      return f"{absent}, a part of it: use {folder}, or"
  return f"{absent};"
