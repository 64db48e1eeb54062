r"""Makes a small tfds set `imagenet2012` out of a folder of photos.

  python -m experiments.prepare_imagenet --images=FOLDER \
    --labels=FOLDER/labels.csv --data_dir=DIR

For trying the ImageNet path, or timing it, without ImageNet: reading, decoding
and training see the files, the 1,000 classes and the splits of the real set,
only far fewer images; figures obtained on them mean nothing. Needs no
TensorFlow. Then train with --config.data.dir=DIR. The real set is prepared by
tfds itself.

The labels are a CSV file with the columns `file`, a name in the folder, and
`wnid`, the class as ImageNet names it, such as n01440764. The files go in as
they are. Of the list, every fifth image is for validation.
"""

import csv
import json
import pathlib
import shutil
import sys
from collections.abc import Sequence

from dpc_jax.data import prepared
from experiments import arguments

_NAME = "imagenet2012"
_VERSION = "5.1.0"
_FEATURES = "tensorflow_datasets.core.features"


def read_labels(
  images: pathlib.Path, labels: pathlib.Path, class_names: Sequence[str]
) -> list[tuple[pathlib.Path, int]]:
  """Returns the files and their labels, in the order of the list.

  Args:
    images: the folder of the files.
    labels: the CSV file.
    class_names: one wnid per label.

  Raises:
    ValueError: a column is missing, or a class unknown.
    FileNotFoundError: the list or one of the files is not there.
  """
  if not labels.is_file():
    raise FileNotFoundError(f"--labels={labels}: there is no such file")
  index = {name: label for label, name in enumerate(class_names)}
  examples = []
  for name, wnid in _read_rows(labels):
    path = images / name
    if not path.is_file():
      raise FileNotFoundError(f"--images={images}: {path.name} is missing")
    if wnid not in index:
      raise ValueError(
        f"--labels={labels}: {wnid!r} of {path.name} is no class of "
        "ImageNet; use names such as n01440764"
      )
    examples.append((path, index[wnid]))
  return examples


def _read_rows(labels: pathlib.Path) -> list[tuple[str, str | None]]:
  """The columns `file` and `wnid`."""
  try:
    with labels.open(newline="", encoding="utf-8") as lines:
      reader = csv.DictReader(lines)
      for column in ("file", "wnid"):
        if column not in (reader.fieldnames or ()):
          raise ValueError(
            f"--labels={labels}: there is no column {column!r}; name the"
            " columns file and wnid in the first line"
          )
      return [(row["file"], row["wnid"]) for row in reader]
  except (UnicodeDecodeError, csv.Error) as error:
    raise ValueError(
      f"--labels={labels}: is no CSV file in UTF-8 ({error})"
    ) from error


def prepare(
  images: pathlib.Path,
  labels: pathlib.Path,
  data_dir: pathlib.Path,
  *,
  validation_every: int = 5,
  shards: int = 2,
) -> dict[str, int]:
  """Writes the set as DIR/imagenet2012/5.1.0, in array_record format.

  Args:
    images: the folder of the files.
    labels: the CSV file, as in this module's docstring.
    data_dir: the folder of all data sets; it may not hold an imagenet2012.
    validation_every: of the list, which images are for validation; at least 2.
    shards: files per split, at least 1.

  Returns:
    How many images each split has.

  Raises:
    ValueError: an argument outside its range, or a wrong list.
    FileNotFoundError: the list or one of the files is not there.
    FileExistsError: there is an imagenet2012 already.
    ModuleNotFoundError: tensorflow_datasets or array_record is not installed.
  """
  if validation_every < 2 or shards < 1:
    raise ValueError(
      f"--validation_every={validation_every} and --shards={shards} must be "
      "at least 2 and 1"
    )
  folder = data_dir / _NAME / _VERSION
  if folder.parent.exists():
    raise FileExistsError(
      f"--data_dir={data_dir} has an {_NAME} already; use another folder"
    )
  tfds = prepared.require("tensorflow_datasets", "preparing images")
  names = (
    pathlib.Path(tfds.__file__).parent / "datasets" / _NAME / "labels.txt"
  ).read_text("utf-8")
  examples = read_labels(images, labels, names.split())
  splits = {
    "train": [e for i, e in enumerate(examples) if (i + 1) % validation_every],
    "validation": examples[validation_every - 1 :: validation_every],
  }
  if len(splits["validation"]) < shards:
    raise ValueError(
      f"--labels={labels}: {len(examples)} images are too few for "
      f"--validation_every={validation_every} and --shards={shards}"
    )
  # Whole or not at all: tfds takes an incomplete folder for a prepared one.
  part = folder.with_name(_VERSION + ".incomplete")
  part.mkdir(parents=True)
  try:
    _write(part, splits, names, shards)
    part.rename(folder)
  finally:
    if not folder.exists():
      shutil.rmtree(folder.parent)
  return {split: len(part) for split, part in splits.items()}


