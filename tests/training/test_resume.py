"""A run that was cut short ends as one that was not."""

import json

import jax
import numpy as np
import pytest

from dpc_jax.data import pipeline
from dpc_jax.training import build, checkpoint, loop, sharding
from dpc_jax.training import config as config_lib
from tests.training import tiny

# Neither logs nor evaluations fall on the steps of the checkpoints.
STEPS = 14
TIMES = ("seconds", "compile_seconds", "compile_count")


class KilledError(Exception):
  pass


@pytest.fixture(autouse=True)
def cyclic(monkeypatch):
  monkeypatch.setattr(build, "make_schedule", lambda config, run: tiny.cyclic())


@pytest.fixture(scope="module")
def config():
  return tiny.make_config(steps=STEPS, **{"precision.method": "dpc"})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, config):
  patch = pytest.MonkeyPatch()
  with patch.context() as m:
    m.setattr(build, "make_schedule", lambda config, run: tiny.cyclic())
    m.setattr(build.models, "create", create)
    m.setattr(loop.metrics_lib, "_event_writer", lambda workdir: None)
    workdir = tmp_path_factory.mktemp("undisturbed")
    summary = loop.train_and_evaluate(config, workdir)
  return workdir, summary


def create(name, *, num_classes, quantization, **sizes):
  del name
  return tiny.Tiny(num_classes, quantization, **sizes)


def cut(config, workdir, step, *, kill):
  """Trains up to `step`, then stops as by SIGTERM or, killed, at once."""

  def is_stopping(now):
    if kill and now == step:
      raise KilledError
    return now == step

  run = loop._Run(build.build(config), workdir)
  try:
    return run.train(is_stopping)
  except KilledError:
    return None
  finally:
    run.close()


def assert_as_undisturbed(undisturbed, config, workdir, summary):
  reference, wanted = undisturbed
  tiny.assert_same(
    tiny.saved_state(config, workdir, STEPS),
    tiny.saved_state(config, reference, STEPS),
  )
  without = "images_per_second"
  assert tiny.read_lines(workdir / "metrics.jsonl", without) == tiny.read_lines(
    reference / "metrics.jsonl", without
  )
  assert (workdir / "bits.jsonl").read_text() == (
    reference / "bits.jsonl"
  ).read_text()
  assert {k: v for k, v in summary.items() if k not in TIMES} == {
    k: v for k, v in wanted.items() if k not in TIMES
  }
  assert json.loads((workdir / "summary.json").read_text()) == summary


def test_stopped_and_resumed(undisturbed, config, tmp_path, capsys):
  # Seven steps of widths, three of the sums of the next log.
  config_lib.claim_workdir(build.build(config).config, tmp_path)
  assert cut(config, tmp_path, 7, kill=False) is None
  assert "stopped by SIGTERM at step 7; saved" in capsys.readouterr().out
  assert not (tmp_path / "summary.json").exists()
  state = tiny.saved_state(config, tmp_path, 7)
  assert state[".step"] == 7
  assert state[".schedule_state['count']"] == 7
  assert any(".quant_stats" in k or "quant_stats" in k for k in state)
  summary = loop.train_and_evaluate(config, tmp_path)
  assert_as_undisturbed(undisturbed, config, tmp_path, summary)
  assert summary["compile_count"] == 2


def test_killed_and_resumed(undisturbed, config, tmp_path, capsys):
  # Lines of the steps 8 (log) and 10 (evaluation) are past the save of 6 or 9.
  config_lib.claim_workdir(build.build(config).config, tmp_path)
  cut(config, tmp_path, 11, kill=True)
  # The newest save lost, as if the kill had come before its end.
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=20)
  checkpoints._manager.delete(9)
  assert checkpoints.latest_step() == 6
  checkpoints.close()
  for name in ("metrics.jsonl", "bits.jsonl"):
    with (tmp_path / name).open("a") as file:
      file.write('{"step": 1, "path": "fir')
  assert any(
    line["step"] > 6
    for line in map(
      json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()[:-1]
    )
  )
  summary = loop.train_and_evaluate(config, tmp_path)
  assert "going on from the checkpoint of step 6" in capsys.readouterr().out
  assert_as_undisturbed(undisturbed, config, tmp_path, summary)


def test_a_finished_run_is_not_trained_again(
  undisturbed, config, monkeypatch, capsys
):
  workdir, summary = undisturbed
  monkeypatch.setattr(
    build, "compile_programs", lambda parts: pytest.fail("compiles")
  )
  assert loop.train_and_evaluate(config, workdir) == summary
  assert "finished already" in capsys.readouterr().out


def test_killed_after_the_last_save(undisturbed, config, tmp_path, monkeypatch):
  def killed(run):
    raise KilledError

  with monkeypatch.context() as m:
    m.setattr(loop._Run, "_finish", killed)
    with pytest.raises(KilledError):
      loop.train_and_evaluate(config, tmp_path)
  assert not (tmp_path / "summary.json").exists()
  summary = loop.train_and_evaluate(config, tmp_path)
  assert_as_undisturbed(undisturbed, config, tmp_path, summary)


def test_every_save_is_the_state_of_its_step(tmp_path):
  """Saving goes on behind the steps, which overwrite the state's buffers."""
  config = tiny.make_config(
    steps=8, **{"checkpoint_every": 1, "model.width": 64}
  )
  loop.train_and_evaluate(config, tmp_path)
  parts = build.build(config)
  programs = build.compile_programs(parts)
  state = programs.init()
  batches = pipeline.TrainBatches(
    parts.data.splits["train"], batch_size=config.batch_size, seed=config.seed
  )
  for step in range(8):
    state, _ = programs.train_step(
      state, sharding.put_batch(batches.batch(step), parts.mesh)
    )
    tiny.assert_same(
      tiny.saved_state(config, tmp_path, step + 1), tiny.leaves(state)
    )


def test_old_checkpoints_go(tmp_path):
  config = tiny.make_config(**{"checkpoint_every": 1, "keep_checkpoints": 2})
  loop.train_and_evaluate(config, tmp_path)
  steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
  assert steps == [5, 6]


def test_checkpoint_holds_the_config(tmp_path):
  config = tiny.make_config(steps=1)
  loop.train_and_evaluate(config, tmp_path)
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
  saved = checkpoints._manager.restore(
    1,
    args=checkpoint.ocp.args.Composite(
      config=checkpoint.ocp.args.JsonRestore()
    ),
  )
  checkpoints.close()
  there = json.loads((tmp_path / "config.json").read_text())
  assert json.loads(json.dumps(saved.config)) == there
  assert jax.tree.leaves(there)
  assert np.isfinite(there["optimizer"]["learning_rate"])


@pytest.mark.parametrize("step", [5, 10])
def test_a_stop_at_an_evaluation_saves_first(
  undisturbed, config, tmp_path, capsys, step
):
  config_lib.claim_workdir(build.build(config).config, tmp_path)
  assert cut(config, tmp_path, step, kill=False) is None
  out = capsys.readouterr().out
  assert f"stopped by SIGTERM at step {step}; saved" in out
  assert f"step {step}: test accuracy" not in out
  # A kill between the two lines of an evaluation would leave one of them.
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write(json.dumps({"step": step, "split": "validation"}) + "\n")
  summary = loop.train_and_evaluate(config, tmp_path)
  assert f"step {step}: test accuracy" in capsys.readouterr().out
  assert_as_undisturbed(undisturbed, config, tmp_path, summary)
