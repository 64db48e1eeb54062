"""One trial of each fault: a run is hurt, and goes on to its end."""

import contextlib
import json
import pathlib
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dpc_jax.training import distributed, peers
from experiments.bench import fault_runs

# The others end by then, seconds: at once where a collective breaks off, else
# when JAX's heartbeats have failed.
LOST_PEER_S = distributed.HEARTBEAT_TIMEOUT_S + 30.0
# Moments of a kill.
ANY, TRAINING, SAVING = range(3)
_DISK_MIB = 32
# How far into a save a kill comes, at most, seconds.
_INTO_SAVE_S = 0.05
# How many saves may be over by then, until the kill comes after one.
_SAVES = 3
# How long after a logged step one comes in training, at most, seconds.
_INTO_STEP_S = 0.02


class Outcome(NamedTuple):
  """What a trial showed.

  Attributes:
    problems: what was not as it should be, in words; () of a good trial.
    lost: steps done again, the most after one fault; None: none are counted.
    seconds: from the fault to the end that it should bring; None of a kill.
    faults: how many the run went through.
    while_saving: how many of them left a checkpoint half written.
  """

  problems: tuple[str, ...]
  lost: int | None = None
  seconds: float | None = None
  faults: int = 1
  while_saving: int = 0


class AloneError(RuntimeError):
  """A run fails, or is not reproducible, without any harm."""


