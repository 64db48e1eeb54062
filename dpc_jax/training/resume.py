"""What a run finds in its workdir when it goes on there."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpc_jax.training import bits_log, checks
from dpc_jax.training import metrics as metrics_lib


def start(
  checkpoints: Any, programs: Any, note: Callable[[str], None]
) -> tuple[int, Any, dict[str, Any]]:
  """Where a run starts: (step, state, what the host keeps).

  Args:
    checkpoints: a `Checkpoints`; see its `restore_newest`.
    programs: a `build.Programs`.
    note: takes a line on each thing of note.
  """
  found = checkpoints.restore_newest(programs.abstract, note)
  if found is not None:
    note(f"going on from the checkpoint of step {found[0]}")
    return found
  host = {
    "sums": metrics_lib.Sums().as_dict(),
    "seconds": 0.0,
    "compile_seconds": 0.0,
    "compile_count": 0,
  }
  return 0, programs.init(), host


def from_first(look: Callable[[], Any]) -> Any:
  """What process 0 sees, in all processes, which must all call it.

  Args:
    look: called in process 0 alone; returns what JSON can hold.

  Returns:
    Its result; of several processes as JSON gives it back.

  Raises:
    Exception: what `look` raised. In the other processes as ConfigError or
      OSError with the same words, or else as RuntimeError.
  """
  if jax.process_count() == 1:
    return look()
  said, error = None, None
  if jax.process_index() == 0:
    try:
      said = ["value", look()]
    # Whatever it is, the others wait for a word.
    except Exception as caught:
      error = caught
      said = _said_of(error)
  kind, value = _broadcast(said)
  if error is not None:
    raise error
  match kind:
    case "value":
      return value
    case "OSError":
      raise OSError(*value)
    case "ConfigError":
      raise checks.ConfigError(value)
    case _:
      raise RuntimeError(f"in process 0: {value}")


def _said_of(error: Exception) -> list[Any]:
  if isinstance(error, OSError) and error.errno is not None:
    name = None if error.filename is None else str(error.filename)
    return ["OSError", [error.errno, error.strerror, name]]
  if isinstance(error, checks.ConfigError):
    return ["ConfigError", str(error)]
  return ["other", f"{type(error).__name__}: {error}"]


def _broadcast(value: Any) -> Any:
  """What process 0 says; by its length first, as shapes must agree."""
  data = json.dumps(value).encode()
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  # Each shape is compiled once.
  buffer = np.zeros(-(-size // 1024) * 1024, np.uint8)
  if jax.process_index() == 0:
    buffer[:size] = np.frombuffer(data, np.uint8)
  return json.loads(bytes(multihost_utils.broadcast_one_to_all(buffer))[:size])


def cut_lines(workdir: pathlib.Path, step: int, evaluates: bool) -> bool:
  """Removes the lines of what came after the restored step.

  Args:
    workdir: of the run.
    step: the restored one.
    evaluates: whether an evaluation belongs to that step.

  Returns:
    Whether the step was saved, and the run then stopped or killed before its
    evaluation was written; all processes agree on it.
  """
  return from_first(lambda: _cut_lines(workdir, step, evaluates))


def _cut_lines(workdir, step, evaluates) -> bool:
  path = workdir / "metrics.jsonl"
  owes = evaluates and not any(
    line["step"] == step and line["split"] == "test"
    for line in metrics_lib.read_lines(path)
  )
  metrics_lib.keep_lines(
    path,
    lambda line: (
      line["step"] < step
      or (line["step"] == step and (line["split"] == "train" or not owes))
    ),
  )
  for name in ("bits.jsonl", bits_log.SIGNALS):
    metrics_lib.keep_lines(workdir / name, lambda line: line["step"] < step)
  return owes


def scores(workdir: pathlib.Path, metric: str) -> dict[int, float]:
  """{step: how good it was on the validation split}, higher is better."""
  return {
    line["step"]: score(line[metric], metric)
    for line in metrics_lib.read_lines(workdir / "metrics.jsonl")
    if line["split"] == "validation" and metric in line
  }


def score(value: float, metric: str) -> float:
  """An accuracy, or a perplexity with its sign turned: higher is better."""
  return value if metric == "accuracy" else -value
