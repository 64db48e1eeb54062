r"""WideResNet-38 on CIFAR-10, CPT's recipe for CIFAR.

  python -m experiments.train --config=configs/cifar10_wide_resnet38.py:dpc \
    --workdir=runs/cifar10_wide_resnet38_dpc --config.data.dir=DIR

Methods: float, static8, dpc and others (README); METHOD,smoke tries the code.
Not run at full length here, and its time not measured on any hardware.
Published: 93.90 % static, 94.38 % DPC (the DPC paper). The paper does not say
how wide its WideResNet-38 is: k = 2, our decision.
Bounds: CPT's for CIFAR, 3..8.
5,000 training images are held out for every choice; to compare with published
figures, fix the choices first and add --config.data.holdout=0.
"""

import ml_collections

from configs import cifar10_resnet20


def get_config(argument: str = "dpc") -> ml_collections.ConfigDict:
  config = cifar10_resnet20.get_config(argument)
  config.model.name = "wide_resnet38"
  return config
