r"""A two-layer LSTM of width 650 on Penn Treebank, 40 epochs of SGD.

  python -m experiments.train --config=configs/ptb_lstm.py:dpc \
    --workdir=runs/ptb_lstm_dpc --config.data.dir=DIR

Methods: float, static8, dpc and others (README); METHOD,smoke tries the code.
Not run at full length here, and its time not measured.
Published test perplexity: 96.95 static 8/8, 96.39 CPT (CPT); their LSTM's
other settings are not known to us, and the schedule, cosine, is ours.
Bounds: CPT's for LSTMs, 5..8.
All four products have 1,690,000 weights, so DPC gives each of them 7 bits. The
softmax is in float and costs more than they do; to quantize it too:

    --config.model.quantize_all=True

DIR holds the prepared set or the plain text files (README).
"""

import ml_collections

from configs import default


def get_config(argument: str = "dpc") -> ml_collections.ConfigDict:
  config = default.get_config(argument)
  config.steps = 53_120  # 40 epochs
  config.batch_size = 20
  config.eval_batch_size = 20
  config.eval_every = 1_328  # an epoch
  config.checkpoint_every = 1_328
  config.data.name = "ptb"
  config.data.unroll = 35
  config.model.name = "lstm_lm"
  config.model.width = 650
  config.model.layers = 2
  config.model.dropout = 0.5
  config.precision.b_min = 5
  config.optimizer.learning_rate = 20.0
  config.optimizer.weight_decay = 0.0
  config.optimizer.momentum = 0.0
  config.optimizer.clip = 0.25
  return default.finish(config, argument, width=8)
