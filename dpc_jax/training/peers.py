"""What befalls a run from outside, in one line: a lost process, a full disk.

JAX ends a process whose peer is lost in one of two ways. A collective that
loses its connection raises, at once; then the process, on its way out, waits
for the dead. Or JAX's coordination service, which hears no heartbeat, aborts
it from C++, after `jax.distributed.initialize(heartbeat_timeout_seconds=...)`,
with a stack trace. Both end here with a line and `EXIT_CODE`.
"""

import contextlib
import ctypes
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator

import jax

# Of a run that goes on where it was, by the same command, once what ended it
# is mended.
EXIT_CODE = 3
# How long a process that fails waits for the others to fail alike, seconds.
GRACE_S = 10.0

_AGAIN = "the same command goes on from the last save"
_LOST = f"another process of this run was lost; {_AGAIN}"
# What JAX says when another process does not answer: gloo, NCCL and the
# coordination service.
_SIGNS = (
  "gloo",
  "nccl",
  "connection reset",
  "connection closed",
  "socket closed",
  "coordination service",
  "coordinationservice",
  "heartbeat",
  "barrier",
  "preempted",
)
_FULL = (errno.ENOSPC, errno.EDQUOT)
# What TensorStore and TensorFlow say in place of the number.
_FULL_TEXTS = ("no space left", "enospc", "quota exceeded", "edquot")
_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)

# C calls it as long as the process lives.
_handler = None


def explain(error: BaseException) -> str | None:
  """One line on an error that neither the user nor the program made.

  Args:
    error: as it was raised; what it was raised from counts, too.

  Returns:
    What happened and what to do; None for any other error. That a process was
    lost is only said where there are several.
  """
  for link in _chain(error):
    text = str(link).lower()
    if isinstance(link, OSError) and link.errno in _UNWRITABLE:
      return f"{_where(link)}: {link.strerror}; mend it, and {_AGAIN}"
    number = link.errno if isinstance(link, OSError) else None
    if number in _FULL or any(sign in text for sign in _FULL_TEXTS):
      return f"{_where(link)}: the disk is full; make space, and {_AGAIN}"
    is_told = isinstance(link, jax.errors.JaxRuntimeError)
    if (
      is_told
      and jax.distributed.is_initialized()
      and any(sign in text for sign in _SIGNS)
    ):
      return _LOST
  return None


def _chain(error: BaseException) -> Iterator[BaseException]:
  """The error, and what it was raised from or during, newest first."""
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    yield error
    error = error.__cause__ or error.__context__


def _where(error: BaseException) -> str:
  name = getattr(error, "filename", None)
  return str(name) if name else "the workdir"


@contextlib.contextmanager
def watch(who: str = "") -> Iterator[None]:
  """In it, an abort by JAX's coordination service ends with a line.

  The line comes after JAX's own trace, and the exit code is `EXIT_CODE`. One
  process by itself may abort as ever. Errors that the threads of orbax log with
  a traceback are not shown: they are raised, too. After an error that holds to
  the end of the process, when the rest of them comes.

  Args:
    who: this process in words, to begin the line with: "process 0 of 2: ".
  """
  if jax.distributed.is_initialized():
    _end_aborts(f"error: {who}{_LOST}\n".encode())
  loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
  for logger in loggers:
    logger.addFilter(_has_no_traceback)
  yield
  for logger in loggers:
    logger.removeFilter(_has_no_traceback)


def _has_no_traceback(record: logging.LogRecord) -> bool:
  return not record.exc_info


def _end_aborts(line: bytes) -> None:
  """From now on an abort writes the line and ends with `EXIT_CODE`."""

  # Python's own signal handlers wait for the interpreter's next step, which
  # does not come after an abort.
  global _handler
  _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: _end(line))
  ctypes.CDLL(None).signal(signal.SIGABRT, _handler)


@contextlib.contextmanager
def hurry(grace_s: float = GRACE_S) -> Iterator[None]:
  """After the loss of a process in it, this one ends within `grace_s` seconds.

  What closes a run waits for the save under way, and that for all processes.
  The error goes on its way, and whoever gets it may be faster.
  """
  try:
    yield
  except (jax.errors.JaxRuntimeError, TimeoutError) as error:
    if explain(error) == _LOST:
      timer = threading.Timer(grace_s, _end, [f"error: {_LOST}\n".encode()])
      timer.daemon = True
      timer.start()
    raise


def _end(line: bytes) -> None:
  os.write(2, line)
  os._exit(EXIT_CODE)


def leave(code: int, grace_s: float = GRACE_S) -> None:
  """Has the process end with `code`, even if the others do not come along.

  On its way out a process of several waits for all the others. After a
  mistake that all of them find they come; where one fails alone, the others
  wait for it in a collective, and learn only by its end that it is lost.

  Args:
    code: the exit code.
    grace_s: seconds to wait for the others; 0 ends the process at once.
  """
  if not jax.distributed.is_initialized():
    return
  sys.stdout.flush()
  sys.stderr.flush()
  if grace_s == 0:
    os._exit(code)
  timer = threading.Timer(grace_s, os._exit, [code])
  timer.daemon = True
  timer.start()
