"""A save that fails in one process, and what orbax asks JAX."""

import asyncio
import gc
import subprocess
import sys
import threading

import numpy as np
import pytest
from jax.experimental import multihost_utils
from orbax.checkpoint._src import asyncio_utils

from dpc_jax.training import checkpoint, saver
from tests.training import processes, saving_processes

# Far above what it takes, far below any limit on a barrier.
SOON_S = saving_processes.HEARTBEAT_TIMEOUT_S / 2


@pytest.fixture
def checkpoints(tmp_path):
  return checkpoint.Checkpoints(tmp_path, keep=1)


def save(checkpoints, step):
  checkpoints.save(step, {"x": np.float32(step)}, {}, {})


# Where there is no room for the folder, for its last file, for the arrays.
@pytest.mark.parametrize(("victim", "saves"), [(0, 0), (0, 1), (1, 2)])
def test_a_full_disk_of_one_process(tmp_path, victim, saves):
  """It says so, and the other, which waits to commit, learns by its end."""
  saving_processes.make_case(tmp_path, victim, saves)
  started = processes.start("tests.training.saving_processes", 2, tmp_path)
  codes = processes.exit_codes(started, SOON_S)
  said = processes.output(tmp_path)
  assert codes == [3, 3], said
  lines = [text.strip().splitlines()[-1] for text in said]
  assert lines[victim].startswith(
    f"error: process {victim}: a file: the disk is full; make space, and the"
  )
  assert lines[1 - victim].startswith(f"error: process {1 - victim}: ")
  assert "another process" in lines[1 - victim]
  assert "Traceback" not in "".join(said)


def test_without_a_folder_the_program_ends(tmp_path):
  """No thread of orbax waits for it, as Python would wait for the thread."""
  code = (
    "import pathlib, shutil, sys\n"
    "import jax, numpy as np\n"
    "jax.config.update('jax_platforms', 'cpu')\n"
    "from dpc_jax.training import checkpoint, peers\n"
    "workdir = pathlib.Path(sys.argv[1])\n"
    "with peers.watch():\n"
    "  checkpoints = checkpoint.Checkpoints(workdir, keep=1)\n"
    "  checkpoints.save(1, {'x': jax.numpy.ones(3)}, {}, {})\n"
    "  checkpoints.wait()\n"
    "  shutil.rmtree(workdir / 'checkpoints')\n"
    "  (workdir / 'checkpoints').write_text('')\n"
    "  try:\n"
    "    checkpoints.save(2, {'x': jax.numpy.ones(3)}, {}, {})\n"
    "    checkpoints.wait()\n"
    "  except OSError as error:\n"
    "    sys.exit(type(error).__name__)\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, str(tmp_path)],
    capture_output=True,
    text=True,
    timeout=SOON_S,
  )
  assert (done.returncode, done.stderr) == (1, "NotADirectoryError\n")


def ends_in_time(call):
  """The error that a call raises in a thread, or None; it must not hang."""
  errors = []

  def run():
    try:
      call()
    except Exception as error:
      errors.append(error)

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  thread.join(20)
  assert not thread.is_alive()
  return errors[0] if errors else None


@pytest.mark.parametrize("again", [False, True])
def test_a_barrier_that_fails_is_no_save_under_way(checkpoints, again):
  """orbax's own sign of that stays as it was."""
  tracker = checkpoints._manager._save_progress_tracker
  change = tracker.set

  def fail(value):
    if not value:
      raise TimeoutError("at a barrier")
    change(value)

  tracker.set = fail
  save(checkpoints, 1)

  def go_on():
    if again:
      save(checkpoints, 2)
    checkpoints.wait()

  assert "at a barrier" in str(ends_in_time(go_on))
  assert checkpoints._manager.is_saving_in_progress()
  ends_in_time(checkpoints.close)


def test_after_an_error_the_rest_comes_to_its_end(caplog):
  """In orbax's event loop, before that is closed, and nothing is said."""
  ended = []

  async def fail(seconds):
    await asyncio.sleep(seconds)
    ended.append(seconds)
    raise OSError(f"after {seconds}")

  async def all_fail():
    await asyncio.gather(*map(fail, (0, 0.1, 0.2)))

  with (
    saver.orderly_errors(),
    pytest.raises(OSError, match=r"after 0$"),
  ):
    asyncio_utils.run_sync(all_fail())
  gc.collect()
  assert ended == [0, 0.1, 0.2]
  assert caplog.records == []


class TestTheBarrier:
  @pytest.fixture
  def reached(self, checkpoints):
    keys = []
    checkpoints._manager._wait = lambda key, timeout_ms: keys.append(key)
    return keys

  def wait(self, checkpoints, error=None):
    """As orbax does, on the way out of what raised an error."""
    try:
      if error is not None:
        raise error
    finally:
      checkpoints._manager._wait_for_all(key="all", timeout_ms=1)

  def test_is_waited_at(self, checkpoints, reached):
    assert ends_in_time(lambda: self.wait(checkpoints)) is None
    assert reached == ["all"]

  def test_is_left_out_after_an_error(self, checkpoints, reached):
    error = OSError(28, "No space left on device")
    assert ends_in_time(lambda: self.wait(checkpoints, error)) is error
    assert reached == []

  def test_an_error_of_the_caller_is_none_of_the_save(
    self, checkpoints, reached
  ):
    try:
      raise KeyError
    except KeyError:
      save(checkpoints, 1)
    checkpoints.close()
    # The sign that a save is under way is set, and taken back.
    assert len(reached) == 4

  def test_has_a_limit(self, checkpoints):
    options = checkpoints._manager._options.async_options
    manager = checkpoints._manager._checkpointer._async_manager
    assert options.timeout_secs == manager._timeout_secs == saver.TIMEOUT_S
    assert saver.TIMEOUT_S <= 600


def test_an_error_of_the_checksums_leaves_the_next_save(
  checkpoints, monkeypatch
):
  """It is raised, and what is under way by then is whole."""
  failed = threading.Event()
  write = checkpoint.checksums.write

  def fail_late(folder):
    if folder.name != "1":
      return write(folder)
    failed.wait()
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(checkpoint.checksums, "write", fail_late)
  save(checkpoints, 1)
  threading.Timer(0.5, failed.set).start()
  with pytest.raises(OSError, match="No space left"):
    save(checkpoints, 2)
  checkpoints.close()
  names = [p.name for p in checkpoints._folder.iterdir()]
  assert names == ["2"]
  assert checkpoint.checksums.exist(checkpoints._folder / "2")


def test_orbax_does_not_ask_whether_to_stop(checkpoints, monkeypatch):
  """JAX keeps the step of who asked last, which is the loop."""
  asked = []

  def ask(step):
    asked.append(step)
    return False

  monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", ask)
  for step in (1, 2):
    save(checkpoints, step)
  checkpoints.close()
  assert asked == []
