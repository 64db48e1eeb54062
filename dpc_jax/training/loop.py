"""The training loop: build, compile once, train, evaluate, save, report."""

import collections
import math
import pathlib
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from dpc_jax.training import (
  auto_bounds,
  bits_log,
  build,
  checkpoint,
  config_precision,
  methods,
  sharding,
  termination,
)
from dpc_jax.training import config as config_lib
from dpc_jax.training import metrics as metrics_lib
from dpc_jax.training import state as state_lib
from dpc_jax.training import summary as summary_lib

# Steps that may be under way on the device while the host goes on.
_STEPS_AHEAD = 2
# Steps whose metrics may wait on the device for the next log.
_METRICS_HELD = 256


class DivergedError(RuntimeError):
  """The loss or the state is not finite; the message says what is left."""


def train_and_evaluate(
  config: ml_collections.ConfigDict, workdir: str | pathlib.Path
) -> dict[str, Any] | None:
  """Trains one run to its end, from its newest checkpoint if there is one.

  A workdir holds `config.json`, `metrics.jsonl`, `bits.jsonl`, `checkpoints/`,
  TensorBoard events and, when the run is finished, `summary.json`; of an
  adaptive run `signals.jsonl`, and of one that measures its bounds
  `found_bounds.json`. Several processes share it; the first one writes, and
  all save checkpoints.

  Args:
    config: see `configs/default.py`.
    workdir: the run's folder; made if absent.

  Returns:
    The summary; None if SIGTERM stopped the run, which is saved then and goes
    on when called again.

  Raises:
    ConfigError: before anything is compiled, a mistake in the config, or a
      workdir that holds another run; later only a threshold of
      `precision.bounds` that no width reaches.
    DivergedError: the loss, or a number in the state, is no longer finite;
      no such state is ever saved.
  """
  workdir = pathlib.Path(workdir).expanduser()
  # Building reads the data: a signal that comes meanwhile must not be lost.
  with termination.watch() as is_stopping:
    parts = build.build(config)
    config_lib.claim_workdir(parts.config, workdir)
    done = summary_lib.read(workdir)
    if done is not None:
      if jax.process_index() == 0:
        print(f"{workdir}: finished already; delete it to train again")
      return done
    run = _Run(parts, workdir)
    try:
      return run.train(is_stopping)
    finally:
      run.close()


