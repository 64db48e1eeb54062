"""SIGTERM: the notice that a machine will be taken away."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def watch() -> Iterator[Callable[[int], bool]]:
  """Yields `is_stopping(step)`: whether to save after `step` and stop.

  With several processes all of them must ask after every step: they agree,
  through JAX's preemption service, on one step to stop at. In a thread, where
  no signal comes, the answer is no. A watch around this one hears the signal,
  too.
  """
  if jax.process_count() > 1:
    # JAX's own handler took SIGTERM when the processes found each other.
    yield multihost_utils.reached_preemption_sync_point
    return
  if threading.current_thread() is not threading.main_thread():
    yield lambda step: False
    return
  # Appending takes no lock, which a handler must not wait for.
  signals = []
  before = signal.getsignal(signal.SIGTERM)

  def hear(number, frame):
    signals.append(number)
    if getattr(before, "_is_watch", False):
      before(number, frame)

  hear._is_watch = True
  signal.signal(signal.SIGTERM, hear)
  try:
    yield lambda step: bool(signals)
  finally:
    # None: a handler that was not set from Python and cannot be set again.
    signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
