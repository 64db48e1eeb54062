"""The training loop: build, compile once, train, evaluate, save, report."""

import collections
import contextlib
import pathlib
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import ml_collections

from dpc_jax.training import (
  agreement,
  auto_bounds,
  bits_log,
  build,
  calls,
  checkpoint,
  config_precision,
  health,
  notes,
  peers,
  resume,
  sharding,
  termination,
)
from dpc_jax.training import metrics as metrics_lib
from dpc_jax.training import state as state_lib
from dpc_jax.training import summary as summary_lib
from dpc_jax.training import workdir as workdir_lib

# Calls whose metrics may wait on the device for the next log.
_METRICS_HELD = 256

DivergedError = health.DivergedError


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
      workdir that holds another run; later only checkpoints that are all
      damaged or do not fit, or a threshold of `precision.bounds` that no width
      reaches.
    DivergedError: a number in the state is no longer finite, or loss or
      gradient were not in the last `max_skipped` steps; no state is ever saved
      that is not finite.

  Where another process of the run is lost, this one ends some seconds after the
  error that tells of it (see `dpc_jax.training.peers`).
  """
  workdir = pathlib.Path(workdir).expanduser()
  # Building reads the data: a signal that comes meanwhile must not be lost.
  with termination.watch() as is_stopping:
    parts = build.build(config)
    with workdir_lib.held(parts.config, workdir) as done:
      if done is None:
        return _train(parts, workdir, is_stopping)
  if jax.process_index() == 0:
    print(f"{workdir}: finished already; delete it to train again")
  return done


def _train(parts, workdir, is_stopping) -> dict[str, Any] | None:
  with contextlib.closing(_Run(parts, workdir)) as run, peers.hurry():
    return run.train(is_stopping)


class _Run:
  """A run under way: its programs, state, files and sums."""

  def __init__(self, parts: build.Parts, workdir: pathlib.Path):
    self.parts, self.workdir = parts, workdir
    # What opens is closed, though what follows it fails.
    with contextlib.ExitStack() as opened:
      self._open(opened)
      self._opened = opened.pop_all()

  def _open(self, opened: contextlib.ExitStack) -> None:
    parts, workdir = self.parts, self.workdir
    config = parts.config
    self.progress = metrics_lib.Progress(
      f"[{config.model.name} {config.precision.method}]",
      config.steps,
      parts.task.unit,
    )
    opened.callback(self.progress.close)
    for line in notes.before_compiling(parts):
      self.progress.note(line)
    self.programs = build.compile_programs(parts)
    self.progress.note(notes.compiled(self.programs))
    self.checkpoints = checkpoint.Checkpoints(
      workdir, config.keep_checkpoints, config.keep_best
    )
    opened.callback(self.checkpoints.close)
    self.step, self.state, host = resume.start(
      self.checkpoints, self.programs, self.progress.note
    )
    self.sums = metrics_lib.Sums(**host["sums"])
    self.compile_seconds = host["compile_seconds"] + self.programs.seconds
    # The compiled step cannot be traced again: one for each start of the run.
    self.compile_count = host["compile_count"] + self.programs.traces[0]
    self.batches = calls.Batches(parts, self.step)
    opened.callback(self.batches.close)
    self.health = health.Watch(parts, self.state)
    self.writer = metrics_lib.Writer(workdir)
    opened.callback(self.writer.close)
    self.bits_log = None
    self.owes_evaluation = resume.cut_lines(
      workdir, self.step, self._evaluates()
    )
    for step, score in resume.scores(workdir, parts.task.metric).items():
      self.checkpoints.score(step, score)
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

  def _evaluates(self) -> bool:
    """Whether an evaluation belongs to the current step."""
    config = self.parts.config
    return self.step > 0 and (
      self.step == config.steps or self.step % config.eval_every == 0
    )

  def train(self, is_stopping: Callable[[int], bool]) -> dict[str, Any] | None:
    config = self.parts.config
    if self.step == 0:
      for table in notes.layers(self.parts, self.programs.abstract, self.state):
        self.progress.note(table)
    if self.owes_evaluation:
      self._evaluate()
    pending, ahead = [], sharding.steps_ahead()
    self.watch.resume()
    while self.step < config.steps:
      if self._finds_bounds():
        self._find_bounds()
      count = calls.end(config, self.step) - self.step
      self.state, metrics = calls.run(
        self.programs, self.state, self.batches.take(count), count
      )
      pending.append((metrics, count))
      done = len(pending) - ahead
      if done > 0:
        jax.block_until_ready(pending[done - 1])
      if len(pending) > _METRICS_HELD:
        self.sums.add(calls.per_step(pending[:done]))
        del pending[:done]
      # Asked once a step: a signal that comes during the evaluation stops the
      # next call, which is saved then. Processes agree on any step of a call.
      stops = False
      for _ in range(count):
        self.step += 1
        self.watch.count_step()
        stops = is_stopping(self.step) or stops
      is_last = self.step == config.steps
      stops = stops and not is_last
      logs = is_last or self.step % config.log_every == 0
      evaluates = self._evaluates()
      saves = is_last or stops or self.step % config.checkpoint_every == 0
      if not (logs or evaluates or saves):
        continue
      self.sums.add(calls.per_step(pending))
      pending.clear()
      seconds_per_step = self.watch.seconds_per_step()
      self._check(state=evaluates or saves)
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
    if not self.health.is_finite(self.state):
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

  def _check(self, *, state: bool) -> None:
    """Raises if the run has diverged, which `state` asks of the state, too."""
    problem, warning = self.health.skipped(self.state, self.step)
    if warning is not None:
      self.progress.note(warning)
    problem = problem or health.not_finite(self.sums.means(), "")
    if problem is None and state and not self.health.is_finite(self.state):
      problem = "the state is not finite"
    if problem is not None:
      self._fail(problem)

  def _fail(self, what: str) -> NoReturn:
    self.checkpoints.wait()
    latest = self.checkpoints.latest_step()
    raise DivergedError(notes.diverged(self.workdir, what, self.step, latest))

  def _log(self, seconds_per_step: float) -> None:
    config = self.parts.config
    means = self.sums.means()
    values = self._position() | means
    values["skipped_steps"] = int(self.state.skips.total)
    # A batch of text may end in filling, which is no token.
    steps = (self.step - 1) % config.log_every + 1
    per_step = self.sums.count / steps
    values[f"{self.parts.task.unit}_per_second"] = per_step / seconds_per_step
    self.sums = metrics_lib.Sums()
    self._advance_bits_log()
    self.writer.write_bits(
      self.step, jax.device_get(state_lib.layer_bits(self.state))
    )
    for line in self.health.dead(self.state):
      self.progress.note(line)
    # Where all steps were skipped there is no mean.
    if not means:
      return
    self.writer.write(self.step, "train", values)
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
      problem = health.not_finite(means, f"{split} ")
      if problem is not None:
        self._fail(problem)
      if split == "validation":
        metric = self.parts.task.metric
        score = resume.score(means[metric], metric)
        self.checkpoints.score(self.step, score)
      count = len(self.parts.data.splits[split])
      values = self._position() | means
      rate = count / (self.watch.seconds() - start)
      values[f"{self.parts.task.unit}_per_second"] = rate
      self.writer.write(self.step, split, values)
      texts.append(f"{split} {metrics_lib.as_text(means)}")
    self.progress.note(f"step {self.step}: {', '.join(texts)}")

  def _evaluate_split(self, split: str) -> dict[str, float]:
    sums = metrics_lib.Sums()
    pending, ahead = collections.deque(), sharding.steps_ahead()
    carry = self.programs.eval_carry()
    for rows in self.parts.feed.evaluate(split):
      metrics, carry = self.programs.eval_step(
        self.state, sharding.put_batch(rows, self.parts.mesh), carry
      )
      pending.append(metrics)
      if len(pending) > ahead:
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
    # Told, not read: a shared disk may show the file to the others later.
    summary = agreement.from_first(self._write_summary)
    cost = 1 - summary["saving_vs_static"]
    b_max = self.parts.config.precision.b_max
    self.progress.note(
      f"done: {summary_lib.test_text(summary)},"
      f" {summary['gbitops']:,.0f} GBitOPs ({metrics_lib.ratio(cost)}"
      f" of static{b_max}),"
      f" {summary['seconds']:.0f} s"
    )
    return summary

  def _write_summary(self) -> dict[str, Any]:
    summary_lib.write(self.workdir, self._summary())
    return summary_lib.read(self.workdir)

  def _summary(self) -> dict[str, Any]:
    summary = summary_lib.summarize(
      self.parts,
      jax.device_get(self.state.cost),
      jax.device_get(state_lib.layer_bits(self.state)),
      summary_lib.read_lines(self.workdir),
    )
    summary |= {
      **summary_lib.bounds(self.parts.config, self.workdir),
      "skipped_steps": int(self.state.skips.total),
      "seconds": self.watch.seconds(),
      "compile_seconds": self.compile_seconds,
      "compile_count": self.compile_count,
    }
    return summary | summary_lib.environment(self.parts.mesh)

  def close(self) -> None:
    """Closes all, though one of them fails."""
    self._opened.close()