class Bench:
  """The recipe, the runs that were left alone, and the trials.

  A trial returns None where the run was over before the fault.

  Attributes:
    seconds: of a run that was left alone.
    training_seconds: of it, from the first line of metrics to the end.
  """

  def __init__(
    self,
    arguments: Sequence[str],
    folder: pathlib.Path,
    interval: int,
    seed: int = 0,
  ):
    """Nothing runs yet.

    Args:
      arguments: the recipe and its overrides.
      folder: of all runs; what earlier trials left there is deleted.
      interval: steps between saves, as the arguments say.
      seed: of the moments.
    """
    self._arguments, self._folder = tuple(arguments), folder
    self._interval = interval
    self._random = random.Random(seed)
    self._trials = self._starts = 0
    self._ends: dict[int, dict[str, Any]] = {}
    self.seconds = self.training_seconds = 0.0
    self._steps = 0
    for name in ("reference", "trials"):
      shutil.rmtree(folder / name, ignore_errors=True)

  def refer(self, processes: int = 1, runs: int = 2) -> pathlib.Path:
    """Trains without harm, `runs` times: the first fills the compiler's cache.

    Returns:
      The workdir of one.

    Raises:
      AloneError: it does not end well, or not alike: there is nothing to
        compare with.
    """
    ends = []
    for i in range(runs):
      folder = self._folder / "reference" / f"{processes}_{i}"
      start = time.monotonic()
      group = self._start(folder / "run", processes)
      group.wait_until(
        lambda folder=folder: fault_runs.reached_step(folder / "run") > 0
      )
      first = time.monotonic()
      if any(group.wait()):
        raise AloneError(group.last_line())
      end = time.monotonic()
      self.seconds, self.training_seconds = end - start, end - first
      summary = json.loads((folder / "run" / "summary.json").read_text())
      self._steps = summary["steps"]
      ends.append(fault_runs.end_state(folder / "run"))
    different = fault_runs.differences(ends[0], ends[-1])
    if different:
      raise AloneError(f"its ends differ in {different[:5]}")
    self._ends[processes] = ends[0]
    return folder / "run"

  def knows(self, processes: int) -> bool:
    """Whether `refer` was called for so many processes."""
    return processes in self._ends

  def kill(
    self, count: int | None = None, moment: int | None = None
  ) -> Outcome | None:
    """kill -9, `count` times (None: 1 to 3), at `moment` (None: in turns)."""
    workdir = self._new()
    if count is None:
      count = self._random.randint(1, 3)
    lost, reached, faults, while_saving = [0], 0, 0, 0
    for i in range(count):
      before = fault_runs.half_saved(workdir)
      group = self._start(workdir)
      which = (self._trials + i) % 3 if moment is None else moment
      if not self._wait_for(group, which, before):
        group.kill()
        break
      group.kill()
      faults += 1
      while_saving += fault_runs.is_saving(workdir, before)
      restored = group.restored_step()
      if restored is not None:
        lost.append(reached - restored)
      reached = fault_runs.reached_step(workdir)
    if not faults:
      return None
    outcome = self._go_on(workdir, reached, [])
    return outcome._replace(
      lost=max(*lost, outcome.lost), faults=faults, while_saving=while_saving
    )

  def terminate(self) -> Outcome | None:
    """SIGTERM in training: the exit code is 0, and no step is lost."""
    workdir = self._new()
    group = self._start(workdir)
    if not self._wait_for(group, TRAINING):
      group.kill()
      return None
    start = time.monotonic()
    group.signal(signal.SIGTERM)
    code = group.end_of(0)
    seconds = time.monotonic() - start
    stopped = re.search(r"stopped by SIGTERM at step (\d+)", group.output())
    if stopped is None:
      if code == 0:
        return None
      return Outcome((f"exit code {code}, and no word of SIGTERM",))
    problems = [f"exit code {code}"] if code else []
    outcome = self._go_on(workdir, int(stopped[1]), problems)
    if outcome.lost:
      problems.append(f"{outcome.lost} steps lost")
    return outcome._replace(problems=tuple(problems), seconds=seconds)

  def fill_disk(self) -> Outcome | None:
    """The disk fills up in training: one line, the last checkpoint stays."""
    problems = []
    workdir = self._new()
    with _disk(workdir.parent):
      group = self._start(workdir)
      if not (
        group.wait_until(lambda: bool(fault_runs.saved_steps(workdir)))
        and self._wait_for(group, TRAINING)
      ):
        group.kill()
        return None
      start = time.monotonic()
      filler = workdir.parent / "filler"
      spare = self._random.choice((0, 0, 16, 256)) * 1024
      _fill(filler, spare)
      there = fault_runs.saved_steps(workdir)
      code = group.end_of(0)
      seconds = time.monotonic() - start
      if code == 0:
        return None
      _check_line(group, 0, code, (peers.EXIT_CODE,), "disk is full", problems)
      left = fault_runs.saved_steps(workdir)
      if not left or left[-1] < there[-1]:
        problems.append(f"checkpoint {there[-1]} is gone, of {left}")
      filler.unlink()
      outcome = self._go_on(workdir, fault_runs.reached_step(workdir), problems)
    return outcome._replace(seconds=seconds)

  def lock_disk(self) -> Outcome | None:
    """The disk is read-only when the run is to go on: one line."""
    problems = []
    workdir = self._new()
    with _disk(workdir.parent):
      group = self._start(workdir)
      is_there = self._wait_for(group, TRAINING)
      group.kill()
      if not is_there:
        return None
      reached = fault_runs.reached_step(workdir)
      _mount("-o", "remount,ro", str(workdir.parent))
      start = time.monotonic()
      group = self._start(workdir)
      code = group.end_of(0)
      seconds = time.monotonic() - start
      _mount("-o", "remount,rw", str(workdir.parent))
      _check_line(group, 0, code, (2, peers.EXIT_CODE), "", problems)
      outcome = self._go_on(workdir, reached, problems)
    return outcome._replace(seconds=seconds)

  def block_folder(self) -> Outcome:
    """A file where the workdir's folder should be: one line."""
    problems = []
    workdir = self._new()
    workdir.parent.rmdir()
    workdir.parent.write_text("a file\n")
    start = time.monotonic()
    group = self._start(workdir)
    code = group.end_of(0)
    seconds = time.monotonic() - start
    _check_line(group, 0, code, (2,), "workdir", problems)
    workdir.parent.unlink()
    outcome = self._go_on(workdir, 0, problems)
    return outcome._replace(lost=None, seconds=seconds)

  def lose_peer(
    self, victim: int, number: int = signal.SIGKILL
  ) -> Outcome | None:
    """Kills or stops one of two processes; the other ends with a line."""
    problems = []
    workdir = self._new()
    group = self._start(workdir, processes=2)
    if not self._wait_for(group, TRAINING):
      group.kill()
      return None
    start = time.monotonic()
    group.signal(number, victim)
    code = group.end_of(1 - victim, LOST_PEER_S)
    seconds = time.monotonic() - start
    group.kill()
    if code == 0:
      return None
    _check_line(
      group, 1 - victim, code, (peers.EXIT_CODE,), "was lost", problems
    )
    reached = fault_runs.reached_step(workdir)
    outcome = self._go_on(workdir, reached, problems, processes=2)
    return outcome._replace(seconds=seconds)

  def _new(self) -> pathlib.Path:
    """The workdir of the next trial, which is not there yet."""
    self._trials += 1
    folder = self._folder / "trials" / str(self._trials)
    folder.mkdir(parents=True)
    return folder / "run"

  def _start(self, workdir, processes=1) -> fault_runs.Group:
    # Outside of what may be full or locked.
    self._starts += 1
    name = f"{workdir.parent.name}_start{self._starts}"
    logs = self._folder / "logs" / name
    return fault_runs.Group(self._arguments, workdir, logs, processes)

  def _wait_for(self, group, moment: int, before=frozenset()) -> bool:
    """Waits for a moment by chance; whether the run still goes on then.

    `before`: the checkpoints that were half saved when the run began.
    """
    workdir = group.workdir
    if moment == ANY:
      time.sleep(self._random.uniform(0, self.seconds))
      return not group.has_ended()
    if not group.wait_until(lambda: re.search(r" step \d+/", group.output())):
      return False
    target = self._random.randint(1, max(1, self._steps - self._interval))
    if not group.wait_until(lambda: fault_runs.reached_step(workdir) >= target):
      return False
    if moment == TRAINING:
      time.sleep(self._random.uniform(0, _INTO_STEP_S))
    else:
      for _ in range(_SAVES):
        if not group.wait_until(lambda: fault_runs.is_saving(workdir, before)):
          return False
        time.sleep(self._random.uniform(0, _INTO_SAVE_S))
        if fault_runs.is_saving(workdir, before):
          break
    is_over = (workdir / "summary.json").exists()
    return not (is_over or group.has_ended())

  def _go_on(self, workdir, reached, problems, processes=1) -> Outcome:
    """Trains to the end and compares; adds to `problems`."""
    had_ended = (workdir / "summary.json").exists()
    group = self._start(workdir, processes)
    codes = group.wait()
    if any(codes):
      problems.append(f"going on: exit {codes}, {group.last_line()}")
      return Outcome(tuple(problems), 0)
    # A step may be saved before it is logged.
    lost = max(reached - (group.restored_step() or 0), 0)
    if had_ended:
      lost = 0
    # The save under way, and the steps until the next waits for it.
    if lost > 2 * self._interval:
      problems.append(f"{lost} steps lost, {self._interval} between saves")
    different = fault_runs.differences(
      self._ends[processes], fault_runs.end_state(workdir)
    )
    if different:
      problems.append(
        f"{len(different)} values differ at the end, as {different[:3]}"
      )
    return Outcome(tuple(problems), lost)


