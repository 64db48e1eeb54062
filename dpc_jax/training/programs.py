"""The compiled train step, and with `steps_per_call` the loop around it."""

import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpc_jax.quant import remat, sums
from dpc_jax.training import (
  checkpoint,
  checks,
  compile_cache,
  sharding,
  stacked,
)
from dpc_jax.training import step as step_lib

if typing.TYPE_CHECKING:
  from dpc_jax.training import build


def compile_train(
  parts: "build.Parts", abstract: Any, gather: step_lib.Gather | None
) -> tuple[Callable[..., Any], Callable[..., Any] | None, list[int], bool]:
  """Compiles one program: the train step, or a loop of `steps_per_call`.

  Args:
    parts: of the run.
    abstract: the state's shapes, dtypes and shardings.
    gather: see `sharding.make_gather`.

  Returns:
    (train_step, train_steps, traces, cached), as in `build.Programs`.

  Raises:
    ConfigError: `precision.backend` cannot multiply exactly in some layer.
  """
  mesh, size = parts.mesh, parts.config.steps_per_call
  replicated, traces = sharding.replicated(mesh), [0]
  run = step_lib.make_train_step(
    parts.model,
    parts.optimizer,
    parts.schedule,
    parts.task,
    gather,
    parts.config.remat,
  )
  batch = parts.feed.train_batch
  arguments = (with_sharding(batch, sharding.batch(mesh)),)
  if size > 1:
    run = step_lib.make_train_steps(run)
    several = jax.eval_shape(lambda rows: _repeated(rows, size), batch)
    arguments = (
      with_sharding(several, stacked.batches(mesh)),
      jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
    )

  def counted(state, *arguments):
    traces[0] += 1
    return run(state, *arguments)

  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  jitted = jax.jit(
    counted, out_shardings=(shardings, replicated), donate_argnums=0
  )
  try:
    lowered = jitted.lower(abstract, *arguments)
  except sums.InexactSumError as error:
    # Those of a batch's gradients show only now.
    backend = parts.config.precision.backend
    checks.fail("precision.backend", backend, str(error))
  with compile_cache.hits() as hits:
    compiled = lowered.compile(_compiler_options(parts))
  if size == 1:
    return compiled, None, traces, bool(hits)
  return _single(compiled, size, mesh), compiled, traces, bool(hits)


def _compiler_options(parts):
  """Options for steps that keep codes, or compute anew; others need none."""
  config = parts.config
  if config.remat is None and config.precision.storage_bits is None:
    return None
  return remat.compiler_options(parts.mesh.devices.flat[0].platform)


def with_sharding(tree: Any, shard: jax.sharding.Sharding) -> Any:
  """Shapes and dtypes, all with one sharding."""
  return checkpoint.abstract_state(tree, jax.tree.map(lambda _: shard, tree))


def _single(train_steps, size, mesh):
  """One step of a program that takes several batches."""
  repeat = jax.jit(
    lambda batch: _repeated(batch, size), out_shardings=stacked.batches(mesh)
  )

  def train_step(state, batch):
    state, metrics = train_steps(state, repeat(batch), np.int32(1))
    return state, jax.tree.map(lambda x: x[0], metrics)

  return train_step


def _repeated(batch, size):
  return jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *x.shape)), batch)
