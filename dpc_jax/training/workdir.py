"""The folder of a run: what it is told to hold, and who trains there."""

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpc_jax.training import checks
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
    BusyError: another run is under way there.
  """
  with contextlib.ExitStack() as stack:
    done = mistake = None
    if jax.process_index() == 0:
      try:
        stack.enter_context(_lock(workdir))
        config_lib.claim_workdir(config, workdir)
        done = summary_lib.read(workdir)
      except checks.ConfigError as error:
        mistake = error
    if jax.process_count() > 1:
      mistake = _agreed(config, mistake)
    if mistake is not None:
      raise mistake
    done = tell(None if done is None else json.dumps(done))
    yield None if done is None else json.loads(done)


def tell(text: str | None) -> str | None:
  """What the first process says, in all processes, which all must ask."""
  if jax.process_count() == 1:
    return text
  sent = b"" if text is None else b"\0" + text.encode()
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(sent))))
  buffer = np.zeros(size, np.uint8)
  if jax.process_index() == 0:
    buffer[:] = np.frombuffer(sent, np.uint8)
  if size == 0:
    return None
  return bytes(multihost_utils.broadcast_one_to_all(buffer))[1:].decode()


def _agreed(config, mistake) -> checks.ConfigError | None:
  """The first process's mistake; or that the configs are not the same."""
  found = tell(None if mistake is None else str(mistake))
  if found is not None:
    return mistake or checks.ConfigError(found)
  own = np.frombuffer(bytes.fromhex(config_lib.config_hash(config)), np.uint8)
  hashes = np.asarray(multihost_utils.process_allgather(own))
  others = [i for i, x in enumerate(hashes) if np.any(x != hashes[0])]
  if not others:
    return None
  return checks.ConfigError(
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