def _check_line(group, index, code, codes, sign, problems) -> None:
  """Adds to `problems` what is not one line and one of the exit codes."""
  if code not in codes:
    problems.append(f"exit code {code}, not {codes}")
  line = group.last_line(index)
  if not line.startswith("error: ") or sign not in line:
    problems.append(f"the last line is {line!r}")
  if "Traceback" in group.output(index):
    problems.append("a traceback")


def can_mount(folder: pathlib.Path) -> bool:
  """Whether this process may mount a small disk at a folder."""
  try:
    with _disk(folder):
      return True
  except (OSError, subprocess.CalledProcessError):
    return False


@contextlib.contextmanager
def _disk(folder: pathlib.Path) -> Iterator[None]:
  """A small disk of its own, in memory, at `folder`."""
  folder.mkdir(parents=True, exist_ok=True)
  _mount("-t", "tmpfs", "-o", f"size={_DISK_MIB}m", "tmpfs", str(folder))
  try:
    yield
  finally:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(*arguments: str) -> None:
  subprocess.run(["mount", *arguments], check=True, capture_output=True)


def _fill(path: pathlib.Path, spare: int) -> None:
  """Fills the disk with a file, but for `spare` bytes."""
  block = bytes(2**16)
  with path.open("wb", buffering=0) as file:
    size = 0
    try:
      while True:
        size += file.write(block)
    except OSError:
      file.truncate(max(size - spare, 0))
