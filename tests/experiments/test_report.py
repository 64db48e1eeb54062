"""Reports made anew from what runs left, and mistakes in one line."""

import json
import shutil

import pytest

from configs import default
from dpc_jax.analysis import curves
from dpc_jax.training import loop
from experiments import report, reporting
from tests.experiments import summaries


def line(step, split):
  return {
    "step": step,
    "split": split,
    "relative_cost": 0.5,
    "loss": 1 / (1 + step),
    "accuracy": 0.8,
  }


def write_run(folder, method="dpc", seed=0, config=(), **changes):
  """A run's folder as `experiments.train` leaves it, without checkpoints.

  `config` are fields by path, `changes` those of the summary.
  """
  folder.mkdir(parents=True)
  summary = summaries.made_up(method, seed) | changes
  (folder / "summary.json").write_text(json.dumps(summary))
  fields = default.get_config(method)
  fields.update_from_flattened_dict({"seed": seed, **dict(config)})
  config = fields.to_dict()
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
  assert "No record says which command trained all of these" in text
  held = json.loads((grid / "results.json").read_text())
  assert {m: list(runs) for m, runs in held["runs"].items()} == {
    "dpc": ["5", "6"],
    "static8": ["5", "6"],
  }
  assert held["command"] is None
  assert (grid / "report.html").read_text().count("<img") == 4


COMMAND = "python -m experiments.compare --seeds=2"


def set_command(grid, command):
  """What is said to have made the results that are there."""
  held = json.loads((grid / "results.json").read_text()) | {"command": command}
  (grid / "results.json").write_text(json.dumps(held))


def command_of(call, grid):
  """What a new report says of it, which shows it or says that none is known."""
  assert call(f"--workdir={grid}")[0] == 0
  command = json.loads((grid / "results.json").read_text())["command"]
  text = (grid / "report.md").read_text()
  assert (command is None) == ("No record says which command" in text)
  assert command is None or f"\n`{command}`\n" in text
  return command


def test_a_command_is_shown_as_long_as_its_runs_are_those_found(call, grid):
  assert command_of(call, grid) is None
  set_command(grid, COMMAND)
  assert command_of(call, grid) == COMMAND == command_of(call, grid)
  # Of an older program, which took itself for what had trained.
  set_command(grid, f"python -m experiments.report --workdir={grid}")
  assert command_of(call, grid) is None
  for method in ("cpt", "dpc"):  # another run, and one that was made anew
    set_command(grid, COMMAND)
    shutil.rmtree(grid / method / "seed5", ignore_errors=True)
    write_run(grid / method / "seed5", method, 5, seconds=77.0)
    assert command_of(call, grid) is None
  set_command(grid, COMMAND)
  (grid / "pfq" / "seed5").mkdir(parents=True)
  (grid / "pfq" / "seed5" / "config.json").write_text("{}")
  assert command_of(call, grid) is None


def test_a_grids_order_and_failures_are_kept(call, grid):
  shutil.rmtree(grid / "dpc" / "seed6")
  (grid / "dpc" / "seed6").mkdir()
  (grid / "dpc" / "seed6" / "config.json").write_text("{}")
  (grid / "cpt" / "seed5").mkdir(parents=True)
  (grid / "cpt" / "seed5" / "config.json").write_text("{}")
  before = {
    "command": COMMAND,
    "runs": {"static8": {}, "dpc": {}},
    "failures": [
      {"method": "dpc", "seed": 6, "message": "the loss is nan"},
      {"method": "dpc", "seed": 5, "message": "finished since"},
    ],
  }
  (grid / "results.json").write_text(json.dumps(before))
  assert call(f"--workdir={grid}")[0] == 0
  held = json.loads((grid / "results.json").read_text())
  assert list(held["runs"]) == ["static8", "dpc"]
  assert held["failures"] == [
    {"method": "dpc", "seed": 6, "message": "the loss is nan"},
    {"method": "cpt", "seed": 5, "message": "not finished"},
  ]


def decide(run):
  """Makes it a run whose bits a signal has moved."""
  first = {"step": 0, "path": "first", "old": None, "new": [8, 8, 8]}
  moved = {"step": 2, "path": "first", "old": [8, 8, 8], "new": [7, 7, 8]}
  lines = [line | {"reason": "stable"} for line in (first, moved)]
  (run / "bits.jsonl").write_text("\n".join(map(json.dumps, lines)))
  signal = {"step": 2, "signals": {"first": -0.4}}
  (run / "signals.jsonl").write_text(json.dumps(signal) + "\n")