class _Run:
  """A run under way: its programs, state, files and sums."""

  def __init__(self, parts: build.Parts, workdir: pathlib.Path):
    self.parts, self.workdir = parts, workdir
    config = parts.config
    self.progress = metrics_lib.Progress(
      f"[{config.model.name} {config.precision.method}]",
      config.steps,
      parts.task.unit,
    )
    if config.data.fake:
      self.progress.note(
        f"data.fake is set: made-up {parts.task.unit} in the form of"
        f" {config.data.name}; accuracies and perplexities mean nothing"
      )
    environment = summary_lib.environment(parts.mesh)
    self.progress.note(f"compiling for {environment['device']}")
    self.programs = build.compile_programs(parts)
    self.progress.note(f"compiled in {self.programs.seconds:.1f} s")
    self.checkpoints = checkpoint.Checkpoints(workdir, config.keep_checkpoints)
    host = self._restore()
    self.sums = metrics_lib.Sums(**host["sums"])
    self.compile_seconds = host["compile_seconds"] + self.programs.seconds
    # The compiled step cannot be traced again: one for each start of the run.
    self.compile_count = host["compile_count"] + self.programs.traces[0]
    self.batches = parts.feed.train(self.step, config.steps)
    self.is_finite = jax.jit(state_lib.is_finite)
    self.writer = metrics_lib.Writer(workdir)
    self.bits_log = None
    self.owes_evaluation = self._cut_lines()
    if jax.process_index() == 0:
      self.bits_log = bits_log.BitsLog(
        workdir / "bits.jsonl",
        parts.schedule,
        self.state.schedule_state,
        jax.device_get(state_lib.layer_bits(self.state)),
        step=self.step,
        reason=config.precision.method,
      )
    # Last: what came before, TensorFlow's import among it, is not the run.
    self.watch = metrics_lib.Stopwatch(host["seconds"])

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

  def _cut_lines(self) -> bool:
    """Removes what came after the restored step.

    Returns whether that step was saved, and then stopped or killed before its
    evaluation was written; all processes agree on it.
    """
    owes = False
    if jax.process_index() == 0:
      step, path = self.step, self.workdir / "metrics.jsonl"
      owes = self._evaluates() and not any(
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
        metrics_lib.keep_lines(
          self.workdir / name, lambda line: line["step"] < step
        )
    return bool(multihost_utils.broadcast_one_to_all(np.int32(owes)))

  def _evaluates(self) -> bool:
    """Whether an evaluation belongs to the current step."""
    config = self.parts.config
    return self.step > 0 and (
      self.step == config.steps or self.step % config.eval_every == 0
    )

  def train(self, is_stopping: Callable[[int], bool]) -> dict[str, Any] | None:
    config = self.parts.config
    if self.step == 0:
      bits = jax.device_get(state_lib.layer_bits(self.state))
      self.progress.note(f"layers\n{summary_lib.layer_table(self.parts, bits)}")
    if self.owes_evaluation:
      self._evaluate()
    pending = []
    self.watch.resume()
    while self.step < config.steps:
      if self._finds_bounds():
        self._find_bounds()
      rows = next(self.batches)
      self.state, metrics = self.programs.train_step(
        self.state, sharding.put_batch(rows, self.parts.mesh)
      )
      self.step += 1
      self.watch.count_step()
      pending.append(metrics)
      if len(pending) > _STEPS_AHEAD:
        jax.block_until_ready(pending[-1 - _STEPS_AHEAD])
      if len(pending) > _METRICS_HELD:
        self.sums.add(pending[:-_STEPS_AHEAD])
        del pending[:-_STEPS_AHEAD]
      is_last = self.step == config.steps
      # Asked once: a signal that comes during the evaluation stops the next
      # step, which is saved then.
      stops = is_stopping(self.step) and not is_last
      logs = is_last or self.step % config.log_every == 0
      evaluates = self._evaluates()
      saves = is_last or stops or self.step % config.checkpoint_every == 0
      if not (logs or evaluates or saves):
        continue
      self.sums.add(pending)
      pending.clear()
      seconds_per_step = self.watch.seconds_per_step()
      self._check_finite(state=evaluates or saves)
      if logs:
        self._log(seconds_per_step)
      # Saved before it is evaluated: a machine that is taken away waits for
      # the one, and a run that goes on makes up for the other.
      if saves:
        self._save()
      if stops:
        self.checkpoints.wait()
        self.progress.note(
          f"stopped by SIGTERM at step {self.step}; saved; the same command"
          " goes on"
        )
        return None
      if evaluates:
        self._evaluate()
      self.watch.resume()
    return self._finish()

  def _finds_bounds(self) -> bool:
    config = self.parts.config
    return (
      config_precision.finds_bounds(config)
      and self.step == config.precision.bounds_step
    )

  def _find_bounds(self) -> None:
    # A diverged run is no mistake of the thresholds.
    if not self.is_finite(self.state):
      self._fail("the state is not finite")
    found = auto_bounds.find(self.parts, self.state)
    self._advance_bits_log()
    self.state, bits = auto_bounds.restart(
      self.parts, self.programs.abstract, self.state, found
    )
    if self.bits_log is not None:
      self.bits_log.replace(
        self.state.schedule_state, bits, f"bounds {found.b_min}..{found.b_max}"
      )
      auto_bounds.write(self.workdir, self.step, found)
    self.progress.note(auto_bounds.text(self.step, found))
    self.watch.resume()

  def _check_finite(self, *, state: bool) -> None:
    """Raises if a metric, or with `state` the state, is not finite."""
    self._check_means(self.sums.means(), "")
    if state and not self.is_finite(self.state):
      self._fail("the state is not finite")

  def _check_means(self, means: dict[str, float], split: str) -> None:
    for name, value in means.items():
      if not math.isfinite(value):
        self._fail(f"the {split}{name} is {value}")

  def _fail(self, what: str) -> NoReturn:
    self.checkpoints.wait()
    latest = self.checkpoints.latest_step()
    left = (
      "no checkpoint was saved"
      if latest is None
      else f"the newest checkpoint is of step {latest}"
    )
    raise DivergedError(
      f"{self.workdir}: {what} at step {self.step}; {left}; lower"
      " optimizer.learning_rate or raise precision.b_min, in another workdir"
    )

  def _log(self, seconds_per_step: float) -> None:
    config = self.parts.config
    values = self._position() | self.sums.means()
    # A batch of text may end in filling, which is no token.
    steps = (self.step - 1) % config.log_every + 1
    per_step = self.sums.count / steps
    values[f"{self.parts.task.unit}_per_second"] = per_step / seconds_per_step
    self.sums = metrics_lib.Sums()
    self._advance_bits_log()
    self.writer.write(self.step, "train", values)
    self.writer.write_bits(
      self.step, jax.device_get(state_lib.layer_bits(self.state))
    )
    left = seconds_per_step * (config.steps - self.step)
    self.progress.show(self.step, values | {"seconds_left": left})

  def _advance_bits_log(self) -> None:
    if self.bits_log is None:
      return
    lines = self.bits_log.advance(self.step, self.state.schedule_state)
    if self.parts.schedule.moves is not None:
      for text in summary_lib.moves_text(lines):
        self.progress.note(text)

  def _evaluate(self) -> None:
    texts = []
    for split in ("validation", "test"):
      if split not in self.parts.data.splits:
        continue
      start = self.watch.seconds()
      means = self._evaluate_split(split)
      self._check_means(means, f"{split} ")
      count = len(self.parts.data.splits[split])
      values = self._position() | means
      rate = count / (self.watch.seconds() - start)
      values[f"{self.parts.task.unit}_per_second"] = rate
      self.writer.write(self.step, split, values)
      texts.append(f"{split} {metrics_lib.as_text(means)}")
    self.progress.note(f"step {self.step}: {', '.join(texts)}")

  def _evaluate_split(self, split: str) -> dict[str, float]:
    sums = metrics_lib.Sums()
    pending = collections.deque()
    carry = self.programs.eval_carry()
    for rows in self.parts.feed.evaluate(split):
      metrics, carry = self.programs.eval_step(
        self.state, sharding.put_batch(rows, self.parts.mesh), carry
      )
      pending.append(metrics)
      if len(pending) > _STEPS_AHEAD:
        sums.add([pending.popleft()])
    sums.add(pending)
    return sums.means()

  def _position(self) -> dict[str, float]:
    config = self.parts.config
    run = summary_lib.run_cost(
      self.parts, jax.device_get(self.state.cost), self.step
    )
    return {
      "epoch": self.step * config.batch_size / self.parts.feed.rows_per_epoch,
      "relative_cost": run.relative_to_static,
      "mean_bits": run.mean_bits,
    }

  def _save(self) -> None:
    self._advance_bits_log()
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
    if jax.process_index() == 0:
      summary_lib.write(self.workdir, self._summary())
    multihost_utils.sync_global_devices("summary.json is written")
    summary = summary_lib.read(self.workdir)
    cost = 1 - summary["saving_vs_static"]
    b_max = self.parts.config.precision.b_max
    self.progress.note(
      f"done: {summary_lib.test_text(summary)},"
      f" {summary['gbitops']:,.0f} GBitOPs ({metrics_lib.ratio(cost)}"
      f" of static{b_max}),"
      f" {summary['seconds']:.0f} s"
    )
    return summary

  def _summary(self) -> dict[str, Any]:
    summary = summary_lib.summarize(
      self.parts,
      jax.device_get(self.state.cost),
      jax.device_get(state_lib.layer_bits(self.state)),
      summary_lib.read_lines(self.workdir),
    )
    summary |= {
      **self._bounds(),
      "seconds": self.watch.seconds(),
      "compile_seconds": self.compile_seconds,
      "compile_count": self.compile_count,
    }
    return summary | summary_lib.environment(self.parts.mesh)

  def _bounds(self) -> dict[str, int]:
    """b_min and b_max of the run; {} of a method without bounds."""
    config = self.parts.config
    if not methods.has_bounds(config.precision.method):
      return {}
    bounds = config.precision
    if config_precision.finds_bounds(config):
      bounds = auto_bounds.read(self.workdir)
    return {name: bounds[name] for name in ("b_min", "b_max")}

  def close(self) -> None:
    self.progress.close()
    self.batches.close()
    self.checkpoints.close()
    self.writer.close()
