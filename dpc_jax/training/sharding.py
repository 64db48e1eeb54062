"""The device mesh and the shardings of state and batches.

Data parallel: the batch is split over the axis `data`, the state replicated.
Ranges, batch statistics and losses are those of the whole batch, since XLA's
partitioner keeps the meaning of the program.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpc_jax.training import config as config_lib

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int | None = None) -> Mesh:
  """A mesh of the axes data, fsdp and tensor; the last two have size 1.

  Args:
    data: number of devices; None takes all. Less than all is for one process
      alone.

  Raises:
    ConfigError: more devices than there are, or a part of several processes'.
  """
  available = jax.device_count()
  data = available if data is None else data
  if not 1 <= data <= available:
    raise config_lib.ConfigError(
      f"config.mesh.data = {data}: there are {available} devices; use"
      f" 1..{available}, or leave it out for all"
    )
  if data != available and jax.process_count() > 1:
    raise config_lib.ConfigError(
      f"config.mesh.data = {data}: with several processes it must be all"
      f" {available} devices"
    )
  # Process by process, so that the rows of a process are contiguous in the
  # global batch (see `dpc_jax.data.pipeline`).
  ordered = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  devices = np.asarray(ordered[:data]).reshape(data, 1, 1)
  return Mesh(devices, AXES)


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device: the sharding of all that is no batch."""
  return NamedSharding(mesh, PartitionSpec())


def batch(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: its leading axis over `data`."""
  return NamedSharding(mesh, PartitionSpec("data"))


def of_state(abstract: Any, mesh: Mesh) -> Any:
  """Shardings of a train state: replicated, but for its carry's rows.

  Args:
    abstract: a `TrainState`, of eval_shape for instance.
    mesh: of the devices.
  """
  return jax.tree.map(lambda _: replicated(mesh), abstract).replace(
    carry=jax.tree.map(lambda _: batch(mesh), abstract.carry)
  )


def put_batch(rows: Any, mesh: Mesh) -> Any:
  """Makes the global batch of this process's rows (a pytree of arrays)."""
  sharding = batch(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), rows
  )
