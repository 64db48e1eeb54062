"""Image sets, batches that shard and resume, and preprocessing on the device.

Importing this needs JAX and NumPy only; grain, tfds and scikit-learn are
imported when a data set is read.
"""

from dpc_jax.data import pipeline, preprocess, sources

TrainBatches = pipeline.TrainBatches
eval_batches = pipeline.eval_batches
augment = preprocess.augment
normalize = preprocess.normalize
ImageData = sources.ImageData
Split = sources.Split
known = sources.known
load = sources.load

__all__ = [
  "ImageData",
  "Split",
  "TrainBatches",
  "augment",
  "eval_batches",
  "known",
  "load",
  "normalize",
]
