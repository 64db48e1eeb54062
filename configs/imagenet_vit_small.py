r"""ViT-small with patches of 16 x 16 on ImageNet, 300 epochs of AdamW.

  python -m experiments.train --config=configs/imagenet_vit_small.py:dpc \
    --workdir=runs/imagenet_vit_small_dpc --config.data.dir=DIR

Methods: float, static8, dpc and others (README); METHOD,smoke tries the code.
The paper names vision transformers as future work: the recipe is ours and not
tuned. Not run here: no ImageNet, no accelerator; only its input was measured
(README).
No published figure.
Bounds: CPT's for ImageNet, 4..8.
10,000 training images are held out for every choice; to compare with published
figures, fix the choices first and add --config.data.holdout=0.
"""

import ml_collections

from configs import default


def get_config(argument: str = "dpc") -> ml_collections.ConfigDict:
  config = default.get_config(argument)
  config.steps = 372_412  # 300 epochs of 1,271,167 images
  config.batch_size = 1024
  config.eval_batch_size = 256
  config.eval_every = 5_000
  config.checkpoint_every = 5_000
  config.data.name = "imagenet2012"
  config.data.holdout = 10_000
  config.data.image_size = 224
  config.data.workers = 16
  config.model.name = "vit_small_imagenet"
  config.precision.b_min = 4
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = 1e-3
  config.optimizer.weight_decay = 0.1
  config.optimizer.warmup = 0.03
  config.optimizer.clip = 1.0
  return default.finish(
    config, argument, width=24, heads=3, layers=2, mlp_width=48, scan=True
  )
