"""The folder of a run: what it is told to hold, and who trains there."""

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpc_jax.training import agreement, checks
from dpc_jax.training import config as config_lib
from dpc_jax.training import summary as summary_lib

_LOCK = "lock"


class BusyError(checks.ConfigError):
  """Somebody else trains in this folder now."""


@contextlib.contextmanager
def held(config: Any, workdir: pathlib.Path) -> Iterator[dict[str, Any] | None]:
  """Within it the folder is this run's, and nobody else's.

  Of several processes the first one looks, locks and writes `config.json`, and
  all take its word. The lock goes with its process; where the file system has
  no locks nothing is locked.

  Args:
    config: resolved; the same in all processes.
    workdir: made if absent.

  Yields:
    The summary of a run that is finished already, or None.

  Raises:
    ConfigError: see `config.claim_workdir` and `summary.read`; or a process was
      started with another config than the first one.
    BusyError: another run is under way there; a ConfigError as the others
      hear of it.
  """
  with contextlib.ExitStack() as stack:

    def look():
      stack.enter_context(_lock(workdir))
      config_lib.claim_workdir(config, workdir)
      return summary_lib.read(workdir)

    done = agreement.from_first(look)
    if jax.process_count() > 1:
      _check_same(config)
    yield done


def _check_same(config) -> None:
  own = np.frombuffer(bytes.fromhex(config_lib.config_hash(config)), np.uint8)
  hashes = np.asarray(multihost_utils.process_allgather(own))
  others = [i for i, x in enumerate(hashes) if np.any(x != hashes[0])]
  if others:
    raise checks.ConfigError(
      f"config: that of process {others[0]} is not that of process 0; start all"
      " of them with the same command, from the same code"
    )


@contextlib.contextmanager
def _lock(folder: pathlib.Path) -> Iterator[None]:
  try:
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / _LOCK).open("w")
  except OSError:
    # Whoever claims the folder says what is wrong with it.
    yield
    return
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise BusyError(
        f"workdir = {folder}: another process trains this run; start again when"
        " it is done"
      ) from None
    except OSError:
      pass
    try:
      yield
    finally:
      # Processes that were forked meanwhile hold the file open, too.
      with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)
