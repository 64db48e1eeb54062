"""Several batches in one array, along a leading axis, on the devices."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpc_jax.training import sharding


def batches(mesh: Mesh) -> NamedSharding:
  """The sharding of stacked batches: the second axis over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(None, *sharding.batch(mesh).spec))


def put(rows: Any, mesh: Mesh) -> Any:
  """Makes global batches of this process's rows.

  Args:
    rows: a pytree of arrays (batches, rows of this process, ...).
    mesh: of the devices.
  """
  _, parts = sharding.rows_of_process(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(
      batches(mesh), x, (x.shape[0], parts * x.shape[1], *x.shape[2:])
    ),
    rows,
  )


def put_everywhere(arrays: Any, mesh: Mesh) -> Any:
  """Copies arrays that every process holds whole to all devices."""
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(
      sharding.replicated(mesh), x, x.shape
    ),
    arrays,
  )
