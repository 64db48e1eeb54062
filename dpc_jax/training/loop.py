"""The training loop: build, compile once, train, evaluate, save, report."""

import contextlib
import math
import pathlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections

from dpc_jax.data import pipeline
from dpc_jax.training import bits_log, build, checkpoint, sharding
from dpc_jax.training import config as config_lib
from dpc_jax.training import metrics as metrics_lib
from dpc_jax.training import summary as summary_lib

# Steps that may be under way on the device while the host goes on.
_STEPS_AHEAD = 2


class DivergedError(RuntimeError):
  """The loss is not finite; the message says where and what is left."""


def train_and_evaluate(
  config: ml_collections.ConfigDict, workdir: str | pathlib.Path
) -> dict[str, Any] | None:
  """Trains one run to its end, from its newest checkpoint if there is one.

  A workdir holds `config.json`, `metrics.jsonl`, `bits.jsonl`, `checkpoints/`,
  TensorBoard events and, when the run is finished, `summary.json`.

  Args:
    config: see `configs/default.py`.
    workdir: the run's folder; made if absent.

  Returns:
    The summary; None if SIGTERM stopped the run, which is saved then and goes
    on when called again.

  Raises:
    ConfigError: before anything is compiled, a mistake in the config, or a
      workdir that holds another run.
    DivergedError: the loss is no longer finite.
  """
  workdir = pathlib.Path(workdir)
  parts = build.build(config)
  config_lib.claim_workdir(parts.config, workdir)
  done = summary_lib.read(workdir)
  if done is not None:
    print(f"{workdir}: finished already; delete it to train again")
    return done
  run = _Run(parts, workdir)
  try:
    with _termination_flag() as stopped:
      return run.train(stopped)
  finally:
    run.close()


