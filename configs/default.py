"""Every field of a config, with its default. A recipe changes some of them.

A field whose default is "none" is a placeholder: it can be set on the command
line, `--config.epochs=2`, and left out it means what its comment says.
"""

import ml_collections
from ml_collections import config_dict


def get_config(method: str = "dpc") -> ml_collections.ConfigDict:
  """The fields; `method` as in `precision.method`."""
  config = ml_collections.ConfigDict()
  config.seed = 0  # of initial values, order, augmentation, rounding noise
  config.steps = 1_000  # the length of the run
  config.epochs = config_dict.placeholder(float)  # if set, overrules steps
  config.batch_size = 128  # of all devices together
  config.eval_batch_size = 500  # rounded up to a multiple of the devices
  config.eval_every = 1_000  # steps; the last step is always evaluated
  config.log_every = 100  # steps
  config.checkpoint_every = 1_000  # steps; the last step is always saved
  config.keep_checkpoints = 2  # the newest ones
  # Precision of float32 products: "default" (TF32 on recent GPUs), "high",
  # "highest"; none leaves JAX's own setting.
  config.matmul_precision = config_dict.placeholder(str)

  config.data = data = ml_collections.ConfigDict()
  data.name = "digits"  # digits, cifar10, cifar100
  data.dir = config_dict.placeholder(str)  # none: TFDS_DATA_DIR
  # Training images held out for every choice ("validation"); the test set is
  # for reporting.
  data.holdout = 0
  # Random crop and flip; none: what the data set's recipe says.
  data.augment = config_dict.placeholder(bool)

  config.model = model = ml_collections.ConfigDict()
  model.name = "resnet8"  # see dpc_jax.models.names()
  model.width = config_dict.placeholder(int)  # none: the model's own

  config.precision = _precision(method)
  config.optimizer = _optimizer()

  config.mesh = mesh = ml_collections.ConfigDict()
  mesh.data = config_dict.placeholder(int)  # none: all devices
  mesh.fsdp = 1  # only 1 so far: parameters are replicated
  mesh.tensor = 1  # only 1 so far
  return config


def _precision(method: str) -> ml_collections.ConfigDict:
  precision = ml_collections.ConfigDict()
  # float: the plain model. static<b>, such as static8: b-bit weights and
  # activations in every quantized layer (all convolutions; the classifier
  # stays in float). dpc: Eq. 1 between b_min and b_max.
  precision.method = method
  precision.b_min = 3
  precision.b_max = 8  # also the width that savings are relative to
  precision.delta = 1.0  # strength of Eq. 1, in [-1, 1]
  precision.center = "median"  # mean, geometric_mean, log_midpoint
  precision.log_form = "base"  # product
  # Widths that overrule the method in every layer; 32 leaves float.
  precision.weights = config_dict.placeholder(int)
  precision.activations = config_dict.placeholder(int)
  precision.gradients = 8
  precision.kind = "affine"  # grids of all operands: affine or symmetric
  # What the backward pass keeps: none is float, 8 is 8-bit integer codes.
  precision.storage_bits = config_dict.placeholder(int)
  return precision


def _optimizer() -> ml_collections.ConfigDict:
  optimizer = ml_collections.ConfigDict()
  optimizer.name = "sgd"  # sgd (with momentum), adamw
  optimizer.learning_rate = 0.1  # the peak
  # Of every parameter; sgd adds it to the gradient, adamw decouples it.
  optimizer.weight_decay = 1e-4
  optimizer.momentum = 0.9  # of sgd
  optimizer.schedule = "cosine"  # constant, cosine (to 0), steps
  optimizer.warmup = 0.0  # fraction of the run, linear from 0
  # schedule "steps": times 0.1 at these fractions of the run.
  optimizer.boundaries = (0.5, 0.75)
  return optimizer
