"""One of two processes: python -m tests.training.saving_processes ...

Arguments: address of the coordinator, processes, index of this one, workdir.
For one of them the disk is full, as `make_case` says; no other is told.
"""

import contextlib
import errno
import json
import pathlib
import sys

import jax
import numpy as np

from dpc_jax.training import checkpoint, peers

# Not what ends them: the test is over by then.
HEARTBEAT_TIMEOUT_S = 60
GRACE_S = 0.5


def make_case(workdir: pathlib.Path, victim: int, saves: int) -> None:
  """`victim` has no disk for the first of so many saves; 0: for its folder."""
  case = {"victim": victim, "saves": saves}
  (workdir / "case.json").write_text(json.dumps(case))


def fill_disk(
  checkpoints: checkpoint.Checkpoints, index: int, saves: int
) -> None:
  """Process 0 can write all but the last file; another one not its arrays."""
  checkpointer = checkpoints._manager._checkpointer

  def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device", "a file")

  async def full_at_once(*args, **kwargs):
    full()

  if saves == 0:
    checkpointer.create_temporary_path = full_at_once
    return
  if index == 0:
    checkpointer._save_step_metadata = full
    return
  start = checkpointer._async_manager.start_async_commit

  def start_in_vain(directory, commit_futures, on_commit_callback):
    commit_futures[0].result = full
    start(directory, commit_futures, on_commit_callback)

  checkpointer._async_manager.start_async_commit = start_in_vain


def save(workdir: pathlib.Path, index: int) -> None:
  """Saves as often as the case says, and waits."""
  case = json.loads((workdir / "case.json").read_text())
  mesh = jax.make_mesh((2,), ("x",))
  spec = jax.sharding.PartitionSpec("x")
  state = jax.device_put(
    np.zeros(8, np.float32), jax.sharding.NamedSharding(mesh, spec)
  )
  checkpoints = checkpoint.Checkpoints(workdir, keep=1)
  with contextlib.closing(checkpoints), peers.hurry(GRACE_S):
    if index == case["victim"]:
      fill_disk(checkpoints, index, case["saves"])
    for step in range(max(case["saves"], 1)):
      checkpoints.save(step, {"x": state + step}, {}, {})
      # The steps between; by then the one knows that its disk is full.
      jax.block_until_ready(state + step)
      if index == case["victim"] and step == 0:
        checkpoints._thread.join()
    checkpoints.wait()


def main() -> None:
  """Joins the other, and ends as the programs do."""
  address, count, index, workdir = sys.argv[1:]
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 1)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(
    address,
    int(count),
    int(index),
    heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
  )
  with peers.watch(f"process {index}: "):
    try:
      save(pathlib.Path(workdir), int(index))
    # As `experiments.cli.run` does.
    except Exception as error:
      found = peers.explain(error, workdir)
      if found is None:
        peers.leave(1, 0.2)
        raise
      print(f"error: process {index}: {found.line}", flush=True)
      peers.leave(found.code, 0)


if __name__ == "__main__":
  main()
