r"""ResNet-110 on CIFAR-10, CPT's recipe: 64,000 steps, x0.1 at 32k and 48k.

  python -m experiments.train --config=configs/cifar10_resnet110.py:dpc \
    --workdir=runs/cifar10_resnet110_dpc --config.data.dir=DIR

Methods: float, static8, dpc. Not run at full length here. Published: static
93.44 %, DPC 93.69 % (DPC paper).
5,000 training images are held out for every choice; to compare with published
figures, fix the choices first and add --config.data.holdout=0.
"""

import ml_collections

from configs import default


def get_config(method: str = "dpc") -> ml_collections.ConfigDict:
  config = default.get_config(method)
  config.steps = 64_000
  config.batch_size = 128
  config.data.name = "cifar10"
  config.data.holdout = 5_000
  config.model.name = "resnet110"
  config.optimizer.learning_rate = 0.1
  config.optimizer.schedule = "steps"
  return config
