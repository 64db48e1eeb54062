r"""MobileNetV2 on CIFAR-10, CPT's recipe for CIFAR.

  python -m experiments.train --config=configs/cifar10_mobilenet_v2.py:dpc \
    --workdir=runs/cifar10_mobilenet_v2_dpc --config.data.dir=DIR

Methods: float, static8, dpc and others (README); METHOD,smoke tries the code.
Not run at full length here, and its time not measured on any hardware.
Published: 92.83 % static, 93.07 % DPC (the DPC paper).
Bounds: CPT's for CIFAR, 3..8.
5,000 training images are held out for every choice; to compare with published
figures, fix the choices first and add --config.data.holdout=0.
"""

import ml_collections

from configs import default


def get_config(argument: str = "dpc") -> ml_collections.ConfigDict:
  config = default.get_config(argument)
  config.steps = 64_000
  config.batch_size = 128
  config.data.name = "cifar10"
  config.data.holdout = 5_000
  config.model.name = "mobilenet_v2"
  config.optimizer.learning_rate = 0.1
  config.optimizer.schedule = "steps"
  return default.finish(config, argument, width_multiplier=0.125)
