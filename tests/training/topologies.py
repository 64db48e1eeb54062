"""Runs that differ in their devices and processes alone.

As a program it is one process of several:
python -m tests.training.topologies ADDRESS PROCESSES INDEX WORKDIR
"""

import pathlib
import sys

import jax
import numpy as np

from dpc_jax.training import build, loop, metrics, sharding
from dpc_jax.training import step as step_lib
from tests import compiling
from tests.training import tiny

DEVICES = 8
STEPS = 50
SAVED = 20  # the step that another topology goes on from
CASES = {
  "float": {"precision.method": "float"},
  "width 32": {
    "precision.weights": 32,
    "precision.activations": 32,
    "precision.gradients": 32,
  },
  "dpc": {},
}
MESHES = {
  "data": {"mesh.data": 8},
  "fsdp": {"mesh.data": 1, "mesh.fsdp": 8},
  "data and fsdp": {"mesh.data": 2, "mesh.fsdp": 4},
  # Over two processes where each has two devices: both read the same rows.
  "tensor": {
    "mesh.tensor": 4,
    "mesh.data": None,
    "mesh.rules": (("second/kernel", (None, None, None, "tensor")),),
  },
}
# Bounds that are found on whatever mesh the run is on by then.
FOUND = {"precision.bounds": "auto", "precision.bounds_step": SAVED + 5}


def make_config(case: str, mesh: dict[str, int]):
  """Of a case of `CASES`, or a method, on a mesh."""
  method = "dpc" if case in CASES else case
  return tiny.make_config(
    method,
    **{
      # Wide enough to split.
      "model.width": 24,
      "model.dropout": 0.2,
      "steps": STEPS,
      "batch_size": 32,
      "data.augment": True,
      "optimizer.learning_rate": 0.1,
      "checkpoint_every": SAVED,
      "eval_every": STEPS,
      "log_every": 1,
      **CASES.get(case, {}),
      **mesh,
    },
  )


def train(config, rounding: int | None = None):
  """{leaf or "losses": array}, after all steps, and after the first one.

  Args:
    config: of the run.
    rounding: another seed of stochastic rounding, and of nothing else.
  """
  keys = step_lib._rngs

  def other_keys(*args):
    rngs = keys(*args)
    return rngs | {"quant": jax.random.fold_in(rngs["quant"], rounding)}

  with compiling.fast():
    parts = build.build(config)
    if rounding is not None:
      step_lib._rngs = other_keys
    try:
      programs = build.compile_programs(parts)
    finally:
      step_lib._rngs = keys
    state, losses, first = programs.init(), [], None
    batches = parts.feed.train(0, config.steps)
    for rows in batches:
      state, sums = programs.train_step(
        state, sharding.put_batch(rows, parts.mesh)
      )
      sums = jax.device_get(sums)  # see sharding.steps_ahead
      losses.append(sums.loss / sums.count)
      if first is None:
        first = whole(state, parts.mesh)
    batches.close()
    last = whole(state, parts.mesh)
  return last | {"losses": np.array(losses)}, first


def whole(state, mesh):
  """{leaf: array}, of leaves that may be split over processes."""
  copy = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))
  return tiny.leaves(copy(state))


def main() -> None:
  """Joins the others, trains each case, leaves `CASE-MESH-INDEX.npz`."""
  address, count, index, workdir = sys.argv[1:]
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", DEVICES // int(count))
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(address, int(count), int(index))
  tiny.register()
  metrics._event_writer = lambda workdir: None
  workdir = pathlib.Path(workdir)
  for case in CASES:
    last, first = train(make_config(case, MESHES["data"]))
    np.savez(workdir / f"{case}-data-{index}.npz", **last)
    np.savez(workdir / f"{case}-data-{index}-first.npz", **first)
  # Once more, and with split parameters.
  for case, name, mesh in (
    ("dpc", "again", "data"),
    ("dpc", "fsdp", "fsdp"),
    ("float", "tensor", "tensor"),
  ):
    last, _ = train(make_config(case, MESHES[mesh]))
    np.savez(workdir / f"{case}-{name}-{index}.npz", **last)
  with compiling.fast():
    run = make_config("dpc", MESHES["data"] | FOUND)
    loop.train_and_evaluate(run, workdir / "run")
    # What one process left, several go on from, and split it over fsdp.
    run = make_config("dpc", MESHES["fsdp"] | FOUND)
    loop.train_and_evaluate(run, workdir / "resumed")


if __name__ == "__main__":
  main()
