r"""ResNet-110 on CIFAR-100, CPT's recipe: 64,000 steps, x0.1 at 32k and 48k.

  python -m experiments.train --config=configs/cifar100_resnet110.py:dpc \
    --workdir=runs/cifar100_resnet110_dpc --config.data.dir=DIR

Methods: float, static8, dpc and others (README); METHOD,smoke tries the code.
Not run at full length here, and its time not measured on any hardware.
No published figure is known to us.
Bounds: CPT's for CIFAR, 3..8.
5,000 training images are held out for every choice; to compare with published
figures, fix the choices first and add --config.data.holdout=0.
"""

import ml_collections

from configs import cifar10_resnet20


def get_config(argument: str = "dpc") -> ml_collections.ConfigDict:
  config = cifar10_resnet20.get_config(argument)
  config.data.name = "cifar100"
  config.model.name = "resnet110"
  return config
