"""Word-level corpora, whole in memory: PTB, WikiText-2 and WikiText-103.

Read without TensorFlow and without a connection, from what the builders of
`dpc_jax.data.text` have prepared or from the plain text files; both give the
same arrays.
"""

import array
import collections
import collections.abc
import dataclasses
import itertools
import os
import pathlib

import numpy as np

from dpc_jax.data import places, prepared, text_files

EOS = "<eos>"
UNK = "<unk>"

_TOKENS_PER_CHUNK = 2**18

# The synthetic corpus: words, lines of each split, and how often a word is
# followed by its successor.
_FAKE_WORDS = 300
_FAKE_LINES = {"train": 400, "validation": 60, "test": 60}
_FAKE_BOND = 0.6
_FAKE_SEED = 1910355


@dataclasses.dataclass(frozen=True, eq=False)
class TextData:
  """A corpus as word numbers.

  Attributes:
    splits: 'train', 'validation' and 'test': int32 (N,), in
      [0, num_classes), in the order of the text, `eos` at each line's end.
    num_classes: words of the vocabulary.
    vocabulary: the word of each number, the most frequent first.
  """

  splits: dict[str, np.ndarray]
  num_classes: int
  vocabulary: tuple[str, ...]

  @property
  def eos(self) -> int:
    """The number of '<eos>', which ends every line."""
    return self.vocabulary.index(EOS)


def known() -> tuple[str, ...]:
  """Returns the names that `load` accepts, sorted."""
  return tuple(sorted(text_files.CORPORA))


def load(
  name: str,
  *,
  data_dir: str | os.PathLike[str] | None = None,
  fake: bool = False,
) -> TextData:
  """Loads a corpus, one number per word and one per end of line.

  A line, empty ones too, is split at white space and ends in '<eos>': this is
  how the published perplexities count tokens. The vocabulary is that of
  'train' alone, '<eos>' included, numbered by descending frequency, of equals
  the first to appear first. A word that 'train' lacks becomes '<unk>'.

  Prepared files in array_record format come first, DIR/ptb/1.0.0; without
  them plain ones, each perhaps with .gz: DIR/ptb/ptb.{train,valid,test}.txt,
  DIR/wikitext2/wiki.{train,valid,test}.tokens, or {train,valid,test}.txt in
  either; folders may also be called wikitext-2 and wikitext-103. Plain files
  are checked by their checksum, and both by their number of tokens and words.

  Lines are read one at a time and numbered in place, so that memory is little
  more than the result's 4 bytes per token. WikiText-2 fifty times over, 104 M
  tokens as in WikiText-103, took 28 s from plain files and 103 s from prepared
  ones on one CPU core, and 0.4 and 0.55 GB.

  Args:
    name: one of `known()`.
    data_dir: the folder DIR; None takes TFDS_DATA_DIR or else tfds' default,
      ~/tensorflow_datasets.
    fake: a small synthetic corpus in its place, the same for every name and
      on every call; it reads no file.

  Returns:
    The corpus.

  Raises:
    ValueError: an unknown name, a file that is not the canonical one or is
      damaged (`prepared.DataError` if a shard), or prepared data in another
      format than array_record.
    FileNotFoundError: the corpus, or a part of it, is not in the folder.
    ModuleNotFoundError: tensorflow_datasets or array_record is not installed;
      plain files need neither.
  """
  if name not in text_files.CORPORA:
    raise ValueError(
      f"data.name={name!r} is unknown; choose one of {', '.join(known())}"
    )
  if fake:
    lines = {split: _fake_lines(split) for split in text_files.SPLITS}
    return _number(name, lines)
  return _read(name, data_dir)


def _read(name: str, data_dir: str | os.PathLike[str] | None) -> TextData:
  """Reads prepared or plain files, and checks the numbers of tokens, words."""
  origin, root = places.data_root(name, data_dir)
  if places.version_dirs(root, name):
    folder = prepared.find(name, data_dir)
    data = _number(name, _prepared_lines(name, folder))
    remedy = f"remove {folder} and {prepared.how_to_get(name, root)}"
  else:
    data = _number(name, _plain_lines(name, origin, root))
    remedy = "its files have the right checksums, so please report this"
  known_as = text_files.CORPORA[name]
  for split, count in known_as.tokens.items():
    if len(data.splits[split]) != count:
      raise ValueError(
        f"data.name={name!r}: {split} has {len(data.splits[split])} tokens "
        f"instead of {count}; {remedy}"
      )
  if data.num_classes != known_as.words:
    raise ValueError(
      f"data.name={name!r}: train has {data.num_classes} different words "
      f"instead of {known_as.words}; {remedy}"
    )
  return data


