"""Reports made anew from what runs left, and mistakes in one line."""

import json
import shutil

import pytest

from dpc_jax.training import loop
from experiments import report
from tests.experiments import summaries


def line(step, split):
  return {
    "step": step,
    "split": split,
    "relative_cost": 0.5,
    "loss": 1 / (1 + step),
    "accuracy": 0.8,
  }


def write_run(folder, method="dpc", seed=0, **changes):
  """A run's folder as `experiments.train` leaves it, without checkpoints."""
  folder.mkdir(parents=True)
  summary = summaries.made_up(method, seed) | changes
  (folder / "summary.json").write_text(json.dumps(summary))
  config = {"seed": seed, "precision": {"method": method, "b_max": 8}}
  (folder / "config.json").write_text(json.dumps(config))
  lines = [line(s, split) for s in (1, 2, 3) for split in ("train", "test")]
  (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture
def call(capsys):
  """Calls report.main: (code, out, err)."""

  def call(*argv):
    code = report.main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err

  return call


@pytest.fixture
def grid(tmp_path):
  for method in ("dpc", "static8"):
    for seed in (5, 6):
      write_run(tmp_path / "grid" / method / f"seed{seed}", method, seed)
  return tmp_path / "grid"


def test_a_run(call, tmp_path):
  run = tmp_path / "a <b>"
  write_run(run)
  code, out, err = call(f"--workdir={run}")
  assert (code, err) == (0, "")
  for name in ("report.md", "report.html", "bits.png", "curves_cost.png"):
    assert str(run / name) in out
  page = (run / "report.html").read_text()
  assert "&lt;b&gt;</span></code>" in page and "<b>" not in page
  assert page.count("<img") == 3
  assert "python -m" not in (run / "report.md").read_text().split("Limits")[0]


def test_a_grid_is_compared_without_training(call, grid, monkeypatch):
  monkeypatch.setattr(
    loop, "train_and_evaluate", lambda *_: pytest.fail("it trains")
  )
  code, out, err = call("--workdir", grid)
  assert (code, err) == (0, "")
  text = (grid / "report.md").read_text()
  assert "against static8" in out and "### Final, against static8" in text
  assert f"`python -m experiments.report --workdir={grid}`" in text
  held = json.loads((grid / "results.json").read_text())
  assert {m: list(runs) for m, runs in held["runs"].items()} == {
    "dpc": ["5", "6"],
    "static8": ["5", "6"],
  }
  assert (grid / "report.html").read_text().count("<img") == 4


def test_a_grids_command_order_and_failures_are_kept(call, grid):
  shutil.rmtree(grid / "dpc" / "seed6")
  (grid / "dpc" / "seed6").mkdir()
  (grid / "dpc" / "seed6" / "config.json").write_text("{}")
  (grid / "cpt" / "seed5").mkdir(parents=True)
  (grid / "cpt" / "seed5" / "config.json").write_text("{}")
  before = {
    "command": "python -m experiments.compare --seeds=2",
    "runs": {"static8": {}, "dpc": {}},
    "failures": [
      {"method": "dpc", "seed": 6, "message": "the loss is nan"},
      {"method": "dpc", "seed": 5, "message": "finished since"},
    ],
  }
  (grid / "results.json").write_text(json.dumps(before))
  assert call(f"--workdir={grid}")[0] == 0
  held = json.loads((grid / "results.json").read_text())
  assert held["command"] == before["command"]
  assert list(held["runs"]) == ["static8", "dpc"]
  assert held["failures"] == [
    {"method": "dpc", "seed": 6, "message": "the loss is nan"},
    {"method": "cpt", "seed": 5, "message": "not finished"},
  ]


def test_mistakes_are_one_line_and_code_2(call, grid, tmp_path):
  run = grid / "dpc" / "seed5"
  (tmp_path / "empty").mkdir()
  cases = [
    (tmp_path / "none", None, "there is no such folder; give a run's"),
    (tmp_path / "empty", None, "no finished run in it"),
    (run / "config.json", None, "there is no such folder"),
    (run, ("metrics.jsonl", "{\nx\n{}"), "line 1 of metrics.jsonl is damaged"),
    (run, ("config.json", "[]"), "config.json is damaged; remove it"),
    (run, ("config.json", "{}"), "lack the field 'precision'"),
    (run, ("summary.json", "{"), "summary.json is damaged"),
    (grid, ("summary.json", '{"model": "tiny"}'), "lack the field"),
    (run, ("summary.json", None), "the run is not finished; the command that"),
  ]
  for where, change, said in cases:
    if change is not None:
      name, text = change
      kept = (run / name).read_bytes()
      (run / name).unlink()
      if text is not None:
        (run / name).write_text(text)
    code, _, err = call(f"--workdir={where}")
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("error: ") and said in err, err
    assert str(where) in err or str(run) in err
    if change is not None:
      (run / name).write_bytes(kept)


@pytest.mark.parametrize(
  ("field", "value"), [("model", "resnet20"), ("steps", 9)]
)
def test_runs_of_two_comparisons_are_not_mixed(call, grid, field, value):
  write_run(grid / "cpt" / "seed5", "cpt", 5, **{field: value})
  code, _, err = call(f"--workdir={grid}")
  assert code == 2
  assert f"runs of different {field}: " in err and str(value) in err


def test_a_folder_that_cannot_be_written(call, tmp_path, monkeypatch):
  write_run(tmp_path / "run")

  def refuse(self, *arguments, **rest):
    raise PermissionError(13, "Permission denied", str(self))

  monkeypatch.setattr("pathlib.Path.replace", refuse)
  code, _, err = call(f"--workdir={tmp_path / 'run'}")
  assert (code, err.count("\n")) == (2, 1)
  assert "Permission denied" in err


def test_flags(capsys):
  for argv, said in (([], "--workdir"), (["--workdir=a", "b"], "b")):
    with pytest.raises(SystemExit) as stop:
      report.main(argv)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err
