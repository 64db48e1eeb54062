"""What runs leave is read as they wrote it; `bad_saved` has what is refused."""

import json

import pytest

from experiments import finished
from tests import compiling
from tests.training import runs, tiny

# Two decisions in six steps.
ADAPTIVE = {
  "data.train_size": 32,
  "precision.adaptive.signal": "variance",
  "precision.adaptive.warmup": 1,
}


@pytest.mark.parametrize("method", ["adaptive", "float"])
def test_all_that_a_run_leaves(method, tmp_path):
  changes = ADAPTIVE if method == "adaptive" else {}
  with compiling.fast():
    runs.train(tiny.make_config(method, **changes), tmp_path)
  assert finished.read_summary(tmp_path) == read(tmp_path / "summary.json")
  assert finished.read_config(tmp_path) == read(tmp_path / "config.json")
  lines = tiny.read_lines(tmp_path / "metrics.jsonl")
  assert finished.read_metrics(tmp_path) == lines
  signals, moves = finished.read_decisions(tmp_path)
  for name, found in (("signals", signals), ("bits", moves)):
    path = tmp_path / f"{name}.jsonl"
    assert found == (tiny.read_lines(path) if path.exists() else [])
    assert bool(found) == (method == "adaptive")


def test_a_run_that_is_not_finished(tmp_path):
  assert finished.read_summary(tmp_path) is None
  assert finished.read_metrics(tmp_path) == []
  assert finished.read_decisions(tmp_path) == ([], [])


def test_signals_of_other_layers_than_the_first(tmp_path):
  moves = [
    {"step": 0, "path": path, "old": None, "new": [8, 8, 8], "reason": "dpc"}
    for path in ("a", "b")
  ]
  signals = [
    {"step": 1, "signals": {"a": 0.1, "b": None}},
    {"step": 2, "signals": {"a": 0.1}},
  ]
  for name, lines in (("bits", moves), ("signals", signals)):
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / f"{name}.jsonl").write_text(text)
  with pytest.raises(ValueError, match=r"line 2 of signals\.jsonl is of other"):
    finished.read_decisions(tmp_path)


def read(path):
  return json.loads(path.read_text())