def _plain_lines(
  name: str, origin: str, root: pathlib.Path
) -> dict[str, collections.abc.Iterator[str]]:
  folders = text_files.folders(name, root)
  paths = text_files.find(name, folders)
  if paths is None:
    files = text_files.CORPORA[name].patterns[0].format("{train,valid,test}")
    wrong = places.wrong_folder(origin, root)
    absent = f"neither a prepared {name} nor text files in {root} ({origin})"
    raise FileNotFoundError(
      f"data.name={name!r}: {wrong or absent}; "
      f"put {files}, plain or with .gz, into {folders[0]}, or "
      f"{prepared.how_to_get(name, root)}"
    )
  for split, path in paths.items():
    text_files.check(name, split, path)
  return {split: text_files.lines(path) for split, path in paths.items()}


def _prepared_lines(
  name: str, folder: pathlib.Path
) -> dict[str, collections.abc.Iterator[str]]:
  prepared.open_builder(name, folder, text_files.SPLITS)
  return {split: _texts(name, folder, split) for split in text_files.SPLITS}


def _texts(
  name: str, folder: pathlib.Path, split: str
) -> collections.abc.Iterator[str]:
  records = prepared.Records(name, folder, split, encoded="text")
  for row, record in enumerate(prepared.in_order(records)):
    try:
      yield record["text"].decode()
    except UnicodeDecodeError as error:
      raise prepared.DataError(
        f"data.name={name!r}: line {row} of tfds' split {split!r} in {folder}"
        f" is not UTF-8 text ({error.reason}); prepare the data set anew"
      ) from error


def _number(
  name: str, lines: dict[str, collections.abc.Iterable[str]]
) -> TextData:
  """Numbers the words of all splits by the vocabulary of 'train'."""
  places = collections.defaultdict(int)
  places.default_factory = places.__len__  # a new word gets the next place
  train = _collect(lines["train"], places)
  ids = _rank(train, len(places))
  words = list(places)
  vocabulary = tuple(words[place] for place in np.argsort(ids))
  numbers = dict(zip(vocabulary, itertools.count()))
  if UNK in numbers:
    unknown = numbers[UNK]
    numbers = collections.defaultdict(lambda: unknown, numbers)
  splits = {"train": train}
  for split in ("validation", "test"):
    try:
      splits[split] = _collect(lines[split], numbers)
    except KeyError as error:
      raise ValueError(
        f"data.name={name!r}: {split} has the word {error}, which train lacks, "
        f"and train has no {UNK!r} to stand for it; add a line with {UNK} to it"
      ) from error
  return TextData(splits, len(vocabulary), vocabulary)


def _collect(
  lines: collections.abc.Iterable[str], numbers: dict[str, int]
) -> np.ndarray:
  """Returns the number of every word and line end, int32 (N,)."""
  number = numbers.__getitem__
  tokens = array.array("i")
  for line in lines:
    tokens.extend(map(number, line.split()))
    tokens.append(number(EOS))
  return np.asarray(tokens)  # the same memory


def _rank(tokens: np.ndarray, words: int) -> np.ndarray:
  """Renumbers tokens in place by descending frequency.

  Args:
    tokens: int32 (N,), numbered by first appearance.
    words: how many different ones there are.

  Returns:
    The new number of each old one, int32 (words,).
  """
  # In chunks: bincount makes int64 of all that it is given.
  chunks = [
    tokens[start : start + _TOKENS_PER_CHUNK]
    for start in range(0, len(tokens), _TOKENS_PER_CHUNK)
  ]
  counts = np.zeros(words, np.int64)
  for chunk in chunks:
    counts += np.bincount(chunk, minlength=words)
  ids = np.empty(words, np.int32)
  ids[np.argsort(-counts, kind="stable")] = np.arange(words)
  for chunk in chunks:
    chunk[:] = ids[chunk]
  return ids


def _fake_lines(split: str) -> collections.abc.Iterator[str]:
  """Makes up text that a model can learn.

  Half the words and more are followed by the one successor that each has; the
  others are drawn by Zipf's law. Every split has its own text over the same
  words and successors.
  """
  # RandomState's stream is frozen for good (NEP 19), Generator's is not.
  successors = np.random.RandomState(_FAKE_SEED).permutation(_FAKE_WORDS)
  number = text_files.SPLITS.index(split)
  random = np.random.RandomState(_FAKE_SEED + 1 + number)
  shares = 1 / np.arange(1, _FAKE_WORDS + 1)
  words = [f"word{place}" for place in range(_FAKE_WORDS)]
  words[_FAKE_WORDS // 10] = UNK
  for _ in range(_FAKE_LINES[split]):
    places = random.choice(
      _FAKE_WORDS, random.randint(5, 25), p=shares / shares.sum()
    )
    for place in range(1, len(places)):
      if random.random_sample() < _FAKE_BOND:
        places[place] = successors[places[place - 1]]
    yield " ".join(words[place] for place in places)
