r"""Trains one recipe.

  python -m experiments.train --config=configs/digits_resnet8.py:dpc \
    --workdir=runs/digits_dpc
"""

import sys

from dpc_jax.training import loop
from experiments import cli


def main() -> None:
  """Trains `--config` in `--workdir`."""
  loop.train_and_evaluate(cli.FLAGS.config, cli.FLAGS.workdir)


if __name__ == "__main__":
  cli.define_config()
  cli.define_distributed()
  sys.exit(cli.run(main, sys.argv))