class _Run:
  """A run under way: its programs, state, files and sums."""

  def __init__(self, parts: build.Parts, workdir: pathlib.Path):
    self.parts, self.workdir = parts, workdir
    config = parts.config
    self.progress = metrics_lib.Progress(
      f"[{config.model.name} {config.precision.method}]", config.steps
    )
    self.progress.note(f"compiling for {summary_lib.environment()['device']}")
    self.programs = build.compile_programs(parts)
    self.progress.note(f"compiled in {self.programs.seconds:.1f} s")
    self.checkpoints = checkpoint.Checkpoints(workdir, config.keep_checkpoints)
    host = self._restore()
    self.sums = metrics_lib.Sums(**host["sums"])
    self.watch = metrics_lib.Stopwatch(host["seconds"])
    self.compile_seconds = host["compile_seconds"] + self.programs.seconds
    self.compile_count = host["compile_count"] + self.programs.traces[0]
    self.batches = pipeline.TrainBatches(
      parts.data.splits["train"],
      batch_size=config.batch_size,
      seed=config.seed,
    )
    metrics_lib.cut_lines(workdir / "metrics.jsonl", self.step + 1)
    metrics_lib.cut_lines(workdir / "bits.jsonl", self.step)
    self.writer = metrics_lib.Writer(workdir)
    self.bits_log = bits_log.BitsLog(
      workdir / "bits.jsonl",
      parts.schedule,
      self.state.schedule_state,
      step=self.step,
      reason=config.precision.method,
    )

  def _restore(self) -> dict[str, Any]:
    latest = self.checkpoints.latest_step()
    if latest is None:
      self.step = 0
      self.state = self.programs.init()
      return {
        "sums": metrics_lib.Sums().as_dict(),
        "seconds": 0.0,
        "compile_seconds": 0.0,
        "compile_count": 0,
      }
    self.step = latest
    self.state, host = self.checkpoints.restore(latest, self.programs.abstract)
    self.progress.note(f"going on from the checkpoint of step {latest}")
    return host

  def train(self, stopped: threading.Event) -> dict[str, Any] | None:
    config = self.parts.config
    if self.step == 0:
      bits, _ = self.parts.schedule.update(
        self.state.schedule_state, step=self.state.step
      )
      print(summary_lib.layer_table(self.parts, jax.device_get(bits)))
    pending = []
    self.watch.resume()
    while self.step < config.steps:
      rows = self.batches.batch(self.step)
      self.state, metrics = self.programs.train_step(
        self.state, sharding.put_batch(rows, self.parts.mesh)
      )
      self.step += 1
      self.watch.count_step()
      pending.append(metrics)
      if len(pending) > _STEPS_AHEAD:
        jax.block_until_ready(pending[-1 - _STEPS_AHEAD])
      is_last = self.step == config.steps
      evaluates = is_last or self.step % config.eval_every == 0
      saves = (
        is_last or self.step % config.checkpoint_every == 0 or stopped.is_set()
      )
      logs = is_last or self.step % config.log_every == 0
      if not (logs or evaluates or saves):
        continue
      self.sums.add(pending)
      pending.clear()
      if logs:
        self._log()
      if evaluates:
        self._evaluate()
      if saves:
        self._save()
      if stopped.is_set() and not is_last:
        self.progress.note(
          f"stopped by SIGTERM at step {self.step}; saved; the same command"
          " goes on"
        )
        return None
      self.watch.resume()
    return self._finish()

  def _log(self) -> None:
    means = self.sums.means()
    self.sums = metrics_lib.Sums()
    if not math.isfinite(means["loss"]):
      raise DivergedError(
        f"{self.workdir}: the loss is {means['loss']} before step {self.step};"
        f" the newest checkpoint is of step {self.checkpoints.latest_step()};"
        " lower optimizer.learning_rate or raise precision.b_min"
      )
    bits = self.bits_log.advance(self.step)
    seconds = self.watch.seconds_per_step()
    values = self._position() | means
    values["images_per_second"] = self.parts.config.batch_size / seconds
    self.writer.write(self.step, "train", values)
    self.writer.write_bits(self.step, bits)
    left = seconds * (self.parts.config.steps - self.step)
    self.progress.show(self.step, values | {"seconds_left": left})

  def _evaluate(self) -> None:
    texts = []
    for split in ("validation", "test"):
      if split not in self.parts.data.splits:
        continue
      start = self.watch.seconds()
      means = self._evaluate_split(split)
      count = len(self.parts.data.splits[split])
      values = self._position() | means
      values["images_per_second"] = count / (self.watch.seconds() - start)
      self.writer.write(self.step, split, values)
      texts.append(
        f"{split} accuracy {means['accuracy']:.4f} loss {means['loss']:.3f}"
      )
    self.progress.note(f"step {self.step}: {', '.join(texts)}")

  def _evaluate_split(self, split: str) -> dict[str, float]:
    sums = metrics_lib.Sums()
    batches = pipeline.eval_batches(
      self.parts.data.splits[split],
      batch_size=self.parts.config.eval_batch_size,
    )
    sums.add(
      self.programs.eval_step(
        self.state, sharding.put_batch(rows, self.parts.mesh)
      )
      for rows in batches
    )
    return sums.means()

  def _position(self) -> dict[str, float]:
    config = self.parts.config
    run = summary_lib.run_cost(
      self.parts, jax.device_get(self.state.cost), self.step
    )
    images = len(self.parts.data.splits["train"])
    return {
      "epoch": self.step * config.batch_size / images,
      "relative_cost": run.relative_to_static,
      "mean_bits": run.mean_bits,
    }

  def _save(self) -> None:
    self.bits_log.advance(self.step)
    host = {
      "sums": self.sums.as_dict(),
      "seconds": self.watch.seconds(),
      "compile_seconds": self.compile_seconds,
      "compile_count": self.compile_count,
    }
    self.checkpoints.save(
      self.step, self.state, host, self.parts.config.to_dict()
    )

  def _finish(self) -> dict[str, Any]:
    self.checkpoints.wait()
    summary = summary_lib.summarize(
      self.parts,
      jax.device_get(self.state.cost),
      self.bits_log.advance(self.step),
      summary_lib.read_lines(self.workdir),
    )
    summary |= {
      "seconds": self.watch.seconds(),
      "compile_seconds": self.compile_seconds,
      "compile_count": self.compile_count,
    }
    summary |= summary_lib.environment()
    summary_lib.write(self.workdir, summary)
    self.progress.note(
      f"done: test accuracy {summary['test_accuracy']:.4f},"
      f" {summary['gbitops']:,.0f} GBitOPs"
      f" ({summary['saving_vs_static']:+.1%} saved against static),"
      f" {summary['seconds']:.0f} s"
    )
    return summary

  def close(self) -> None:
    self.checkpoints.close()
    self.writer.close()


@contextlib.contextmanager
def _termination_flag() -> Iterator[threading.Event]:
  """An event that SIGTERM sets; in a thread, where none comes, never set."""
  stopped = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield stopped
    return
  before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
  try:
    yield stopped
  finally:
    signal.signal(signal.SIGTERM, before)
