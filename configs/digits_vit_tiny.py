r"""A small ViT on scikit-learn's digits: no download, a minute on a laptop.

  python -m experiments.train --config=configs/digits_vit_tiny.py:dpc \
    --workdir=runs/digits_vit_tiny_dpc

Methods: float, static8, dpc and others (README); METHOD,smoke tries the code.
The README's table has the figures and the time. No published figure.
Bounds: CPT's for CIFAR, 3..8.
"""

import ml_collections

from configs import default


def get_config(argument: str = "dpc") -> ml_collections.ConfigDict:
  config = default.get_config(argument)
  config.steps = 674  # 30 epochs of 1,437 images
  config.batch_size = 64
  config.eval_every = 225
  config.log_every = 20
  config.checkpoint_every = 225
  config.data.name = "digits"
  config.model.name = "vit_tiny"
  config.model.width = 48
  config.model.layers = 4
  config.model.mlp_width = 192
  config.model.patch_size = 2
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = 2e-3
  config.optimizer.weight_decay = 0.05
  config.optimizer.warmup = 0.1
  config.optimizer.clip = 1.0
  return default.finish(config, argument, width=12, layers=2, mlp_width=24)
