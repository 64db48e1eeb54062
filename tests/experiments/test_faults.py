"""A short campaign of faults on real runs, and what it compares by."""

import json
import os
import shutil
import signal

import numpy as np
import pytest

from dpc_jax.training import distributed
from experiments.bench import fault_runs, fault_trials, faults

ARGUMENTS = (
  "--config=configs/digits_resnet8.py:dpc",
  "--config.steps=30",
  "--config.eval_every=11",
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
  """A bench that knows how one process ends when it is left alone."""
  folder = tmp_path_factory.mktemp("faults")
  # TensorBoard's events take half of a start, and no part in what is compared.
  without = folder / "without"
  without.mkdir()
  (without / "tensorflow.py").write_text("raise ImportError('left out')\n")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("PYTHONPATH", str(without))
    patch.setenv("JAX_PLATFORMS", "cpu")
    # With every small program in the cache a start takes half the time.
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    arguments, interval = faults.with_short(ARGUMENTS)
    made = fault_trials.Bench(arguments, folder, interval, seed=1)
    made.workdir = made.refer(runs=1)
    yield made


def unfinished(workdir, reached, problems, processes=1):
  return fault_trials.Outcome(tuple(problems))


def assert_survived(outcome):
  assert outcome is not None, "the run was over before the fault"
  assert outcome.problems == ()


def test_kills_while_saving(bench):
  outcome = bench.kill(count=2, moment=fault_trials.SAVING)
  assert_survived(outcome)
  assert outcome.faults >= 1
  assert outcome.while_saving >= 1
  assert 0 <= outcome.lost <= 14


def test_a_signal_loses_no_step(bench):
  outcome = bench.terminate()
  assert_survived(outcome)
  assert outcome.lost == 0


def test_a_dead_peer_ends_the_other(bench, monkeypatch):
  """To compare how both go on is left to the campaign."""
  monkeypatch.setattr(bench, "_go_on", unfinished)
  outcome = bench.lose_peer(victim=0)
  assert_survived(outcome)
  # Not by the heartbeat: the collective that breaks off tells.
  assert outcome.seconds < distributed.HEARTBEAT_TIMEOUT_S / 2


def test_a_file_in_place_of_the_folder(bench, monkeypatch):
  monkeypatch.setattr(bench, "_go_on", unfinished)
  assert_survived(bench.block_folder())


def test_a_save_that_a_kill_left_is_none_under_way(tmp_path):
  before = fault_runs.half_saved(tmp_path)
  assert before == set() and not fault_runs.is_saving(tmp_path, before)
  folder = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp"
  folder.mkdir(parents=True)
  assert fault_runs.is_saving(tmp_path, before)
  left = fault_runs.half_saved(tmp_path)
  assert not fault_runs.is_saving(tmp_path, left)
  # The same step again, by the same name.
  shutil.rmtree(folder)
  folder.mkdir()
  os.utime(folder, ns=(1, 1))
  assert fault_runs.is_saving(tmp_path, left)


def test_a_deletion_is_no_save(tmp_path):
  folder = tmp_path / "checkpoints" / "7.deleted.orbax-checkpoint-tmp"
  folder.mkdir(parents=True)
  assert fault_runs.half_saved(tmp_path) == set()


@pytest.fixture
def copy(bench, tmp_path):
  shutil.copytree(bench.workdir, tmp_path / "run")
  return tmp_path / "run"


def differences(bench, workdir):
  return fault_runs.differences(
    fault_runs.end_state(bench.workdir), fault_runs.end_state(workdir)
  )


def change(path, change_it, line=-1):
  """Changes an object in a file of JSON or of lines of it."""
  text = path.read_text()
  whole = path.suffix == ".json"
  parts = [text] if whole else text.splitlines()
  values = json.loads(parts[line])
  change_it(values)
  parts[line] = json.dumps(values)
  path.write_text("\n".join(parts) + "\n")


def test_a_copy_is_the_same(bench, copy):
  assert differences(bench, copy) == []


def test_times_do_not_count(bench, copy):
  change(copy / "summary.json", lambda x: x.update(seconds=1, compile_count=9))
  change(copy / "metrics.jsonl", lambda x: x.update(images_per_second=1))
  assert differences(bench, copy) == []


def test_the_last_digit_of_a_loss_counts(bench, copy):
  def change_it(line):
    line["loss"] = float(np.nextafter(line["loss"], 0))

  change(copy / "metrics.jsonl", change_it, line=3)
  assert differences(bench, copy) == ["metrics.jsonl:4 loss"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "bits.jsonl"])
