"""Corpora from text files: counts, numbering, and what goes wrong."""

import dataclasses
import gzip
import hashlib
import os
import pathlib
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest

from dpc_jax.data import corpus, text_files

ROOT = pathlib.Path(__file__).parents[2]
# 'b' and 'a' are equally frequent, 'b' is first; '<eos>' as often as they.
TEXT = {
  "train": " b a <unk> \n\n c c c b a c\n",
  "validation": "c new\n",
  "test": "b\n",
}
WORDS = ("c", "<eos>", "b", "a", "<unk>")
NUMBERS = {
  "train": [2, 3, 4, 1, 1, 0, 0, 0, 2, 3, 0, 1],
  "validation": [0, 4, 1],
  "test": [2, 1],
}


def adopt(
  monkeypatch,
  name: str,
  files: dict[str, bytes],
  tokens=None,
  words: int = len(WORDS),
):
  """Makes other files the canonical ones of a corpus."""
  sums = {
    s: hashlib.sha256(content).hexdigest() for s, content in files.items()
  }
  replaced = dataclasses.replace(
    text_files.CORPORA[name],
    algorithm="sha256",
    checksums=sums,
    tokens={split: len(ids) for split, ids in (tokens or NUMBERS).items()},
    words=words,
  )
  monkeypatch.setitem(text_files.CORPORA, name, replaced)


def write(
  folder: pathlib.Path, pattern: str, files: dict[str, bytes]
) -> dict[str, pathlib.Path]:
  folder.mkdir(parents=True, exist_ok=True)
  paths = {}
  for split, content in files.items():
    path = folder / pattern.format(split.removesuffix("ation"))
    paths[split] = path
    path.write_bytes(
      gzip.compress(content) if path.suffix == ".gz" else content
    )
  return paths


def encoded(text: dict[str, str]) -> dict[str, bytes]:
  return {split: lines.encode() for split, lines in text.items()}


@pytest.fixture
def small(monkeypatch, tmp_path):
  """A tiny PTB, gzipped: (data_dir, {split: path})."""
  adopt(monkeypatch, "ptb", encoded(TEXT))
  return tmp_path, write(tmp_path / "ptb", "ptb.{}.txt.gz", encoded(TEXT))


def one_line(info) -> str:
  message = str(info.value)
  assert "\n" not in message
  return message


def check_form(data: corpus.TextData) -> None:
  assert list(data.splits) == ["train", "validation", "test"]
  assert data.num_classes == len(data.vocabulary) == len(set(data.vocabulary))
  assert data.vocabulary[data.eos] == "<eos>"
  for tokens in data.splits.values():
    assert tokens.dtype == np.int32
    assert tokens.ndim == 1
    assert tokens.min() >= 0
    assert tokens.max() < data.num_classes
    assert tokens[-1] == data.eos
  counts = np.bincount(data.splits["train"], minlength=data.num_classes)
  assert (np.diff(counts) <= 0).all()
  assert counts[-1] > 0
  firsts = np.unique(data.splits["train"], return_index=True)[1]
  assert (np.diff(firsts)[np.diff(counts) == 0] > 0).all()


@pytest.mark.parametrize(
  ("name", "tokens", "words"),
  [
    ("ptb", (929589, 73760, 82430), 10000),
    ("wikitext2", (2088628, 217646, 245569), 33278),
  ],
)
def test_published_counts(shared_data, name, tokens, words):
  data = corpus.load(name, data_dir=shared_data)
  check_form(data)
  assert tuple(len(split) for split in data.splits.values()) == tokens
  assert data.num_classes == words
  for split, path in text_files.find(
    name, text_files.folders(name, shared_data)
  ).items():
    text = gzip.decompress(path.read_bytes()).decode()
    written = " ".join(data.vocabulary[token] for token in data.splits[split])
    assert written.split() == text.replace("\n", " <eos> ").split()


def test_vocabularies_have_the_published_sizes():
  sizes = {name: known.words for name, known in text_files.CORPORA.items()}
  assert sizes == {"ptb": 10000, "wikitext2": 33278, "wikitext103": 267735}