def test_pictures_of_the_report_before_go_and_others_stay(call, grid):
  for method in ("dpc", "adaptive"):
    write_run(grid / method / "seed7", method, 7)
    decide(grid / method / "seed7")
  shutil.rmtree(grid / "dpc" / "seed5")
  shutil.rmtree(grid / "dpc" / "seed6")
  (grid / "moves_mine.png").write_bytes(b"a picture of the user's")
  _, out, _ = call(f"--workdir={grid}")
  assert "moves_adaptive.png" in out and "moves_dpc.png" in out
  assert "moves_mine" not in out and (grid / "moves_adaptive.svg").exists()
  # The user has put pictures into the text, too.
  with (grid / "report.md").open("a") as file:
    file.write("\n![mine](photo.png)\n")
  (grid / "photo.png").write_bytes(b"a photo")
  shutil.rmtree(grid / "adaptive")
  _, out, _ = call(f"--workdir={grid}")
  assert "moves_adaptive" not in out and "moves_dpc.png" in out
  assert sorted(path.name for path in grid.glob("*mo*.*")) == [
    *("moves_dpc.png", "moves_dpc.svg", "moves_mine.png"),
  ]
  assert (grid / "photo.png").exists()


def test_nothing_is_drawn_before_all_is_read(call, grid):
  decide(grid / "static8" / "seed5")
  for where in (grid, grid / "static8" / "seed5"):
    for name in ("signals.jsonl", "metrics.jsonl"):
      path = grid / "static8" / "seed5" / name
      kept = path.read_text()
      path.write_text("{}\n")
      before = sorted(grid.rglob("*"))
      code, _, err = call(f"--workdir={where}")
      assert code == 2 and f"line 1 of {name} lacks the field 'step'" in err
      assert sorted(grid.rglob("*")) == before
      path.write_text(kept)


def test_layers_that_are_stacked(call, tmp_path):
  run = tmp_path / "run"
  layers = {"first": {"weights": 9, "macs": 9, "layers": 2}}
  write_run(run, layers=layers, bits={"first": [[8, 7], [8, 7], [8, 8]]})
  first = {"step": 0, "path": "first", "old": None, "reason": "dpc"}
  first["new"] = [[8, 7], [8, 7], [8, 8]]
  (run / "bits.jsonl").write_text(json.dumps(first))
  for signals, code in (([0.1, None], 0), ([0.1], 2), (0.1, 2)):
    line = json.dumps({"step": 2, "signals": {"first": signals}})
    (run / "signals.jsonl").write_text(line + "\n")
    assert call(f"--workdir={run}")[0] == code
  (run / "signals.jsonl").unlink()
  summary = json.loads((run / "summary.json").read_text())
  summary["bits"]["first"][0] = [8, 7, 6]
  (run / "summary.json").write_text(json.dumps(summary))
  assert "the bits of 'first' do not fit" in call(f"--workdir={run}")[2]


def test_mistakes_are_one_line_and_code_2(call, grid, tmp_path):
  run = grid / "dpc" / "seed5"
  (tmp_path / "empty").mkdir()
  cases = [
    (tmp_path / "none", None, "there is no such folder; give a run's"),
    (tmp_path / "empty", None, "no finished run in it"),
    (
      run / "config.json",
      None,
      "it is a file; give a run's folder or a grid's",
    ),
    (run, ("metrics.jsonl", "{\nx\n{}"), "line 1 of metrics.jsonl is damaged"),
    (run, ("config.json", "[]"), "config.json is damaged; remove it"),
    (run, ("config.json", "{}"), "config.json lacks the field 'precision'"),
    (run, ("summary.json", "{"), "summary.json is damaged"),
    (grid, ("summary.json", '{"model": "tiny"}'), "lacks the field 'method'"),
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
  ("field", "value"),
  [
    ("model", "resnet20"),
    ("steps", 9),
    ("dataset", "digits (fake)"),
    ("metric", "perplexity"),
  ],
)
def test_runs_of_two_comparisons_are_not_mixed(call, grid, field, value):
  words = {"test_perplexity": 9.0, "best_test_perplexity": 9.0}
  write_run(grid / "cpt" / "seed5", "cpt", 5, **words | {field: value})
  code, _, err = call(f"--workdir={grid}")
  assert code == 2
  assert f"runs of different {field}: " in err and str(value) in err