def _write(
  folder: pathlib.Path,
  splits: dict[str, list[tuple[pathlib.Path, int]]],
  names: str,
  shards: int,
) -> None:
  for split, examples in splits.items():
    for i in range(shards):
      name = f"{_NAME}-{split}.array_record-{i:05d}-of-{shards:05d}"
      _write_shard(folder / name, _shard(examples, i, shards))
  info = {
    "name": _NAME,
    "version": _VERSION,
    "fileFormat": "array_record",
    "description": "A few photos in the form of ImageNet, for trials.",
    "splits": [
      {
        "name": split,
        "numBytes": str(sum(path.stat().st_size for path, _ in examples)),
        "shardLengths": [
          str(len(_shard(examples, i, shards))) for i in range(shards)
        ],
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
      }
      for split, examples in splits.items()
    ],
  }
  (folder / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n")
  (folder / "features.json").write_text(json.dumps(_features(), indent=2))
  (folder / "label.labels.txt").write_text(names)


def _shard(examples: Sequence, i: int, shards: int) -> Sequence:
  """Returns the i-th of `shards` contiguous parts."""
  count = len(examples)
  return examples[i * count // shards : (i + 1) * count // shards]


def _write_shard(
  path: pathlib.Path, examples: Sequence[tuple[pathlib.Path, int]]
) -> None:
  user = "preparing images"
  array_record = prepared.require(
    "array_record.python.array_record_module", user
  )
  proto = prepared.require("tensorflow_datasets.proto", user)
  writer = array_record.ArrayRecordWriter(str(path), "group_size:1")
  for source, label in examples:
    example = proto.tf_example_pb2.Example()
    feature = example.features.feature
    feature["image"].bytes_list.value.append(source.read_bytes())
    feature["label"].int64_list.value.append(label)
    feature["file_name"].bytes_list.value.append(source.name.encode())
    writer.write(example.SerializeToString())
  writer.close()


def _features() -> dict:
  """The features of tfds' imagenet2012, as tfds writes them down."""
  features = {
    "file_name": {
      "pythonClassName": f"{_FEATURES}.text_feature.Text",
      "text": {},
    },
    "image": {
      "pythonClassName": f"{_FEATURES}.image_feature.Image",
      "image": {
        "dtype": "uint8",
        "encodingFormat": "jpeg",
        "shape": {"dimensions": ["-1", "-1", "3"]},
      },
    },
    "label": {
      "pythonClassName": f"{_FEATURES}.class_label_feature.ClassLabel",
      "classLabel": {"numClasses": "1000"},
    },
  }
  return {
    "pythonClassName": f"{_FEATURES}.features_dict.FeaturesDict",
    "featuresDict": {"features": features},
  }


def main(argv: Sequence[str] | None = None) -> int:
  """Reads the flags, writes the set, prints what it holds."""
  parser = arguments.Parser("experiments.prepare_imagenet", __doc__)
  parser.add_argument("--images", type=pathlib.Path, required=True)
  parser.add_argument("--labels", type=pathlib.Path, required=True)
  parser.add_argument("--data_dir", type=pathlib.Path, required=True)
  parser.add_argument("--validation_every", type=int, default=5)
  parser.add_argument("--shards", type=int, default=2, help="files per split")
  flags = parser.parse_args(argv)
  try:
    counts = prepare(
      flags.images,
      flags.labels,
      flags.data_dir,
      validation_every=flags.validation_every,
      shards=flags.shards,
    )
  except (OSError, ValueError, ModuleNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(
    f"written: {flags.data_dir / _NAME / _VERSION} "
    f"({', '.join(f'{name} {count}' for name, count in counts.items())})"
  )
  return 0


if __name__ == "__main__":
  sys.exit(main())
