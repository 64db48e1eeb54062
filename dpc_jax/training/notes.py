"""What a run tells on the console beside its figures."""

import pathlib
from typing import Any

import jax

from dpc_jax.training import build, partition, summary
from dpc_jax.training import state as state_lib


def before_compiling(parts: build.Parts) -> list[str]:
  """Lines on what is about to be compiled, and for which devices."""
  config, lines = parts.config, []
  if config.data.fake:
    lines.append(
      f"data.fake is set: made-up {parts.task.unit} in the form of"
      f" {config.data.name}; accuracies and perplexities mean nothing"
    )
  device = summary.environment(parts.mesh)["device"]
  unused = jax.device_count() - parts.mesh.devices.size
  left = f", {unused} of all devices left out" if unused else ""
  return [*lines, f"compiling for {device}{left}"]


def compiled(programs: build.Programs) -> str:
  """How long that took, and whether the train step was there already."""
  source = ", the train step from the cache" if programs.cached else ""
  return f"compiled in {programs.seconds:.1f} s{source}"


def layers(
  parts: build.Parts, abstract: Any, state: state_lib.TrainState
) -> list[str]:
  """A table of the layers, and one of parameters that are split, if any.

  Args:
    parts: of the run.
    abstract: the state's shapes, dtypes and shardings.
    state: whose widths are shown.
  """
  bits = jax.device_get(state_lib.layer_bits(state))
  tables = [f"layers\n{summary.layer_table(parts, bits)}"]
  if any(parts.partition.values()):
    table = partition.table(abstract.params, parts.partition, parts.mesh)
    tables.append(f"parameters\n{table}")
  return tables


def diverged(
  workdir: pathlib.Path, what: str, step: int, latest: int | None
) -> str:
  """Why the run ends, what is left of it, and what to do.

  Args:
    workdir: of the run.
    what: is not finite.
    step: at which that was found.
    latest: the step of the newest checkpoint, or None.
  """
  left = (
    "no checkpoint was saved"
    if latest is None
    else f"the newest checkpoint is of step {latest}"
  )
  return (
    f"{workdir}: {what} at step {step}; {left}; lower"
    " optimizer.learning_rate or raise precision.b_min, in another workdir"
  )
