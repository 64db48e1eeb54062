"""What a run writes and shows while it goes: JSON lines, events, progress."""

import json
import math
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from dpc_jax.training import checks, tasks


class Sums:
  """Sums of step metrics over an interval, as Python floats (float64)."""

  def __init__(
    self, loss: float = 0.0, correct: float | None = None, count: float = 0.0
  ):
    """Starts from given sums, those of a checkpoint for instance."""
    self.loss, self.correct, self.count = loss, correct, count

  def add(self, metrics: Iterable[tasks.Metrics]) -> None:
    """Adds step metrics; waits for the device."""
    for m in jax.device_get(list(metrics)):
      self.loss += float(m.loss)
      self.count += float(m.count)
      if m.correct is not None:
        self.correct = (self.correct or 0.0) + float(m.correct)

  def as_dict(self) -> dict[str, float | None]:
    """The sums themselves."""
    return {"loss": self.loss, "correct": self.correct, "count": self.count}

  def means(self) -> dict[str, float]:
    """Per example: loss in nats, and what it is worth.

    That is `accuracy`, in [0, 1], where right answers were counted, else
    `perplexity`, exp(loss), which may be inf. {} if nothing was counted, as in
    steps that were all skipped.
    """
    if self.count == 0:
      return {}
    loss = self.loss / self.count
    if self.correct is not None:
      return {"loss": loss, "accuracy": self.correct / self.count}
    # exp overflows a float64 just above.
    return {
      "loss": loss,
      "perplexity": math.inf if loss > 709 else math.exp(loss),
    }


def as_text(values: Mapping[str, float]) -> str:
  """Accuracy or perplexity, whichever is there, and the loss."""
  if "accuracy" in values:
    return f"accuracy {values['accuracy']:.4f} loss {values['loss']:.3f}"
  return f"perplexity {values['perplexity']:.2f} loss {values['loss']:.3f}"


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """The objects of a JSON-lines file; [] if there is none.

  A last line cut short, by a kill, is left out.

  Raises:
    ConfigError: another line is damaged.
  """
  if not path.exists():
    return []
  objects, lines = [], path.read_bytes().splitlines()
  for number, line in enumerate(lines, 1):
    try:
      found = json.loads(line)
    except ValueError:
      found = None
    if isinstance(found, dict):
      objects.append(found)
    elif number < len(lines):
      raise checks.ConfigError(
        f"workdir = {path.parent}: line {number} of {path.name} is damaged;"
        " remove that line, or use another workdir"
      )
  return objects


def keep_lines(
  path: pathlib.Path, is_kept: Callable[[dict[str, Any]], bool]
) -> None:
  """Removes the other lines of a JSON-lines file, and those cut short."""
  if path.exists():
    kept = [line for line in read_lines(path) if is_kept(line)]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    temporary.replace(path)


class Writer:
  """Writes `metrics.jsonl` and, where TensorFlow is, TensorBoard events.

  Of several processes, the first one writes.
  """

  def __init__(self, workdir: pathlib.Path):
    """Opens both in `workdir`; says so in one line if events cannot be."""
    self._path = workdir / "metrics.jsonl"
    self._writes = jax.process_index() == 0
    self._events = _event_writer(workdir) if self._writes else None

  def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
    """Appends one object: step, split and the values."""
    if not self._writes:
      return
    with self._path.open("a") as file:
      file.write(
        json.dumps({"step": step, "split": split, **values}, allow_nan=False)
        + "\n"
      )
    if self._events is not None:
      self._events.write_scalars(
        step, {f"{split}/{k}": v for k, v in values.items()}
      )

  def write_bits(self, step: int, bits: Mapping[str, Any]) -> None:
    """Writes the width of the weights of every layer as `bits/<path>`."""
    if self._events is None:
      return
    scalars = {}
    for path, layer in bits.items():
      if layer.weights.ndim == 0:
        scalars[f"bits/{path}"] = int(layer.weights)
      else:
        for i, width in enumerate(layer.weights.tolist()):
          scalars[f"bits/{path}/{i}"] = width
    self._events.write_scalars(step, scalars)

  def close(self) -> None:
    """Flushes and closes the events."""
    if self._events is not None:
      self._events.flush()
      self._events.close()


