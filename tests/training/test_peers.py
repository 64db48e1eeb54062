"""A lost process and a full disk in one line."""

import errno
import logging
import os
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


@pytest.mark.parametrize("text", [GLOO, HEARTBEAT])
def test_a_lost_peer(text, several):
  line = peers.explain(jax.errors.JaxRuntimeError(text))
  assert "was lost" in line and "\n" not in line


def test_one_process_loses_no_peer():
  assert peers.explain(jax.errors.JaxRuntimeError(GLOO)) is None


def test_other_errors_of_jax_are_its_own(several):
  error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
  assert peers.explain(error) is None
  assert peers.explain(ValueError(GLOO)) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(number):
  line = peers.explain(OSError(number, os.strerror(number), "runs/a/x.tmp"))
  assert line.startswith("runs/a/x.tmp: the disk is full")


def test_a_full_disk_in_the_words_of_others():
  text = "RESOURCE_EXHAUSTED: write failed [OS error 28: ENOSPC No space left]"
  assert "the disk is full" in peers.explain(ValueError(text))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_that_does_not_take_it(number):
  line = peers.explain(OSError(number, os.strerror(number), "runs/a"))
  assert line.startswith(f"runs/a: {os.strerror(number)}; ")


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

  assert "the disk is full" in peers.explain(of(True, False))
  assert "the disk is full" in peers.explain(of(False, True))


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
    assert line.startswith("error: process 1 of 2: another process")


def test_a_process_leaves_with_its_code():
  code, _, _ = run("peers.leave(7, 0)\ntime.sleep(60)")
  assert code == 7
  # The others do not come.
  code, _, _ = run("peers.leave(7, 0.2)\ntime.sleep(60)")
  assert code == 7
  # They do.
  code, _, seconds = run("peers.leave(7, 50)\nsys.exit(5)")
  assert code == 5 and seconds < 40


@pytest.mark.parametrize("text", [GLOO, "RESOURCE_EXHAUSTED: out of memory"])
def test_a_loss_does_not_wait_for_what_closes_the_run(text):
  code, err, _ = run(
    "try:\n"
    "  with peers.hurry(0.2):\n"
    f"    raise jax.errors.JaxRuntimeError({text!r})\n"
    "except jax.errors.JaxRuntimeError:\n"
    "  time.sleep(3)\n"
    "print('closed', file=sys.stderr)"
  )
  if text == GLOO:
    assert code == peers.EXIT_CODE and "was lost" in err and "closed" not in err
  else:
    assert code == 0 and err.endswith("closed\n")


def test_tracebacks_that_a_library_logs_are_left_out(caplog):
  logger = logging.getLogger("absl")
  with peers.watch():
    try:
      raise OSError(errno.ENOSPC, "No space left on device")
    except OSError:
      logger.exception("a thread failed")
    logger.error("a word")
  try:
    raise ValueError("other")
  except ValueError:
    logger.exception("after it")
  assert [r.getMessage() for r in caplog.records] == ["a word", "after it"]


def test_one_process_leaves_by_itself():
  peers.leave(7, 0)
  with peers.watch():
    pass
