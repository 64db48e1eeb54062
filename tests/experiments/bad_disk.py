"""A folder of what may lie on a disk and be wrong, for `bad_inputs`."""

import gzip
import io
import json
import math
import pathlib
import shutil
from typing import Any

import numpy as np
from array_record.python import array_record_module
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from tests.experiments import summaries

_FEATURES = "tensorflow_datasets.core.features"
_TEXT = "a b c <unk>\n" * 20


def make(disk: pathlib.Path, run: pathlib.Path) -> None:
  """Fills the folder `disk`; `run` is a workdir of seed 0 with a config."""
  (disk / "empty").mkdir(parents=True)
  (disk / "file").write_text("a file\n")
  _recipes(disk)
  _labels(disk)
  _workdirs(disk / "runs", run)
  _image_folders(disk)
  for name, content in {
    "short": _TEXT.encode(),
    "utf8": _TEXT.encode() + b"\xff\xfe\n",
    "nul": _TEXT.encode() + bytes(64) + b"\n",
    "nothing": b"",
  }.items():
    for split in ("train", "valid", "test"):
      _write(disk / name / "ptb" / f"ptb.{split}.txt", content)
  _write(disk / "some" / "ptb" / "ptb.train.txt", _TEXT.encode())
  for split in ("train", "valid", "test"):
    content = gzip.compress(_TEXT.encode())[:-9]
    _write(disk / "gzip" / "ptb" / f"ptb.{split}.txt.gz", content)


def add_saved(disk: pathlib.Path, run: pathlib.Path) -> None:
  """Adds what the programs read that take finished runs.

  Args:
    disk: the folder.
    run: a workdir with a checkpoint, of images.
  """
  shutil.copytree(run, disk / "saved" / "run")
  config = (run / "config.json").read_text()
  for name, changes in {
    "bare": {},
    "cifar10": {"data": {"name": "cifar10"}},
    "holdout": {"data": {"holdout": 300}},
    "text": {
      "data": {"name": "ptb", "fake": True, "holdout": 0, "unroll": 35},
      "model": {"name": "lstm_lm", "width": 8},
    },
    "batch": {"batch_size": 0},
    "types": {"steps": "many"},
  }.items():
    changed = json.loads(config)
    for field, value in changes.items():
      if isinstance(value, dict):
        value = changed.get(field, {}) | value
      changed[field] = value
    _write_run(disk / "saved" / name, json.dumps(changed).encode())
  for name, content in {
    "cut": config.encode()[:100],
    "list": b"[]\n",
    "number": b"3\n",
    "bytes": b"\xff\xfe\x00",
  }.items():
    _write_run(disk / "saved" / name, content)
  _reported(disk / "reported")


def _write_run(folder: pathlib.Path, config: bytes) -> None:
  """A run that has saved nothing yet."""
  _write(folder / "config.json", config)
  (folder / "checkpoints").mkdir()


def _reported(folder: pathlib.Path) -> None:
  """Finished runs, each with one file that is wrong, and grids of them."""
  summary = summaries.made_up("dpc", 0)
  config = {"seed": 0, "precision": {"b_max": 8}}
  metrics = {"step": 1, "split": "test", "relative_cost": 0.5, "accuracy": 0.5}
  move = {"step": 0, "path": "first", "old": None, "new": [8, 8, 8]}
  move["reason"] = "start"
  whole: dict[str, Any] = {
    "summary.json": summary,
    "config.json": config,
    "metrics.jsonl": metrics,
  }
  for name, changes in {
    "summary_cut": {"summary.json": b'{"method": "dp'},
    "summary_list": {"summary.json": []},
    "summary_bytes": {"summary.json": b"\xff\xfe\x00"},
    "summary_empty": {"summary.json": b""},
    "summary_fields": {"summary.json": {"method": "dpc"}},
    "summary_steps": {"summary.json": summary | {"steps": "many"}},
    "summary_metric": {"summary.json": summary | {"metric": "loss"}},
    "summary_nan": {"summary.json": summary | {"test_accuracy": math.nan}},
    "summary_bits": {"summary.json": summary | {"bits": {"first": [17, 8, 8]}}},
    "summary_paths": {"summary.json": summary | {"bits": {"x": [8, 8, 8]}}},
    "summary_layers": {"summary.json": summary | {"layers": []}},
    "config_cut": {"config.json": b'{"seed"'},
    "config_list": {"config.json": []},
    "config_fields": {"config.json": {}},
    "config_types": {"config.json": {"precision": 8}},
    "config_width": {"config.json": {"precision": {"b_max": 99}}},
    "metrics_cut": {"metrics.jsonl": b'{"step"\n{}\n'},
    "metrics_fields": {"metrics.jsonl": {"step": 1}},
    "metrics_types": {"metrics.jsonl": metrics | {"accuracy": "high"}},
    "moves": {"bits.jsonl": move | {"new": 8}},
    "signals": {"bits.jsonl": move, "signals.jsonl": {"step": 1}},
    "signals_paths": {
      "bits.jsonl": move,
      "signals.jsonl": {"step": 1, "signals": {"second": 0.5}},
    },
  }.items():
    _write_files(folder / name, whole | changes)
  for name, field, value in (
    ("data_sets", "dataset", "cifar10"),
    ("lengths", "steps", 9),
  ):
    for method, changes in (("dpc", {}), ("cpt", {field: value})):
      changed = {"summary.json": summary | {"method": method} | changes}
      _write_files(folder / name / method / "seed0", whole | changed)
  _write(folder / "begun" / "dpc" / "seed0" / "config.json", b"{}")
  grid = {f"dpc/seed0/{name}": content for name, content in whole.items()}
  for name, results in {
    "results_cut": b'{"command": "py',
    "results_list": [],
    "results_runs": {"runs": 5},
    "results_failures": {"failures": [{"method": "cpt"}]},
  }.items():
    _write_files(folder / name, grid | {"results.json": results})


