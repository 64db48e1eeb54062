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
import pathlib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

# Of a run that goes on where it was, by the same command, once what ended it
# is mended.
EXIT_CODE = 3
# How long a process that fails waits for the others to fail alike, seconds.
GRACE_S = 10.0

_AGAIN = "the same command goes on from the last save"
_LOST = f"another process of this run was lost; {_AGAIN}"
_ABORTED = (
  f"aborted; what JAX says stands above; if another process was lost, {_AGAIN}"
)
# What JAX says when another process does not answer, in lower case: gloo, NCCL,
# gRPC and the coordination service. Their names alone say nothing: their
# mistakes bear them, too.
_SIGNS = re.compile(
  r"connection (reset|closed|refused)|broken pipe|socket closed"
  r"|caused pair closure|timed out waiting \d+ ?ms|remote process exited"
  r"|failed to connect to all addresses|heartbeat timeout|sending heartbeats"
  r"|barrier (failed|timed out)|coordination service has stopped"
  r"|set to error|in error state|another task died"
)
# How XLA's errors begin, those too that JAX raises as ValueError, as it does
# when a collective fails as the program is started.
_STATUS = re.compile(r"[A-Z]+(_[A-Z]+)*: ")
# Characters of JAX's own text that a line shows.
_SHOWN = 160
_FULL = (errno.ENOSPC, errno.EDQUOT)
# What TensorStore and TensorFlow say in place of the number.
_FULL_TEXTS = ("no space left", "enospc", "quota exceeded", "edquot")
# A disk that is damaged or, over a network, gone. Linux alone has EREMOTEIO.
_GONE = (
  errno.EIO,
  errno.ESTALE,
  errno.ETIMEDOUT,
  getattr(errno, "EREMOTEIO", errno.EIO),
)
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM, *_GONE)
# How TensorStore ends the text of an error of the system.
_NUMBER = re.compile(r"\[os_error_code='(\d+)'|\[OS error (\d+):")
# Where orbax is, and TensorStore below it, in paths and in texts.
_SAVERS = ("orbax", "tensorstore")


class Ending(NamedTuple):
  """How a process ends.

  Attributes:
    line: what happened and what to do.
    code: its exit code: `EXIT_CODE` if the same command goes on, 2 after a
      user's mistake.
    is_loss: another process was lost.
  """

  line: str
  code: int = EXIT_CODE
  is_loss: bool = False


class _Watch:
  """What `watch` began: in it, `hurry` counts.

  Attributes:
    who: this process in words.
    timer: of `hurry`, or None.
    handler: what C calls on an abort, or None.
  """

  def __init__(self, who: str):
    self.who = who
    self.timer: threading.Timer | None = None
    self.handler = None


_watches: list[_Watch] = []


def explain(
  error: BaseException, workdir: str | os.PathLike = ""
) -> Ending | None:
  """How to end after an error that is no fault of the program.

  A full disk, a lost process where there are several, and a path that the
  system refuses: below the workdir something befell the run; elsewhere, such
  as in `data.dir`, somebody has to correct a path or its permissions.

  Args:
    error: as it was raised; what it was raised from counts, too.
    workdir: of the run; "" if there is none.

  Returns:
    None for any other error.
  """
  # What came first is the cause: a barrier fails after a full disk, and what
  # waits for it runs out of time after a loss.
  for link in reversed(list(_chain(error))):
    text = str(link).lower()
    told = _system_error(link)
    number = None if told is None else told.errno
    if number in _REFUSED:
      return _refused(told, workdir)
    if number in _FULL or any(sign in text for sign in _FULL_TEXTS):
      where = _path(link) or "the workdir"
      return Ending(f"{where}: the disk is full; make space, and {_AGAIN}")
    is_told = isinstance(link, jax.errors.JaxRuntimeError) or (
      isinstance(link, ValueError) and _STATUS.match(str(link))
    )
    if is_told and jax.distributed.is_initialized() and _SIGNS.search(text):
      return Ending(f"{_LOST} (JAX: {_first_line(link)})", is_loss=True)
  return None


def system_error(error: BaseException) -> OSError | None:
  """The error of the system that one is, or was raised from; the first of them.

  Those that TensorStore tells by their number in its text count, too: they are
  made into an OSError without a path. One without a number is none.
  """
  found = map(_system_error, reversed(list(_chain(error))))
  return next((told for told in found if told is not None), None)


def _system_error(link: BaseException) -> OSError | None:
  if isinstance(link, OSError):
    return None if link.errno is None else link
  numbers = _NUMBER.search(str(link))
  if numbers is None:
    return None
  number = int(numbers[1] or numbers[2])
  return OSError(number, os.strerror(number))


