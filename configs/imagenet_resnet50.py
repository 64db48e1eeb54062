r"""ResNet-50 (v1.5) on ImageNet, CPT's recipe: 120 epochs, x0.1 every 30.

  python -m experiments.train --config=configs/imagenet_resnet50.py:dpc \
    --workdir=runs/imagenet_resnet50_dpc --config.data.dir=DIR

Methods: float, static8, dpc and others (README); METHOD,smoke tries the code.
Not run here: no ImageNet, no accelerator; only its input was measured
(README).
No published low-precision figure is known to us.
Bounds: CPT's for ImageNet, 4..8.
10,000 training images are held out for every choice; to compare with published
figures, fix the choices first and add --config.data.holdout=0.
"""

import ml_collections

from configs import imagenet_resnet18


def get_config(argument: str = "dpc") -> ml_collections.ConfigDict:
  config = imagenet_resnet18.get_config(argument)
  config.model.name = "resnet50_imagenet"
  return config
