"""orbax's manager of checkpoints, as a run of several processes needs it."""

import asyncio
import contextlib
import pathlib
import sys
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import orbax.checkpoint as ocp

from dpc_jax.training import about

# Of one save in the background, from its start to its commit, seconds. In it a
# process writes all of its data, so that a slow disk must have the time: 3 GB
# at 5 MB/s. It ends a save whose disk hangs; the death of another process ends
# one much sooner. Our decision; orbax's own is 1200.
TIMEOUT_S = 600


class Manager(ocp.CheckpointManager):
  """orbax's, with two things left out that are of no use here, and do harm.

  A process whose save failed does not wait for the others before it says so.
  orbax's does, in a barrier that they do not reach: they wait for this one in
  another, to commit. So all would wait for `TIMEOUT_S`, and then be told of the
  time that ran out in place of the disk.

  And JAX's preemption service is not asked, see `reached_preemption`.
  """

  def __init__(self, folder: pathlib.Path):
    """Opens or creates the folder; it deletes no checkpoint by itself."""
    self._wait = ocp.multihost.get_barrier_sync_fn()
    self._saver: int | None = None
    super().__init__(
      folder,
      options=ocp.CheckpointManagerOptions(
        create=True,
        async_options=ocp.AsyncOptions(
          timeout_secs=TIMEOUT_S,
          barrier_sync_fn=self._wait_for_all,
          # Else one thread makes the folders, and others wait for it. If the
          # disk lets it make none, they wait on for 300 s, and so does Python
          # on its way out.
          create_directories_asynchronously=False,
        ),
      ),
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        **{
          name: ocp.JsonCheckpointHandler()
          for name in ("host", "config", about.NAME)
        },
      },
    )

  def save(self, *args: Any, **kwargs: Any) -> bool:
    """orbax's."""
    self._saver = threading.get_ident()
    return super().save(*args, **kwargs)

  def reached_preemption(self, step: int) -> bool:
    """No: whether to stop is asked by the loop alone, after every step.

    JAX keeps the last step that it was asked about. orbax asks from a thread of
    process 0, about a step some time ago. If SIGTERM came just then, the
    processes would agree to stop at a step that one of them is past.
    """
    return False

  def _wait_for_all(self, *, key: str, timeout_ms: int) -> None:
    error = sys.exc_info()[1]
    # In the thread that called `save` it may be one that the caller handles.
    if error is not None and threading.get_ident() != self._saver:
      raise error
    self._wait(key=key, timeout_ms=timeout_ms)


def _run_to_the_end(coroutine: Coroutine[Any, Any, Any]) -> Any:
  """Runs it in a new event loop, and after an error all that it began.

  orbax closes the loop at the first array that it cannot write or read. Each of
  the others then has a traceback when it is done, in the midst of what follows.
  """
  loop = asyncio.new_event_loop()
  try:
    asyncio.set_event_loop(loop)
    try:
      return loop.run_until_complete(coroutine)
    except Exception:
      others = asyncio.gather(*asyncio.all_tasks(loop), return_exceptions=True)
      loop.run_until_complete(others)
      raise
  finally:
    asyncio.set_event_loop(None)
    loop.close()


@contextlib.contextmanager
def orderly_errors() -> Iterator[None]:
  """In it, an error of orbax's does not leave others behind that speak later.

  orbax has no option for it, so one of its private functions is another one
  meanwhile, if this orbax has it; the command line does so, and the package
  itself changes nothing.
  """
  name = "_run_sync_via_new_loop"
  module = sys.modules.get("orbax.checkpoint._src.asyncio_utils")
  if not hasattr(module, name):
    yield
    return
  former = getattr(module, name)
  setattr(module, name, _run_to_the_end)
  try:
    yield
  finally:
    setattr(module, name, former)