def _write_files(folder: pathlib.Path, files: dict[str, Any]) -> None:
  for name, content in files.items():
    if not isinstance(content, bytes):
      content = json.dumps(content).encode()
    _write(folder / name, content)


def snapshot(folder: pathlib.Path) -> dict[str, bytes | None]:
  """{path: content, None of a folder} of all that is below `folder`."""
  return {
    str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
    for path in folder.rglob("*")
    if "__pycache__" not in path.parts
  }


def _write(path: pathlib.Path, content: bytes) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content)


def _recipes(disk: pathlib.Path) -> None:
  for name, text in {
    "syntax": "def get_config(:\n",
    "raises": "def get_config():\n  return {}['lr']\n",
    "asserts": "def get_config():\n  assert False, 'too large'\n",
    "number": "def get_config():\n  return 3\n",
    "none": "def get_config():\n  pass\n",
    "empty": "",
    "bare": (
      "import ml_collections\n"
      "def get_config():\n  return ml_collections.ConfigDict({'steps': 3})\n"
    ),
    "typo": (
      "from configs import default\n"
      "def get_config():\n"
      "  config = default.get_config()\n"
      "  config.optimizer.learnig_rate = 0.2\n"
      "  return config\n"
    ),
  }.items():
    (disk / f"{name}.py").write_text(text)


def _labels(disk: pathlib.Path) -> None:
  """Lists of photos, for `prepare_imagenet`."""
  (disk / "dog.csv").write_text("file,wnid\nfile,dog\n")
  (disk / "gone.csv").write_text("file,wnid\ngone.jpg,n01440764\n")
  (disk / "row.csv").write_text("file,wnid\nfile\n")
  (disk / "bytes.csv").write_bytes(b"file,wnid\n\xff\xfe,n01440764\n")


def _workdirs(runs: pathlib.Path, run: pathlib.Path) -> None:
  text = (run / "config.json").read_text()
  for name, content in {
    "other": text.replace('"seed": 0', '"seed": 5', 1).encode(),
    "cut": text.encode()[:100],
    "list": b"[]\n",
    "bytes": b"\xff\xfe\x00",
    "summary": text.encode(),
  }.items():
    _write(runs / name / "config.json", content)
  (runs / "summary" / "summary.json").write_text('{"method": "dp')
  (runs / "bare" / "checkpoints").mkdir(parents=True)


def _image_folders(disk: pathlib.Path) -> None:
  """CIFAR-10 of two images a split, as tfds lays it out, and what harms it."""
  whole = disk / "whole" / "cifar10" / "3.0.2"
  whole.mkdir(parents=True)
  info = {
    "fileFormat": "array_record",
    "name": "cifar10",
    "version": "3.0.2",
    "splits": [
      {
        "name": split,
        "numBytes": "1",
        "shardLengths": ["2"],
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
      }
      for split in ("train", "test")
    ],
  }
  _write(whole / "dataset_info.json", json.dumps(info).encode())
  _write(whole / "features.json", json.dumps(_features()).encode())
  _write(whole / "label.labels.txt", "\n".join("abcdefghij").encode())
  image = _png(32)
  for split in ("train", "test"):
    _shard(whole, split, [image, image])

  def copy(name: str) -> pathlib.Path:
    folder = disk / name / "cifar10" / "3.0.2"
    shutil.copytree(whole, folder)
    return folder

  other = json.dumps(info | {"name": "cifar100"}).encode()
  _write(copy("renamed") / "dataset_info.json", other)
  _write(copy("json") / "dataset_info.json", json.dumps(info).encode()[:50])
  for shard in copy("truncated").glob("*-train.*"):
    _write(shard, shard.read_bytes()[:100])
  next(copy("missing").glob("*-test.*")).unlink()
  _shard(copy("pixels"), "test", [image, image[: len(image) // 2]])
  _shard(copy("size"), "train", [_png(8), image])
  _shard(copy("label"), "test", [image, image], last=10)


def _features() -> dict:
  return {
    "pythonClassName": f"{_FEATURES}.features_dict.FeaturesDict",
    "featuresDict": {
      "features": {
        "image": {
          "pythonClassName": f"{_FEATURES}.image_feature.Image",
          "image": {
            "dtype": "uint8",
            "shape": {"dimensions": ["32", "32", "3"]},
          },
        },
        "label": {
          "pythonClassName": f"{_FEATURES}.class_label_feature.ClassLabel",
          "classLabel": {"numClasses": "10"},
        },
      }
    },
  }


def _png(size: int) -> bytes:
  pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
  encoded = io.BytesIO()
  Image.fromarray(pixels).save(encoded, "PNG")
  return encoded.getvalue()


def _shard(
  folder: pathlib.Path, split: str, images: list[bytes], last: int = 3
) -> None:
  """Writes a split; `last` is the label of the last image."""
  path = folder / f"cifar10-{split}.array_record-00000-of-00001"
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for i, image in enumerate(images):
    label = last if i == len(images) - 1 else 3
    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature["image"].bytes_list.value.append(image)
    feature["label"].int64_list.value.append(label)
    writer.write(example.SerializeToString())
  writer.close()
