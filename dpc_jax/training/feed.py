"""The input of a run: what the data set is to the loop, whatever its kind."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from dpc_jax.data import (
  corpus,
  imagenet,
  pipeline,
  preprocess,
  sources,
  token_batches,
)
from dpc_jax.training import config as config_lib
from dpc_jax.training import tasks

Data = sources.ImageData | imagenet.StreamedImages | corpus.TextData
Rows = dict[str, Any]


# Above it a split stays on the host, unless `data.on_device` says otherwise; a
# tenth of a small accelerator's memory. CIFAR-10 has 147 MiB.
_MOST_ON_DEVICE = 2**30


class Resident(NamedTuple):
  """A training split that lives on the devices: a step needs row numbers only.

  Attributes:
    arrays: {name in a batch: all of the split}, on the host still.
    indices: step -> int32, which rows make this process's part of the batch,
      the same as `Feed.train` reads.
  """

  arrays: Rows
  indices: Callable[[int], Any]


class Feed(NamedTuple):
  """Batches of a data set, and their shapes before there are any.

  Attributes:
    sample: the model input of one example (an image, or a row of tokens).
    rows_per_epoch: batch rows that make up one pass over the training split.
    train_batch: {name: shape and dtype} of a global batch of training.
    eval_batch: likewise, of evaluation.
    train: (start, stop) -> iterator of this process's rows, step by step; what
      a step gets is a function of the seed and the step alone.
    evaluate: split -> iterator over the whole split, once.
    resident: the training split, where it is to live on the devices.
  """

  sample: jax.ShapeDtypeStruct
  rows_per_epoch: int
  train_batch: dict[str, jax.ShapeDtypeStruct]
  eval_batch: dict[str, jax.ShapeDtypeStruct]
  train: Callable[[int, int], Iterator[Rows]]
  evaluate: Callable[[str], Iterator[Rows]]
  resident: Resident | None = None


# Fields of `data` that belong to one kind of data.
_FIELDS = {
  sources.ImageData: ("augment", "on_device"),
  imagenet.StreamedImages: ("image_size", "workers"),
  corpus.TextData: ("unroll",),
}


def check_fields(config: ml_collections.ConfigDict, data: Data) -> None:
  """Refuses fields that mean nothing for this kind of data.

  Raises:
    ConfigError: naming the field.
  """
  for kind, names in _FIELDS.items():
    for name in names:
      value = config.data[name]
      if value is not None and not isinstance(data, kind):
        raise config_lib.ConfigError(
          f"config.data.{name} = {value!r}: means nothing for"
          f" {config.data.name}; leave it out"
        )
  if isinstance(data, corpus.TextData) and config.data.unroll is None:
    raise config_lib.ConfigError(
      "config.data.unroll = None: set the number of tokens of a row that a"
      " step sees, 35 for instance"
    )


def make_task(
  config: ml_collections.ConfigDict, data: Data, model: nn.Module
) -> tasks.Task:
  """The task that fits the data and the model."""
  if isinstance(data, corpus.TextData):
    return tasks.language_model(getattr(model, "initial_carry", None))
  return tasks.classification(make_prepare(config, data))


def make_prepare(
  config: ml_collections.ConfigDict,
  data: sources.ImageData | imagenet.StreamedImages,
) -> tasks.Prepare:
  """Augmentation (with a key, where the config wants it), normalization."""
  augment = config.data.augment
  augment = data.augment if augment is None else augment

  def prepare(images, key):
    if augment and key is not None:
      images = preprocess.augment(key, images)
    return preprocess.normalize(images, data.mean, data.std)

  return prepare


def make_sample(
  config: ml_collections.ConfigDict, data: Data
) -> jax.ShapeDtypeStruct:
  """Shape and dtype of the model's input for one example."""
  if isinstance(data, corpus.TextData):
    return jax.ShapeDtypeStruct((1, config.data.unroll), jnp.int32)
  return jax.ShapeDtypeStruct((1, *_image_shape(config, data)), jnp.float32)


def rows_per_epoch(config: ml_collections.ConfigDict, data: Data) -> int:
  """Batch rows that make up one pass over the training split.

  Of text, rows of `data.unroll` tokens, those filled up included.
  """
  train = data.splits["train"]
  if not isinstance(data, corpus.TextData):
    return len(train)
  return config.batch_size * _token_batches(config, data).windows


