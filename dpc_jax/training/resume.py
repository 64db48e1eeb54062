"""What a run finds in its workdir when it goes on there."""

import pathlib
from collections.abc import Callable
from typing import Any

from dpc_jax.training import agreement, bits_log
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
  return agreement.from_first(lambda: _cut_lines(workdir, step, evaluates))


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
