"""`python -m experiments.train` for real: to its end, and through signals."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import pytest

import dpc_jax as dpc
from configs import digits_resnet8
from dpc_jax.training import build

ROOT = pathlib.Path(__file__).parent.parent.parent
DEADLINE_S = 240
STEPS = 60
OVERRIDES = {
  "steps": STEPS,
  "batch_size": 16,
  "model.width": 2,
  "log_every": 1,
  "eval_every": 25,
  "checkpoint_every": 20,
}
pytestmark = pytest.mark.as_users
# What depends on the clock and on interruptions.
TIMES = ("seconds", "compile_seconds", "compile_count")


def start(workdir, *arguments, **environment):
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      "experiments.train",
      "--config=configs/digits_resnet8.py:dpc",
      f"--workdir={workdir}",
      *(f"--config.{name}={value}" for name, value in OVERRIDES.items()),
      *arguments,
    ],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
  )


def finish(process):
  """(code, out, err)."""
  out, err = process.communicate(timeout=DEADLINE_S)
  return process.returncode, out, err


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The workdir of a run, and what it printed."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  code, out, err = finish(start(workdir))
  assert code == 0, err
  return workdir, out


@pytest.fixture(scope="module")
def without_tensorflow(tmp_path_factory):
  """An environment in which its import fails."""
  folder = tmp_path_factory.mktemp("stub")
  (folder / "tensorflow.py").write_text(
    "raise ImportError('no TensorFlow for this machine')\n"
  )
  return {"PYTHONPATH": str(folder)}


def read_lines(path, *without):
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  return [{k: v for k, v in x.items() if k not in without} for x in lines]


def test_the_workdir_is_complete(whole):
  workdir, out = whole
  names = {p.name for p in workdir.iterdir() if "tfevents" not in p.name}
  assert names == {
    "bits.jsonl",
    "checkpoints",
    "config.json",
    "lock",
    "metrics.jsonl",
    "summary.json",
  }
  assert [p for p in workdir.iterdir() if "tfevents" in p.name]
  assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"40", "60"}
  config = json.loads((workdir / "config.json").read_text())
  assert config["steps"] == STEPS
  assert config["epochs"] is None
  assert config["precision"]["method"] == "dpc"
  assert "layer  " in out
  assert f"step {STEPS}/{STEPS}" in out
  assert "ETA 0:00" in out
  assert "done: test accuracy" in out


def test_the_lines_have_their_keys(whole):
  workdir, _ = whole
  lines = read_lines(workdir / "metrics.jsonl")
  for line in lines:
    skipped = {"skipped_steps"} if line["split"] == "train" else set()
    assert set(line) == skipped | {
      "step",
      "epoch",
      "split",
      "loss",
      "accuracy",
      "relative_cost",
      "mean_bits",
      "images_per_second",
    }
  train = [x["step"] for x in lines if x["split"] == "train"]
  test = [x["step"] for x in lines if x["split"] == "test"]
  assert train == list(range(1, STEPS + 1))
  assert test == [25, 50, 60]
  bits = read_lines(workdir / "bits.jsonl")
  assert len(bits) == 9
  for line in bits:
    assert set(line) == {"step", "path", "old", "new", "reason"}
    assert (line["step"], line["old"]) == (0, None)


def test_the_summary_is_right(whole):
  workdir, _ = whole
  summary = json.loads((workdir / "summary.json").read_text())
  lines = read_lines(workdir / "metrics.jsonl")
  test = [x["accuracy"] for x in lines if x["split"] == "test"]
  assert summary["test_accuracy"] == test[-1]
  assert summary["best_test_accuracy"] == max(test)
  wanted = {
    "method": "dpc",
    "model": "resnet8",
    "dataset": "digits",
    "seed": 0,
    "steps": STEPS,
    "compile_count": 1,
  }
  assert {k: summary[k] for k in wanted} == wanted
  assert summary["seconds"] > 0
  assert summary["compile_seconds"] > 0
  assert "cpu" in summary["device"]
  assert {"python", "jax", "flax"} <= set(summary["versions"])
  assert len(summary["config_hash"]) == 12
  # The cost, apart from the run: Eq. 1 and the formula of BitOPs.
  config = digits_resnet8.get_config("dpc")
  config.update_from_flattened_dict(OVERRIDES | {"mesh.data": 1})
  costs = build.build(config).costs
  layers = {p: c.weights for p, c in costs.items() if p != "classifier"}
  bits = dpc.dpc_bit_widths(layers, 3, 8)
  assert summary["bits"] == {p: [b, b, 8] for p, b in bits.items()}
  one = dpc.bitops(costs, bits).total
  static = dpc.bitops(costs, dict.fromkeys(bits, 8)).total
  assert summary["gbitops"] == STEPS * 16 * one / 1e9
  assert summary["saving_vs_static"] == pytest.approx(1 - one / static)
  assert summary["saving_vs_float"] == pytest.approx(
    1 - one / dpc.bitops(costs, None).total
  )
  assert summary["mean_bits"] == pytest.approx(sum(bits.values()) / len(bits))


def test_sigterm_then_the_same_command(whole, without_tensorflow, tmp_path):
  """Without TensorFlow, moreover, which changes nothing but the events."""
  workdir = tmp_path / "run"
  process = start(workdir, **without_tensorflow)
  timer = threading.Timer(DEADLINE_S, process.kill)
  timer.start()
  said = []
  for line in process.stdout:
    said.append(line)
    if "step 1/" in line:
      process.send_signal(signal.SIGTERM)
      break
  code, out, err = finish(process)
  timer.cancel()
  assert code == 0, err
  assert err == ""
  said += out.splitlines()
  assert sum("no TensorBoard events" in line for line in said) == 1
  stopped = [line for line in said if "stopped by SIGTERM" in line]
  assert len(stopped) == 1
  assert stopped == said[-1:]
  step = int(stopped[0].split("at step ")[1].split(";")[0])
  assert 1 <= step < STEPS
  assert {p.name for p in (workdir / "checkpoints").iterdir()} == {str(step)}
  assert not (workdir / "summary.json").exists()

  code, out, err = finish(start(workdir, **without_tensorflow))
  assert code == 0, err
  assert f"going on from the checkpoint of step {step}" in out
  assert "layer  " not in out
  reference, _ = whole
  for name in ("metrics.jsonl", "bits.jsonl"):
    assert read_lines(workdir / name, "images_per_second") == read_lines(
      reference / name, "images_per_second"
    )
  got, wanted = (
    json.loads((folder / "summary.json").read_text())
    for folder in (workdir, reference)
  )
  assert {k: v for k, v in got.items() if k not in TIMES} == {
    k: v for k, v in wanted.items() if k not in TIMES
  }
  assert got["compile_count"] == 2
  assert not [p for p in workdir.iterdir() if "tfevents" in p.name]


def test_ctrl_c_in_the_middle(without_tensorflow, tmp_path):
  process = start(tmp_path, "--config.steps=1000000", **without_tensorflow)
  timer = threading.Timer(DEADLINE_S, process.kill)
  timer.start()
  for line in process.stdout:
    # Again, for a callback of C, in which Python raises nothing, drops it.
    if re.search(r"step (1|[0-9,]*00)/", line):
      process.send_signal(signal.SIGINT)
  _, err = process.communicate()
  timer.cancel()
  assert process.returncode == 130
  assert err.endswith(
    "error: interrupted; the same command goes on from the last save, if any\n"
  )
