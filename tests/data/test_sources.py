"""Sources: splits, hold-outs, the reading path, and what goes wrong."""

import io
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from dpc_jax import data as data_lib
from dpc_jax.data import fake, sources
from dpc_jax.data import prepared as prepared_lib

ROOT = pathlib.Path(__file__).parents[2]
NAMES = "abcdefghij"


def _info(count: int, split: str) -> dict:
  return {
    "name": split,
    "numBytes": "1",
    "shardLengths": [str(count)],
    "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
  }


def _features(name: str) -> dict:
  base = "tensorflow_datasets.core.features"
  shape = {"dimensions": ["32", "32", "3"]}
  features = {
    "image": {
      "image": {"dtype": "uint8", "shape": shape},
      "pythonClassName": f"{base}.image_feature.Image",
    },
    "label": {
      "classLabel": {"numClasses": name.removeprefix("cifar")},
      "pythonClassName": f"{base}.class_label_feature.ClassLabel",
    },
  }
  if name == "cifar100":
    features["coarse_label"] = features["label"] | {
      "classLabel": {"numClasses": "20"}
    }
  return {
    "featuresDict": {"features": features},
    "pythonClassName": f"{base}.features_dict.FeaturesDict",
  }


def _write_records(path: pathlib.Path, images, labels) -> None:
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_pb2

  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for image, label in zip(images, labels, strict=True):
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "PNG")
    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature["image"].bytes_list.value.append(encoded.getvalue())
    feature["label"].int64_list.value.append(int(label))
    feature["coarse_label"].int64_list.value.append(int(label) // 5)
    writer.write(example.SerializeToString())
  writer.close()


def _prepare(
  root: pathlib.Path, name: str, counts: dict[str, int], classes: list[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Writes a small set as tfds lays it out; returns {split: (x, y)}."""
  folder = root / name / "3.0.2"
  folder.mkdir(parents=True)
  random = np.random.default_rng(0)
  arrays = {}
  for split, count in counts.items():
    images = random.integers(0, 256, (count, 32, 32, 3), np.uint8)
    labels = random.permutation(np.arange(count) % len(classes))
    shard = folder / f"{name}-{split}.array_record-00000-of-00001"
    _write_records(shard, images, labels)
    arrays[split] = images, labels
  info = {
    "fileFormat": "array_record",
    "name": name,
    "version": "3.0.2",
    "splits": [_info(count, split) for split, count in counts.items()],
  }
  (folder / "dataset_info.json").write_text(json.dumps(info))
  (folder / "features.json").write_text(json.dumps(_features(name)))
  (folder / "label.labels.txt").write_text("\n".join(classes) + "\n")
  return arrays


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A small CIFAR-10 as tfds lays it out: (data_dir, {split: (x, y)})."""
  root = tmp_path_factory.mktemp("tfds")
  return root, _prepare(root, "cifar10", {"train": 40, "test": 20}, list(NAMES))


@pytest.fixture
def copied(prepared, tmp_path):
  """A copy of the small data set to damage: its version folder."""
  folder = tmp_path / "cifar10" / "3.0.2"
  folder.mkdir(parents=True)
  for path in (prepared[0] / "cifar10" / "3.0.2").iterdir():
    (folder / path.name).write_bytes(path.read_bytes())
  return folder


def _one_line(info) -> str:
  message = str(info.value)
  assert "\n" not in message
  return message


def _image_set(split: sources.Split) -> set[tuple[bytes, int]]:
  return {
    (image.tobytes(), int(label))
    for image, label in zip(split.images, split.labels, strict=True)
  }


def _check_form(data: sources.ImageData, sizes: dict[str, int]) -> None:
  assert {name: len(split) for name, split in data.splits.items()} == sizes
  for split in data.splits.values():
    assert split.images.dtype == np.uint8
    assert split.labels.dtype == np.int32
    assert split.images.shape == (len(split), *data.image_shape)
    assert set(np.unique(split.labels)) == set(range(data.num_classes))
  assert len(data.class_names) == data.num_classes
  assert len(data.mean) == len(data.std) == data.image_shape[-1]


def test_digits_are_exact_and_split_1437_to_360():
  from sklearn import datasets

  data = sources.load("digits")
  _check_form(data, {"train": 1437, "test": 360})
  original = {
    (np.uint8(15 * image).tobytes(), int(label))
    for image, label in zip(*datasets.load_digits(return_X_y=True), strict=True)
  }
  train, test = (_image_set(data.splits[name]) for name in ("train", "test"))
  assert train | test == original
  assert not train & test
  assert data.augment is False
  scaled = data.splits["train"].images / 255
  np.testing.assert_allclose(data.mean, scaled.mean())
  np.testing.assert_allclose(data.std, scaled.std())


def test_digits_split_is_stratified_and_never_changes():
  data = sources.load("digits")
  test = np.bincount(data.splits["test"].labels)
  whole = test + np.bincount(data.splits["train"].labels)
  np.testing.assert_allclose(test, whole * 360 / 1797, atol=1)
  # Written down once: published figures on the digits refer to this split.
  assert test.tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
  assert data.splits["test"].labels[:12].tolist() == [
    0,
    1,
    4,
    0,
    2,
    5,
    9,
    0,
    9,
    3,
    2,
    8,
  ]
  assert int(data.splits["test"].images.sum()) == 1688310


def test_holdout_is_disjoint_balanced_nested_and_without_a_seed():
  whole = sources.load("digits")
  np.random.seed(1)
  small = sources.load("digits", holdout=100)
  np.random.seed(2)
  large = sources.load("digits", holdout=300)
  again = sources.load("digits", holdout=300)
  _check_form(large, {"train": 1137, "validation": 300, "test": 360})
  held = _image_set(large.splits["validation"])
  kept = _image_set(large.splits["train"])
  assert not held & kept
  assert held | kept == _image_set(whole.splits["train"])
  assert _image_set(small.splits["validation"]) < held
  assert (large.mean, large.std) == (whole.mean, whole.std)
  for name, split in large.splits.items():
    np.testing.assert_array_equal(split.images, again.splits[name].images)
  np.testing.assert_array_equal(
    large.splits["test"].images, whole.splits["test"].images
  )
  shares = np.bincount(whole.splits["train"].labels) * 300 / 1437
  np.testing.assert_allclose(
    np.bincount(large.splits["validation"].labels), shares, atol=1
  )


@pytest.mark.parametrize("holdout", [-1, 1437, 5000])
def test_holdout_out_of_range(holdout):
  with pytest.raises(ValueError, match=f"data.holdout={holdout} ") as info:
    sources.load("digits", holdout=holdout)
  _one_line(info)


def test_train_size_is_balanced_nested_and_without_a_seed():
  whole = sources.load("digits")
  np.random.seed(1)
  small = sources.load("digits", train_size=100)
  np.random.seed(2)
  large = sources.load("digits", train_size=700)
  _check_form(large, {"train": 700, "test": 360})
  kept = _image_set(large.splits["train"])
  assert _image_set(small.splits["train"]) < kept
  assert kept < _image_set(whole.splits["train"])
  again = sources.load("digits", train_size=700)
  np.testing.assert_array_equal(
    large.splits["train"].images, again.splits["train"].images
  )
  np.testing.assert_array_equal(
    large.splits["test"].images, whole.splits["test"].images
  )
  # By the rule of the hold-out.
  held = sources.load("digits", holdout=700)
  assert kept == _image_set(held.splits["validation"])
  # The scale of the pixels is the whole set's.
  assert (small.mean, small.std) == (whole.mean, whole.std)
  shares = np.bincount(whole.splits["train"].labels) * 700 / 1437
  np.testing.assert_allclose(
    np.bincount(large.splits["train"].labels), shares, atol=1
  )


def test_train_size_is_taken_of_what_is_not_held_out():
  held = sources.load("digits", holdout=300)
  both = sources.load("digits", holdout=300, train_size=200)
  _check_form(both, {"train": 200, "validation": 300, "test": 360})
  np.testing.assert_array_equal(
    both.splits["validation"].images, held.splits["validation"].images
  )
  trained = _image_set(both.splits["train"])
  assert trained < _image_set(held.splits["train"])
  assert not trained & _image_set(both.splits["validation"])
  whole = sources.load("digits", holdout=300, train_size=1137)
  np.testing.assert_array_equal(
    whole.splits["train"].images, held.splits["train"].images
  )


@pytest.mark.parametrize("train_size", [-1, 0, 1138])
def test_train_size_out_of_range(train_size):
  with pytest.raises(ValueError, match=f"data.train_size={train_size}: ") as i:
    sources.load("digits", holdout=300, train_size=train_size)
  assert "use 1..1137, or leave it out" in _one_line(i)


@pytest.mark.parametrize("name", ["ptb", "wikitext2", "wikitext103"])
def test_text_is_read_whole(name):
  with pytest.raises(ValueError, match=r"train_size=5: text is read") as info:
    sources.load(name, train_size=5, fake=True)
  _one_line(info)


def test_a_part_of_imagenet():
  whole = sources.load("imagenet2012", fake=True)
  part = sources.load("imagenet2012", fake=True, train_size=5)
  assert len(part.splits["train"]) == 5
  assert len(part.splits["train"]) < len(whole.splits["train"])
  for name in whole.splits.keys() - {"train"}:
    assert len(part.splits[name]) == len(whole.splits[name])


def test_known_names_are_the_papers_and_ours():
  assert sources.known() == (
    "cifar10",
    "cifar100",
    "digits",
    "imagenet2012",
    "ptb",
    "wikitext103",
    "wikitext2",
  )


@pytest.mark.parametrize("name", ["ptb", "wikitext2", "wikitext103"])
def test_text_takes_no_holdout(name):
  with pytest.raises(ValueError, match=r"holdout=5: .*validation") as info:
    sources.load(name, holdout=5, fake=True)
  assert name in _one_line(info)


def test_text_comes_from_its_own_module(monkeypatch):
  from dpc_jax.data import corpus

  calls = []
  monkeypatch.setattr(
    corpus, "load", lambda *args, **options: calls.append((args, options))
  )
  sources.load("ptb", data_dir="folder", fake=True)
  assert calls == [(("ptb",), {"data_dir": "folder", "fake": True})]


def test_unknown_name_lists_the_known_ones():
  with pytest.raises(ValueError, match="'mnist'") as info:
    sources.load("mnist")
  assert "cifar10, cifar100, digits" in _one_line(info)


def test_reads_prepared_files_exactly_and_in_order(prepared, monkeypatch):
  root, arrays = prepared
  monkeypatch.setattr(prepared_lib, "_RECORDS_PER_READ", 7)
  data = sources.load("cifar10", data_dir=root)
  _check_form(data, {"train": 40, "test": 20})
  for name, (images, labels) in arrays.items():
    np.testing.assert_array_equal(data.splits[name].images, images)
    np.testing.assert_array_equal(data.splits[name].labels, labels)
  assert data.class_names == tuple(NAMES)
  assert data.augment is True
  assert data.mean == (0.4914, 0.4822, 0.4465)
  assert data.std == (0.2023, 0.1994, 0.2010)


def test_cifar100_takes_the_fine_labels(tmp_path):
  classes = [f"class{label}" for label in range(100)]
  counts = {"train": 150, "test": 100}
  arrays = _prepare(tmp_path, "cifar100", counts, classes)
  data = sources.load("cifar100", data_dir=tmp_path)
  _check_form(data, counts)
  for name, (images, labels) in arrays.items():
    np.testing.assert_array_equal(data.splits[name].images, images)
    np.testing.assert_array_equal(data.splits[name].labels, labels)
  assert data.num_classes == 100
  assert data.class_names == tuple(classes)
  assert data.augment is True


def test_data_dir_wins_over_the_environment(prepared, monkeypatch, tmp_path):
  monkeypatch.setenv("TFDS_DATA_DIR", str(prepared[0]))
  assert len(sources.load("cifar10").splits["train"]) == 40
  with pytest.raises(FileNotFoundError, match=r"\(data\.dir\)"):
    sources.load("cifar10", data_dir=tmp_path)
  monkeypatch.delenv("TFDS_DATA_DIR")
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "tensorflow_datasets").symlink_to(prepared[0])
  assert len(sources.load("cifar10").splits["train"]) == 40


def test_newest_version_wins(copied):
  (copied.parent / "3.0.10").mkdir()
  for path in copied.iterdir():
    if path.suffix == ".json":
      (copied.parent / "3.0.10" / path.name).write_bytes(path.read_bytes())
  with pytest.raises(FileNotFoundError, match=r"3\.0\.10.*is missing"):
    sources.load("cifar10", data_dir=copied.parents[1])


# Runs in a fresh interpreter whose sockets refuse to connect.
OFFLINE = """
import socket, sys
def refuse(*args, **kwargs):
  print("NETWORK", args, flush=True)
  raise OSError("no network here")
socket.socket.connect = socket.getaddrinfo = refuse
import dpc_jax.data
late = {"tensorflow_datasets", "grain", "sklearn", "PIL", "array_record"}
assert not late & set(sys.modules), late & set(sys.modules)
"""


def _offline(code: str, *args: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "-W", "error", "-c", OFFLINE + code, *args]
  env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  return subprocess.run(
    command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
  )


def test_reading_needs_no_tensorflow_and_no_network(prepared):
  done = _offline(
    """
data = dpc_jax.data.load("cifar10", data_dir=sys.argv[1], holdout=10)
batches = dpc_jax.data.TrainBatches(data.splits["train"], batch_size=8, seed=0)
batches.batch(3)
dpc_jax.data.load("digits")
print("tensorflow" in sys.modules, len(data.splits["train"]))
""",
    str(prepared[0]),
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == "False 30\n"


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_data_set_ends_at_once(tmp_path, name):
  start = time.perf_counter()
  with pytest.raises(FileNotFoundError, match=f"'{name}'") as info:
    sources.load(name, data_dir=tmp_path)
  assert time.perf_counter() - start < 2
  message = _one_line(info)
  command = (
    'python -c "import tensorflow_datasets as tfds; tfds.builder('
    f"'{name}', file_format='array_record', data_dir='{tmp_path}')"
    '.download_and_prepare()"'
  )
  for part in (command, "--config.data.dir, or --data_dir", "TFDS_DATA_DIR"):
    assert part in message


def test_missing_data_set_never_tries_the_network(tmp_path):
  done = _offline(
    """
try:
  dpc_jax.data.load("cifar10", data_dir=sys.argv[1])
except FileNotFoundError as error:
  print("missing", "tensorflow_datasets" in sys.modules)
""",
    str(tmp_path),
  )
  assert (done.stdout, done.stderr) == ("missing False\n", "")


def test_missing_shard_is_named(copied):
  shard = "cifar10-test.array_record-00000-of-00001"
  (copied / shard).unlink()
  with pytest.raises(FileNotFoundError, match=f"{shard} is missing") as info:
    sources.load("cifar10", data_dir=copied.parents[1])
  assert f"remove {copied}" in _one_line(info)


def test_tfrecord_format_is_named(copied):
  info = copied / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(ValueError, match="is in tfrecord format") as raised:
    sources.load("cifar10", data_dir=copied.parents[1])
  assert "file_format='array_record'" in _one_line(raised)


@pytest.mark.parametrize("size", [0, 66_000])
def test_damaged_shard_is_one_line(copied, size):
  os.truncate(copied / "cifar10-train.array_record-00000-of-00001", size)
  with pytest.raises(data_lib.DataError, match="damaged") as info:
    sources.load("cifar10", data_dir=copied.parents[1])
  assert str(copied) in _one_line(info)


@pytest.mark.parametrize(
  ("damage", "reason"),
  [
    (lambda encoded: encoded[:60], "truncated"),
    (lambda encoded: b"text", "not a JPEG or PNG file"),
    (lambda encoded: bytes(200), "not a JPEG or PNG file"),
    (lambda encoded: None, "NoneType instead of bytes"),
    (lambda encoded: _png(31, 32), "31x32 pixels instead of 32x32"),
  ],
)
def test_damaged_image_is_one_line(monkeypatch, damage, reason):
  records = fake.cifar(10)
  whole = list(records["test"])
  whole[5] = whole[5] | {"image": damage(whole[5]["image"])}
  records["test"] = fake.Records(whole)
  monkeypatch.setattr(fake, "cifar", lambda num_classes: records)
  with pytest.raises(data_lib.DataError, match="image 5 of tfds'") as info:
    sources.load("cifar10", fake=True)
  for part in ("data.name='cifar10'", "split 'test'", reason):
    assert part in _one_line(info)


@pytest.mark.parametrize("label", [-1, 10, 2**40, 3.5, None])
def test_damaged_label_is_one_line(monkeypatch, label):
  records = fake.cifar(10)
  whole = list(records["test"])
  whole[5] = whole[5] | {"label": label}
  records["test"] = fake.Records(whole)
  monkeypatch.setattr(fake, "cifar", lambda num_classes: records)
  with pytest.raises(data_lib.DataError, match="image 5 of tfds'") as info:
    sources.load("cifar10", fake=True)
  assert f"its label is {label}, none of 0..9" in _one_line(info)


@pytest.mark.parametrize("record", [bytes(100), b"\x8f\xffrandom" * 9])
def test_record_that_is_no_example_is_one_line(copied, record):
  from array_record.python import array_record_module

  shard = copied / "cifar10-train.array_record-00000-of-00001"
  writer = array_record_module.ArrayRecordWriter(str(shard), "group_size:1")
  for _ in range(40):
    writer.write(record)
  writer.close()
  with pytest.raises(data_lib.DataError, match="is damaged") as info:
    sources.load("cifar10", data_dir=copied.parents[1])
  assert str(copied) in _one_line(info)


def _png(width: int, height: int) -> bytes:
  encoded = io.BytesIO()
  Image.new("RGB", (width, height)).save(encoded, "PNG")
  return encoded.getvalue()


def test_damaged_description_is_one_line(copied):
  whole = (copied / "dataset_info.json").read_text()
  (copied / "dataset_info.json").write_text("{")
  with pytest.raises(ValueError, match="is not JSON") as info:
    sources.load("cifar10", data_dir=copied.parents[1])
  _one_line(info)
  text = (copied / "features.json").read_text()
  info = json.loads(whole)
  for wrong, message in (
    ("[]", "dataset_info.json is no description; remove"),
    ("{}", "holds None; remove"),
    (json.dumps(info | {"name": "cifar100"}), "holds 'cifar100'; remove"),
    (json.dumps(info | {"version": "3"}), "is wrong (Invalid version '3'"),
    (json.dumps(info | {"splits": 3}), "is wrong (Failed to parse splits"),
  ):
    (copied / "dataset_info.json").write_text(wrong)
    with pytest.raises(ValueError, match="'cifar10'") as raised:
      sources.load("cifar10", data_dir=copied.parents[1])
    assert message in _one_line(raised)
  (copied / "dataset_info.json").write_text(whole)
  (copied / "features.json").write_text("{}")
  with pytest.raises(ValueError, match="is wrong") as raised:
    sources.load("cifar10", data_dir=copied.parents[1])
  _one_line(raised)
  (copied / "features.json").write_text(text)
  (copied / "features.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"features\.json is missing"):
    sources.load("cifar10", data_dir=copied.parents[1])


def test_remote_folder_is_refused():
  with pytest.raises(ValueError, match="gs://bucket is not a local") as info:
    sources.load("cifar10", data_dir="gs://bucket")
  _one_line(info)


def test_missing_package_names_the_command(monkeypatch):
  monkeypatch.setitem(sys.modules, "sklearn", None)
  monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
  with pytest.raises(
    ModuleNotFoundError, match="pip install scikit-learn"
  ) as e:
    sources.load("digits")
  _one_line(e)


def test_real_cifar10(shared_data):
  data = sources.load(
    "cifar10", data_dir=shared_data / "tensorflow_datasets", holdout=5000
  )
  _check_form(data, {"train": 45_000, "validation": 5_000, "test": 10_000})
  for name, split in data.splits.items():
    assert np.bincount(split.labels).tolist() == [len(split) // 10] * 10, name
  images = np.concatenate([split.images for split in data.splits.values()])
  assert len({image.tobytes() for image in images}) == 60_000
  train = np.concatenate(
    [data.splits[name].images for name in ("train", "validation")]
  )
  np.testing.assert_allclose(
    train.mean(axis=(0, 1, 2)) / 255, data.mean, atol=1e-3
  )
  assert data.class_names[0] == "airplane"
