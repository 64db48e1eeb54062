"""A lost process and a full disk in one line."""

import errno
import logging
import os
import signal
import subprocess
import sys
import time

import jax
import pytest

from dpc_jax.training import peers


@pytest.fixture
def several(monkeypatch):
  """As if this process had joined others."""
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)


GLOO = (
  "UNKNOWN: Gloo all-reduce failed: [gloo/transport/tcp/pair.cc:538] Read"
  " error [127.0.0.1]:8615: Connection reset by peer"
)
HEARTBEAT = (
  "INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1"
  " heartbeat timeout."
)

UNHEALTHY = (
  "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):"
)
REMOTE = (
  "INTERNAL: NCCL operation ncclAllReduce failed: remote process exited or"
  " there was a network error. Last NCCL warning(error) log entry (may be"
  " unrelated) ''."
)


@pytest.mark.parametrize("text", [GLOO, HEARTBEAT, UNHEALTHY, REMOTE])
def test_a_lost_peer(text, several):
  found = peers.explain(jax.errors.JaxRuntimeError(f"{text}\n{'more' * 99}"))
  assert (found.code, found.is_loss) == (3, True)
  assert "was lost" in found.line and "\n" not in found.line
  # JAX's own words, shortened.
  assert f"(JAX: {text[:157]}" in found.line
  assert "more" not in found.line and len(found.line) < 270


# Of the same libraries, and nobody was lost.
OTHERS = [
  "RESOURCE_EXHAUSTED: Out of memory",
  "INTERNAL: NCCL operation ncclCommInitRank failed: invalid argument",
  "UNIMPLEMENTED: Gloo does not support all-to-all of this type",
  "INVALID_ARGUMENT: barrier id is empty",
]


def test_one_process_loses_no_peer():
  assert peers.explain(jax.errors.JaxRuntimeError(GLOO)) is None


def test_other_errors_of_jax_are_its_own(several):
  for text in OTHERS:
    assert peers.explain(jax.errors.JaxRuntimeError(text)) is None
  assert peers.explain(ValueError("heartbeat timeout")) is None
  assert peers.explain(KeyError(GLOO)) is None


def test_a_collective_that_fails_as_it_is_started(several):
  """JAX raises the same words as another error then."""
  assert peers.explain(ValueError(GLOO)).is_loss


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(number):
  found = peers.explain(OSError(number, os.strerror(number), "runs/a/x.tmp"))
  assert found.line.startswith("runs/a/x.tmp: the disk is full")
  assert found.code == 3


def test_a_full_disk_in_the_words_of_others():
  text = "RESOURCE_EXHAUSTED: write failed [OS error 28: ENOSPC No space left]"
  assert "the disk is full" in peers.explain(ValueError(text)).line


@pytest.mark.parametrize("form", ["[os_error_code='%d'", "[OS error %d: X]"])
def test_a_number_in_the_words_of_others(form):
  """TensorStore's, as it was seen to write it, and as it once did."""
  link = ValueError(f'UNKNOWN: Failed to open: "/x": No. {form % errno.ESTALE}')
  found = peers.system_error(link)
  assert (found.errno, found.filename) == (errno.ESTALE, None)
  assert peers.explain(link).line.startswith("a disk: Stale file handle; mend")
  missing = ValueError(form % errno.ENOENT)
  assert peers.explain(missing) is None
  assert peers.system_error(missing).errno == errno.ENOENT
  for none in (ValueError("os error: none"), TimeoutError("no number")):
    assert peers.system_error(none) is None


REFUSED = [
  *(errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
  *(errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO),
]


@pytest.mark.parametrize("number", REFUSED)
def test_a_path_that_is_refused(number, tmp_path, monkeypatch):
  """Below the workdir the run goes on some time; elsewhere it is a mistake."""
  monkeypatch.chdir(tmp_path)
  said = os.strerror(number)
  (tmp_path / "link").symlink_to("runs")
  inside = "runs/a", "runs/a/b", tmp_path / "runs/a/b"
  for path in map(str, inside):
    for workdir in ("runs/a", "runs/a/", tmp_path / "link" / "a"):
      found = peers.explain(OSError(number, said, path), workdir)
      assert found.line.startswith(f"{path}: {said}; mend it, and the same")
      assert found.code == 3
  for path in ("runs/ab", "/data/x"):
    for workdir in ("runs/a", "", None):
      found = peers.explain(OSError(number, said, path), workdir or "")
      assert found.line.startswith(f"{path}: {said}; ")
      assert found.line.endswith("give another path")
      assert (found.code, "save" in found.line) == (2, False)
  # A write to a file that is open names none.
  assert peers.explain(OSError(number, said), "runs/a").code == 3


def test_what_it_was_raised_from_counts():
  def of(cause, context):
    try:
      try:
        raise OSError(errno.ENOSPC, "No space left on device")
      except OSError as inner:
        if cause:
          raise RuntimeError("the save failed") from inner
        raise RuntimeError("the save failed")  # noqa: B904
    except RuntimeError as outer:
      return outer

  assert "the disk is full" in peers.explain(of(True, False)).line
  assert "the disk is full" in peers.explain(of(False, True)).line


def raised_from(error, cause):
  error.__cause__ = cause
  return error


def test_what_came_first_is_the_cause(several):
  full = OSError(errno.ENOSPC, "No space left on device", "a file")
  lost = jax.errors.JaxRuntimeError(HEARTBEAT)
  # The others do not come to a barrier after it.
  assert "disk is full" in peers.explain(raised_from(lost, full)).line
  # orbax's word for a barrier that fails; the same with a number.
  for late in (TimeoutError("Timed out"), OSError(errno.ETIMEDOUT, "No")):
    lost = jax.errors.JaxRuntimeError(HEARTBEAT)
    assert isinstance(late, TimeoutError)
    assert peers.explain(raised_from(late, lost)).is_loss
  assert not peers.explain(OSError(errno.ETIMEDOUT, "No", "x")).is_loss


def test_a_missing_file_is_no_fault_of_the_disk():
  assert peers.explain(FileNotFoundError(errno.ENOENT, "no", "x")) is None
  assert peers.explain(RuntimeError("no")) is None


def run(code):
  """Runs a process that takes itself for one of several."""
  head = (
    "import os, sys, time, jax\n"
    "jax.distributed.is_initialized = lambda: True\n"
    "from dpc_jax.training import peers\n"
  )
  start = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-c", head + code],
    capture_output=True,
    text=True,
    timeout=60,
  )
  return done.returncode, done.stderr, time.monotonic() - start


