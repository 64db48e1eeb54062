r"""ResNet-18 on ImageNet, CPT's recipe: 120 epochs, x0.1 every 30.

  python -m experiments.train --config=configs/imagenet_resnet18.py:dpc \
    --workdir=runs/imagenet_resnet18_dpc --config.data.dir=DIR

Methods: float, static8, dpc and others (README); METHOD,smoke tries the code.
Not run here: no ImageNet, no accelerator; only its input was measured
(README).
Published, static 8/8: 69.60 % (CPT).
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
  config.model.name = "resnet18_imagenet"
  config.precision.b_min = 4
  config.optimizer.learning_rate = 0.1
  config.optimizer.schedule = "steps"
  config.optimizer.boundaries = (0.25, 0.5, 0.75)
  return default.finish(config, argument, width=4, scan=True)