def _chain(error: BaseException) -> Iterator[BaseException]:
  """The error, and what it was raised from or during, newest first."""
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    yield error
    error = error.__cause__ or error.__context__


def _refused(error: OSError, workdir: str | os.PathLike) -> Ending:
  path = _path(error)
  # Without a path it came while reading or writing what is open already.
  if path is None or _is_below(path, workdir):
    where = path or "a disk"
    return Ending(f"{where}: {error.strerror}; mend it, and {_AGAIN}")
  remedy = "change its permissions, or give another path"
  if error.errno in _GONE:
    remedy = "its disk is damaged or gone; mend it, or give another path"
  elif error.errno == errno.EROFS:
    remedy = "give another path"
  return Ending(f"{path}: {error.strerror}; {remedy}", 2)


def _path(error: BaseException) -> str | None:
  name = getattr(error, "filename", None)
  return os.fsdecode(name) if isinstance(name, str | bytes) and name else None


def _is_below(path: str, workdir: str | os.PathLike) -> bool:
  if not os.fspath(workdir):
    return False
  given = pathlib.Path(workdir).expanduser()
  # With links followed, as orbax does, and without.
  return any(
    pathlib.Path(way(path)).is_relative_to(way(given))
    for way in (os.path.abspath, os.path.realpath)
  )


def _first_line(error: BaseException) -> str:
  """Of its text, shortened."""
  line = " ".join((str(error).strip().splitlines() or [""])[0].split())
  return line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "..."


@contextlib.contextmanager
def watch(who: str = "", is_quiet: bool = True) -> Iterator[None]:
  """In it, an abort by JAX's coordination service ends with a line.

  The line comes after JAX's own trace, and the exit code is `EXIT_CODE`; any
  other abort ends likewise, since they cannot be told apart. One process by
  itself may abort as ever. The handler is in Python: while other C code holds
  the interpreter's lock, and never lets go, an abort waits with it.

  Args:
    who: this process in words, to begin the line with: "process 0 of 2: ".
    is_quiet: errors that the threads of orbax log with a traceback are not
      shown: they are raised, too. After an error they stay hidden, until the
      next `watch`: a save that failed may have threads that are not done.
  """
  watched = _Watch(who)
  loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
  with contextlib.ExitStack() as stack, contextlib.ExitStack() as shown:
    if jax.distributed.is_initialized():
      stack.callback(_end_aborts(watched))
    for logger in loggers:
      logger.removeFilter(_is_shown)
      if is_quiet:
        logger.addFilter(_is_shown)
        shown.callback(logger.removeFilter, _is_shown)
    _watches.append(watched)
    try:
      yield
    except Exception:
      shown.pop_all()
      raise
    finally:
      _watches.remove(watched)
      if watched.timer is not None:
        watched.timer.cancel()


def _is_shown(record: logging.LogRecord) -> bool:
  """Whether a record of a log is no traceback of a save."""
  if not record.exc_info:
    return True
  error = record.exc_info[1]
  places = [record.pathname, str(error)]
  trace = error.__traceback__ if error is not None else None
  while trace is not None:
    places.append(trace.tb_frame.f_code.co_filename)
    trace = trace.tb_next
  return not any(saver in place for place in places for saver in _SAVERS)


def _end_aborts(watched: _Watch) -> Callable[[], None]:
  """From now on an abort writes the line; returns what ends that."""
  line = f"error: {watched.who}{_ABORTED}\n".encode()
  # Python's own signal handlers wait for the interpreter's next step, which
  # does not come after an abort.
  watched.handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(
    lambda number: _end(line)
  )
  set_handler = ctypes.CDLL(None).signal
  set_handler.argtypes = (ctypes.c_int, ctypes.c_void_p)
  set_handler.restype = ctypes.c_void_p
  address = ctypes.cast(watched.handler, ctypes.c_void_p)
  former = set_handler(signal.SIGABRT, address)
  return lambda: set_handler(signal.SIGABRT, former)


@contextlib.contextmanager
def hurry(grace_s: float = GRACE_S) -> Iterator[None]:
  """After the loss of a process in it, this one ends within `grace_s` seconds.

  What closes a run waits for the save under way, and that for all processes.
  The error goes on its way, and whoever gets it may be faster. It ends a
  process only within `watch`, that of the command line, and no more after it:
  a caller of the library may want to go on.
  """
  try:
    yield
  # Of any kind: orbax raises its own TimeoutError from JAX's error. Which of
  # them tell of a loss is for `explain` to say.
  except Exception as error:
    found = explain(error)
    if _watches and found is not None and found.is_loss:
      watched = _watches[-1]
      line = f"error: {watched.who}{found.line}\n".encode()
      watched.timer = threading.Timer(grace_s, _end, [line])
      watched.timer.daemon = True
      watched.timer.start()
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
