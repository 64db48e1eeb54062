"""The folder of a run: what it is told to hold, and who trains there."""

import contextlib
import fcntl
import os
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
# Bytes of what a process says of its config.
_LONGEST = 1000


class BusyError(checks.TransientError):
  """Somebody else trains in this folder now."""


@contextlib.contextmanager
def held(config: Any, workdir: pathlib.Path) -> Iterator[dict[str, Any] | None]:
  """Within it the folder is this run's, and nobody else's.

  Of several processes the first one looks, locks and writes `config.json`, and
  all take its word. The lock goes with its process, of a dead host later, when
  the file server gives it up; nobody waits for that here. Where the file system
  has no locks nothing is locked, and nothing of a finished run, which is only
  read.

  Args:
    config: resolved; the same in all processes.
    workdir: made if absent.

  Yields:
    The summary of a run that is finished already, or None.

  Raises:
    ConfigError: see `config.claim_workdir` and `summary.read`; or a process was
      started with another config than the first one.
    BusyError: another run is under way there; a TransientError as the other
      processes hear of it.
  """
  if jax.process_count() > 1:
    _check_same(config)
  with contextlib.ExitStack() as stack:

    def look():
      if not os.path.exists(workdir / "summary.json"):
        stack.enter_context(_lock(workdir))
      config_lib.claim_workdir(config, workdir)
      # Another run may have ended just before the lock was free.
      return summary_lib.read(workdir)

    yield agreement.from_first(look)


def _check_same(config) -> None:
  """Before anything that goes by the config is done together, or written."""
  first = agreement.from_first(lambda: config_lib.shared(config))
  words = ("process 0 has", f"process {jax.process_index()} has")
  text = config_lib.difference(config, first, words).encode()[:_LONGEST]
  # Of one length, as shapes must agree; over a mesh of its own.
  own = np.zeros(_LONGEST, np.uint8)
  own[: len(text)] = np.frombuffer(text, np.uint8)
  for said in np.asarray(multihost_utils.process_allgather(own)):
    if said.any():
      raise checks.ConfigError(
        f"config: not the same in all processes; {_text(said)}; start all of"
        " them with the same command, from the same code"
      )


def _text(said: np.ndarray) -> str:
  return bytes(said).rstrip(b"\0").decode(errors="ignore")


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
        f" it is done, or if none runs there, delete {folder / _LOCK}"
      ) from None
    except OSError:
      pass
    try:
      yield
    finally:
      # Processes that were forked meanwhile hold the file open, too.
      with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)
