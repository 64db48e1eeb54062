"""Lines, events, the progress line and the clock of a run."""

import json
import sys

import numpy as np
import pytest

import dpc_jax as dpc
from dpc_jax.training import metrics, summary, tasks
from tests.training import tiny

WRITES_EVENTS = True


def test_events_are_written(tmp_path):
  tensorflow = pytest.importorskip("tensorflow")
  from tensorboard.backend.event_processing import event_accumulator

  writer = metrics.Writer(tmp_path)
  values = {"loss": 0.5, "accuracy": 0.25}
  writer.write(3, "train", values)
  writer.write(5, "test", values)
  bits = {
    "stem": dpc.LayerBits(*map(np.int32, (7, 6, 8))),
    "stack": dpc.LayerBits(*np.array([[2, 3], [4, 5], [8, 8]])),
  }
  writer.write_bits(3, bits)
  writer.close()
  events = event_accumulator.EventAccumulator(
    str(tmp_path), size_guidance={"tensors": 0}
  )
  events.Reload()
  got = {
    tag: [
      (e.step, float(tensorflow.make_ndarray(e.tensor_proto)))
      for e in events.Tensors(tag)
    ]
    for tag in events.Tags()["tensors"]
  }
  assert got == {
    "train/loss": [(3, 0.5)],
    "train/accuracy": [(3, 0.25)],
    "test/loss": [(5, 0.5)],
    "test/accuracy": [(5, 0.25)],
    "bits/stem": [(3, 7)],
    "bits/stack/0": [(3, 2)],
    "bits/stack/1": [(3, 3)],
  }
  assert tiny.read_lines(tmp_path / "metrics.jsonl") == [
    {"step": 3, "split": "train", **values},
    {"step": 5, "split": "test", **values},
  ]


@pytest.mark.parametrize("missing", ["tensorflow", "clu"])
def test_without_tensorflow_the_lines_are_written(
  tmp_path, monkeypatch, capsys, missing
):
  monkeypatch.setitem(sys.modules, missing, None)
  if missing == "clu":
    pytest.importorskip("tensorflow")
  writer = metrics.Writer(tmp_path)
  out = capsys.readouterr().out
  assert out.count("\n") == 1
  assert "no TensorBoard events" in out
  assert missing in out
  writer.write(1, "train", {"loss": 2.0})
  writer.write_bits(1, {"a": dpc.LayerBits(*map(np.int32, (7, 6, 8)))})
  writer.close()
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


class Clock:
  def __init__(self, monkeypatch):
    self.now = 100.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: self.now)


def test_stopwatch_leaves_out_what_is_not_training(monkeypatch):
  clock = Clock(monkeypatch)
  watch = metrics.Stopwatch(7.0)
  clock.now += 50  # set-up
  watch.resume()
  for _ in range(4):
    clock.now += 0.5
    watch.count_step()
  assert watch.seconds_per_step() == 0.5
  clock.now += 30  # evaluation
  watch.resume()
  clock.now += 1
  watch.count_step()
  assert watch.seconds_per_step() == 1
  assert watch.seconds() == 7 + 50 + 2 + 30 + 1


VALUES = {
  "epoch": 1.5,
  "loss": 0.25,
  "accuracy": 0.9,
  "mean_bits": 5.5,
  "relative_cost": 0.7,
  "images_per_second": 1234.5,
  "seconds_left": 3725.0,
}


class TestProgress:
  def test_a_pipe_gets_lines(self, capsys):
    progress = metrics.Progress("[x]", 10)
    progress.show(1, VALUES)
    progress.note("done")
    progress.close()
    assert capsys.readouterr().out == (
      "[x] step 1/10  epoch 1.5  loss 0.250  accuracy 0.900  bits 5.50"
      "  cost 70.0%  1,234 images/s  ETA 1:02:05\n[x] done\n"
    )

  def test_text_has_perplexity_and_tokens(self, capsys):
    values = {k: v for k, v in VALUES.items() if k != "accuracy"}
    values["tokens_per_second"] = values.pop("images_per_second")
    progress = metrics.Progress("[x]", 10, "tokens")
    progress.show(1, values | {"perplexity": 1234.56})
    assert capsys.readouterr().out == (
      "[x] step 1/10  epoch 1.5  loss 0.250  perplexity 1,234.6  bits 5.50"
      "  cost 70.0%  1,234 tokens/s  ETA 1:02:05\n"
    )

  def test_a_terminal_gets_one_line(self, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    progress = metrics.Progress("[x]", 10)
    progress.show(1, VALUES)
    progress.show(2, VALUES)
    progress.note("done")
    progress.show(3, VALUES)
    progress.close()
    progress.close()
    out = capsys.readouterr().out
    lines = out.split("\n")
    assert [line.count("\r") for line in lines] == [2, 0, 1, 0]
    assert lines[1] == "[x] done"
    # One that wraps would stay on the screen.
    assert all(len(x) < 60 for line in lines for x in line.split("\r"))

  def test_an_unknown_time_left(self):
    assert metrics._clock(float("nan")) == "?"
    assert metrics._clock(59.6) == "1:00"


def test_a_damaged_line_is_left_out(tmp_path):
  path = tmp_path / "lines.jsonl"
  path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
  metrics.keep_lines(path, lambda line: line["step"] < 2)
  assert path.read_text() == '{"step": 1}\n'
  assert metrics.read_lines(tmp_path / "none.jsonl") == []


def test_summary_is_whole_or_absent(tmp_path):
  summary.write(tmp_path, {"a": 1})
  assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
  assert json.loads((tmp_path / "summary.json").read_text()) == {"a": 1}
  assert summary.read(tmp_path) == {"a": 1}


def test_sums_are_means_of_what_was_counted():
  sums = metrics.Sums()
  sums.add([tasks.Metrics(np.float32(6), np.float32(2), np.float32(1))] * 2)
  assert sums.means() == {"loss": 3.0, "accuracy": 0.5}
  again = metrics.Sums(**json.loads(json.dumps(sums.as_dict())))
  assert again.means() == sums.means()


def test_sums_of_text_give_a_perplexity():
  sums = metrics.Sums()
  sums.add([tasks.Metrics(np.float32(6), np.float32(2))])
  sums.add([tasks.Metrics(np.float32(4), np.float32(3))])
  assert sums.means() == {"loss": 2.0, "perplexity": np.exp(2.0)}
  again = metrics.Sums(**json.loads(json.dumps(sums.as_dict())))
  assert again.means() == sums.means()
  assert metrics.Sums(loss=1e4, count=1.0).means()["perplexity"] == np.inf
