r"""A two-layer Transformer of width 128 on WikiText-2: minutes on a laptop.

  python -m experiments.train --config=configs/wikitext2_transformer.py:dpc \
    --workdir=runs/wikitext2_transformer_dpc --config.data.dir=DIR

Methods: float, static8, dpc and others (README); METHOD,smoke tries the code.
The README's table has the figures and the time. No published figure: the
model is ours. Bounds: CPT's for Transformers, 4..8.
DIR holds the prepared set or the plain text files (README).
"""

import ml_collections

from configs import default


def get_config(argument: str = "dpc") -> ml_collections.ConfigDict:
  config = default.get_config(argument)
  config.steps = 600
  config.batch_size = 16
  config.eval_batch_size = 16
  config.eval_every = 300
  config.log_every = 20
  config.checkpoint_every = 200
  config.data.name = "wikitext2"
  config.data.unroll = 64
  config.model.name = "transformer_lm"
  config.model.width = 128
  config.model.layers = 2
  config.model.heads = 4
  config.model.mlp_width = 512
  config.model.cutoffs = (4_000, 12_000)
  config.model.dropout = 0.1
  config.model.attention_dropout = 0.0
  config.precision.b_min = 4
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = 2e-3
  config.optimizer.weight_decay = 0.01
  config.optimizer.clip = 1.0
  config.optimizer.warmup = 0.1
  return default.finish(
    config,
    argument,
    width=16,
    layers=2,
    heads=2,
    mlp_width=32,
    cutoffs=(40, 120),
  )