def test_numbers_are_ranks(small):
  data = corpus.load("ptb", data_dir=small[0])
  check_form(data)
  assert data.vocabulary == WORDS
  assert {s: t.tolist() for s, t in data.splits.items()} == NUMBERS
  assert data.eos == 1


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
  ("name", "place"),
  [
    ("ptb", "ptb/ptb.{}.txt"),
    ("ptb", "ptb/{}.txt"),
    ("wikitext2", "wikitext2/wiki.{}.tokens"),
    ("wikitext2", "wikitext-2/{}.txt"),
    ("wikitext103", "wikitext103/{}.txt"),
    ("wikitext103", "wikitext-103/wiki.{}.tokens"),
  ],
)
def test_files_are_found(monkeypatch, tmp_path, name, place, ending):
  adopt(monkeypatch, name, encoded(TEXT))
  write(
    tmp_path / pathlib.Path(place).parent,
    pathlib.Path(place).name + ending,
    encoded(TEXT),
  )
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  assert corpus.load(name).vocabulary == WORDS


def test_lines_end_as_in_python_text_files(monkeypatch, tmp_path):
  # Unicode's other separators part words and no lines.
  files = encoded(
    {
      "train": "a\u2028b\r\na\x85<unk>\ra\x0cc",
      "validation": "a\n",
      "test": "b\n",
    }
  )
  tokens = {"train": [0] * 9, "validation": [0] * 2, "test": [0] * 2}
  adopt(monkeypatch, "ptb", files, tokens)
  write(tmp_path / "ptb", "{}.txt", files)
  data = corpus.load("ptb", data_dir=tmp_path)
  words = [data.vocabulary[token] for token in data.splits["train"]]
  assert " ".join(words) == "a b <eos> a <unk> <eos> a c <eos>"


def _load_error(small, kind=ValueError) -> str:
  with pytest.raises(kind) as info:
    corpus.load("ptb", data_dir=small[0])
  return one_line(info)


@pytest.mark.parametrize(
  ("damage", "reason"),
  [
    (lambda packed: packed[:-9], "is damaged (Compressed file ended"),
    (lambda packed: b"plain text", "is damaged (Not a gzipped file"),
    (lambda packed: packed[:-8] + bytes(8), "is damaged (CRC check failed"),
    (lambda packed: b"", "is empty"),
    (lambda packed: gzip.compress(b"\n \n"), "is empty"),
    (lambda packed: gzip.compress(b"a\n\xff\xfe"), "is not UTF-8 text"),
    (lambda packed: gzip.compress(bytes(9)), "is not the validation split"),
    (lambda packed: gzip.compress(b"b a\n"), "is not the validation split of"),
  ],
)
def test_bad_file_is_named_with_its_remedy(small, damage, reason):
  path = small[1]["validation"]
  path.write_bytes(damage(path.read_bytes()))
  message = _load_error(small)
  assert f"{path} {reason}" in message
  assert "replace it by the one from https://" in message
  assert "ptb.valid.txt" in message


def test_file_that_cannot_be_read_is_named(small, monkeypatch):
  path = small[1]["validation"]

  def refuse(*args, **kwargs):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(text_files.gzip, "open", refuse)
  message = _load_error(small)
  assert "ptb.train.txt.gz cannot be read (Permission denied)" in message
  assert path.exists()


def test_prepared_line_that_is_no_text_is_named(small, monkeypatch):
  records = [{"text": b"a"}, {"text": b"\xff\x00"}]

  class Records:
    def __init__(self, *args, **kwargs):
      pass

    def __len__(self):
      return len(records)

    def __getitems__(self, indices):
      return [records[i] for i in indices]

  monkeypatch.setattr(corpus.prepared, "Records", Records)
  with pytest.raises(corpus.prepared.DataError) as info:
    list(corpus._texts("ptb", small[0], "train"))
  message = one_line(info)
  assert "data.name='ptb': line 1 of tfds' split 'train'" in message
  assert "is not UTF-8 text (invalid start byte); prepare" in message


def test_missing_split_is_named(small):
  small[1]["validation"].unlink()
  message = _load_error(small, FileNotFoundError)
  assert f"{small[0] / 'ptb'} holds other files of it" in message
  assert "neither ptb.valid.txt nor ptb.valid.txt.gz" in message
  assert "get it from https://" in message


def test_wrong_count_is_named(small, monkeypatch):
  adopt(monkeypatch, "ptb", encoded(TEXT), NUMBERS | {"test": [0] * 3})
  assert "test has 2 tokens instead of 3" in _load_error(small)
  adopt(monkeypatch, "ptb", encoded(TEXT), words=6)
  message = _load_error(small)
  assert "train has 5 different words instead of 6; " in message


