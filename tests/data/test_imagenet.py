"""ImageNet's path: splits, crops, batches in parallel, exact evaluation."""

import csv
import gc
import io
import itertools
import multiprocessing
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import threading
import zlib

import jax
import numpy as np
import pytest
from jax._src import xla_bridge
from PIL import Image

from dpc_jax import data as data_lib
from dpc_jax.data import decode, imagenet, parallel, sources
from experiments import prepare_imagenet

ROOT = pathlib.Path(__file__).parents[2]
WNIDS = ("n01440764", "n01443537", "n01484850", "n15075141")
LABELS = (0, 1, 2, 999)


def _encode(image: Image.Image, file_format: str = "JPEG") -> bytes:
  encoded = io.BytesIO()
  image.save(encoded, file_format)
  return encoded.getvalue()


def _ramp(width: int, height: int) -> np.ndarray:
  """Pixels that tell their place: red the column, green the row."""
  image = np.zeros((height, width, 3), np.uint8)
  image[..., 0] = np.arange(width) * 255 // max(width - 1, 1)
  image[..., 1] = (np.arange(height) * 255 // max(height - 1, 1))[:, None]
  return image


def _write_photos(folder: pathlib.Path, count: int) -> pathlib.Path:
  """Random small photos of many sizes, and their list."""
  random = np.random.default_rng(0)
  folder.mkdir(parents=True)
  with (folder / "labels.csv").open("w", newline="") as lines:
    writer = csv.writer(lines)
    writer.writerow(["file", "wnid"])
    for i in range(count):
      size = tuple(random.integers(20, 60, 2))
      pixels = random.integers(0, 256, (*size, 3), np.uint8)
      (folder / f"{i}.JPEG").write_bytes(_encode(Image.fromarray(pixels)))
      writer.writerow([f"{i}.JPEG", WNIDS[i % 4]])
  return folder / "labels.csv"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A small prepared imagenet2012: (data_dir, folder of its photos)."""
  root = tmp_path_factory.mktemp("imagenet")
  labels = _write_photos(root / "photos", 29)
  counts = prepare_imagenet.prepare(root / "photos", labels, root / "data")
  assert counts == {"train": 24, "validation": 5}
  return root / "data", root / "photos"


class Photos:
  """Records in memory; label i is image i. Workers may use no device."""

  def __init__(self, count: int):
    random = np.random.default_rng(1)
    self._encoded = [
      _encode(
        Image.fromarray(
          random.integers(0, 256, (*random.integers(20, 50, 2), 3), np.uint8)
        )
      )
      for _ in range(count)
    ]

  def __len__(self) -> int:
    return len(self._encoded)

  def __getitem__(self, index: int) -> dict:
    if multiprocessing.parent_process() is not None:
      assert not xla_bridge.backends_are_initialized()
      assert jax.config.jax_platforms == "cpu"
    return {"image": self._encoded[index], "label": index}


def _split(count: int) -> imagenet.StreamedSplit:
  return imagenet.StreamedSplit(
    records=Photos(count), rows=None, record_set="train"
  )


def _assert_equal(left: dict, right: dict) -> None:
  assert left.keys() == right.keys()
  for name in left:
    assert type(left[name]) is type(right[name]) is np.ndarray
    np.testing.assert_array_equal(left[name], right[name])
    assert left[name].dtype == right[name].dtype


def _one_line(info) -> str:
  message = str(info.value)
  assert "\n" not in message
  return message


def test_set_has_its_form_and_reads_the_files_as_they_are(prepared):
  data_dir, photos = prepared
  data = sources.load("imagenet2012", data_dir=data_dir)
  assert isinstance(data, imagenet.StreamedImages)
  assert data.num_classes == len(data.class_names) == 1000
  assert data.class_names[999] == "n15075141"
  assert data.image_shape == (224, 224, 3)
  assert data.mean == (0.485, 0.456, 0.406)
  assert data.std == (0.229, 0.224, 0.225)
  assert data.augment is False
  listed = range(29)
  expected = {
    "train": [i for i in listed if i % 5 != 4],
    "test": [i for i in listed if i % 5 == 4],
  }
  assert data.splits.keys() == expected.keys()
  for name, numbers in expected.items():
    assert len(data.splits[name]) == len(numbers)
    for (encoded, label), i in zip(data.splits[name], numbers, strict=True):
      assert encoded == (photos / f"{i}.JPEG").read_bytes()
      assert (label, type(label)) == (LABELS[i % 4], int)


def test_pickling_carries_the_address_and_not_the_images(prepared):
  split = sources.load("imagenet2012", data_dir=prepared[0]).splits["train"]
  first = split[0]  # opens it
  pickled = pickle.dumps(split)
  assert len(pickled) < 1000
  assert pickle.loads(pickled)[0] == first


@pytest.mark.parametrize("index", [-1, 24])
def test_index_out_of_range(prepared, index):
  data = sources.load("imagenet2012", data_dir=prepared[0])
  with pytest.raises(IndexError, match=f"index {index} "):
    data.splits["train"][index]


def test_holdout_is_disjoint_nested_in_order_and_without_a_seed(prepared):
  def load(holdout: int):
    return sources.load("imagenet2012", data_dir=prepared[0], holdout=holdout)

  whole = load(0)
  np.random.seed(1)
  small, large, again = load(5), load(20), load(20)
  rows = {name: split.rows for name, split in large.splits.items()}
  assert (len(rows["train"]), len(rows["validation"])) == (4, 20)
  together = np.concatenate([rows["train"], rows["validation"]])
  assert sorted(together) == list(range(24))
  assert set(small.splits["validation"].rows) < set(rows["validation"])
  for split in ("train", "validation"):
    assert list(rows[split]) == sorted(rows[split])
    np.testing.assert_array_equal(rows[split], again.splits[split].rows)
    for place, row in enumerate(rows[split]):
      assert large.splits[split][place] == whole.splits["train"][int(row)]
  # Written down once: runs that hold images out rely on the choice.
  assert small.splits["validation"].rows.tolist() == [6, 11, 16, 17, 23]
  with pytest.raises(ValueError, match=r"holdout=24 .*at most 23"):
    load(24)


def test_batch_has_its_form_and_depends_on_the_step_alone():
  forward = imagenet.TrainBatches(
    _split(23), batch_size=6, seed=3, image_size=16
  )
  in_order = [forward.batch(step) for step in range(9)]
  assert in_order[0]["image"].shape == (6, 16, 16, 3)
  assert in_order[0]["image"].dtype == np.uint8
  assert in_order[0]["label"].dtype == np.int32
  resumed = imagenet.TrainBatches(
    _split(23), batch_size=6, seed=3, image_size=16
  )
  for step in (8, 3, 3, 0):
    _assert_equal(resumed.batch(step), in_order[step])
  far = forward.batch(np.int32(2**31 - 1))
  assert len(set(far["label"])) == 6
  labels = np.concatenate([batch["label"] for batch in in_order])
  assert sorted(labels[:23]) == sorted(labels[23:46]) == list(range(23))


def test_an_image_is_never_cropped_alike_twice():
  batches = imagenet.TrainBatches(
    _split(1), batch_size=64, seed=0, image_size=8
  )
  images = np.concatenate([batches.batch(i)["image"] for i in range(2)])
  assert len({image.tobytes() for image in images}) > 120
  other = imagenet.TrainBatches(_split(1), batch_size=64, seed=1, image_size=8)
  assert (other.batch(0)["image"] != batches.batch(0)["image"]).any()


def test_randomness_follows_the_row_of_the_run_alone():
  split = _split(23)
  whole, half = (
    imagenet.TrainBatches(split, batch_size=size, seed=5, image_size=16)
    for size in (8, 4)
  )
  for step in range(4):
    pieces = [half.batch(2 * step), half.batch(2 * step + 1)]
    joined = {
      name: np.concatenate([piece[name] for piece in pieces])
      for name in pieces[0]
    }
    _assert_equal(joined, whole.batch(step))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_hold_contiguous_parts_of_one_batch(count):
  split = _split(10)
  settings = {"batch_size": 8, "seed": 5, "image_size": 16}
  whole = imagenet.TrainBatches(split, **settings)
  parts = [
    imagenet.TrainBatches(
      split, **settings, process_index=p, process_count=count
    )
    for p in range(count)
  ]
  assert parts[0].local_batch_size == 8 // count
  streams = [part.iterate(0, 3) for part in parts]
  for step, pieces in enumerate(zip(*streams, strict=True)):
    joined = {
      name: np.concatenate([piece[name] for piece in pieces])
      for name in pieces[0]
    }
    _assert_equal(joined, whole.batch(step))


def test_threads_give_the_batches_bit_for_bit_from_anywhere():
  batches = imagenet.TrainBatches(
    _split(23), batch_size=6, seed=3, image_size=16
  )
  for start, stop in ((0, 4), (5, 12), (7, 7), (10**7, 10**7 + 2)):
    stream = batches.iterate(start, stop)
    for step, batch in zip(range(start, stop), stream, strict=True):
      _assert_equal(batch, batches.batch(step))


def test_closing_ends_the_threads():
  def threads() -> list[threading.Thread]:
    return [
      thread
      for thread in threading.enumerate()
      if thread.name.startswith("grain-prefetch")
    ]

  batches = imagenet.TrainBatches(_split(5), batch_size=2, seed=0, image_size=8)
  stream = batches.iterate(0, 10**9)
  next(stream)
  mine = threads()
  assert mine
  stream.close()
  for thread in mine:
    thread.join(timeout=20)
  assert not [thread for thread in threads() if thread in mine]


def test_worker_processes_give_the_same_and_touch_no_device():
  batches = imagenet.TrainBatches(
    _split(23), batch_size=6, seed=3, image_size=16, workers=2
  )
  stream = batches.iterate(2, 7)
  for step, batch in zip(range(2, 7), stream, strict=True):
    _assert_equal(batch, batches.batch(step))
  assert not multiprocessing.active_children()


def test_no_shared_memory_is_left():
  batches = imagenet.TrainBatches(
    _split(5), batch_size=2, seed=3, image_size=16, workers=2
  )
  gc.disable()  # luck must not do it
  try:
    for count in (4, 1):
      stream = batches.iterate(0, 4)
      seen = list(itertools.islice(stream, count))
      if count == 4:
        assert next(stream, None) is None
      stream.close()
      assert not multiprocessing.active_children()
      kinds = {type(thing).__name__ for thing in gc.get_objects()}
      assert "SharedMemoryArray" not in kinds
      _assert_equal(seen[0], batches.batch(0))
  finally:
    gc.enable()


@pytest.mark.parametrize("workers", [None, 1])
def test_damaged_image_is_one_line_with_split_and_index(workers):
  split = _split(3)
  encoded = split.records._encoded
  encoded[2] = encoded[2][: len(encoded[2]) // 2]
  split = imagenet.StreamedSplit(split.records, np.array([0, 2]), "train")
  batches = imagenet.TrainBatches(
    split, batch_size=2, seed=0, image_size=8, workers=workers
  )
  message = "image 2 of tfds' split 'train'"
  with pytest.raises(data_lib.DataError, match=message) as e:
    list(batches.iterate(0, 1))
  assert "truncated" in _one_line(e).lower()
  assert "data.name='imagenet2012'" in _one_line(e)
  assert not hasattr(e.value, "__notes__")  # grain's, of many lines
  if workers is None:
    stream = imagenet.eval_batches(split, batch_size=2, image_size=8)
    with pytest.raises(data_lib.DataError, match=message):
      list(stream)
    with pytest.raises(data_lib.DataError, match=message):
      batches.batch(0)


# A program whose second worker has batches ready when the first ends.
DAMAGED = """
import io, sys
import numpy as np
from PIL import Image
from dpc_jax.data import imagenet

class Records:
  def __len__(self):
    return 64

  def __getitem__(self, index):
    encoded = io.BytesIO()
    Image.new("RGB", (20, 20)).save(encoded, "JPEG")
    encoded = encoded.getvalue()
    return {"image": encoded[:50] if index == 40 else encoded, "label": 0}

if __name__ == "__main__":
  split = imagenet.StreamedSplit(Records(), None, "train")
  batches = imagenet.TrainBatches(
    split, batch_size=2, seed=0, image_size=64, workers=2
  )
  try:
    for _ in batches.iterate(0, 32):
      pass
  except ValueError as error:
    print(error)
    sys.exit(2)
"""


def test_damaged_image_leaves_no_shared_memory(tmp_path):
  program = tmp_path / "damaged.py"
  program.write_text(DAMAGED)
  done = subprocess.run(
    [sys.executable, str(program)],
    env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert "image 40 of tfds' split 'train'" in done.stdout
  # Nothing of "resource_tracker: ... leaked shared_memory objects".
  assert (done.returncode, done.stderr) == (2, "")


def _bomb() -> bytes:
  """The header of a PNG of 2e8 pixels."""
  header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0)
  check = struct.pack(">I", zlib.crc32(header))
  return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + check


def test_what_pillow_cannot_unpack_is_one_line(monkeypatch):
  def fail(file, formats):
    del file, formats
    raise struct.error("unpack requires a buffer of 2 bytes")

  monkeypatch.setattr(Image, "open", fail)
  with pytest.raises(decode.DamagedImageError, match="buffer of 2 bytes"):
    decode.eval_image(b"", image_size=8)


# Pillow has EPS drawn by another program: what is read must not run.
_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nquit\n"
_GIF = _encode(Image.new("L", (9, 9)), "GIF")


@pytest.mark.parametrize(
  "encoded",
  [
    b"",
    bytes(500),
    np.random.default_rng(0).bytes(500),
    "no image, but text: ß".encode(),
    b"GIF89a",
    b"\xff\xd8\xff\xe0" * 9,
    _GIF,
    _EPS,
    _bomb(),
    None,
  ],
  ids=range(10),
)
def test_what_is_no_image_is_one_line(encoded):
  uniforms = np.zeros(decode.UNIFORMS)
  with pytest.raises(decode.DamagedImageError) as info:
    decode.train_image(encoded, image_size=8, uniforms=uniforms)
  assert "0x" not in _one_line(info)
  if encoded in (_EPS, _GIF):
    assert "not a JPEG or PNG file" in _one_line(info)
  with pytest.raises(decode.DamagedImageError):
    decode.eval_image(encoded, image_size=8)


@pytest.mark.parametrize("label", [-1, 1000, None])
def test_label_of_no_class_is_one_line(label):
  record = {"image": _encode(Image.new("L", (9, 9))), "label": label}
  split = imagenet.StreamedSplit([record], None, "train")
  message = f"image 0 of .* 'train' .*its label is {label}, none of 0..999"
  with pytest.raises(data_lib.DataError, match=message) as info:
    split[0]
  _one_line(info)


def test_uniform_numbers_are_the_recorded_ones():
  # Resuming relies on these as on the order of the images.
  first = imagenet._uniforms(0, 0)
  assert first.shape == (decode.UNIFORMS,)
  np.testing.assert_array_equal(
    first[:3], [0.011546754286331562, 0.24154919656271812, 0.11142585551493822]
  )
  np.testing.assert_array_equal(
    imagenet._uniforms(2**32 - 1, 2**40)[-2:],
    [0.9323139701315799, 0.742822799607663],
  )
  assert decode.crop_box(500, 375, first[1:]) == (144, 62, 357, 328)


def test_crops_cover_area_ratio_and_place_as_they_should():
  width, height, count = 500, 375, 4000
  boxes = np.array(
    [
      decode.crop_box(width, height, imagenet._uniforms(0, row)[1:])
      for row in range(count)
    ]
  )
  left, upper, right, lower = boxes.T
  assert (left >= 0).all() and (upper >= 0).all()
  assert (right <= width).all() and (lower <= height).all()
  w, h = right - left, lower - upper
  area = w * h / (width * height)
  assert 0.075 < area.min() < 0.1 and 0.95 < area.max() <= 1
  # Large areas fit less often: 0.5 of the tries' uniform law at least.
  assert 0.42 < area.mean() < 0.54
  ratio = w / h
  assert 0.74 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.35
  small = area < 0.4
  np.testing.assert_allclose(np.log(ratio[small]).mean(), 0, atol=0.02)
  slack = left[small] / (width - w[small])
  np.testing.assert_allclose(slack.mean(), 0.5, atol=0.03)
  slack = upper[small] / (height - h[small])
  np.testing.assert_allclose(slack.mean(), 0.5, atol=0.03)
  flips = [imagenet._uniforms(0, row)[0] < 0.5 for row in range(count)]
  np.testing.assert_allclose(np.mean(flips), 0.5, atol=0.04)


@pytest.mark.parametrize(
  ("size", "box"),
  [
    ((1000, 12), (492, 0, 508, 12)),
    ((12, 1000), (0, 492, 12, 508)),
    ((1, 1), (0, 0, 1, 1)),
  ],
)
def test_no_crop_fits_a_narrow_image_so_its_center_is_taken(size, box):
  for row in range(20):
    uniforms = imagenet._uniforms(1, row)[1:]
    if size == (1, 1):
      uniforms = np.zeros_like(uniforms)
    assert decode.crop_box(*size, uniforms) == box


def test_training_image_shows_its_crop():
  encoded = _encode(Image.fromarray(_ramp(512, 256)), "PNG")
  sides = set()
  for row in range(40):
    uniforms = imagenet._uniforms(2, row)
    image = decode.train_image(encoded, image_size=64, uniforms=uniforms)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert image.flags.c_contiguous and image.flags.writeable
    left, upper, right, lower = decode.crop_box(512, 256, uniforms[1:])
    columns = image[32, :, 0].astype(float)
    rows = image[:, 32, 1].astype(float)
    flipped = columns[0] > columns[-1]
    sides.add((bool(uniforms[0] < 0.5), bool(flipped)))
    first, last = sorted((columns[0], columns[-1]))
    # A pixel of the result stands for 8 columns or 4 rows of these at most.
    assert abs(first - left / 2) < 3 and abs(last - right / 2) < 3
    assert abs(rows[0] - upper) < 3 and abs(rows[-1] - lower) < 4
  assert sides == {(True, True), (False, False)}


def test_evaluation_cuts_the_center_out():
  ramp = _ramp(512, 256)
  image = decode.eval_image(
    _encode(Image.fromarray(ramp), "PNG"), image_size=224
  )
  np.testing.assert_array_equal(image, ramp[16:240, 144:368])
  upright = ramp.transpose(1, 0, 2)
  image = decode.eval_image(
    _encode(Image.fromarray(upright), "PNG"), image_size=224
  )
  np.testing.assert_array_equal(image, upright[144:368, 16:240])


@pytest.mark.parametrize("size", [(333, 500), (500, 333), (40, 40), (9, 700)])
def test_evaluation_resizes_the_short_side_as_torchvision(size):
  original = Image.fromarray(_ramp(*size))
  width, height = size
  short = round(96 * 256 / 224)
  if width <= height:
    resized = short, int(short * height / width)
  else:
    resized = int(short * width / height), short
  left, upper = (round((side - 96) / 2) for side in resized)
  expected = original.resize(resized, Image.Resampling.BILINEAR).crop(
    (left, upper, left + 96, upper + 96)
  )
  image = decode.eval_image(_encode(original, "PNG"), image_size=96)
  np.testing.assert_array_equal(image, np.asarray(expected))


def test_all_color_spaces_become_rgb():
  red = Image.new("RGB", (40, 40), (200, 30, 40))
  files = {
    "jpeg": _encode(red),
    "cmyk": _encode(red.convert("CMYK")),
    "png": _encode(red, "PNG"),
    "palette": _encode(red.convert("P"), "PNG"),
    "alpha": _encode(red.convert("RGBA"), "PNG"),
  }
  uniforms = np.full(decode.UNIFORMS, 0.4)
  for name, encoded in files.items():
    for image in (
      decode.train_image(encoded, image_size=8, uniforms=uniforms),
      decode.eval_image(encoded, image_size=8),
    ):
      assert image.shape == (8, 8, 3), name
      error = np.abs(image.astype(int) - (200, 30, 40)).max()
      assert error < (40 if name == "palette" else 8), name
  gray = decode.eval_image(_encode(red.convert("L")), image_size=8)
  assert (gray == gray[..., :1]).all()


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 8, 13])
def test_evaluation_shows_every_image_once(count, processes):
  split = _split(count)
  streams = [
    list(
      imagenet.eval_batches(
        split,
        batch_size=8,
        image_size=16,
        process_index=p,
        process_count=processes,
      )
    )
    for p in range(processes)
  ]
  assert {len(stream) for stream in streams} == {-(-count // 8)}
  seen = []
  for piece in itertools.chain(*zip(*streams, strict=True)):
    assert piece["image"].shape == (8 // processes, 16, 16, 3)
    assert piece["image"].dtype == np.uint8
    assert piece["label"].shape == piece["mask"].shape == (8 // processes,)
    assert piece["label"].dtype == np.int32
    assert piece["mask"].dtype == np.float32
    filling = piece["mask"] == 0
    assert not piece["image"][filling].any()
    assert not piece["label"][filling].any()
    for image, label in zip(
      piece["image"][~filling], piece["label"][~filling], strict=True
    ):
      encoded, _ = split[int(label)]
      expected = decode.eval_image(encoded, image_size=16)
      np.testing.assert_array_equal(image, expected)
      seen.append(label)
  assert seen == list(range(count))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"image_size": 0}, "image_size=0 "),
    ({"batch_size": 10, "process_count": 4}, "batch_size=10 .* multiple of 4"),
    ({"process_index": 2, "process_count": 2}, "process_index=2 .*0..1"),
  ],
)
def test_bad_arguments_are_named_at_the_call(arguments, message):
  settings = {"split": _split(2), "batch_size": 8, "process_index": 0}
  settings.update(arguments)
  with pytest.raises(ValueError, match=message):
    imagenet.eval_batches(**settings)
  with pytest.raises(ValueError, match=message):
    imagenet.TrainBatches(**settings, seed=0)


def test_evaluation_is_closable_and_starts_no_process():
  stream = imagenet.eval_batches(_split(5), batch_size=2, image_size=8)
  next(stream)
  assert not multiprocessing.active_children()
  stream.close()
  assert next(stream, None) is None


def test_bad_seed_and_steps_are_named_at_the_call():
  with pytest.raises(ValueError, match="seed=-1 "):
    imagenet.TrainBatches(_split(2), batch_size=2, seed=-1)
  with pytest.raises(ValueError, match=r"data.workers=0 .*None"):
    imagenet.TrainBatches(_split(2), batch_size=2, seed=0, workers=0)
  batches = imagenet.TrainBatches(_split(2), batch_size=2, seed=0)
  with pytest.raises(ValueError, match="step=-1 "):
    batches.batch(-1)
  with pytest.raises(ValueError, match="step=-1 "):
    batches.iterate(-1, 3)
  with pytest.raises(ValueError, match="stop=2 lies before start=3"):
    batches.iterate(3, 2)


def test_too_little_shared_memory_is_refused_before_anything_runs(
  monkeypatch, tmp_path
):
  monkeypatch.setattr(parallel, "_SHARED_MEMORY", str(tmp_path))
  usage = parallel.shutil.disk_usage(tmp_path)._replace(free=64 * 2**20)
  monkeypatch.setattr(parallel.shutil, "disk_usage", lambda path: usage)
  settings = {"batch_size": 256, "seed": 0}
  with pytest.raises(ValueError, match=r"^data.workers=4 needs 625 MiB") as e:
    imagenet.TrainBatches(_split(2), **settings, workers=4)
  assert "64 MiB free; use fewer workers" in _one_line(e)
  # A part of the batch, smaller images, or threads fit.
  part = {"process_index": 0, "process_count": 16}
  imagenet.TrainBatches(_split(2), **settings, workers=4, **part)
  imagenet.TrainBatches(_split(2), **settings, workers=4, image_size=32)
  imagenet.TrainBatches(_split(2), **settings)


def test_missing_set_says_what_to_download(tmp_path):
  with pytest.raises(FileNotFoundError, match="'imagenet2012'") as info:
    sources.load("imagenet2012", data_dir=tmp_path)
  message = _one_line(info)
  for part in (
    "ILSVRC2012_img_val.tar",
    f"'{tmp_path}/downloads/manual'",
    "tfds.builder('imagenet2012'",
  ):
    assert part in message


def test_damaged_shard_is_one_line(tmp_path):
  labels = _write_photos(tmp_path / "photos", 10)
  prepare_imagenet.prepare(tmp_path / "photos", labels, tmp_path / "data")
  folder = tmp_path / "data" / "imagenet2012" / "5.1.0"
  shard = next(folder.glob("*-train.*-00001-of-00002"))
  os.truncate(shard, 100)
  data = sources.load("imagenet2012", data_dir=tmp_path / "data")
  message = f"a file in {folder} is damaged"
  with pytest.raises(data_lib.DataError, match=message) as e:
    list(data.splits["train"])
  _one_line(e)
  batches = imagenet.TrainBatches(
    data.splits["train"], batch_size=8, seed=0, image_size=8
  )
  with pytest.raises(data_lib.DataError, match=message) as e:
    list(batches.iterate(0, 1))
  _one_line(e)
  pickled = pickle.dumps(data.splits["train"])
  shard.unlink()
  # What a worker meets where a file has gone since the set was opened.
  message = f"{shard.name} is missing"
  with pytest.raises(data_lib.DataError, match=message) as e:
    pickle.loads(pickled)[0]
  _one_line(e)
  with pytest.raises(FileNotFoundError, match=f"{shard.name} is missing"):
    sources.load("imagenet2012", data_dir=tmp_path / "data")


# A fresh interpreter whose sockets refuse to connect and that may open fewer
# files than there are shards.
MANY_SHARDS = """
import resource, socket, sys
def refuse(*args, **kwargs):
  print("NETWORK", args, flush=True)
  raise OSError("no network here")
socket.socket.connect = socket.getaddrinfo = refuse
from dpc_jax.data import imagenet, sources
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 4096))
split = sources.load("imagenet2012", data_dir=sys.argv[1]).splits["train"]
batches = imagenet.TrainBatches(split, batch_size=len(split), seed=0)
batches.batch(0)
print("tensorflow" in sys.modules, len(split))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs Unix's limits")
def test_more_shards_than_open_files_and_no_tensorflow(tmp_path):
  labels = _write_photos(tmp_path / "photos", 100)
  prepare_imagenet.prepare(
    tmp_path / "photos",
    labels,
    tmp_path / "data",
    validation_every=2,
    shards=50,
  )
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", MANY_SHARDS, str(tmp_path / "data")],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert (done.returncode, done.stdout) == (0, "False 50\n"), done.stderr


