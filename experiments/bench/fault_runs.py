"""Runs as child processes, and whether two of them ended alike, bit for bit."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent.parent
# What depends on the clock and on interruptions.
TIMES = ("seconds", "compile_seconds", "compile_count")
# A run that has not ended by then hangs, seconds.
DEADLINE_S = 240.0
_POLL_S = 0.002
_TAIL = 2_000


class HangError(RuntimeError):
  """A run does not end, or not get to where it should; shows its output."""


class Group:
  """The processes of one run, started together by the command line.

  Attributes:
    workdir: of the run.
    processes: one, or several that are joined over this machine's network.
  """

  def __init__(
    self,
    arguments: Sequence[str],
    workdir: pathlib.Path,
    logs: pathlib.Path,
    processes: int = 1,
  ):
    """Starts `experiments.train`; its output goes to `logs/INDEX.txt`.

    Args:
      arguments: the recipe and its overrides.
      workdir: of the run.
      logs: a folder, made if absent; what is there is overwritten.
      processes: how many; of several, each has one CPU device.
    """
    logs.mkdir(parents=True, exist_ok=True)
    self.workdir, self._logs = workdir, logs
    command = [sys.executable, "-m", "experiments.train", *arguments]
    command.append(f"--workdir={workdir}")
    environment = {
      # What is started again compiles fast.
      "JAX_COMPILATION_CACHE_DIR": str(logs.parent / "cache"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      **os.environ,
    }
    if processes > 1:
      command += [f"--coordinator=127.0.0.1:{_free_port()}"]
      command += [f"--processes={processes}"]
      environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
      }
    self.processes = []
    for index in range(processes):
      own = [f"--process={index}"] if processes > 1 else []
      with (logs / f"{index}.txt").open("w") as file:
        self.processes.append(
          subprocess.Popen(
            [*command, *own],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
          )
        )

  def output(self, index: int = 0) -> str:
    """What a process has said so far."""
    return (self._logs / f"{index}.txt").read_text(errors="replace")

  def last_line(self, index: int = 0) -> str:
    """The last line of it; "" if there is none."""
    return (self.output(index).strip().splitlines() or [""])[-1]

  def has_ended(self) -> bool:
    """Whether any of the processes has."""
    return any(p.poll() is not None for p in self.processes)

  def end_of(self, index: int, deadline_s: float = DEADLINE_S) -> int:
    """The exit code of one of the processes.

    Raises:
      HangError: after `deadline_s`; all processes are killed.
    """
    try:
      return self.processes[index].wait(deadline_s)
    except subprocess.TimeoutExpired:
      self.kill()
      raise HangError(
        f"process {index} has not ended after {deadline_s:g} s:"
        f" {self.output(index)[-_TAIL:]}"
      ) from None

  def wait(self, deadline_s: float = DEADLINE_S) -> list[int]:
    """The exit codes of all.

    Raises:
      HangError: after `deadline_s` for one; all are killed.
    """
    return [self.end_of(i, deadline_s) for i in range(len(self.processes))]

  def wait_until(
    self, is_there: Callable[[], bool], deadline_s: float = DEADLINE_S
  ) -> bool:
    """Whether `is_there()` comes true before the run ends.

    Raises:
      HangError: neither, after `deadline_s`; the processes are killed.
    """
    end = time.monotonic() + deadline_s
    while not is_there():
      if self.has_ended():
        return False
      if time.monotonic() > end:
        self.kill()
        raise HangError(f"not there after {deadline_s:g} s: {self.last_line()}")
      time.sleep(_POLL_S)
    return True

  def signal(self, number: int, index: int = 0) -> None:
    """Sends a signal to one of the processes."""
    self.processes[index].send_signal(number)

  def kill(self) -> None:
    """Kills what still lives, at once."""
    for p in self.processes:
      if p.poll() is None:
        p.send_signal(signal.SIGKILL)
    for p in self.processes:
      p.wait()

  def restored_step(self) -> int | None:
    """The step that the run says it goes on from; None: it has not said so."""
    steps = re.findall(r"from the checkpoint of step (\d+)", self.output())
    return int(steps[-1]) if steps else None


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def saved_steps(workdir: pathlib.Path) -> list[int]:
  """Steps of the complete checkpoints, in order."""
  folder = workdir / "checkpoints"
  if not folder.is_dir():
    return []
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def half_saved(workdir: pathlib.Path) -> set[tuple[str, int]]:
  """{(name, time)} of checkpoints that orbax is still writing, or was."""
  found = set()
  folder = workdir / "checkpoints"
  for path in folder.glob("*orbax-checkpoint-tmp*"):
    # Complete checkpoints bear the name, too, on their way out.
    if ".deleted" in path.name:
      continue
    # Complete, and renamed, meanwhile.
    with contextlib.suppress(FileNotFoundError):
      found.add((path.name, path.stat().st_mtime_ns))
  return found


def is_saving(workdir: pathlib.Path, before: Set[tuple[str, int]]) -> bool:
  """Whether orbax is writing a checkpoint that is not complete.

  Args:
    workdir: of the run.
    before: `half_saved` before the run was started: what a kill left there
      stays, or is there again.
  """
  return not half_saved(workdir) <= before


def reached_step(workdir: pathlib.Path) -> int:
  """The last step in `metrics.jsonl`; 0 before the first."""
  path = workdir / "metrics.jsonl"
  if not path.exists():
    return 0
  steps = re.findall(r'^\{"step": (\d+),', path.read_text(), re.MULTILINE)
  return max(map(int, steps), default=0)


def end_state(workdir: pathlib.Path) -> dict[str, Any]:
  """{name: array, or value of JSON}: all that a run leaves, but times.

  That is the newest checkpoint's arrays and sums, every line of the files of
  JSON lines without rates, and every value of the JSON files without times.
  """
  steps = saved_steps(workdir)
  found = {"newest checkpoint": steps[-1] if steps else None}
  if steps:
    folder = workdir / "checkpoints" / str(steps[-1])
    found |= _arrays(folder / "state")
    host = json.loads((folder / "host" / "metadata").read_text())
    found |= _flat("host", _without_times(host))
  for path in sorted(workdir.glob("*.jsonl")):
    lines = path.read_text().splitlines()
    found[f"{path.name} lines"] = len(lines)
    for i, line in enumerate(lines):
      found |= _flat(f"{path.name}:{i + 1}", _without_times(json.loads(line)))
  for path in sorted(workdir.glob("*.json")):
    found |= _flat(path.name, _without_times(json.loads(path.read_text())))
  return found


def _arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of a checkpoint, without the model that they belong to."""
  import jax  # this and orbax take seconds, and most of a campaign is waiting
  import orbax.checkpoint as ocp

  handler = ocp.PyTreeCheckpointHandler()
  as_numpy = jax.tree.map(
    lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
    handler.metadata(folder).tree,
  )
  arrays = handler.restore(
    folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy)
  )
  return {
    f"state{jax.tree_util.keystr(path)}": np.asarray(array)
    for path, array in jax.tree_util.tree_leaves_with_path(arrays)
  }


def _without_times(values: Mapping[str, Any]) -> dict[str, Any]:
  return {
    name: value
    for name, value in values.items()
    if name not in TIMES and not name.endswith("_per_second")
  }


def _flat(prefix: str, value: Any) -> dict[str, Any]:
  if not isinstance(value, dict) or not value:
    return {prefix: value}
  flat = {}
  for name, inner in value.items():
    flat |= _flat(f"{prefix} {name}", inner)
  return flat


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
  """Names of `end_state` that are not the same in both, bit for bit."""
  return [name for name in {**a, **b} if not _is_same(name, a, b)]


def _is_same(name, a, b) -> bool:
  if name not in a or name not in b:
    return False
  x, y = a[name], b[name]
  if not isinstance(x, np.ndarray):
    # Text: 1 is not 1.0, -0.0 not 0.0, and NaN is itself.
    return json.dumps(x) == json.dumps(y)
  return (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
