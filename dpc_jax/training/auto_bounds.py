"""Bounds of the widths found on the way: `config.precision.bounds = "auto"`."""

import json
import pathlib
from typing import Any

import jax

from dpc_jax.policy import bounds
from dpc_jax.quant import grids
from dpc_jax.training import build, sharding
from dpc_jax.training import config as config_lib
from dpc_jax.training import state as state_lib

_FILE = "found_bounds.json"


def find(
  parts: build.Parts, state: state_lib.TrainState
) -> bounds.PrecisionBounds:
  """The bounds of the state's weights, between 2 and `precision.b_max`.

  Raises:
    ConfigError: no width reaches a threshold.
  """
  precision = parts.config.precision
  # Whole on every process, where they are split over the mesh.
  whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(parts.mesh))
  try:
    return bounds.precision_bounds(
      {"params": whole(state.params), **state.model_state},
      tau_min=precision.tau_min,
      tau_max=precision.tau_max,
      widths=range(grids.MIN_WIDTH, precision.b_max + 1),
      grid=parts.model.quantization.weights,
    )
  except ValueError as error:
    raise config_lib.ConfigError(f"config.precision: {error}") from None


def restart(
  parts: build.Parts,
  abstract: state_lib.TrainState,
  state: state_lib.TrainState,
  found: bounds.PrecisionBounds,
) -> tuple[state_lib.TrainState, dict[str, grids.LayerBits]]:
  """(the state with the schedule begun between the bounds, its first widths).

  Nothing recompiles: bounds are data of the schedule's state.

  Args:
    parts: of the run.
    abstract: the state's shardings.
    state: of the run so far.
    found: the bounds.
  """
  shardings = jax.tree.map(lambda x: x.sharding, abstract.schedule_state)
  begin = jax.jit(
    lambda: parts.schedule_state(found.b_min, found.b_max),
    out_shardings=shardings,
  )
  state = state.replace(schedule_state=begin())

  bits, _ = jax.jit(
    lambda state: state_lib.update_schedule(parts.schedule, state)
  )(state)
  return state, jax.device_get(bits)


def write(
  workdir: pathlib.Path, step: int, found: bounds.PrecisionBounds
) -> None:
  """Writes `found_bounds.json`: step, bounds, mean and worst similarities."""
  result = {
    "step": step,
    "b_min": found.b_min,
    "b_max": found.b_max,
    "mean": found.mean,
    "worst": found.worst,
  }
  temporary = workdir / "bounds.tmp"
  temporary.write_text(json.dumps(result, indent=2) + "\n")
  temporary.replace(workdir / _FILE)


def read(workdir: pathlib.Path) -> dict[str, Any] | None:
  """What `write` wrote, or None."""
  path = workdir / _FILE
  return json.loads(path.read_text()) if path.exists() else None


def text(step: int, found: bounds.PrecisionBounds) -> str:
  """The bounds in a line."""
  b_min, b_max = (
    f"{b} bits (mean similarity {found.mean[b]:.5f})"
    for b in (found.b_min, found.b_max)
  )
  return f"bounds of the weights at step {step}: {b_min} to {b_max}"
