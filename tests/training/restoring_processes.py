"""One of two processes: python -m tests.training.restoring_processes ...

Arguments: address of the coordinator, processes, index of this one, workdir.
They save and restore where one alone sees another folder, or fails.
"""

import errno
import pathlib
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpc_jax.training import checkpoint, checks, checksums, peers

LENGTH = 8


def restore_again(workdir: pathlib.Path, index: int, state: jax.Array) -> None:
  """Saves, and restores by the word of process 0 alone."""
  abstract = {
    "x": jax.ShapeDtypeStruct(state.shape, state.dtype, sharding=state.sharding)
  }
  checkpoints = checkpoint.Checkpoints(workdir, keep=20)
  for step in (1, 2):
    checkpoints.save(step, {"x": state + step}, {}, {})
  checkpoints.close()
  multihost_utils.sync_global_devices("all is on disk")

  checkpoints = checkpoint.Checkpoints(workdir, keep=20)
  problem = checksums.problem
  checksums.problem = broken if index == 0 else forbidden
  try:
    checkpoints.restore_newest(abstract, print)
  except OSError as error:
    print(f"told: {errno.errorcode[error.errno]} of {error.filename}")

  # The disk shows the other process what was there a while ago.
  if index == 1:
    checkpoints._manager._checkpoints.delete_if(lambda info: info.step == 2)
  else:
    checksums.problem = lambda folder: "bad" if folder.name == "2" else None
  step, found, _ = checkpoints.restore_newest(abstract, print)
  mine = [np.asarray(x.data) for x in found["x"].addressable_shards]
  print(f"restored: {step} {np.unique(mine)}")
  checksums.problem = problem
  checkpoints.save(2, {"x": state + 3}, {}, {})
  checkpoints.close()
  multihost_utils.sync_global_devices("all is on disk again")

  # One without checksums, which one process alone cannot read.
  if index == 0:
    (workdir / "checkpoints" / "2" / checksums.NAME).unlink()
  checkpoints = checkpoint.Checkpoints(workdir, keep=20)
  if index == 1:
    checkpoints._manager.restore = damaged
  checkpoints.restore_newest(abstract, print)
  # The next thing of a run that is common to all.
  multihost_utils.sync_global_devices("restored")


def broken(*args, **kwargs):
  raise OSError(errno.EIO, "Input/output error", "a file")


def damaged(*args, **kwargs):
  raise ValueError("DATA_LOSS: of a file")


def forbidden(folder):
  raise AssertionError(f"{folder} is for process 0 to check")


def main() -> None:
  """Joins the other, and ends as the programs do."""
  address, count, index, workdir = sys.argv[1:]
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 1)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(address, int(count), int(index))
  mesh = jax.make_mesh((2,), ("x",))
  spec = jax.sharding.PartitionSpec("x")
  state = jax.device_put(
    np.zeros(LENGTH, np.float32), jax.sharding.NamedSharding(mesh, spec)
  )
  try:
    restore_again(pathlib.Path(workdir), int(index), state)
  except checks.ConfigError as error:
    print(f"error: {error}")
    peers.leave(2, 0)
  except jax.errors.JaxRuntimeError as error:
    print(f"error: {peers.explain(error)}")
    peers.leave(peers.EXIT_CODE, 0)


if __name__ == "__main__":
  main()
