"""The loop around the steps: what it writes, when it stops, what it keeps."""

import dataclasses
import json
import os
import signal
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpc_jax as dpc
from dpc_jax.data import sources
from dpc_jax.training import (
  build,
  checkpoint,
  feed,
  loop,
  metrics,
  sharding,
)
from dpc_jax.training import config as config_lib
from tests.training import tiny


def test_workdir_of_a_run_with_changing_bits(tmp_path, monkeypatch):
  monkeypatch.setattr(build, "make_schedule", lambda config, run: tiny.cyclic())
  config = tiny.make_config(steps=10)
  result = loop.train_and_evaluate(config, tmp_path)
  parts = build.build(config)
  assert result["compile_count"] == 1
  # The log of the bits.
  bits = {}
  lines = tiny.read_lines(tmp_path / "bits.jsonl")
  for step in range(10):
    for line in lines:
      if line["step"] == step:
        assert line["old"] == bits.get(line["path"])
        assert line["new"] != line["old"]
        bits[line["path"]] = line["new"]
    assert bits == tiny.cyclic_bits(step)
  assert result["bits"] == tiny.cyclic_bits(9)
  # The cost, step by step.
  total, widths = 0, []
  for step in range(10):
    total += dpc.bitops(parts.costs, as_bits(step), samples=16).total
    widths += [w for w, _, _ in tiny.cyclic_bits(step).values()]
  assert result["gbitops"] == total / 1e9
  assert result["mean_bits"] == np.mean(widths)
  static = dict.fromkeys(as_bits(0), 8)
  static_total = dpc.bitops(parts.costs, static, samples=160).total
  assert result["saving_vs_static"] == pytest.approx(1 - total / static_total)
  float_total = dpc.bitops(parts.costs, None, samples=160).total
  assert result["saving_vs_float"] == pytest.approx(1 - total / float_total)
  # The lines: train at 4, 8, 10; test at 5, 10.
  logged = tiny.read_lines(tmp_path / "metrics.jsonl")
  assert [(x["step"], x["split"]) for x in logged] == [
    (4, "train"),
    (5, "test"),
    (8, "train"),
    (10, "train"),
    (10, "test"),
  ]
  first = dpc.bitops(parts.costs, None).layers
  assert set(first) == {"first", "second", "classifier"}
  cost = sum(dpc.bitops(parts.costs, as_bits(s)).total for s in range(4))
  relative = cost / 4 / dpc.bitops(parts.costs, static).total
  assert logged[0]["relative_cost"] == pytest.approx(relative)
  assert logged[0]["epoch"] == 64 / 1437


def as_bits(step):
  bits = tiny.cyclic_bits(step)
  return {path: dpc.LayerBits(*layer) for path, layer in bits.items()}


def test_train_metrics_are_means_of_their_interval(tmp_path):
  """Steps 1..4, 5..8, 9: read off runs that log every step."""
  fine = tiny.make_config(steps=9, log_every=1)
  coarse = tiny.make_config(steps=9, log_every=4)
  results = []
  for name, config in (("fine", fine), ("coarse", coarse)):
    loop.train_and_evaluate(config, tmp_path / name)
    results.append(
      [
        line
        for line in tiny.read_lines(tmp_path / name / "metrics.jsonl")
        if line["split"] == "train"
      ]
    )
  for i, steps in enumerate([range(0, 4), range(4, 8), range(8, 9)]):
    for key in ("loss", "accuracy"):
      mean = np.mean([results[0][step][key] for step in steps])
      assert results[1][i][key] == pytest.approx(mean, rel=1e-6)


def test_metrics_do_not_pile_up_on_the_device(tmp_path, monkeypatch):
  """Fetched early, they are the same sums."""
  config = tiny.make_config(steps=9, log_every=9)
  lines = []
  for held in (loop._METRICS_HELD, 3):
    monkeypatch.setattr(loop, "_METRICS_HELD", held)
    workdir = tmp_path / str(held)
    loop.train_and_evaluate(config, workdir)
    lines.append(
      tiny.read_lines(workdir / "metrics.jsonl", "images_per_second")
    )
  assert lines[0] == lines[1]