def make_feed(
  config: ml_collections.ConfigDict,
  data: Data,
  parts: int,
  reader: tuple[int | None, int | None] = (None, None),
) -> Feed:
  """The feed of a resolved config.

  Args:
    config: of the run.
    data: loaded.
    parts: that a batch's rows are split into; an evaluation batch is filled up
      to a multiple of it.
    reader: (i, n): this process reads the i-th of n equal parts of each batch;
      None takes `jax.process_index()` and `jax.process_count()`.

  Raises:
    ValueError, ModuleNotFoundError: what a split cannot give: more rows than
      it has tokens, for instance.
  """
  eval_rows = -(-config.eval_batch_size // parts) * parts
  reader = dict(zip(("process_index", "process_count"), reader, strict=True))
  if isinstance(data, corpus.TextData):
    return _text_feed(config, data, eval_rows, parts, reader)
  return _image_feed(config, data, eval_rows, reader)


def _text_feed(config, data, eval_rows, parts, reader) -> Feed:
  def evaluate(split):
    return token_batches.eval_batches(
      data.splits[split],
      eos=data.eos,
      # Rows cut the text, and so the context: their number must not depend on
      # the devices.
      rows=config.eval_batch_size,
      unroll=config.data.unroll,
      multiple=parts,
      **reader,
    )

  for split, tokens in data.splits.items():
    if split == "train":
      continue
    if config.eval_batch_size > len(tokens):
      raise config_lib.ConfigError(
        f"config.eval_batch_size = {config.eval_batch_size}: the split {split}"
        f" has {len(tokens)} tokens; use 1..{len(tokens)}"
      )
    evaluate(split)  # Checks, and reads nothing yet.
  longest = -(-len(data.splits["train"]) // config.batch_size)
  if config.data.unroll > longest:
    raise config_lib.ConfigError(
      f"config.data.unroll = {config.data.unroll}: the {config.batch_size} rows"
      f" of a batch have {longest} tokens each; use 1..{longest}"
    )
  return Feed(
    sample=make_sample(config, data),
    rows_per_epoch=rows_per_epoch(config, data),
    train_batch=_text_batch(config.batch_size, config.data.unroll),
    eval_batch=_text_batch(eval_rows, config.data.unroll),
    train=_token_batches(config, data, **reader).iterate,
    evaluate=evaluate,
  )


def _image_feed(config, data, eval_rows, reader) -> Feed:
  shape = _image_shape(config, data)
  module, options, workers = pipeline, dict(reader), {}
  if isinstance(data, imagenet.StreamedImages):
    module = imagenet
    options["image_size"] = shape[0]
    workers = {"workers": config.data.workers}
  batches = module.TrainBatches(
    data.splits["train"],
    batch_size=config.batch_size,
    seed=config.seed,
    **options,
    **workers,
  )
  return Feed(
    sample=make_sample(config, data),
    rows_per_epoch=rows_per_epoch(config, data),
    train_batch=_image_batch(config.batch_size, shape),
    eval_batch=_image_batch(eval_rows, shape)
    | {"mask": jax.ShapeDtypeStruct((eval_rows,), jnp.float32)},
    train=batches.iterate,
    evaluate=lambda split: module.eval_batches(
      data.splits[split], batch_size=eval_rows, **options
    ),
    resident=_resident(config, data, batches),
  )


def _resident(config, data, batches) -> Resident | None:
  """The training split, if `data.on_device` says so; None: if that helps.

  A CPU's own memory is where the split is already.
  """
  if not isinstance(data, sources.ImageData):
    return None
  split, wanted = data.splits["train"], config.data.on_device
  if wanted is None:
    fits = split.images.nbytes <= _MOST_ON_DEVICE
    wanted = fits and jax.default_backend() != "cpu"
  if not wanted:
    return None
  arrays = {"image": split.images, "label": split.labels}
  return Resident(arrays, batches.indices)


def _token_batches(config, data, **reader):
  return token_batches.TrainBatches(
    data.splits["train"],
    eos=data.eos,
    batch_size=config.batch_size,
    unroll=config.data.unroll,
    **reader,
  )


def _image_shape(config, data) -> tuple[int, ...]:
  size = config.data.image_size
  return data.image_shape if size is None else (size, size, 3)


def _image_batch(rows, shape):
  return {
    "image": jax.ShapeDtypeStruct((rows, *shape), jnp.uint8),
    "label": jax.ShapeDtypeStruct((rows,), jnp.int32),
  }


def _text_batch(rows, unroll):
  return {
    "tokens": jax.ShapeDtypeStruct((rows, unroll), jnp.int32),
    "targets": jax.ShapeDtypeStruct((rows, unroll), jnp.int32),
    "mask": jax.ShapeDtypeStruct((rows, unroll), jnp.float32),
    "reset": jax.ShapeDtypeStruct((rows,), jnp.bool_),
  }
