r"""MobileNetV2 on ImageNet, 120 epochs, cosine.

  python -m experiments.train --config=configs/imagenet_mobilenet_v2.py:dpc \
    --workdir=runs/imagenet_mobilenet_v2_dpc --config.data.dir=DIR

Methods: float, static8, dpc; METHOD,smoke tries the code in seconds.
Not run here: no ImageNet, no accelerator; only its input was measured
(README).
The learning rate and decay are the common ones of MobileNetV2, not the
paper's, which are not public. Bounds: CPT's for ImageNet, 4..8.
10,000 training images are held out for every choice; to compare with published
figures, fix the choices first and add --config.data.holdout=0.
"""

import ml_collections

from configs import default, imagenet_resnet18


def get_config(argument: str = "dpc") -> ml_collections.ConfigDict:
  config = imagenet_resnet18.get_config(argument)
  config.model.name = "mobilenet_v2_imagenet"
  config.model.width = None
  config.model.scan = None
  config.optimizer.learning_rate = 0.05
  config.optimizer.weight_decay = 4e-5
  config.optimizer.schedule = "cosine"
  return default.finish(config, argument, width_multiplier=0.125)
