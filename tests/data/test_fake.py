"""Random stand-ins: the form of the real sets, and classes to be learned."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from dpc_jax.data import fake, imagenet, sources

IN_MEMORY = {
  "cifar10": (10, (32, 32, 3)),
  "cifar100": (100, (32, 32, 3)),
  "digits": (10, (8, 8, 1)),
}


@pytest.mark.parametrize("name", IN_MEMORY)
def test_form_is_that_of_the_set(name):
  classes, shape = IN_MEMORY[name]
  data = sources.load(name, data_dir="nowhere", fake=True, holdout=100)
  sizes = {split: len(part) for split, part in data.splits.items()}
  assert sizes == {"train": 412, "validation": 100, "test": 128}
  for part in data.splits.values():
    assert part.images.shape == (len(part), *shape)
    assert part.images.dtype == np.uint8
    assert part.labels.dtype == np.int32
    assert set(part.labels) == set(range(classes))
  assert data.num_classes == len(data.class_names) == classes
  assert data.image_shape == shape
  assert len(data.mean) == len(data.std) == shape[-1]
  assert data.augment is (name != "digits")


def test_real_description_is_kept():
  real = sources.load("digits")
  stand_in = sources.load("digits", fake=True)
  assert stand_in.class_names == real.class_names
  cifar = sources.load("cifar10", fake=True)
  assert cifar.mean == (0.4914, 0.4822, 0.4465)


@pytest.mark.parametrize("name", IN_MEMORY)
def test_classes_can_be_learned(name):
  data = sources.load(name, fake=True)
  train, test = data.splits["train"], data.splits["test"]
  means = np.stack(
    [
      train.images[train.labels == label].mean(axis=0)
      for label in range(data.num_classes)
    ]
  )
  distances = [
    ((means - image.astype(float)) ** 2).sum(axis=(1, 2, 3))
    for image in test.images
  ]
  right = np.argmin(distances, axis=1) == test.labels
  assert right.mean() > 0.95
  # Mirrored images keep their class.
  distances = [
    ((means - image[:, ::-1].astype(float)) ** 2).sum(axis=(1, 2, 3))
    for image in test.images
  ]
  assert (np.argmin(distances, axis=1) == test.labels).mean() > 0.95


def test_no_image_is_in_two_splits():
  data = sources.load("digits", fake=True, holdout=100)
  images = np.concatenate([part.images for part in data.splits.values()])
  assert len({image.tobytes() for image in images}) == 640


def test_images_never_change():
  (images, labels), _ = fake.digits()
  again = fake.digits()[0]
  np.testing.assert_array_equal(images, again[0])
  np.testing.assert_array_equal(labels, again[1])
  digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
  assert digest[:12] == "64dc3c213681"


def test_imagenet_keeps_its_classes_and_its_odd_files():
  data = sources.load("imagenet2012", data_dir="nowhere", fake=True, holdout=9)
  assert isinstance(data, imagenet.StreamedImages)
  assert data.num_classes == len(data.class_names) == 1000
  sizes = {split: len(part) for split, part in data.splits.items()}
  assert sizes == {"train": 55, "validation": 9, "test": 30}
  files = [
    Image.open(io.BytesIO(encoded)) for encoded, _ in data.splits["test"]
  ]
  assert {file.format for file in files} == {"JPEG"}
  assert {file.mode for file in files} == {"RGB", "L", "CMYK"}
  assert len({file.size for file in files}) > 20
  labels = {split: {y for _, y in part} for split, part in data.splits.items()}
  assert labels["train"] == labels["test"] == set(range(0, 1000, 125))
  for batch in (
    imagenet.TrainBatches(
      data.splits["train"], batch_size=8, seed=0, image_size=32
    ).batch(0),
    next(imagenet.eval_batches(data.splits["test"], batch_size=8)),
  ):
    assert batch["image"].dtype == np.uint8
    assert batch["image"].std() > 20


def test_imagenet_needs_filling_at_evaluation():
  test = sources.load("imagenet2012", fake=True).splits["test"]
  for size in (4, 8, 16, 32):
    *_, last = imagenet.eval_batches(test, batch_size=size, image_size=8)
    assert 0 < last["mask"].sum() < size


def test_imagenet_classes_can_be_learned():
  data = sources.load("imagenet2012", fake=True)
  images, labels = {}, {}
  for split, part in data.splits.items():
    batches = list(imagenet.eval_batches(part, batch_size=8, image_size=16))
    count = len(part)  # without the filling
    whole = np.concatenate([b["image"] for b in batches])
    images[split] = whole[:count].astype(float)
    labels[split] = np.concatenate([b["label"] for b in batches])[:count]
  distances = (images["test"][:, None] - images["train"][None]) ** 2
  nearest = distances.sum(axis=(2, 3, 4)).argmin(axis=1)
  assert (labels["train"][nearest] == labels["test"]).mean() > 0.7
