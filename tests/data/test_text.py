"""tfds builders: what they prepare, from where, and what goes wrong.

The net is a web server on this machine; the true addresses were not tried.
"""

import contextlib
import dataclasses
import functools
import hashlib
import http.server
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest

from dpc_jax.data import corpus, prepared, text_files

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")

ROOT = pathlib.Path(__file__).parents[2]
TEXT = {
  "train": " b a <unk> \n\n c c c \u00e9\u2028a c\n".encode() * 40,
  "validation": b"c new\n\nb\n",
  "test": b"b\n \na a\n",
}
TOKENS = {"train": 12 * 40, "validation": 6, "test": 6}
NAMES = {"train": "train", "validation": "valid", "test": "test"}


def write(folder: pathlib.Path, pattern: str) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  for split, content in TEXT.items():
    (folder / pattern.format(NAMES[split])).write_bytes(content)


@pytest.fixture
def small(monkeypatch):
  """Makes a tiny text the canonical one of every corpus."""
  sums = {
    split: hashlib.sha256(text).hexdigest() for split, text in TEXT.items()
  }
  for name, known in text_files.CORPORA.items():
    changed = dataclasses.replace(
      known, algorithm="sha256", checksums=sums, tokens=TOKENS, words=6
    )
    monkeypatch.setitem(text_files.CORPORA, name, changed)


@contextlib.contextmanager
def served(folder: pathlib.Path):
  """Serves a folder at the address that it yields."""

  class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
      del args

  server = http.server.ThreadingHTTPServer(
    ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
  )
  thread = threading.Thread(target=server.serve_forever, args=(0.02,))
  thread.start()
  try:
    yield f"http://127.0.0.1:{server.server_port}"
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def no_proxy(monkeypatch):
  for name in ("http_proxy", "https_proxy", "all_proxy"):
    monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(name.upper(), raising=False)


def refuse(*args, **kwargs):
  raise OSError("no network here")


def prepare(name, data_dir, manual_dir=None, **config):
  from dpc_jax.data import text  # noqa: F401  registers the builders

  builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(
      manual_dir=manual_dir, **config
    )
  )
  return builder


def assert_same(left: corpus.TextData, right: corpus.TextData) -> None:
  assert left.vocabulary == right.vocabulary
  assert left.splits.keys() == right.splits.keys()
  for split, tokens in left.splits.items():
    np.testing.assert_array_equal(tokens, right.splits[split])
    assert tokens.dtype == right.splits[split].dtype


def one_line(info) -> str:
  message = str(info.value)
  assert "\n" not in message
  return message


@pytest.mark.parametrize("name", ["ptb", "wikitext2"])
def test_real_text_is_prepared_as_it_is(shared_data, tmp_path, name):
  folder = text_files.folders(name, shared_data)[-1]
  builder = prepare(name, tmp_path, folder)
  plain = corpus.load(name, data_dir=shared_data)
  assert_same(corpus.load(name, data_dir=tmp_path), plain)
  assert set(builder.info.splits) == {"train", "validation", "test"}
  paths = text_files.find(name, [folder])
  source = builder.as_data_source("validation")
  lines = [record["text"].decode() for record in source]
  assert lines == list(text_files.lines(paths["validation"]))


def test_reading_needs_no_tensorflow(small, tmp_path):
  write(tmp_path / "ptb", "{}.txt")
  prepare("ptb", tmp_path / "data", tmp_path)
  stub = tmp_path / "stub"
  stub.mkdir()
  (stub / "tensorflow.py").write_text("raise ImportError('no TensorFlow')\n")
  code = """
import sys
from dpc_jax.data import corpus, prepared
folder = prepared.find("ptb", sys.argv[1])
lines = corpus._prepared_lines("ptb", folder)
print({split: len(list(part)) for split, part in lines.items()})
"""
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", code, str(tmp_path / "data")],
    env={
      **os.environ,
      "PYTHONPATH": f"{stub}{os.pathsep}{ROOT}",
      "JAX_PLATFORMS": "cpu",
    },
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == "{'train': 120, 'validation': 3, 'test': 3}\n"


def test_order_holds_over_blocks_and_shards(small, monkeypatch, tmp_path):
  monkeypatch.setattr(prepared, "_RECORDS_PER_READ", 7)
  write(tmp_path / "ptb", "{}.txt")
  builder = prepare("ptb", tmp_path / "data", tmp_path, num_shards=3)
  assert builder.info.splits["train"].num_shards == 3
  assert_same(
    corpus.load("ptb", data_dir=tmp_path / "data"),
    corpus.load("ptb", data_dir=tmp_path),
  )


def test_checksums_are_those_of_the_files_and_addresses():
  from dpc_jax.data import text

  for builder in (text.Ptb, text.WikiText2, text.WikiText103):
    known = text_files.CORPORA[builder.name]
    assert set(known.urls.values()) <= builder.url_infos.keys()
  known = text_files.CORPORA["ptb"]
  for split, url in known.urls.items():
    assert text.Ptb.url_infos[url].checksum == known.checksums[split]


@pytest.mark.parametrize("damage", ["wrong", "gone"])
def test_bad_manual_file_ends_before_anything_is_written(
  small, tmp_path, damage
):
  write(tmp_path / "manual", "ptb.{}.txt")
  path = tmp_path / "manual" / "ptb.test.txt"
  if damage == "wrong":
    path.write_bytes(b"\xff")
    kind, reason = ValueError, f"{path} is not UTF-8 text"
  else:
    path.unlink()
    kind, reason = FileNotFoundError, "neither ptb.test.txt nor"
  with pytest.raises(kind) as info:
    prepare("ptb", tmp_path / "data", tmp_path / "manual")
  assert reason in one_line(info)
  assert not list((tmp_path / "data").rglob("*.array_record*"))


