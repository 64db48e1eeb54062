r"""ViT-tiny with patches of 4 x 4 on CIFAR-10, 200 epochs of AdamW.

  python -m experiments.train --config=configs/cifar10_vit_tiny.py:dpc \
    --workdir=runs/cifar10_vit_tiny_dpc --config.data.dir=DIR

Methods: float, static8, dpc and others (README); METHOD,smoke tries the code.
The paper names vision transformers as future work: the recipe is ours and not
tuned. Not run at full length here, and its time not measured on any hardware.
No published figure. Bounds: CPT's for CIFAR, 3..8.
5,000 training images are held out for every choice; to compare with published
figures, fix the choices first and add --config.data.holdout=0.
"""

import ml_collections

from configs import default


def get_config(argument: str = "dpc") -> ml_collections.ConfigDict:
  config = default.get_config(argument)
  config.steps = 70_312  # 200 epochs of 45,000 images
  config.batch_size = 128
  config.data.name = "cifar10"
  config.data.holdout = 5_000
  config.model.name = "vit_tiny"
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = 1e-3
  config.optimizer.weight_decay = 0.05
  config.optimizer.warmup = 0.05
  config.optimizer.clip = 1.0
  return default.finish(
    config, argument, width=24, layers=2, mlp_width=48, patch_size=8, scan=True
  )
