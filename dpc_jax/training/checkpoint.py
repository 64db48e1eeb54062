"""Checkpoints: orbax, the whole state, the host's sums, config and versions.

`checkpoints/STEP` is there once all processes have written their part. Soon
after, a thread of process 0 adds `checksums.json` (our decision: orbax restores
a flipped byte without a word). Before a restore the files are held against it.
A run killed between the two leaves a checkpoint without checksums; so did
older programs. Its files are complete, as orbax renames the folder last, so it
is used if orbax can read it, and a line says that nothing vouches for its
bytes.
"""

import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dpc_jax.training import checks, checksums, fit

# Raised by one for a change that an older program could not read.
FORMAT = 2
DAMAGED = "damaged_checkpoints"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# What orbax raises of files that it cannot read.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError)
_POLL_S = 0.02


class Checkpoints:
  """The checkpoints of one run, in `workdir/checkpoints`.

  The input position is the step itself (see `dpc_jax.data.pipeline`).
  """

  def __init__(self, workdir: pathlib.Path, keep: int, keep_best: bool = False):
    """Opens or creates the folder.

    Args:
      workdir: of the run.
      keep: how many of the newest checkpoints are kept.
      keep_best: whether the one of the highest `score` is kept, too.
    """
    self._workdir = workdir
    self._folder = (workdir / "checkpoints").absolute()
    self._policy = _Policy(keep, keep_best)
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._policy, create=True
      ),
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        **{n: ocp.JsonCheckpointHandler() for n in ("host", "config", "about")},
      },
    )
    self._thread = None
    self._error = None

  def latest_step(self) -> int | None:
    """The newest complete checkpoint's step, or None."""
    return self._manager.latest_step()

  def score(self, step: int, value: float) -> None:
    """Says how good the state of a step is; higher is better."""
    self._policy.scores[step] = value

  def save(self, step: int, state: Any, host: dict, config: dict) -> None:
    """Saves once per step; returns when the state may be donated."""
    if self.latest_step() == step:
      return
    self._join()
    # force: a save is asked for, so no policy of orbax may leave it out.
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        host=ocp.args.JsonSave(host),
        config=ocp.args.JsonSave(config),
        about=ocp.args.JsonSave(_about()),
      ),
      force=True,
    )
    if jax.process_index() == 0:
      self._thread = threading.Thread(
        target=self._seal, args=(step,), name="checksums", daemon=True
      )
      self._thread.start()

  def _seal(self, step: int) -> None:
    """Waits for the commit, then writes the checksums."""
    while self._manager.is_saving_in_progress():
      time.sleep(_POLL_S)
    folder = self._folder / str(step)
    try:
      # A save that failed left none; orbax raises that to whoever waits.
      if folder.is_dir():
        checksums.write(folder)
    except OSError as error:
      self._error = error

  def _join(self) -> None:
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    if self._error is not None:
      error, self._error = self._error, None
      raise error

  def restore(self, step: int, abstract: Any) -> tuple[Any, dict]:
    """Returns (state, host) of a step, with the shardings of `abstract`.

    Raises:
      ConfigError: the checkpoint is damaged, or does not fit `abstract`.
    """
    problem = self._problem(step)
    if _agree(problem is not None):
      raise checks.ConfigError(
        f"workdir = {self._workdir}: checkpoints/{step} is damaged:"
        f" {problem or 'process 0 says how'}; use another step"
      )
    return self._read(step, abstract)

  def restore_newest(
    self, abstract: Any, note: Callable[[str], None]
  ) -> tuple[int, Any, dict] | None:
    """Returns (step, state, host) of the newest checkpoint that is whole.

    Newer, damaged ones go to `workdir/damaged_checkpoints`, so that their steps
    can be saved again; nothing is deleted. All processes must call it: process
    0 checks the files.

    Args:
      abstract: the state's shapes, dtypes and shardings.
      note: takes a line on each damaged one, or on one without checksums.

    Returns:
      None if there is no checkpoint at all.

    Raises:
      ConfigError: all are damaged, and stay where they are; or the newest
        whole one is of a state with other fields, shapes or dtypes.
    """
    problems = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      problem = self._problem(step)
      if _agree(problem is not None):
        problems[step] = problem or "process 0 says how"
        continue
      is_sealed = _agree(checksums.exist(self._folder / str(step)))
      found, problem = self._try(step, abstract, is_sealed)
      if found is None:
        problems[step] = problem
        continue
      self._set_aside(problems, step, note)
      if not is_sealed:
        note(
          f"the checkpoint of step {step} has no {checksums.NAME}: it could be"
          " read, but a changed byte would not be seen"
        )
      return step, *found
    if not problems:
      return None
    step, problem = next(iter(problems.items()))
    raise checks.ConfigError(
      f"workdir = {self._workdir}: all checkpoints are damaged; of the newest,"
      f" checkpoints/{step}, {problem}; put back a copy, or use another workdir"
    )

  def _problem(self, step: int) -> str | None:
    if jax.process_index() != 0:
      return None
    return checksums.problem(self._folder / str(step))

  def _try(self, step, abstract, is_sealed):
    """((state, host), None), or (None, what is wrong) in all processes."""
    if is_sealed:
      return self._read(step, abstract), None
    found, problem = None, "another process cannot read it"
    try:
      found = self._read(step, abstract)
    except checks.ConfigError:
      raise
    except _UNREADABLE as error:
      problem = f"orbax cannot read it: {' '.join(str(error).split())[:200]}"
    is_read = multihost_utils.process_allgather(np.int32(found is not None))
    return (found, None) if np.all(is_read) else (None, problem)

  def _set_aside(self, problems, good, note) -> None:
    """Moves damaged checkpoints out of the way of a later save."""
    for step, problem in problems.items():
      target = self._workdir / DAMAGED / str(step)
      if jax.process_index() == 0:
        target.parent.mkdir(exist_ok=True)
        n = 1
        while target.exists():
          n += 1
          target = target.with_name(f"{step}-{n}")
        (self._folder / str(step)).rename(target)
      note(
        f"warning: checkpoints/{step} is damaged: {problem}; moved to"
        f" {DAMAGED}/{target.name}, the one of step {good} is used"
      )
    if problems:
      multihost_utils.sync_global_devices("damaged checkpoints are moved")
      self._manager.reload()

  def _read(self, step: int, abstract: Any) -> tuple[Any, dict]:
    there = self._manager.item_metadata(step).state
    wanted, late = fit.check(
      abstract,
      there,
      f"workdir = {self._workdir}: checkpoints/{step}",
      functools.partial(self._origin, step),
    )
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(wanted),
        host=ocp.args.JsonRestore(),
      ),
    )
    return fit.complete(restored.state, abstract, late), restored.host

  def _origin(self, step: int) -> str:
    """What wrote a checkpoint."""
    path = self._folder / str(step) / "about" / "metadata"
    if not path.exists():
      return "format 1"
    about = json.loads(path.read_text())
    versions = about["versions"]
    return (
      f"format {about['format']}, dpc_jax {versions['dpc_jax']}, jax"
      f" {versions['jax']}, flax {versions['flax']}, optax {versions['optax']}"
    )

  def wait(self) -> None:
    """Returns when all is on disk, checksums too."""
    self._manager.wait_until_finished()
    self._join()

  def close(self) -> None:
    """Waits and lets go of the folder."""
    self.wait()
    self._manager.close()


@dataclasses.dataclass
class _Policy:
  """Keeps the newest checkpoints and, if asked to, the best one."""

  newest: int
  best: bool
  scores: dict[int, float] = dataclasses.field(default_factory=dict)

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    """One bool for each of the checkpoints, which come oldest first."""
    del context
    steps = [info.step for info in checkpoints]
    kept = set(steps[-self.newest :])
    rated = [step for step in steps if step in self.scores]
    if self.best and rated:
      kept.add(max(rated, key=self.scores.__getitem__))
    return [step in kept for step in steps]


def _agree(value: bool) -> bool:
  """What process 0 says, in all processes."""
  return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _about() -> dict[str, Any]:
  """The format, and the versions of what writes it."""
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return {"format": FORMAT, "versions": {"dpc_jax": _own(), **versions}}


def _own() -> str:
  # The program may run from its source tree, not installed.
  try:
    return importlib.metadata.version("dpc_jax")
  except importlib.metadata.PackageNotFoundError:
    return "of a source tree"


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