def test_evaluation_does_not_depend_on_its_batch_size():
  """Of 37 images, by the running ranges of one step of training."""
  data = sources.load("digits")
  splits = {
    k: sources.Split(v.images[:37], v.labels[:37])
    for k, v in data.splits.items()
  }
  data = dataclasses.replace(data, splits=splits)
  results = []
  for size, devices in ((1, 1), (37, 1), (50, 1), (10, 8)):
    config = tiny.make_config(
      steps=1, **{"eval_batch_size": size, "mesh.data": devices}
    )
    run = loop._Run.__new__(loop._Run)
    run.parts = build.build(config, data)
    rows = run.parts.feed.eval_batch["image"].shape[0]
    assert rows == (16 if devices == 8 else size)
    run.programs = build.compile_programs(run.parts)
    if not results:
      train = data.splits["train"]
      batch = {"image": train.images[:16], "label": train.labels[:16]}
      state, _ = run.programs.train_step(
        run.programs.init(), sharding.put_batch(batch, run.parts.mesh)
      )
      state = jax.device_get(state.replace(rng=jax.random.key_data(state.rng)))
    run.state = jax.device_put(
      state.replace(rng=jax.random.wrap_key_data(state.rng)),
      sharding.replicated(run.parts.mesh),
    )
    results.append(run._evaluate_split("test"))
  logits = run.parts.model.apply(
    {"params": state.params, **state.model_state},
    feed.make_prepare(config, data)(jnp.asarray(splits["test"].images), None),
  )
  right = np.sum(np.argmax(logits, -1) == splits["test"].labels)
  for result in results:
    assert result["accuracy"] == int(right) / 37
    assert result["loss"] == pytest.approx(results[0]["loss"], rel=1e-6)


def test_held_out_images_choose_the_checkpoint(tmp_path):
  config = tiny.make_config(steps=6, **{"data.holdout": 200, "eval_every": 2})
  result = loop.train_and_evaluate(config, tmp_path)
  lines = tiny.read_lines(tmp_path / "metrics.jsonl")
  validation = {
    x["step"]: x["accuracy"] for x in lines if x["split"] == "validation"
  }
  test = {x["step"]: x["accuracy"] for x in lines if x["split"] == "test"}
  assert set(validation) == set(test) == {2, 4, 6}
  best = max(validation, key=validation.get)
  assert result["test_accuracy_at_best_validation"] == test[best]
  assert result["validation_accuracy"] == validation[6]
  assert result["best_test_accuracy"] == max(test.values())
  assert result["test_accuracy"] == test[6]


def test_float_run(tmp_path):
  config = tiny.make_config("float")
  result = loop.train_and_evaluate(config, tmp_path)
  assert result["mean_bits"] == 32
  # Relative to the static widths that its layers would have.
  costs = build.build(config).costs
  static = dpc.bitops(costs, {"first": 8, "second": 8}).total
  ratio = dpc.bitops(costs, None).total / static
  assert result["saving_vs_static"] == pytest.approx(1 - ratio)
  assert result["saving_vs_float"] == 0
  assert result["bits"] == {}
  assert result["float_layers"] == ["first", "second", "classifier"]


def test_static_run_saves_nothing_against_static(tmp_path):
  result = loop.train_and_evaluate(tiny.make_config("static8"), tmp_path)
  assert result["mean_bits"] == 8
  assert result["saving_vs_static"] == 0
  assert result["saving_vs_float"] > 0.9


