r"""A one-layer LSTM of width 200 on Penn Treebank, 4 epochs on a laptop.

  python -m experiments.train --config=configs/ptb_lstm_tiny.py:dpc \
    --workdir=runs/ptb_lstm_tiny_dpc --config.data.dir=DIR

Methods: float, static8, dpc; METHOD,smoke tries the code in seconds.
The README's table has the figures and the time. Bounds: CPT's for LSTMs, 5..8.
DIR holds the prepared set or the plain text files (README).
"""

import ml_collections

from configs import default, ptb_lstm


def get_config(argument: str = "dpc") -> ml_collections.ConfigDict:
  config = ptb_lstm.get_config(argument)
  config.epochs = 4.0
  config.log_every = 50
  config.eval_every = 664
  config.checkpoint_every = 664
  config.model.width = 200
  config.model.layers = 1
  config.model.dropout = 0.2
  config.optimizer.warmup = 0.02
  return default.finish(config, argument, width=8)