def test_a_part_of_the_corpus_is_refused(small, tmp_path):
  write(tmp_path / "ptb", "{}.txt")
  prepare("ptb", tmp_path / "data", tmp_path, max_examples_per_split=2)
  with pytest.raises(ValueError, match="train has 5 tokens instead of") as info:
    corpus.load("ptb", data_dir=tmp_path / "data")
  folder = tmp_path / "data" / "ptb" / "1.0.0"
  assert f"remove {folder} and prepare it once" in one_line(info)
  shard = next(folder.glob("ptb-train.array_record*"))
  shard.write_bytes(shard.read_bytes()[:50])
  with pytest.raises(prepared.DataError, match="is damaged") as info:
    corpus.load("ptb", data_dir=tmp_path / "data")
  assert f"remove {folder} and" in one_line(info)
  shard.unlink()
  with pytest.raises(FileNotFoundError, match="is missing") as info:
    corpus.load("ptb", data_dir=tmp_path / "data")
  one_line(info)


@pytest.fixture
def net(small, no_proxy, monkeypatch, tmp_path):
  """What the builders download, on this machine: (builders, folder)."""
  from dpc_jax.data import text

  folder = tmp_path / "net"
  write(folder, "ptb.{}.txt")
  for size in ("2", "103"):
    with zipfile.ZipFile(folder / f"wikitext-{size}-v1.zip", "w") as archive:
      for split, content in TEXT.items():
        inside = f"wikitext-{size}/wiki.{NAMES[split]}.tokens"
        archive.writestr(inside, content)
  with served(folder) as address:
    for builder in (text.Ptb, text.WikiText2, text.WikiText103):
      known = text_files.CORPORA[builder.name]
      urls = {
        split: f"{address}/{url.rpartition('/')[2]}"
        for split, url in known.urls.items()
      }
      changed = dataclasses.replace(known, urls=urls)
      monkeypatch.setitem(text_files.CORPORA, builder.name, changed)
      infos = {}
      for url in urls.values():
        file = folder / url.rpartition("/")[2]
        infos[url] = tfds.core.download.checksums.compute_url_info(file)
      monkeypatch.setattr(builder, "url_infos", infos)
    yield folder


@pytest.mark.parametrize("name", ["ptb", "wikitext2", "wikitext103"])
def test_downloads_are_prepared(net, monkeypatch, tmp_path, name):
  write(tmp_path / "plain" / name, "{}.txt")
  prepare(name, tmp_path / "data")
  data = corpus.load(name, data_dir=tmp_path / "data")
  assert_same(data, corpus.load(name, data_dir=tmp_path / "plain"))
  # Again, after the net has gone: tfds keeps what it has downloaded.
  shutil.rmtree(tmp_path / "data" / name)
  shutil.rmtree(net)
  monkeypatch.setattr(socket, "create_connection", refuse)
  prepare(name, tmp_path / "data")
  assert_same(corpus.load(name, data_dir=tmp_path / "data"), data)


def test_a_download_that_is_gone_needs_the_network(net, monkeypatch, tmp_path):
  prepare("ptb", tmp_path / "data")
  shutil.rmtree(tmp_path / "data" / "ptb")
  urls = text_files.CORPORA["ptb"].urls
  for info in (tmp_path / "data" / "downloads").rglob("*.INFO"):
    if urls["test"] in info.read_text():
      info.with_suffix("").unlink()
  monkeypatch.setattr(socket, "create_connection", refuse)
  with pytest.raises(ConnectionError, match="cannot reach") as info:
    prepare("ptb", tmp_path / "data")
  assert urls["test"] in one_line(info)


def test_archive_in_the_manual_directory_is_used(net, tmp_path):
  archive = net / "wikitext-2-v1.zip"
  (tmp_path / "manual").mkdir()
  archive.rename(tmp_path / "manual" / archive.name)
  prepare("wikitext2", tmp_path / "data", tmp_path / "manual")
  corpus.load("wikitext2", data_dir=tmp_path / "data")


@pytest.mark.parametrize("name", ["ptb", "wikitext2"])
def test_wrong_download_is_refused(net, tmp_path, name):
  for path in net.iterdir():
    path.write_bytes(b"a page that says that the file is gone")
  with pytest.raises(ValueError, match="has not the checksum") as info:
    prepare(name, tmp_path / "data")
  assert "manual_dir=DIR" in one_line(info)
  assert not list((tmp_path / "data").rglob("*.array_record*"))


def test_refused_download_says_what_to_do(net, tmp_path):
  (net / "wikitext-2-v1.zip").unlink()
  with pytest.raises(ConnectionError, match="HTTP code: 404") as info:
    prepare("wikitext2", tmp_path / "data")
  assert "manual_dir=DIR" in one_line(info)


@pytest.mark.parametrize("manual", [None, "empty"])
def test_no_network_ends_at_once(
  small, no_proxy, monkeypatch, tmp_path, manual
):
  monkeypatch.setattr(socket, "create_connection", refuse)
  start = time.perf_counter()
  with pytest.raises(ConnectionError) as info:
    prepare("ptb", tmp_path, manual and tmp_path / manual)
  assert time.perf_counter() - start < 10
  message = one_line(info)
  for part in (
    "cannot reach raw.githubusercontent.com (no network here)",
    "manual_dir=DIR",
    text_files.CORPORA["ptb"].urls["train"],
  ):
    assert part in message
