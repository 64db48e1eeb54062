r"""ResNet-74 on CIFAR-10, CPT's recipe: 64,000 steps, x0.1 at 32k and 48k.

  python -m experiments.train --config=configs/cifar10_resnet74.py:dpc \
    --workdir=runs/cifar10_resnet74_dpc --config.data.dir=DIR

Methods: float, static8, dpc and others (README); METHOD,smoke tries the code.
Not run at full length here, and its time not measured on any hardware.
Published, static 8/8: 93.04 % (CPT).
Bounds: CPT's for CIFAR, 3..8.
5,000 training images are held out for every choice; to compare with published
figures, fix the choices first and add --config.data.holdout=0.
"""

import ml_collections

from configs import cifar10_resnet20


def get_config(argument: str = "dpc") -> ml_collections.ConfigDict:
  config = cifar10_resnet20.get_config(argument)
  config.model.name = "resnet74"
  return config
