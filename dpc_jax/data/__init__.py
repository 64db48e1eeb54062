"""Data sets, batches that shard and resume, preprocessing on the device.

Importing this needs JAX and NumPy only; grain, tfds, Pillow and scikit-learn
are imported when a data set is read. Images in memory and streamed ones are
batched by the same names in `pipeline` and `imagenet`, text in
`token_batches`.
"""

from dpc_jax.data import imagenet, pipeline, prepared, preprocess, sources

DataError = prepared.DataError
TrainBatches = pipeline.TrainBatches
eval_batches = pipeline.eval_batches
augment = preprocess.augment
normalize = preprocess.normalize
ImageData = sources.ImageData
Split = sources.Split
StreamedImages = imagenet.StreamedImages
StreamedSplit = imagenet.StreamedSplit
known = sources.known
load = sources.load

__all__ = [
  "DataError",
  "ImageData",
  "Split",
  "StreamedImages",
  "StreamedSplit",
  "TrainBatches",
  "augment",
  "eval_batches",
  "imagenet",
  "known",
  "load",
  "normalize",
]