def test_a_missing_line_counts(name, bench, copy):
  lines = (copy / name).read_text().splitlines()
  (copy / name).write_text("\n".join(lines[:-1]) + "\n")
  found = differences(bench, copy)
  assert f"{name} lines" in found
  assert all(x.startswith((f"{name} lines", f"{name}:")) for x in found)


def test_a_value_of_the_summary_counts(bench, copy):
  change(copy / "summary.json", lambda x: x.update(mean_bits=-x["mean_bits"]))
  assert differences(bench, copy) == ["summary.json mean_bits"]


def test_a_missing_checkpoint_counts(bench, copy):
  newest = fault_runs.saved_steps(copy)[-1]
  shutil.rmtree(copy / "checkpoints" / str(newest))
  assert "newest checkpoint" in differences(bench, copy)


def test_one_bit_of_an_array_counts(bench):
  a = fault_runs.end_state(bench.workdir)
  arrays = [name for name in a if name.startswith("state")]
  assert any(a[name].size > 1 for name in arrays)
  for name in arrays:
    b = dict(a)
    b[name] = a[name].copy()
    b[name].reshape(-1).view(np.uint8)[-1] ^= 1
    assert fault_runs.differences(a, b) == [name]


def test_values_that_compare_equal_are_told_apart():
  a = {
    "zero": np.float32(0),
    "dtype": np.zeros(2, np.int32),
    "shape": np.zeros((2, 1)),
    "nan": np.float32(np.nan),
  }
  a = {name: np.asarray(x) for name, x in a.items()}
  b = a | {
    "zero": np.asarray(np.float32(-0.0)),
    "dtype": np.zeros(2, np.uint32),
    "shape": np.zeros(2),
  }
  assert fault_runs.differences(a, b) == ["zero", "dtype", "shape"]
  assert fault_runs.differences({"x": 1, "y": 0}, {"x": 1.0}) == ["x", "y"]


def test_the_recipe_of_a_command_line():
  argv = ["--config", "a.py", "--trials=2", "--config.steps=9", "--workdir=b"]
  assert faults.of_recipe(argv) == ["--config=a.py", "--config.steps=9"]
  assert faults.of_recipe(["--config=a.py"]) == ["--config=a.py"]


def test_the_command_line_overrules_the_short_run():
  arguments, interval = faults.with_short(
    ["--config=x.py", "--config.checkpoint_every=9"]
  )
  assert interval == 9
  assert arguments[:2] == ["--config=x.py", "--config.checkpoint_every=9"]
  assert "--config.log_every=3" in arguments
  assert sum("checkpoint_every" in a for a in arguments) == 1


def test_a_row_sums_up_its_trials():
  outcomes = iter(
    [
      fault_trials.Outcome((), lost=3, seconds=1.0),
      None,
      fault_trials.Outcome(("a traceback",), lost=5, seconds=0.5),
    ]
  )
  row = faults._row("full disk", lambda: next(outcomes), 2, end=float("inf"))
  assert row["tried"] == 2 and row["survived"] == 1 and row["missed"] == 1
  assert row["steps_lost_max"] == 5 and row["seconds_to_end_max"] == 1.0
  assert row["problems"] == ["a traceback"]

  def hang():
    raise fault_runs.HangError("no end")

  row = faults._row("dead peer", hang, 1, end=float("inf"))
  assert row["survived"] == 0 and row["problems"] == ["a hang: no end"]
  text = faults.table({"faults": [row, row | {"planned": 0, "tried": 0}]})
  assert "dead peer" in text and "cannot mount" in text


def test_no_trial_begins_after_the_end():
  row = faults._row("SIGTERM", lambda: pytest.fail("tried"), 1, end=0.0)
  assert row["tried"] == 0


def test_every_fault_is_planned(tmp_path):
  idle = fault_trials.Bench([], tmp_path, 7)
  planned = {name: count for name, _, count in faults.plan(idle, 20, True)}
  assert planned["kill -9"] == 20 and all(planned.values())
  unmounted = {name: count for name, _, count in faults.plan(idle, 20, False)}
  assert [n for n, count in unmounted.items() if not count] == [
    "full disk",
    "read-only disk",
  ]


def test_what_a_line_must_say(tmp_path):
  class Ended:
    def output(self, index):
      return self.text

    def last_line(self, index):
      return self.text.splitlines()[-1]

  def problems(text, code):
    group, found = Ended(), []
    group.text = text
    fault_trials._check_line(group, 0, code, (3,), "was lost", found)
    return found

  assert problems("error: a process was lost", 3) == []
  assert len(problems("error: a process was lost", -signal.SIGABRT)) == 1
  assert len(problems("Traceback ...\nerror: a process was lost", 3)) == 1
  assert len(problems("done", 3)) == 1
