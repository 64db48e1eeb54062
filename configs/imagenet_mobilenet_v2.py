r"""MobileNetV2 on ImageNet, 120 epochs, cosine.

  python -m experiments.train --config=configs/imagenet_mobilenet_v2.py:dpc \
    --workdir=runs/imagenet_mobilenet_v2_dpc --config.data.dir=DIR

Methods: float, static8, dpc and others (README); METHOD,smoke tries the code.
Not run here: no ImageNet, no accelerator; only its input was measured
(README).
No published low-precision figure is known to us. Learning rate and decay are
the usual ones of MobileNetV2; the paper's are not public.
Bounds: CPT's for ImageNet, 4..8.
10,000 training images are held out for every choice; to compare with published
figures, fix the choices first and add --config.data.holdout=0.
"""

import ml_collections

from configs import default


def get_config(argument: str = "dpc") -> ml_collections.ConfigDict:
  config = default.get_config(argument)
  config.steps = 595_860  # 120 epochs of 1,271,167 images
  config.batch_size = 256
  config.eval_batch_size = 256
  config.eval_every = 5_000
  config.checkpoint_every = 5_000
  config.data.name = "imagenet2012"
  config.data.holdout = 10_000
  config.data.image_size = 224
  config.data.workers = 16
  config.model.name = "mobilenet_v2_imagenet"
  config.precision.b_min = 4
  config.optimizer.learning_rate = 0.05
  config.optimizer.weight_decay = 4e-5
  return default.finish(config, argument, width_multiplier=0.125)
