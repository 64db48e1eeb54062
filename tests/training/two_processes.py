"""One process of several: python -m tests.training.two_processes ...

Arguments: address of the coordinator, processes, index of this one, workdir.
Trains a float run, a DPC run, an LSTM, and an adaptive run that only SIGTERM
ends.
"""

import contextlib
import pathlib
import sys

import jax
import numpy as np

from dpc_jax.training import build, loop, metrics, termination
from dpc_jax.training import workdir as workdir_lib
from tests.training import tiny

DEVICES_PER_PROCESS = 2


def make_config(method: str, **changes):
  """The same config in one process and in several."""
  return tiny.make_config(
    method,
    **{
      "mesh.data": 4,
      "batch_size": 32,
      "data.augment": True,
      "optimizer.learning_rate": 0.02,
      "log_every": 1,
      **changes,
    },
  )


def make_text_config():
  """An LSTM whose carry lies on both; 3 rows of evaluation on 4 devices."""
  return make_config(
    "float",
    **{
      "data.name": "ptb",
      "data.fake": True,
      "data.unroll": 9,
      "data.augment": None,
      "model.name": "lstm_lm",
      "model.width": 8,
      "model.layers": 1,
      "eval_batch_size": 3,
    },
  )


def make_endless_config():
  """Adaptive, with decisions at the steps 2 (the reference), 4, 6, ..."""
  return make_config(
    "adaptive",
    **{
      "steps": 20_000,
      "checkpoint_every": 10**6,
      "eval_every": 10**6,
      "data.train_size": 64,
      "precision.adaptive.signal": "variance",
      "precision.adaptive.warmup": 1,
      "precision.adaptive.patience": 1,
      "precision.adaptive.threshold": 0.0,
      "precision.adaptive.freeze": 1.0,
    },
  )


def train_endlessly(workdir: pathlib.Path, index: str) -> dict | None:
  """Leaves this process's share of the last state in `state-INDEX.npz`."""
  with termination.watch() as is_stopping:
    parts = build.build(make_endless_config())
    folder = workdir / "endless"
    with (
      workdir_lib.held(parts.config, folder),
      contextlib.closing(loop._Run(parts, folder)) as run,
    ):
      summary = run.train(is_stopping)
  state = tiny.leaves(run.state)
  np.savez(workdir / f"state-{index}.npz", **state)
  return summary


def main() -> None:
  """Joins the others, then trains."""
  address, count, index, workdir = sys.argv[1:]
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", DEVICES_PER_PROCESS)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(address, int(count), int(index))
  tiny.register()
  metrics._event_writer = lambda workdir: None
  workdir = pathlib.Path(workdir)
  for method in ("float", "dpc"):
    summary = loop.train_and_evaluate(make_config(method), workdir / method)
    if summary["steps"] != 6:
      raise ValueError(f"steps = {summary['steps']} in the summary")
  loop.train_and_evaluate(make_text_config(), workdir / "text")
  summary = train_endlessly(workdir, index)
  print(f"process {index} of {jax.process_count()} stopped: {summary}")
  sys.stdout.flush()


if __name__ == "__main__":
  main()
