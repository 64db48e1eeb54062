"""Runs that are saved: their configs and their checkpoints."""

import json
import pathlib

import jax
import ml_collections

from dpc_jax.training import build, checkpoint, sharding
from dpc_jax.training import config as config_lib
from dpc_jax.training import state as state_lib


def update_config(
  run: str | pathlib.Path, config: ml_collections.ConfigDict, flag: str
) -> None:
  """Sets all fields of `config` to those of a run.

  Args:
    run: its workdir.
    config: has all fields of the run's.
    flag: which names the run, as a line of error begins.

  Raises:
    ConfigError: no run is there, or its config is damaged.
  """
  folder = pathlib.Path(run).expanduser()
  path = folder / "config.json"
  if not path.is_file() or not (folder / "checkpoints").is_dir():
    raise config_lib.ConfigError(
      f"{flag}: holds no run; name the workdir of one, with config.json and"
      " checkpoints/"
    )
  try:
    config.update(json.loads(path.read_text()))
  except (ValueError, TypeError, AttributeError):
    raise config_lib.ConfigError(
      f"{flag}: its config.json is damaged"
    ) from None


def restore(
  run: str | pathlib.Path,
  parts: build.Parts,
  flag: str,
  step: int | None = None,
) -> tuple[int, state_lib.TrainState]:
  """Returns (step, state) of a checkpoint, on the mesh of `parts`.

  Args:
    run: its workdir.
    parts: built from the run's config, for whatever mesh.
    flag: which names the run, as a line of error begins.
    step: of the checkpoint; None is the newest.

  Raises:
    ConfigError: no checkpoint, a damaged one, or one that does not fit.
    OSError: the disk does not let it be read.
  """
  shapes = jax.eval_shape(parts.init, jax.random.key(0))
  shardings = sharding.of_state(shapes, parts.mesh, parts.partition)
  checkpoints = checkpoint.Checkpoints(
    pathlib.Path(run).expanduser(), parts.config.keep_checkpoints
  )
  try:
    if step is None:
      step = checkpoints.latest_step()
    if step is None:
      raise config_lib.ConfigError(
        f"{flag}: no checkpoint there yet; wait for the first"
      )
    state, _ = checkpoints.restore(
      step, checkpoint.abstract_state(shapes, shardings)
    )
  finally:
    checkpoints.close()
  return step, state
