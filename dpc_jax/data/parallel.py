"""Runs a grain pipeline ahead of its reader, in threads or worker processes."""

import atexit
import collections.abc
import gc
import os
import shutil
import sys
import typing
import weakref

import jax
import numpy as np

from dpc_jax.data import prepared

_MAX_THREADS = 16
_SHARED_MEMORY = "/dev/shm"
_GRAIN_FLAG = "grain_enable_multiprocess_worker_profiling"
_GRAIN_ARRAYS = "grain._src.python.ipc.shared_memory_array"
# Of each worker: one in the making, one in its queue, and here one just taken
# from there and one waiting.
_BATCHES_PER_WORKER = 4


def check_workers(workers: int | None, batch_bytes: int) -> None:
  """Checks that `run` can have its worker processes.

  Args:
    workers: processes; None: threads of this process, which need no check.
    batch_bytes: of one batch, about.

  Raises:
    ValueError: fewer than one, or too little shared memory for them, which
      would end in a bus error, with no line of explanation.
  """
  if workers is None:
    return
  if workers < 1:
    raise ValueError(
      f"data.workers={workers} is out of range; "
      "use at least 1, or None for threads"
    )
  if not os.path.isdir(_SHARED_MEMORY):
    return
  needed = (_BATCHES_PER_WORKER * workers + 1) * batch_bytes
  free = shutil.disk_usage(_SHARED_MEMORY).free
  if free < needed:
    raise ValueError(
      f"data.workers={workers} needs {needed / 2**20:,.0f} MiB in "
      f"{_SHARED_MEMORY}, which has {free / 2**20:,.0f} MiB free; use fewer "
      "workers or a smaller batch, or give it more (docker run --shm-size)"
    )


def run(
  batches: typing.Any, workers: int | None = None
) -> collections.abc.Iterator[dict[str, np.ndarray]]:
  """Iterates over a grain MapDataset, computing elements ahead in parallel.

  Args:
    batches: the MapDataset; its elements are batches.
    workers: processes, as `check_workers` allows; None: threads of this
      process, as many as it has cores and at most 16, one batch each and one
      more waiting.

  Returns:
    A generator of the elements in order; closing it ends the parallel work.

  Raises:
    prepared.DataError: later, the one that a thread or a worker process met,
      in its one line, without grain's notes.
  """
  grain = prepared.require("grain", "input in parallel")
  if workers is None:
    threads = min(_cores(), _MAX_THREADS)
    ahead = batches.to_iter_dataset(
      grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
    )
  else:
    _let_grain_read_its_flag()
    ahead = batches.to_iter_dataset(
      grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    ).mp_prefetch(
      grain.MultiprocessingOptions(num_workers=workers),
      worker_init_fn=_leave_accelerators_alone,
    )
  elements = _elements(ahead, in_processes=workers is not None)
  _open.add(elements)
  return elements


def _elements(
  dataset: typing.Any, in_processes: bool
) -> collections.abc.Iterator[dict[str, np.ndarray]]:
  elements, element, damage = iter(dataset), None, None
  try:
    for element in elements:
      yield {name: _plain(array) for name, array in element.items()}
  except prepared.DataError as error:
    damage = str(error)
  finally:
    elements.close()
    if in_processes:
      # The errors that ended grain's threads hold their last batches in cycles.
      del elements, element
      gc.collect()
      _wait_for_deletions()
  # A new one: the traceback of the first holds batches of other workers, which
  # would stay in shared memory when the program ends.
  if damage:
    raise prepared.DataError(damage)


def _wait_for_deletions() -> None:
  """Lets grain's thread unlink the shared memory of all collected batches.

  A program that ends before complains of leaks. The thread, one and in order,
  is grain 0.2.18's own affair: there is no public way to wait for it.
  """
  arrays = getattr(sys.modules.get(_GRAIN_ARRAYS), "SharedMemoryArray", None)
  deleter = getattr(arrays, "_del_thread_pool", None)
  if deleter is not None:
    deleter.apply(int)  # comes after all that are pending


def _close_all() -> None:
  """Ends what a program left open, while all that it takes is still there."""
  for elements in list(_open):
    elements.close()


# Registered after grain's own exit handlers, so that it runs before them.
_open = weakref.WeakSet()
atexit.register(_close_all)


def _plain(array: np.ndarray) -> np.ndarray:
  """Copies what came from a worker out of shared memory.

  The copy, some milliseconds for a batch, hands the memory back at once; an
  array that is still there when the program ends would complain.
  """
  return array if type(array) is np.ndarray else np.array(array)


def _leave_accelerators_alone(index: int, count: int) -> None:
  """In a worker, before its first batch: the accelerators are its parent's."""
  del index, count
  jax.config.update("jax_platforms", "cpu")


def _let_grain_read_its_flag() -> None:
  """Spares programs that do not parse absl's flags an error.

  grain 0.2.18 reads this one without asking whether they are parsed (its issue
  1355); marked as present, as grain marks others, it gives its default.
  """
  flags = prepared.require("absl.flags", "input in parallel").FLAGS
  if not flags.is_parsed() and _GRAIN_FLAG in flags:
    flags[_GRAIN_FLAG].present = 1


def _cores() -> int:
  """Returns how many cores this process may use."""
  if hasattr(os, "sched_getaffinity"):  # not on every system
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
