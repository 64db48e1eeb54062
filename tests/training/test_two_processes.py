"""Two real processes, of two devices each, against one of four."""

import signal
import time

import numpy as np
import pytest

from dpc_jax.training import loop
from tests.training import processes, tiny, two_processes

pytestmark = pytest.mark.usefixtures("fast_compiler")
OPERANDS = ("weights", "activations", "gradients")


def wait_for(workdir, started, text):
  end = time.monotonic() + processes.DEADLINE_S
  while text not in (workdir / "0.txt").read_text():
    alive = all(p.poll() is None for p in started)
    assert alive and time.monotonic() < end, processes.output(workdir)
    time.sleep(0.1)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
  """The workdir of the runs, after a SIGTERM to the second process alone."""
  workdir = tmp_path_factory.mktemp("two")
  started = processes.start("tests.training.two_processes", 2, workdir)
  try:
    wait_for(workdir, started, "step 9/20000")
    started[1].send_signal(signal.SIGTERM)
  except AssertionError:
    for p in started:
      p.kill()
    raise
  processes.finish(started, workdir)
  return workdir


@pytest.mark.parametrize("method", ["float", "dpc"])
def test_as_one_process(method, together, tmp_path):
  config = two_processes.make_config(method)
  summary = loop.train_and_evaluate(config, tmp_path)
  one = tiny.read_lines(tmp_path / "metrics.jsonl", "images_per_second")
  two = tiny.read_lines(
    together / method / "metrics.jsonl", "images_per_second"
  )
  keys = ("step", "split", "epoch", "relative_cost", "mean_bits")
  assert [[x[k] for k in keys] for x in two] == [
    [x[k] for k in keys] for x in one
  ]
  losses = [[x["loss"] for x in lines] for lines in (two, one)]
  if method == "float":
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)
  else:
    assert abs(losses[0][0] - losses[1][0]) < 1e-3
    np.testing.assert_allclose(*losses, rtol=0, atol=0.05)
  for name in ("bits.jsonl", "config.json"):
    if method == "dpc" or name == "config.json":
      assert (together / method / name).read_text() == (
        tmp_path / name
      ).read_text()
  there = loop.summary_lib.read(together / method)
  for key in ("gbitops", "bits", "mean_bits", "config_hash", "layers"):
    assert there[key] == summary[key]


def test_both_decide_alike(together):
  """Of the moves of adaptive bits, and of all that they were made by."""
  first, second = (
    dict(np.load(together / f"state-{index}.npz")) for index in range(2)
  )
  assert any(".opt_state" in name for name in first)
  tiny.assert_same(first, second)
  lines = tiny.read_lines(together / "endless" / "bits.jsonl")
  moves = [line for line in lines if line["step"] > 0]
  assert moves
  assert all(x["step"] >= 4 and x["step"] % 2 == 0 for x in moves)
  # One writer: every move once, and the last ones are in the state.
  keys = [(line["step"], line["path"]) for line in lines]
  assert len(keys) == len(set(keys))
  for path, widths in {x["path"]: x["new"] for x in lines}.items():
    layer = f".model_state['precision']['{path}']"
    assert [int(first[f"{layer}['{name}']"]) for name in OPERANDS] == widths


def test_text_as_one_process(together, tmp_path):
  """The carry is split by rows; evaluation is filled up, and exact."""
  config = two_processes.make_text_config()
  loop.train_and_evaluate(config, tmp_path)
  one, two = (
    tiny.read_lines(path / "metrics.jsonl", "tokens_per_second")
    for path in (tmp_path, together / "text")
  )
  assert [(x["step"], x["split"]) for x in two] == [
    (x["step"], x["split"]) for x in one
  ]
  assert {x["split"] for x in one} == {"train", "validation", "test"}
  np.testing.assert_allclose(
    [x["loss"] for x in two], [x["loss"] for x in one], rtol=0, atol=1e-5
  )
  states = [
    tiny.saved_state(config, path, 6) for path in (tmp_path, together / "text")
  ]
  carries = [
    np.concatenate([x.ravel() for name, x in s.items() if ".carry" in name])
    for s in states
  ]
  assert np.any(carries[0])
  np.testing.assert_allclose(*carries, atol=1e-5)


def test_a_checkpoint_of_two_processes_is_read_by_one(together):
  config = two_processes.make_config("dpc")
  state = tiny.saved_state(config, together / "dpc", 6)
  assert state[".step"] == 6


def test_sigterm_to_one_stops_both_at_one_step(together):
  first, second = processes.output(together)
  assert "stopped by SIGTERM at step" in first
  assert "process 0 of 2 stopped: None" in first
  assert "process 1 of 2 stopped: None" in second
  step = int(first.split("stopped by SIGTERM at step ")[1].split(";")[0])
  saved = [p.name for p in (together / "endless" / "checkpoints").iterdir()]
  assert saved == [str(step)]
  lines = tiny.read_lines(together / "endless" / "metrics.jsonl")
  # One writer: every step once.
  assert [x["step"] for x in lines] == list(range(1, step + 1))
  assert not (together / "endless" / "summary.json").exists()


def test_only_the_first_process_speaks(together):
  _, second = processes.output(together)
  spoken = [x for x in second.splitlines() if x.startswith("[tiny")]
  assert spoken == []
