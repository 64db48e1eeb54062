r"""A one-layer LSTM of width 200 on Penn Treebank, 4 epochs on a laptop.

  python -m experiments.train --config=configs/ptb_lstm_tiny.py:dpc \
    --workdir=runs/ptb_lstm_tiny_dpc --config.data.dir=DIR

Methods: float, static8, dpc and others (README); METHOD,smoke tries the code.
The README's table has the figures and the time. No published figure: the model
is ours. Bounds: CPT's for LSTMs, 5..8.
Both products have 160,000 weights, so DPC gives each of them 7 bits. The
softmax is in float and costs more than they do; to quantize it too:

    --config.model.quantize_all=True

DIR holds the prepared set or the plain text files (README).
"""

import ml_collections

from configs import default


def get_config(argument: str = "dpc") -> ml_collections.ConfigDict:
  config = default.get_config(argument)
  config.steps = 5_312  # 4 epochs
  config.batch_size = 20
  config.eval_batch_size = 20
  config.log_every = 50
  config.eval_every = 664  # half an epoch
  config.checkpoint_every = 664
  config.data.name = "ptb"
  config.data.unroll = 35
  config.model.name = "lstm_lm"
  config.model.width = 200
  config.model.layers = 1
  config.model.dropout = 0.2
  config.precision.b_min = 5
  config.optimizer.learning_rate = 20.0
  config.optimizer.weight_decay = 0.0
  config.optimizer.momentum = 0.0
  config.optimizer.clip = 0.25
  config.optimizer.warmup = 0.02
  return default.finish(config, argument, width=8)
