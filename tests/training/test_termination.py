"""SIGTERM is heard by the run, and by what was there before it."""

import os
import signal
import threading

import pytest

from dpc_jax.training import termination


def terminate():
  os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def restored():
  """Every test leaves the handler that it found."""
  before = signal.getsignal(signal.SIGTERM)
  yield
  assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_is_remembered():
  with termination.watch() as is_stopping:
    assert not is_stopping(1)
    terminate()
    assert is_stopping(2)
    assert is_stopping(3)
  with termination.watch() as is_stopping:
    assert not is_stopping(4)


def test_an_outer_watch_hears_what_an_inner_one_hears():
  with termination.watch() as outer:
    with termination.watch() as inner:
      terminate()
      assert inner(1)
    assert outer(1)
    # And the runs that come after the first one.
    with termination.watch() as inner:
      assert not inner(1)


def test_an_outer_watch_hears_alone_once_the_inner_is_over():
  with termination.watch() as outer:
    with termination.watch() as inner:
      assert not inner(1)
    terminate()
    assert outer(1)
    assert not inner(1)


def test_three_deep():
  with termination.watch() as a, termination.watch() as b:
    with termination.watch() as c:
      terminate()
    assert (a(1), b(1), c(1)) == (True, True, True)


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL])
def test_what_is_no_function_is_not_called(before):
  found = signal.signal(signal.SIGTERM, before)
  try:
    with termination.watch() as is_stopping:
      terminate()
      assert is_stopping(1)
    assert signal.getsignal(signal.SIGTERM) is before
  finally:
    signal.signal(signal.SIGTERM, found)


def test_another_handler_waits():
  """One that exits, such as a notebook's, would come before the save."""
  heard = []
  found = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(1))
  try:
    with termination.watch() as is_stopping:
      terminate()
      assert is_stopping(1)
    assert heard == []
    terminate()
    assert heard == [1]
  finally:
    signal.signal(signal.SIGTERM, found)


def test_the_handler_comes_back_after_an_error():
  with pytest.raises(KeyError), termination.watch():
    raise KeyError


def test_no_signal_comes_to_a_thread():
  answers = []

  def run():
    with termination.watch() as is_stopping:
      answers.append(is_stopping(1))

  with termination.watch() as outer:
    terminate()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert outer(1)
  assert answers == [False]