def _event_writer(workdir: pathlib.Path) -> Any:
  # TensorFlow's start-up notes say nothing about the run.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  is_ours = "tensorflow" not in sys.modules
  try:
    import tensorflow as tf  # seconds
    from clu import metric_writers
  except ImportError as error:
    reason = " ".join(str(error).split())
    print(f"no TensorBoard events ({reason}); metrics.jsonl has everything")
    return None
  if is_ours:
    # TensorFlow would take all of a GPU's memory to write a few numbers.
    tf.config.set_visible_devices([], "GPU")
  return metric_writers.SummaryWriter(str(workdir))


class Progress:
  """One line that tells how far the run is; live on a terminal.

  Of several processes, the first one speaks.
  """

  def __init__(self, label: str, steps: int, unit: str = "images"):
    """`label` names the run, `steps` is its length, `unit` what it reads."""
    self._label, self._steps, self._unit = label, steps, unit
    self._speaks = jax.process_index() == 0
    self._live = sys.stdout.isatty()
    self._width = 0

  def show(self, step: int, values: Mapping[str, float]) -> None:
    """Shows an interval: loss, score, bits, cost, rate, ETA."""
    if not self._speaks:
      return
    rate = values[f"{self._unit}_per_second"]
    if "accuracy" in values:
      score = f"accuracy {values['accuracy']:.3f}"
    else:
      score = f"perplexity {values['perplexity']:,.1f}"
    left = values["seconds_left"]
    line = (
      f"{self._label} step {step}/{self._steps}"
      f"  epoch {values['epoch']:.1f}  loss {values['loss']:.3f}  {score}"
      f"  bits {values['mean_bits']:.2f}"
      f"  cost {ratio(values['relative_cost'])}"
      f"  {rate:,.0f} {self._unit}/s  ETA {_clock(left)}"
    )
    if not self._live:
      print(line, flush=True)
      return
    # A line that wraps could not be overwritten.
    line = line[: shutil.get_terminal_size().columns - 1]
    print("\r" + line.ljust(self._width), end="", flush=True)
    self._width = len(line)

  def note(self, text: str) -> None:
    """Prints a line that stays."""
    self.close()
    if self._speaks:
      print(f"{self._label} {text}", flush=True)

  def close(self) -> None:
    """Ends the live line."""
    if self._width:
      print(flush=True)
      self._width = 0


def ratio(cost: float) -> str:
  """A cost relative to static B_max: 0.7 -> "70.0%", 16 -> "16.0x"."""
  return f"{cost:.1%}" if cost < 2 else f"{cost:.1f}x"


def _clock(seconds: float) -> str:
  if not math.isfinite(seconds):
    return "?"
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02d}:{seconds:02d}"
  return f"{minutes}:{seconds:02d}"


class Stopwatch:
  """Wall time, with training time apart from evaluation and saving."""

  def __init__(self, seconds: float = 0.0):
    """Starts now, on top of the seconds of a run that goes on."""
    self._start = time.perf_counter() - seconds
    self._mark = time.perf_counter()
    self._steps = 0

  def seconds(self) -> float:
    """Seconds of the whole run so far."""
    return time.perf_counter() - self._start

  def resume(self) -> None:
    """Begins a stretch of training; leaves out what came since the last."""
    self._mark = time.perf_counter()
    self._steps = 0

  def count_step(self) -> None:
    """Counts a training step of this stretch."""
    self._steps += 1

  def seconds_per_step(self) -> float:
    """Mean over the stretch; NaN before its first step."""
    if self._steps == 0:
      return math.nan
    return (time.perf_counter() - self._mark) / self._steps
