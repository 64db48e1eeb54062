"""Checkpoints: orbax, the whole state, the host's sums and the config."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
  """The checkpoints of one run, in `workdir/checkpoints`.

  The input position is the step itself (see `dpc_jax.data.pipeline`).
  """

  def __init__(self, workdir: pathlib.Path, keep: int):
    """Opens or creates the folder; keeps the `keep` newest checkpoints."""
    self._manager = ocp.CheckpointManager(
      (workdir / "checkpoints").absolute(),
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
      item_names=("state", "host", "config"),
    )

  def latest_step(self) -> int | None:
    """The newest complete checkpoint's step, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, host: dict, config: dict) -> None:
    """Saves once per step; returns when the state may be donated."""
    if self.latest_step() == step:
      return
    # force: a save is asked for, so no policy of orbax may leave it out.
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        host=ocp.args.JsonSave(host),
        config=ocp.args.JsonSave(config),
      ),
      force=True,
    )

  def restore(self, step: int, abstract: Any) -> tuple[Any, dict]:
    """Returns (state, host) with the shardings of `abstract`."""
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract),
        host=ocp.args.JsonRestore(),
      ),
    )
    return restored.state, restored.host

  def wait(self) -> None:
    """Returns when all is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and lets go of the folder."""
    self.wait()
    self._manager.close()


def abstract_state(abstract: Any, shardings: Any) -> Any:
  """`abstract`, of eval_shape, with a sharding on every leaf.

  Args:
    abstract: a tree of shapes and dtypes.
    shardings: one for each leaf, in a tree of the same structure.
  """
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    abstract,
    shardings,
  )
