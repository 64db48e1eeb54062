"""The device mesh and the shardings of state and batches.

The mesh has the axes `data`, `fsdp` and `tensor`. The batch is split over the
first two, parameters over the last two (see `dpc_jax.training.partition`), and
XLA's partitioner keeps the meaning of the program: ranges, batch statistics
and losses are those of the whole batch on any mesh.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpc_jax.training import checks, partition

AXES = ("data", "fsdp", "tensor")
_BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(
  data: int | None = None, fsdp: int | None = 1, tensor: int | None = 1
) -> Mesh:
  """A mesh of the axes data, fsdp and tensor.

  Args:
    data: devices on this axis; of the three, one may be None: the rest.
    fsdp: likewise.
    tensor: likewise.

  Raises:
    ConfigError: sizes that do not fit the devices. One process may use a part
      of its devices; several use all of theirs.
  """
  available = jax.device_count()
  sizes = _fill((data, fsdp, tensor), available)
  count = math.prod(sizes)
  text = " x ".join(
    f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True)
  )
  if count > available:
    most = available * sizes[0] // count
    remedy = f"use 1..{most}" if most else "lower mesh.fsdp or mesh.tensor"
    checks.fail(
      "mesh.data",
      sizes[0],
      f"{_devices(available)}, and {text} is more; {remedy}, or leave"
      " it out for all",
    )
  if count != available and jax.process_count() > 1:
    checks.fail(
      "mesh.data",
      sizes[0],
      f"{text} = {count} devices: several processes must use all {available}",
    )
  # Process by process, so that the rows of a process are contiguous in the
  # global batch (see `dpc_jax.data.pipeline`).
  ordered = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  mesh = Mesh(np.asarray(ordered[:count]).reshape(sizes), AXES)
  rows_of_process(mesh)
  return mesh


def _devices(count) -> str:
  return f"there are {count} devices" if count > 1 else "there is 1 device"


def _fill(sizes, available) -> tuple[int, ...]:
  """The sizes, None replaced by the rest of the devices."""
  for axis, size in zip(AXES, sizes, strict=True):
    if size is not None and size < 1:
      checks.fail(
        f"mesh.{axis}",
        size,
        f"{_devices(available)}; use 1..{available}, or leave it out",
      )
  open_axes = [a for a, s in zip(AXES, sizes, strict=True) if s is None]
  given = math.prod(s for s in sizes if s is not None)
  if len(open_axes) > 1:
    checks.fail(f"mesh.{open_axes[1]}", None, "only one axis can be the rest")
  if open_axes and available % given:
    # The first axis of several that is not 1 is as good a culprit as any.
    axis, size = next(
      (a, s) for a, s in zip(AXES, sizes, strict=True) if s not in (None, 1)
    )
    checks.fail(
      f"mesh.{axis}",
      size,
      f"the {available} devices are no multiple of {given}; use a divisor",
    )
  return tuple(available // given if s is None else s for s in sizes)


def batch_parts(mesh: Mesh) -> int:
  """Into how many parts the rows of a batch are split."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def rows_of_process(mesh: Mesh) -> tuple[int, int]:
  """(i, n): this process reads the i-th of n equal parts of a batch's rows.

  Where `tensor` spans processes, several of them read the same rows.

  Raises:
    ConfigError: a size of `tensor` that neither divides the devices of a
      process nor is a multiple of them.
  """
  processes = jax.process_count()
  tensor, local = mesh.shape["tensor"], mesh.size // processes
  if processes == 1 or local % tensor == 0:
    return jax.process_index(), processes
  if tensor % local:
    checks.fail(
      "mesh.tensor",
      tensor,
      f"a process has {local} devices; use a divisor or a multiple of that",
    )
  sharers = tensor // local
  return jax.process_index() // sharers, processes // sharers


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: its leading axis over `data` and `fsdp`."""
  return NamedSharding(mesh, _BATCH)


def of_state(
  abstract: Any, mesh: Mesh, specs: partition.Specs | None = None
) -> Any:
  """Shardings of a train state, one for every leaf.

  Parameters as `specs` say, what the optimizer keeps of a parameter with it,
  the carry by the batch's rows; widths, ranges, statistics of batches, costs,
  counts and keys are replicated.

  Args:
    abstract: a `TrainState`, of eval_shape for instance.
    mesh: of the devices.
    specs: {path of a parameter: PartitionSpec}; None replicates all.
  """
  shardings = jax.tree.map(lambda _: replicated(mesh), abstract).replace(
    carry=jax.tree.map(lambda _: batch(mesh), abstract.carry)
  )
  if specs is None:
    return shardings
  fields = {
    name: jax.tree.map(
      lambda spec: NamedSharding(mesh, spec),
      partition.follow(getattr(abstract, name), abstract.params, specs),
      is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    for name in ("params", "opt_state")
  }
  return shardings.replace(**fields)


def make_gather(
  mesh: Mesh, specs: partition.Specs | None
) -> Callable[[Any], Any] | None:
  """Returns params -> params without their split over `fsdp`, for the products.

  Inside jit. Without it the partitioner may split the activations' features
  instead, and send these around. The gradient of what was gathered is split
  again, so that a compiler may scatter the sum over devices. None where nothing
  is split over `fsdp`.
  """
  specs = specs or {}
  if all(partition.gathered(spec) == spec for spec in specs.values()):
    return None

  def constrained(params, change):
    shardings = jax.tree.map(
      lambda spec: NamedSharding(mesh, change(spec)),
      partition.follow(params, params, specs),
      is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    return jax.lax.with_sharding_constraint(params, shardings)

  @jax.custom_vjp
  def gather(params):
    return constrained(params, partition.gathered)

  def split(_, gradients):
    return (constrained(gradients, lambda spec: spec),)

  gather.defvjp(lambda params: (gather(params), None), split)
  return gather


def steps_ahead() -> int:
  """How many steps may be under way on the devices while the host goes on.

  0 on the CPUs of several processes: there, steps under way at once can wait
  for each other's collectives for ever (seen with gloo, 4 processes).
  """
  several = jax.process_count() > 1
  return 0 if several and jax.default_backend() == "cpu" else 2


def put_batch(rows: Any, mesh: Mesh) -> Any:
  """Makes the global batch of this process's rows (a pytree of arrays)."""
  sharding = batch(mesh)
  _, count = rows_of_process(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(
      sharding, x, (count * x.shape[0], *x.shape[1:])
    ),
    rows,
  )