def test_word_that_train_lacks_needs_unk(monkeypatch, tmp_path):
  files = encoded(TEXT | {"train": "a b c\n"})
  adopt(monkeypatch, "ptb", files)
  write(tmp_path / "ptb", "{}.txt", files)
  message = _load_error((tmp_path,))
  assert "validation has the word 'new', which train lacks" in message
  assert "'<unk>'" in message


def test_unknown_name_lists_the_known():
  with pytest.raises(ValueError, match="'c4'") as info:
    corpus.load("c4")
  assert "ptb, wikitext103, wikitext2" in one_line(info)
  with pytest.raises(ValueError, match="'c4'"):
    corpus.load("c4", fake=True)


@pytest.mark.parametrize("name", ["ptb", "wikitext2", "wikitext103"])
def test_missing_corpus_ends_at_once(tmp_path, name):
  start = time.perf_counter()
  with pytest.raises(FileNotFoundError, match=f"'{name}'") as info:
    corpus.load(name, data_dir=tmp_path)
  assert time.perf_counter() - start < 2
  message = one_line(info)
  for part in (
    f"into {tmp_path / name}",
    "dpc_jax.data.text; ",
    f"tfds.builder('{name}'",
    "(--config.data.dir, or --data_dir) or TFDS_DATA_DIR",
  ):
    assert part in message


def test_folder_on_the_net_is_refused():
  with pytest.raises(ValueError, match="gs://bucket"):
    corpus.load("ptb", data_dir="gs://bucket")


def test_fake_corpus_is_one_and_the_same(tmp_path):
  data = corpus.load("ptb", data_dir=tmp_path, fake=True)
  check_form(data)
  assert 4000 < len(data.splits["train"]) < 10000
  assert 200 < data.num_classes < 500
  assert "<unk>" in data.vocabulary
  for split, tokens in corpus.load("wikitext103", fake=True).splits.items():
    np.testing.assert_array_equal(tokens, data.splits[split])
  assert not np.array_equal(
    data.splits["validation"][:500], data.splits["test"][:500]
  )
  counts = np.bincount(data.splits["train"])
  # Far from uniform, as words are.
  assert counts[:30].sum() > 0.4 * counts.sum()


def test_fake_corpus_can_be_learned():
  data = corpus.load("ptb", fake=True)
  train, test = data.splits["train"], data.splits["test"]
  words = data.num_classes
  single = (np.bincount(train, minlength=words) + 1) / (len(train) + words)
  pairs = np.zeros((words, words))
  np.add.at(pairs, (train[:-1], train[1:]), 1)
  # Dirichlet smoothing by the frequencies of words.
  double = (pairs + 5 * single) / (pairs.sum(1, keepdims=True) + 5)
  loss = -np.log(single[test[1:]]).mean()
  better = -np.log(double[test[:-1], test[1:]]).mean()
  assert loss < 0.95 * np.log(words)
  assert better < loss - 0.4


def test_memory_is_that_of_the_result(monkeypatch):
  monkeypatch.setattr(corpus, "_TOKENS_PER_CHUNK", 2**13)
  count = 400_000
  line = " ".join(f"w{i}" for i in range(999))
  tracemalloc.start()
  try:
    data = corpus._number(
      "ptb",
      {
        "train": (line for _ in range(count // 1000)),
        "validation": [],
        "test": [],
      },
    )
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert len(data.splits["train"]) == count
  assert peak < 5.5 * count


# Runs in a fresh interpreter that has none of the optional packages and whose
# sockets refuse to connect.
BARE = """
import socket, sys
def refuse(*args, **kwargs):
  raise OSError("no network here")
socket.socket.connect = socket.getaddrinfo = refuse
for name in ("tensorflow", "tensorflow_datasets", "grain", "array_record"):
  sys.modules[name] = None
"""


def bare(code: str, *args: str) -> str:
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", BARE + code, *args],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert (done.returncode, done.stderr) == (0, "")
  return done.stdout


def test_plain_files_need_numpy_alone(shared_data):
  out = bare(
    """
from dpc_jax.data import corpus
print(len(corpus.load("ptb", data_dir=sys.argv[1]).splits["test"]))
print(corpus.load("ptb", fake=True).num_classes)
try:
  corpus.load("ptb", data_dir="/nowhere")
except FileNotFoundError:
  print("missing")
try:
  from dpc_jax.data import text
except ModuleNotFoundError as error:
  print(error)
""",
    str(shared_data),
  )
  assert out.splitlines() == [
    "82430",
    "301",
    "missing",
    "dpc_jax.data.text needs the package tensorflow_datasets, which is not "
    "installed: pip install tensorflow-datasets",
  ]