class TestDivergence:
  def prepare(self, monkeypatch, at):
    """The step that takes step `at` to the next one gets NaN parameters."""

    def make_prepare(config, data):
      del config, data

      def prepare(images, key):
        del key
        return images.astype(jnp.float32) / 255

      return prepare

    compile_programs = build.compile_programs

    def poisoned(parts):
      programs = compile_programs(parts)

      def train_step(state, batch):
        if int(state.step) == at:
          params = {
            **state.params,
            "classifier": {
              k: v * self.factor for k, v in state.params["classifier"].items()
            },
          }
          state = state.replace(params=params)
        return programs.train_step(state, batch)

      return programs._replace(train_step=train_step)

    monkeypatch.setattr(feed, "make_prepare", make_prepare)
    monkeypatch.setattr(build, "compile_programs", poisoned)

  factor = np.float32("nan")

  # 4: seen by the log of step 8, but the save of step 6 comes first.
  # 5: the very step that is saved.
  @pytest.mark.parametrize("at", [4, 5])
  def test_the_last_good_checkpoint_survives(self, tmp_path, monkeypatch, at):
    self.prepare(monkeypatch, at)
    config = tiny.make_config(
      steps=20, **{"log_every": 8, "eval_every": 20, "keep_checkpoints": 1}
    )
    with pytest.raises(loop.DivergedError) as caught:
      loop.train_and_evaluate(config, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    # Of NaN parameters no later step is taken, so they stay in the state.
    assert "the state is not finite at step 6" in message
    assert "the newest checkpoint is of step 3" in message
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    assert checkpoints.latest_step() == 3
    checkpoints.close()
    state = tiny.saved_state(config, tmp_path, 3)
    assert all(np.isfinite(v).all() for k, v in state.items() if ".params" in k)
    assert not (tmp_path / "summary.json").exists()

  def test_a_broken_state_with_a_finite_loss(self, tmp_path, monkeypatch):
    """The loss is of the parameters before a step, the save of those after."""
    is_finite = loop.state_lib.is_finite
    monkeypatch.setattr(
      loop.state_lib,
      "is_finite",
      lambda state: is_finite(state) & (state.step != 6),
    )
    config = tiny.make_config(steps=20)
    with pytest.raises(loop.DivergedError, match=r"the state is not finite"):
      loop.train_and_evaluate(config, tmp_path)
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    assert checkpoints.latest_step() == 3
    checkpoints.close()

  def test_before_any_checkpoint(self, tmp_path, monkeypatch):
    self.prepare(monkeypatch, 0)
    with pytest.raises(loop.DivergedError, match="no checkpoint was saved"):
      loop.train_and_evaluate(tiny.make_config(), tmp_path)
    # Strict JSON has no NaN.
    path = tmp_path / "metrics.jsonl"
    assert not path.exists() or "NaN" not in path.read_text()


def test_a_signal_during_the_evaluation_is_not_lost(
  tmp_path, monkeypatch, capsys
):
  """It stops the next step, and that one is saved."""
  evaluate = loop._Run._evaluate

  def interrupted(run):
    if run.step == 5:
      os.kill(os.getpid(), signal.SIGTERM)
    evaluate(run)

  monkeypatch.setattr(loop._Run, "_evaluate", interrupted)
  before = signal.getsignal(signal.SIGTERM)
  config = tiny.make_config(steps=20, **{"checkpoint_every": 20})
  assert loop.train_and_evaluate(config, tmp_path) is None
  assert signal.getsignal(signal.SIGTERM) is before
  assert "stopped by SIGTERM at step 6; saved" in capsys.readouterr().out
  assert (tmp_path / "checkpoints" / "6").is_dir()


class TestClosing:
  def watch(self, monkeypatch, fails=()):
    """The names of what is closed; some of them fail."""
    closed = []

    def closing(name, close):
      def closes(*args):
        closed.append(name)
        close(*args)
        if name in fails:
          raise OSError(name)

      return closes

    for owner, name in (
      (checkpoint.Checkpoints, "checkpoints"),
      (metrics.Writer, "writer"),
    ):
      monkeypatch.setattr(owner, "close", closing(name, owner.close))

    class Batches:
      def __init__(self, batches):
        self.batches = batches
        self.close = closing("batches", batches.close)

      def __next__(self):
        return next(self.batches)

    build_parts = build.build

    def built(config):
      parts = build_parts(config)
      train = parts.feed.train
      feed_of_run = parts.feed._replace(train=lambda *a: Batches(train(*a)))
      return parts._replace(feed=feed_of_run)

    monkeypatch.setattr(build, "build", built)
    return closed

  @pytest.mark.parametrize(
    ("owner", "name", "opened"),
    [
      (checkpoint.Checkpoints, "restore_newest", ["checkpoints"]),
      (loop.resume, "scores", ["batches", "checkpoints", "writer"]),
    ],
  )
  def test_a_start_that_fails(self, tmp_path, monkeypatch, owner, name, opened):
    def fail(*args):
      raise RuntimeError("at the start")

    closed = self.watch(monkeypatch)
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(RuntimeError, match="at the start"):
      loop.train_and_evaluate(tiny.make_config(steps=1), tmp_path)
    assert sorted(closed) == opened

  def test_one_that_fails_keeps_no_other_open(self, tmp_path, monkeypatch):
    closed = self.watch(monkeypatch, ("checkpoints", "batches"))
    with pytest.raises(OSError, match=r"checkpoints|batches"):
      loop.train_and_evaluate(tiny.make_config(steps=1), tmp_path)
    assert sorted(closed) == ["batches", "checkpoints", "writer"]


def test_a_run_in_a_thread(tmp_path):
  """No signal comes there; a notebook's server may run it so."""
  results = []
  config = tiny.make_config(steps=1)
  thread = threading.Thread(
    target=lambda: results.append(loop.train_and_evaluate(config, tmp_path))
  )
  thread.start()
  thread.join()
  assert results[0]["steps"] == 1


def test_without_tensorflow_it_says_so(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "tensorflow", None)
  monkeypatch.setattr(metrics, "_event_writer", EVENT_WRITER)
  loop.train_and_evaluate(tiny.make_config(steps=1), tmp_path)
  lines = capsys.readouterr().out.splitlines()
  said = [line for line in lines if "no TensorBoard events" in line]
  assert len(said) == 1
  assert "tensorflow" in said[0]
  assert (tmp_path / "summary.json").exists()


EVENT_WRITER = metrics._event_writer


def test_images_per_second_do_not_count_evaluation(tmp_path, monkeypatch):
  """A second of every evaluation and save, which the rate must not see."""
  for name in ("_evaluate", "_save"):
    before = getattr(loop._Run, name)

    def slow(run, before=before):
      metrics.time.sleep(1)
      before(run)

    monkeypatch.setattr(loop._Run, name, slow)
  config = tiny.make_config(
    steps=8,
    **{"log_every": 4, "eval_every": 3, "checkpoint_every": 3},
  )
  loop.train_and_evaluate(config, tmp_path)
  lines = tiny.read_lines(tmp_path / "metrics.jsonl")
  rates = [x["images_per_second"] for x in lines if x["split"] == "train"]
  assert min(rates) > 100
  test = [x["images_per_second"] for x in lines if x["split"] == "test"]
  assert min(test) > 360


def test_claim_and_hash(tmp_path):
  config = build.build(tiny.make_config()).config
  config_lib.claim_workdir(config, tmp_path / "new" / "deep")
  # Where the data lies is the machine's business.
  moved = build.build(tiny.make_config(**{"data.dir": "/elsewhere"})).config
  config_lib.claim_workdir(moved, tmp_path / "new" / "deep")
  there = json.loads((tmp_path / "new/deep/config.json").read_text())
  assert there["steps"] == 6
  assert there["data"]["dir"] is None
  assert config_lib.config_hash(config) == config_lib.config_hash(moved)
  other = build.build(tiny.make_config(seed=1)).config
  assert config_lib.config_hash(config) != config_lib.config_hash(other)


def test_the_config_does_not_depend_on_the_devices():
  one, eight = (
    build.build(tiny.make_config(**{"mesh.data": None, "eval_batch_size": n}))
    for n in (96, 97)
  )
  assert eight.feed.eval_batch["mask"].shape == (104,)
  assert eight.config.eval_batch_size == 97
  assert one.feed.eval_batch["mask"].shape == (96,)


def test_an_evaluation_that_is_not_finite(tmp_path, monkeypatch):
  monkeypatch.setattr(
    loop._Run,
    "_evaluate_split",
    lambda run, split: {"loss": float("inf"), "accuracy": 0.0},
  )
  with pytest.raises(loop.DivergedError, match="the test loss is inf at step"):
    loop.train_and_evaluate(tiny.make_config(), tmp_path)
  for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
    assert json.loads(line)["split"] == "train"
