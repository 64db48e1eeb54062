r"""ResNet-8 on scikit-learn's digits: the demo, no download.

  python -m experiments.train --config=configs/digits_resnet8.py:dpc \
    --workdir=runs/digits_dpc

Methods: float, static8, dpc and others (README); METHOD,smoke tries the code.
The README's demo has the figures and the time. No published figure.
Bounds: CPT's for CIFAR, 3..8.
"""

import ml_collections

from configs import default


def get_config(argument: str = "dpc") -> ml_collections.ConfigDict:
  config = default.get_config(argument)
  config.steps = 449  # 20 epochs of 1,437 images
  config.batch_size = 64
  config.eval_every = 110
  config.log_every = 20
  config.checkpoint_every = 220
  config.data.name = "digits"
  config.model.name = "resnet8"
  config.optimizer.learning_rate = 0.05
  config.optimizer.warmup = 0.1
  return default.finish(config, argument, width=4)