@pytest.mark.parametrize(
  ("method", "field", "value", "there"),
  [
    ("static8", "precision.b_max", 6, 8),
    ("float", "precision.b_max", 6, 8),
    ("static8", "precision.gradients", 6, 8),
    ("dpc", "precision.delta", 0.5, 1.0),
    ("uniform", "precision.b_min", 4, 3),
    ("static8", "batch_size", 64, 128),
    ("static8", "eval_every", 10, 1000),
    ("dpc", "data.holdout", 100, 0),
    ("static8", "data.augment", True, None),
    ("dpc", "model.width", 8, None),
    ("dpc", "optimizer.learning_rate", 0.2, 0.1),
    ("dpc", "optimizer.boundaries", (0.5, 0.9), [0.5, 0.75]),
  ],
)
def test_runs_of_two_recipes_are_not_compared(
  call, grid, method, field, value, there
):
  write_run(grid / method / "seed7", method, 7, {field: value})
  code, _, err = call(f"--workdir={grid}")
  assert (code, err.count("\n")) == (2, 1)
  value = list(value) if isinstance(value, tuple) else value
  assert f"has {field} = {there!r}, " in err, err
  assert f"{method}/seed7 has {value!r}; compare such runs in" in err, err
  assert not (grid / "report.md").exists()


# Fields that change no number of a run, or none of such a method.
MAY_DIFFER = (
  ("dpc", "log_every", 7),
  ("dpc", "keep_best", False),
  ("dpc", "epochs", 3.0),
  ("dpc", "eval_batch_size", 64),
  ("dpc", "data.dir", "/elsewhere"),
  ("dpc", "data.workers", 2),
  ("dpc", "mesh.fsdp", 2),
  ("static8", "precision.delta", 0.5),
  ("static8", "precision.b_min", 4),
  ("static8", "precision.bounds_step", 4),
  ("cpt", "precision.center", "mean"),
  ("dpc_log_midpoint", "precision.center", "mean"),
  ("dpc", "precision.cycles", 8),
  ("dpc", "precision.seed", 8),
  ("dpc", "precision.pfq.stages", 3),
  ("dpc", "precision.adaptive.decay", 0.25),
  ("float", "precision.gradients", 6),
)


def test_what_changes_no_number_of_a_run_may_differ(call, grid):
  for seed, (method, field, value) in enumerate(MAY_DIFFER, 7):
    folder = grid / method / f"seed{seed}"
    write_run(folder, method, seed, {field: value})
  assert call(f"--workdir={grid}")[::2] == (0, "")


def test_how_an_evaluation_of_text_is_cut_may_not_differ(call, tmp_path):
  words = {"metric": "perplexity"}
  words |= dict.fromkeys(("test_perplexity", "best_test_perplexity"), 9.0)
  for seed, rows in ((0, 10), (1, 5)):
    folder = tmp_path / "dpc" / f"seed{seed}"
    write_run(folder, "dpc", seed, {"eval_batch_size": rows}, **words)
  code, _, err = call(f"--workdir={tmp_path}")
  assert code == 2
  assert "dpc/seed0 has eval_batch_size = 10, dpc/seed1 has 5; comp" in err


def test_a_config_of_an_older_program_lacks_fields(call, grid):
  write_run(grid / "dpc" / "seed7", "dpc", 7)
  path = grid / "dpc" / "seed7" / "config.json"
  config = json.loads(path.read_text())
  for field in ("ranges", "storage_bits"):
    del config["precision"][field]
  del config["data"]
  path.write_text(json.dumps(config))
  assert call(f"--workdir={grid}")[0] == 0


def test_each_picture_of_curves_has_its_axis(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(
    curves,
    "training_curves",
    lambda lines, path, **rest: drawn.append((path.name, rest["against"])),
  )
  lines = {"dpc": {0: [line(1, "test")]}}
  sizes = {"metric": "accuracy", "steps": 3, "b_max": 8}
  said = reporting._draw_curves(lines, tmp_path, **sizes)
  assert drawn == [("curves.png", "steps"), ("curves_cost.png", "cost")]
  assert said == {
    "curves.png": "Loss and test metric against steps",
    "curves_cost.png": "Loss and test metric against cost",
  }


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
