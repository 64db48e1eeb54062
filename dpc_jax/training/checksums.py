"""SHA-256 of every file of a folder, beside the files: orbax has none."""

import concurrent.futures
import errno
import hashlib
import json
import os
import pathlib

NAME = "checksums.json"
# Hashing lets go of the interpreter's lock; more threads wait for the disk.
_THREADS = 4


def write(folder: pathlib.Path) -> None:
  """Writes `checksums.json` into a folder, whole or not at all.

  Its form is {path in the folder: [bytes, SHA-256 in hex]}. A folder that has
  it is on the disk, as are its files and its own name, and outlives a power
  cut: another may be deleted once this returns.
  """
  names = sorted(_names(folder))
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    found = threads.map(
      lambda name: _measure(folder / name, is_synced=True), names
    )
    text = json.dumps(dict(zip(names, found, strict=True)), indent=1)
  # orbax syncs the arrays alone, and not the new name of the folder.
  for path in (*filter(pathlib.Path.is_dir, folder.rglob("*")), folder):
    _sync_folder(path)
  _sync_folder(folder.parent)
  temporary = folder / f"{NAME}.tmp"
  with temporary.open("w") as file:
    file.write(text + "\n")
    file.flush()
    _sync(file.fileno())
  temporary.replace(folder / NAME)
  _sync_folder(folder)


def exist(folder: pathlib.Path) -> bool:
  """Whether the folder has checksums."""
  return (folder / NAME).exists()


def problem(folder: pathlib.Path) -> str | None:
  """What is wrong with the files, the first of them by name, or None.

  Files that came later are of no interest. A folder without checksums has no
  problem that they could show.

  Raises:
    OSError: a file is there, but cannot be read now. That is no damage.
  """
  if not exist(folder):
    return None
  try:
    wanted = json.loads((folder / NAME).read_bytes())
    wanted = {str(name): (int(n), str(h)) for name, (n, h) in wanted.items()}
  except (AttributeError, TypeError, ValueError):
    return f"{NAME} is damaged"
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    found = threads.map(
      lambda name: _compare(folder, name, *wanted[name]), sorted(wanted)
    )
    return next((text for text in found if text is not None), None)


def _names(folder):
  for path in folder.rglob("*"):
    name = path.relative_to(folder).as_posix()
    if path.is_file() and name not in (NAME, f"{NAME}.tmp"):
      yield name


def _compare(folder, name, size, digest) -> str | None:
  path = folder / name
  try:
    there = path.stat().st_size
    if there != size:
      return f"{name} has {there} bytes in place of {size}"
    return None if _measure(path)[1] == digest else f"{name} has changed"
  except (FileNotFoundError, NotADirectoryError):
    return f"{name} is missing"


def _measure(path, is_synced=False) -> tuple[int, str]:
  with path.open("rb") as file:
    if is_synced:
      _sync(file.fileno())
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return file.tell(), digest


def _sync_folder(folder: pathlib.Path) -> None:
  """Has the names in it on the disk."""
  try:
    descriptor = os.open(folder, os.O_RDONLY)
  except PermissionError:
    # Windows opens no folder; elsewhere what may be written may be read.
    if os.name != "nt":
      raise
    return
  try:
    _sync(descriptor)
  finally:
    os.close(descriptor)


def _sync(descriptor: int) -> None:
  try:
    os.fsync(descriptor)
  except OSError as error:
    # Of a file system that knows no such thing there is no more to be had.
    if error.errno not in (errno.EINVAL, errno.ENOTSUP):
      raise
