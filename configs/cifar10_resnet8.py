r"""ResNet-8 on CIFAR-10 for 2 epochs: minutes on a laptop.

  python -m experiments.train --config=configs/cifar10_resnet8.py:dpc \
    --workdir=runs/cifar10_resnet8_dpc --config.data.dir=DIR

Methods: float, static8, dpc and others (README); METHOD,smoke tries the code.
The README's table has the figures and the time. No published figure.
Bounds: CPT's for CIFAR, 3..8.
"""

import ml_collections

from configs import default


def get_config(argument: str = "dpc") -> ml_collections.ConfigDict:
  config = default.get_config(argument)
  config.steps = 703  # 2 epochs of 45,000 images
  config.batch_size = 128
  config.eval_every = 176  # half an epoch
  config.log_every = 20
  config.checkpoint_every = 176
  config.data.name = "cifar10"
  config.data.holdout = 5_000
  config.model.name = "resnet8"
  config.optimizer.learning_rate = 0.1
  config.optimizer.warmup = 0.2
  return default.finish(config, argument, width=4)