def test_an_abort_ends_with_a_line():
  """From a thread of C, as JAX's, while Python sleeps or computes."""
  for busy in ("time.sleep(60)", "while True: pass"):
    code, err, _ = run(
      "import ctypes, threading\n"
      "abort = ctypes.CDLL(None).abort\n"
      "with peers.watch('process 1 of 2: '):\n"
      "  threading.Timer(0.2, abort).start()\n"
      f"  {busy}\n"
    )
    assert code == peers.EXIT_CODE
    line = err.splitlines()[-1]
    assert line.startswith("error: process 1 of 2: aborted; what JAX says")
    assert "if another process was lost" in line


def test_after_it_an_abort_is_as_before():
  code, err, _ = run(
    "try:\n"
    "  with peers.watch('process 1 of 2: '):\n"
    "    raise ValueError\n"
    "except ValueError:\n"
    "  os.abort()\n"
  )
  assert (code, err) == (-signal.SIGABRT, "")


def test_a_process_leaves_with_its_code():
  code, _, _ = run("peers.leave(7, 0)\ntime.sleep(60)")
  assert code == 7
  # The others do not come.
  code, _, _ = run("peers.leave(7, 0.2)\ntime.sleep(60)")
  assert code == 7
  # They do.
  code, _, seconds = run("peers.leave(7, 50)\nsys.exit(5)")
  assert code == 5 and seconds < 40


def closing(
  text, seconds, *, outer="", inner="contextlib.nullcontext()", by_orbax=False
):
  """A run that loses another, closes in some seconds, and may be watched."""
  raising = f"raise jax.errors.JaxRuntimeError({text!r})"
  if by_orbax:
    raising = (
      "raise TimeoutError('Timed out while waiting for async_write_complete"
      f" barrier.') from jax.errors.JaxRuntimeError({text!r})"
    )
  return run(
    "import contextlib\n"
    f"with {outer or 'contextlib.nullcontext()'}:\n"
    "  try:\n"
    f"    with {inner}, peers.hurry(0.2):\n"
    f"      {raising}\n"
    "  except Exception:\n"
    f"    time.sleep({seconds})\n"
    "print('closed', file=sys.stderr)"
  )


def test_a_loss_does_not_wait_for_what_closes_the_run():
  watch = "peers.watch('process 1 of 2: ')"
  for by_orbax in (False, True):
    code, err, _ = closing(GLOO, 60, outer=watch, by_orbax=by_orbax)
    assert code == peers.EXIT_CODE and "closed" not in err
    assert err.startswith("error: process 1 of 2: another process of this run")
  # Another error; a caller who handles it; a program that is not ours.
  for found in (
    closing(OTHERS[0], 1, outer=watch),
    closing(GLOO, 1, inner=watch),
    closing(GLOO, 1),
  ):
    assert found[:2] == (0, "closed\n")


def fail(logger, message, error):
  try:
    raise error
  except type(error):
    logger.exception(message)


@pytest.mark.parametrize("name", ["absl", "asyncio"])
def test_tracebacks_that_orbax_logs_are_left_out(name, caplog):
  logger = logging.getLogger(name)
  error = ValueError("[source locations='tensorstore/kvstore/x.cc:3']")
  # A thread of orbax, by the file that it fails in.
  save = compile("raise OSError(28, 'full')", "/x/orbax/a.py", "exec")
  with pytest.raises(KeyError), peers.watch():
    try:
      exec(save)
    except OSError:
      logger.exception("of a save")
    fail(logger, "of TensorStore", error)
    fail(logger, "ours", TypeError("no"))
    logger.error("a word")
    raise KeyError
  fail(logger, "of a thread that outlives the save", error)
  with peers.watch(is_quiet=False):
    fail(logger, "to debug", error)
  with peers.watch():
    pass
  fail(logger, "after all is well", error)
  said = [r.getMessage() for r in caplog.records]
  assert said == ["ours", "a word", "to debug", "after all is well"]


def test_one_process_leaves_by_itself():
  peers.leave(7, 0)
  with peers.watch():
    pass
