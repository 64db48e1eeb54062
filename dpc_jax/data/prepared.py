"""Finds and reads data sets that `tensorflow_datasets` has prepared.

Nothing here imports TensorFlow or opens a connection: array_record files are
read in place, by random access, and what is absent or damaged ends in one line
that says how to get it.
"""

import collections.abc
import contextlib
import importlib
import json
import os
import pathlib
import sys
import threading
import types
import typing

from dpc_jax.data import places, text_files

_PACKAGES = {
  "array_record": "array-record",
  "grain": "grain",
  "PIL": "Pillow",
  "absl": "absl-py",
  "sklearn": "scikit-learn",
  "tensorflow_datasets": "tensorflow-datasets",
}

# Its import registers the builders that tfds itself does not have.
_TEXT_BUILDERS = "dpc_jax.data.text"
# What has to lie in place before a builder can run.
_BY_HAND = {
  "imagenet2012": (
    "put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, from "
    "image-net.org, into '{folder}/downloads/manual' and "
  ),
}
# Reading small records in such blocks is 4 times as fast as one by one.
_RECORDS_PER_READ = 2048


class DataError(ValueError):
  """Data that cannot be read, in one line with the data set and the remedy.

  What a run may meet at any step, whichever thread or process reads: a damaged
  image, a damaged file, or one that has gone.
  """


def require(module: str, user: str) -> types.ModuleType:
  """Imports an optional package, at the time of its first use.

  Args:
    module: the dotted name of the module.
    user: what needs it, the first words of the error.

  Returns:
    The module.

  Raises:
    ModuleNotFoundError: in one line, with the command that installs it.
  """
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    missing = error.name or module
    root = missing.split(".")[0]
    raise ModuleNotFoundError(
      f"{user} needs the package {root}, which is not installed: "
      f"pip install {_PACKAGES.get(root, root)}",
      name=missing,
    ) from error


def find(name: str, data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
  """Returns the newest version of a data set, before tfds is even imported.

  Args:
    name: of the data set.
    data_dir: the folder that holds tfds data sets, as for `places.data_root`.

  Returns:
    Its folder, such as DIR/cifar10/3.0.2, whose descriptions are JSON.

  Raises:
    FileNotFoundError: the set or one of its descriptions is not there.
    ValueError: a description is damaged, or the folder is not a local one.
  """
  origin, root = places.data_root(name, data_dir)
  found = places.version_dirs(root, name)
  if not found:
    raise FileNotFoundError(
      f"data.name={name!r}: {places.absence(name, origin, root)} "
      f"{how_to_get(name, root)}"
    )
  description = _read_json(found[-1] / "dataset_info.json", name, root)
  _read_json(found[-1] / "features.json", name, root)
  if description.get("name") != name:
    raise ValueError(
      f"data.name={name!r}: {found[-1]} holds {description.get('name')!r}; "
      f"{_again(name, found[-1])}"
    )
  return found[-1]


def open_builder(
  name: str, version_dir: pathlib.Path, splits: collections.abc.Iterable[str]
) -> typing.Any:
  """Opens a prepared data set and checks that its splits can be read.

  Args:
    name: of the data set.
    version_dir: what `find` returned.
    splits: the names of the splits that must be there.

  Returns:
    A read-only tfds builder: made from the folder, not by name, so that it
    cannot download. `builder.as_data_source(split)` reads a split.

  Raises:
    FileNotFoundError: a split or one of its files is not there.
    ValueError: the files are not in array_record format, or their description
      is wrong.
    ModuleNotFoundError: tensorflow_datasets or array_record is not installed.
  """
  user = f"data.name={name!r}"
  tfds = require("tensorflow_datasets", user)
  require("array_record", user)
  try:
    builder = tfds.builder_from_directory(version_dir)
  except (KeyError, TypeError, ValueError, *_protobuf_errors()) as error:
    raise ValueError(
      f"data.name={name!r}: the description in {version_dir} is wrong "
      f"({' '.join(str(error).split())}); {_again(name, version_dir)}"
    ) from error
  _check_files(builder, name, version_dir, splits)
  return builder


@contextlib.contextmanager
def one_line_if_damaged(
  name: str, version_dir: pathlib.Path
) -> collections.abc.Iterator[None]:
  """Turns array_record's error over a damaged file into one that helps.

  Args:
    name: of the data set.
    version_dir: what `find` returned.

  Yields:
    Nothing: read inside the `with`.

  Raises:
    DataError: in place of its RuntimeError, or of protobuf's error over a
      record, in one line with the remedy.
  """
  try:
    yield
  except (RuntimeError, *_protobuf_errors()) as error:
    reason = " ".join(str(error).split(";")[0].split())
    raise DataError(
      f"data.name={name!r}: a file in {version_dir} is damaged ({reason}); "
      f"{_again(name, version_dir)}"
    ) from error


def _protobuf_errors() -> tuple[type[Exception], ...]:
  """What is raised on bytes that are no example, and on a wrong description.

  Only a module that is loaded can have raised it.
  """
  names = ("google.protobuf.message", "google.protobuf.json_format")
  return tuple(sys.modules[n].Error for n in names if n in sys.modules)


class Records:
  """The examples of a prepared split, by random access, undecoded.

  Opened at the first access, in every process anew: pickling one carries its
  address alone. Threads may share one.
  """

  def __init__(
    self,
    name: str,
    version_dir: pathlib.Path,
    split: str,
    *,
    encoded: str = "image",
  ):
    """Describes the split; opens nothing.

    Args:
      name: of the data set.
      version_dir: what `find` returned.
      split: a split that `open_builder` has checked.
      encoded: the feature to leave as bytes.
    """
    self._name = name
    self._version_dir = version_dir
    self._split = split
    self._encoded = encoded
    self._source = None
    self._lock = threading.Lock()

  def __getstate__(self) -> dict[str, typing.Any]:
    return self.__dict__ | {"_source": None, "_lock": None}

  def __setstate__(self, state: dict[str, typing.Any]) -> None:
    self.__dict__.update(state)
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self._open())

  def __getitem__(self, index: int) -> dict[str, typing.Any]:
    with one_line_if_damaged(self._name, self._version_dir):
      return self._open()[index]

  def __getitems__(
    self, indices: collections.abc.Sequence[int]
  ) -> collections.abc.Sequence[dict[str, typing.Any]]:
    """Returns several examples."""
    with one_line_if_damaged(self._name, self._version_dir):
      return self._open().__getitems__(list(indices))

  def _open(self) -> typing.Any:
    with self._lock:
      if self._source is None:
        self._source = self._new_source()
      return self._source

  def _new_source(self) -> typing.Any:
    try:
      builder = open_builder(self._name, self._version_dir, [self._split])
    except FileNotFoundError as error:  # gone since the split was checked
      raise DataError(" ".join(str(error).split())) from error
    decode = importlib.import_module("tensorflow_datasets").decode
    _allow_open_files(len(builder.info.splits[self._split].filepaths))
    return builder.as_data_source(
      self._split, decoders={self._encoded: decode.SkipDecoding()}
    )


