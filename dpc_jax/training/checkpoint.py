"""Checkpoints: orbax, the whole state, the host's sums, config and versions.

`checkpoints/STEP` is there once all processes have written their part. Soon
after, a thread of process 0 adds `checksums.json` (our decision: orbax restores
a flipped byte without a word). Before a restore the files are held against it.
Only then older checkpoints go, so that a run of checkpoints with checksums
never is without one. A run killed between the two leaves a checkpoint without
checksums; so did older programs. Its files are complete, as orbax renames the
folder last, so it is used if process 0 (see `unsealed`) and then orbax can read
it, and a line says that nothing vouches for its bytes.

All processes of a run go by what process 0 sees of the folder: on a disk over a
network the others may see what was there a while ago.
"""

import dataclasses
import functools
import pathlib
import shutil
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from dpc_jax.training import (
  about,
  agreement,
  checks,
  checksums,
  fit,
  peers,
  saver,
  unsealed,
)

DAMAGED = "damaged_checkpoints"
# orbax's end of the name of a folder that is not whole.
_UNFINISHED = ".orbax-checkpoint-tmp"
_AWAY = "move it out of that folder, and the one before it is used"


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
    # It keeps all: nothing may go before its successor has checksums.
    self._manager = saver.Manager(self._folder)
    # As process 0 sees them, oldest first; None before it was asked.
    self._steps: list[int] | None = None
    self._thread = None
    self._error = None

  def latest_step(self) -> int | None:
    """The newest complete checkpoint's step, or None."""
    if self._steps is None:
      return self._manager.latest_step()
    return self._steps[-1] if self._steps else None

  def score(self, step: int, value: float) -> None:
    """Says how good the state of a step is; higher is better."""
    self._policy.scores[step] = value

  def save(self, step: int, state: Any, host: dict, config: dict) -> None:
    """Saves once per step; returns when the state may be donated.

    Raises:
      Exception: the save before it failed, or its checksums did.
    """
    if self._steps is None:
      self._use(agreement.from_first(self._list))
    if self.latest_step() == step:
      return
    # An error is raised before the others are waited for: they may wait for
    # this process in the save that failed. One still under way is waited for
    # by orbax, once all are there, so that the end of one tells the others.
    if self._thread is not None and not self._thread.is_alive():
      self.wait()
    # force: a save is asked for, so no policy of orbax may leave it out.
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        host=ocp.args.JsonSave(host),
        config=ocp.args.JsonSave(config),
        about=ocp.args.JsonSave(about.written()),
      ),
      force=True,
    )
    try:
      self._join()
    finally:
      self._begin_to_seal(step)

  def _begin_to_seal(self, step: int) -> None:
    kept = self._policy.kept([*self._steps, step])
    old = [other for other in self._steps if other not in kept]
    self._steps = [*(s for s in self._steps if s in kept), step]
    self._thread = threading.Thread(
      target=self._seal, args=(step, old), name="checksums", daemon=True
    )
    self._thread.start()

  def _seal(self, step: int, old: Sequence[int]) -> None:
    """Waits for the commit; process 0 writes checksums, deletes the old."""
    try:
      self._manager.wait_until_finished()
    # Whatever it is, orbax raises it to every thread that waits.
    except Exception:
      return
    if jax.process_index() != 0:
      return
    try:
      checksums.write(self._folder / str(step))
      for other in old:
        self._delete(other)
    # A thread's error is seen by nobody: the next `_join` raises it.
    except Exception as error:
      self._error = error

  def _delete(self, step: int) -> None:
    """Under another name first: half a checkpoint must not look like one."""
    folder = self._folder / str(step)
    if folder.exists():
      doomed = self._folder / f"{step}.deleted{_UNFINISHED}"
      shutil.rmtree(folder.rename(doomed))

  def _join(self) -> None:
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    if self._error is not None:
      error, self._error = self._error, None
      raise error

  def restore(self, step: int, abstract: Any) -> tuple[Any, dict]:
    """Returns (state, host) of a step, with the shardings of `abstract`.

    All processes must call it: process 0 checks the files.

    Raises:
      ConfigError: the checkpoint is damaged, of a newer format, or does not fit
        `abstract`.
      OSError: the disk did not let process 0 check the files, or this process
        read them.
    """
    problem, is_sealed = agreement.from_first(lambda: self._examine(step))
    found = None
    if problem is None:
      found, problem = self._try(step, abstract, is_sealed)
    if found is None:
      raise checks.ConfigError(
        f"workdir = {self._workdir}: checkpoints/{step} is damaged: {problem};"
        f" {_AWAY}"
      )
    return found

  def restore_newest(
    self, abstract: Any, note: Callable[[str], None]
  ) -> tuple[int, Any, dict] | None:
    """Returns (step, state, host) of the newest checkpoint that is whole.

    Newer, damaged ones go to `workdir/damaged_checkpoints`, so that their steps
    can be saved again. What a killed run has not finished saving or deleting is
    deleted. All processes must call it, and none may be at work in the folder:
    process 0 checks the files.

    Args:
      abstract: the state's shapes, dtypes and shardings.
      note: takes a line on each damaged one, or on one without checksums.

    Returns:
      None if there is no checkpoint at all.

    Raises:
      ConfigError: all are damaged, and stay where they are; or the newest
        whole one is of a newer format, or of a state with other fields, shapes
        or dtypes; or, of several processes, this one cannot read one without
        checksums, which the others perhaps can: it stays, too, and this
        process must end.
      OSError: the disk did not let process 0 check the files, or this process
        read them. That is no damage, and nothing was moved.
    """
    self._use(agreement.from_first(self._tidy))
    problems = {}
    for step in reversed(self._steps):
      problem, is_sealed = agreement.from_first(lambda s=step: self._examine(s))
      found = None
      if problem is None:
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

  def _list(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def _tidy(self) -> list[int]:
    """Deletes what is not whole and never will be; the steps that are."""
    for path in self._folder.glob(f"*{_UNFINISHED}*"):
      shutil.rmtree(path)
    return self._list()

  def _use(self, steps: Collection[int]) -> None:
    """From now on these, of process 0's listing, are all there are."""
    self._steps = sorted(steps)
    # orbax refuses a step that it has listed. `reload` would list again.
    self._manager._checkpoints.delete_if(lambda info: info.step not in steps)

  def _examine(self, step: int) -> tuple[str | None, bool]:
    """(what is wrong with its files, whether there are checksums)."""
    folder = self._folder / str(step)
    problem = checksums.problem(folder)
    # Only now its `about` can be trusted.
    if problem is None and (found := about.too_new(folder)) is not None:
      raise checks.ConfigError(
        f"workdir = {self._workdir}: checkpoints/{step} is of format {found},"
        f" and this dpc_jax reads formats up to {about.FORMAT}; use a newer"
        " dpc_jax, or another workdir"
      )
    is_sealed = checksums.exist(folder)
    if problem is None and not is_sealed:
      problem = unsealed.problem(folder)
    return problem, is_sealed

  def _try(self, step, abstract, is_sealed):
    """((state, host), None), or (None, what is wrong) in the one process.

    Of several processes one alone may fail. It cannot tell the others, which
    wait for it within orbax, so it must end, and they with it.
    """
    if is_sealed:
      return self._read(step, abstract), None
    try:
      return self._read(step, abstract), None
    # Of a device, or of another process: the file may be as it should.
    except (checks.ConfigError, jax.errors.JaxRuntimeError, TimeoutError):
      raise
    # orbax has no class of its own for bad files, and for one that is gone
    # raises a bare Exception.
    except Exception as error:
      # That another process is lost comes as a ValueError from orbax's barrier.
      lost = jax.errors.JaxRuntimeError(str(error))
      if peers.explain(lost) is not None:
        raise lost from error
      refusal = unsealed.refusal(error, self._folder / str(step))
      if refusal is not None:
        raise refusal from error
      problem = f"orbax cannot read it: {unsealed.text(error)}"
      if jax.process_count() == 1:
        return None, problem
      raise checks.ConfigError(
        f"workdir = {self._workdir}: checkpoints/{step} has no"
        f" {checksums.NAME}, and {problem}; {_AWAY}"
      ) from error

  def _set_aside(self, problems, good, note) -> None:
    """Moves damaged checkpoints out of the way of a later save."""
    names = agreement.from_first(
      lambda: [self._move(step) for step in problems]
    )
    for (step, problem), name in zip(problems.items(), names, strict=True):
      note(
        f"warning: checkpoints/{step} is damaged: {problem}; moved to"
        f" {DAMAGED}/{name}, the one of step {good} is used"
      )
    self._use([step for step in self._steps if step not in problems])

  def _move(self, step: int) -> str:
    target = self._workdir / DAMAGED / str(step)
    target.parent.mkdir(exist_ok=True)
    n = 1
    while target.exists():
      n += 1
      target = target.with_name(f"{step}-{n}")
    (self._folder / str(step)).rename(target)
    return target.name

  def _read(self, step: int, abstract: Any) -> tuple[Any, dict]:
    there = self._manager.item_metadata(step).state
    # Of a file that is gone orbax says that nothing was saved.
    if not jax.tree.leaves(there):
      raise ValueError("it does not say what was saved")
    wanted, late = fit.check(
      abstract,
      there,
      f"workdir = {self._workdir}: checkpoints/{step}",
      functools.partial(about.origin, self._folder / str(step)),
    )
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(wanted),
        host=ocp.args.JsonRestore(),
      ),
    )
    return fit.complete(restored.state, abstract, late), restored.host

  def wait(self) -> None:
    """Returns when all is on disk, checksums too."""
    try:
      self._manager.wait_until_finished()
    finally:
      self._join()

  def close(self) -> None:
    """Waits and lets go of the folder."""
    try:
      self.wait()
    finally:
      self._manager.close()


@dataclasses.dataclass
class _Policy:
  """Keeps the newest checkpoints and, if asked to, the best one."""

  newest: int
  best: bool
  scores: dict[int, float] = dataclasses.field(default_factory=dict)

  def kept(self, steps: Sequence[int]) -> set[int]:
    """Those of the steps, which come oldest first, that stay."""
    kept = set(steps[-self.newest :])
    rated = [step for step in steps if step in self.scores]
    if self.best and rated:
      kept.add(max(rated, key=self.scores.__getitem__))
    return kept


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