def test_prepare_program_explains_itself_and_its_mistakes(tmp_path, capsys):
  labels = _write_photos(tmp_path / "photos", 10)
  arguments = [
    f"--images={tmp_path / 'photos'}",
    f"--labels={labels}",
    f"--data_dir={tmp_path / 'data'}",
  ]

  def fails(*changes: str) -> str:
    assert prepare_imagenet.main([*arguments, *changes]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error

  assert "--validation_every=1" in fails("--validation_every=1")
  assert "too few" in fails("--shards=9")
  assert "no such file" in fails("--labels=nowhere.csv")
  assert "0.JPEG is missing" in fails(f"--images={tmp_path}")
  wrong = tmp_path / "wrong.csv"
  wrong.write_text("file,class\n")
  assert "no column 'wnid'" in fails(f"--labels={wrong}")
  wrong.write_text("file,wnid\n0.JPEG,dog\n")
  assert "'dog' of 0.JPEG" in fails(f"--labels={wrong}")
  assert not (tmp_path / "data").exists()
  assert prepare_imagenet.main(arguments) == 0
  assert "(train 8, validation 2)" in capsys.readouterr().out
  assert "has an imagenet2012 already" in fails()


def test_preparing_leaves_all_or_nothing(tmp_path, monkeypatch):
  """Ctrl-C included: tfds takes an incomplete folder for a prepared one."""
  labels = _write_photos(tmp_path / "photos", 10)
  arguments = tmp_path / "photos", labels, tmp_path / "data"

  def interrupted(path, examples):
    raise KeyboardInterrupt

  with monkeypatch.context() as m:
    m.setattr(prepare_imagenet, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
      prepare_imagenet.prepare(*arguments)
  assert not (tmp_path / "data" / "imagenet2012").exists()
  assert prepare_imagenet.prepare(*arguments) == {"train": 8, "validation": 2}


@pytest.fixture
def photos(shared_data, tmp_path):
  """The 290 real photos as a prepared set: its data_dir."""
  sample = shared_data / "imagenet_sample"
  if not sample.is_dir():
    pytest.skip(f"no real photos at {sample}")
  prepare_imagenet.prepare(
    sample / "images", sample / "labels.csv", tmp_path / "data"
  )
  return tmp_path / "data"


def test_real_photos_train_and_evaluate_exactly(photos):
  data = sources.load("imagenet2012", data_dir=photos, holdout=32)
  sizes = {name: len(split) for name, split in data.splits.items()}
  assert sizes == {"train": 200, "validation": 32, "test": 58}
  batches = imagenet.TrainBatches(
    data.splits["train"], batch_size=100, seed=0, image_size=64
  )
  epoch = list(batches.iterate(0, 2))
  labels = np.concatenate([batch["label"] for batch in epoch])
  expected = [label for _, label in data.splits["train"]]
  assert sorted(labels) == sorted(expected)
  pixels = np.concatenate([batch["image"] for batch in epoch]) / 255
  # Photos: near ImageNet's mean and spread.
  np.testing.assert_allclose(pixels.mean((0, 1, 2)), data.mean, atol=0.05)
  np.testing.assert_allclose(pixels.std((0, 1, 2)), data.std, atol=0.06)
  streams = [
    list(
      imagenet.eval_batches(
        data.splits["test"],
        batch_size=16,
        image_size=64,
        process_index=p,
        process_count=2,
      )
    )
    for p in (0, 1)
  ]
  assert [len(stream) for stream in streams] == [4, 4]
  seen = [
    label
    for piece in itertools.chain(*zip(*streams, strict=True))
    for label, mask in zip(piece["label"], piece["mask"], strict=True)
    if mask
  ]
  assert seen == [label for _, label in data.splits["test"]]