def in_order(
  records: collections.abc.Sequence[dict[str, typing.Any]],
) -> collections.abc.Iterator[dict[str, typing.Any]]:
  """Iterates over records that have `__getitems__`, in blocks."""
  for start in range(0, len(records), _RECORDS_PER_READ):
    stop = min(start + _RECORDS_PER_READ, len(records))
    yield from records.__getitems__(range(start, stop))


def how_to_get(name: str, folder: str | os.PathLike[str]) -> str:
  """Returns the command that prepares a data set, as a part of an error."""
  imports = "import tensorflow_datasets as tfds"
  if name in text_files.CORPORA:
    imports += f", {_TEXT_BUILDERS}"
  return (
    _BY_HAND.get(name, "").format(folder=folder)
    + "prepare it once, which needs TensorFlow: python -c "
    f"\"{imports}; tfds.builder('{name}', "
    f"file_format='array_record', data_dir='{folder}')"
    '.download_and_prepare()" and name that folder by data.dir '
    "(--config.data.dir, or --data_dir) or TFDS_DATA_DIR"
  )


def _again(name: str, version_dir: pathlib.Path) -> str:
  # tfds takes an incomplete folder for a prepared one, so it has to go.
  return f"remove {version_dir} and {how_to_get(name, version_dir.parents[1])}"


def _read_json(
  path: pathlib.Path, name: str, root: pathlib.Path
) -> dict[str, typing.Any]:
  remedy = f"remove {path.parent} and {how_to_get(name, root)}"
  if not path.is_file():
    raise FileNotFoundError(f"data.name={name!r}: {path} is missing; {remedy}")
  try:
    content = json.loads(path.read_text("utf-8"))
  except ValueError as error:
    raise ValueError(
      f"data.name={name!r}: {path} is not JSON; {remedy}"
    ) from error
  except OSError as error:
    raise ValueError(
      f"data.name={name!r}: {path} cannot be read ({error.strerror}); {remedy}"
    ) from error
  if not isinstance(content, dict):
    raise ValueError(f"data.name={name!r}: {path} is no description; {remedy}")
  return content


def _check_files(
  builder: typing.Any,
  name: str,
  version_dir: pathlib.Path,
  splits: collections.abc.Iterable[str],
) -> None:
  """Checks format and presence of every file that the splits need."""
  formats = {item.value for item in builder.info.available_file_formats()}
  if "array_record" not in formats:
    raise ValueError(
      f"data.name={name!r}: {version_dir} is in {'/'.join(sorted(formats))} "
      "format, which cannot be read here; beside it, in another folder DIR, "
      f"{how_to_get(name, 'DIR')}"
    )
  builder.info.set_file_format(
    "array_record", override=True, override_if_initialized=True
  )
  for split in splits:
    if split not in builder.info.splits:
      raise FileNotFoundError(
        f"data.name={name!r}: {version_dir} has no split {split!r}; "
        f"{_again(name, version_dir)}"
      )
    for path in builder.info.splits[split].filepaths:
      if not os.path.isfile(path):
        raise FileNotFoundError(
          f"data.name={name!r}: {path} is missing; {_again(name, version_dir)}"
        )


def _allow_open_files(count: int) -> None:
  """Raises this process's limit of open files where a split needs more.

  array_record keeps every shard that it has touched open: the 1,024 shards of
  ImageNet's training split are more than the usual soft limit of 1,024 files.
  """
  try:
    resource = importlib.import_module("resource")
  except ModuleNotFoundError:  # not a Unix system: no such limit
    return
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  unlimited = resource.RLIM_INFINITY
  needed = count + 1024  # beside the shards: sockets, logs, libraries
  if soft == unlimited or soft >= needed:
    return
  wanted = needed if hard == unlimited else min(needed, hard)
  resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
