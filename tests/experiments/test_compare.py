"""The grid: methods x seeds, resumed, with failures, reported at the end."""

import json
import sys

import pytest
from absl import flags

from dpc_jax import models
from dpc_jax.training import config as config_lib
from dpc_jax.training import loop, metrics, workdir
from experiments import compare, grid
from tests.experiments import summaries
from tests.training import tiny


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
  """Calls compare.main with a config, as the flags would: (code, out, err)."""
  monkeypatch.setattr(metrics, "_event_writer", lambda workdir: None)
  monkeypatch.setattr(sys, "argv", ["compare", "--config=x"])
  monkeypatch.setitem(models._CONSTRUCTORS, "tiny", tiny.Tiny)

  def call(*methods, seeds=1, **changes):
    class Flags:
      workdir = str(tmp_path)
      config = tiny.make_config(**{"steps": 3, "eval_every": 3} | changes)

    monkeypatch.setattr(compare.cli, "FLAGS", Flags)
    for name, value in (("_METHODS", [*methods]), ("_SEEDS", seeds)):
      monkeypatch.setattr(compare, name, type("Flag", (), {"value": value}))
    code = compare.main()
    captured = capsys.readouterr()
    return code, captured.out, captured.err

  return call


@pytest.fixture
def trained(monkeypatch):
  """Training in no time; `.calls` lists (method, seed), and `.fail` raises.

  `.fail` is {(method, seed): error, or None for a stop by SIGTERM}.
  """
  calls, fail = [], {}

  def call(config, workdir):
    cell = (config.precision.method, config.seed)
    calls.append(cell)
    if cell in fail:
      if fail[cell] is None:
        return None
      raise fail[cell]
    path = workdir / "summary.json"
    if path.exists():
      print(f"{workdir}: finished already")
    else:
      workdir.mkdir(parents=True, exist_ok=True)
      path.write_text(json.dumps(summaries.made_up(*cell)))
    return json.loads(path.read_text())

  monkeypatch.setattr(loop, "train_and_evaluate", call)
  call.calls, call.fail = calls, fail
  return call


def results(workdir):
  return json.loads((workdir / "results.json").read_text())


def test_one_seed_of_two_methods(run, tmp_path):
  code, out, err = run("static8", "dpc")
  assert (code, err) == (0, "")
  table = out[out.index("method ") :].splitlines()
  assert [line.split()[0] for line in table[2:4]] == ["static8", "dpc"]
  assert "0.0%" in table[2]
  assert "verdict" not in out and "±" not in out
  pictures = ("bits", "pareto", "curves", "curves_cost")
  files = {"report.md", "report.html", "results.json"}
  files |= {f"{name}.png" for name in pictures}
  assert all(str(tmp_path / name) in out for name in files)
  runs = results(tmp_path)["runs"]
  assert runs["dpc"]["0"]["gbitops"] < runs["static8"]["0"]["gbitops"]
  files |= {f"{name}.svg" for name in pictures}
  assert {p.name for p in tmp_path.iterdir() if p.is_file()} == files
  page = (tmp_path / "report.html").read_text()
  assert page.count("data:image/svg+xml;base64,") == len(pictures)


def test_a_grid_of_two_methods_and_two_seeds(run, tmp_path):
  code, out, err = run("static8", "dpc", seeds=2, seed=5)
  assert (code, err) == (0, "")
  cells = [("static8", 5), ("dpc", 5), ("static8", 6), ("dpc", 6)]
  for method, seed in cells:
    folder = tmp_path / method / f"seed{seed}"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["method"], summary["seed"]) == (method, seed)
  assert "[1/4] static8, seed 5\n" in out
  assert "[4/4] dpc, seed 6, 1 to train, about 1 min left\n" in out
  assert "verdict" in out and "against static8" in out
  # A second call trains nothing and says the same.
  before = results(tmp_path)
  code, again, err = run("static8", "dpc", seeds=2, seed=5)
  assert (code, err) == (0, "")
  assert again.count("finished already") == 4
  assert "compiling" not in again and "left" not in again
  assert again[again.index("method ") :] == out[out.index("method ") :]
  assert results(tmp_path) == before
  check_results(before)


def check_results(held):
  assert held["command"] == "python -m experiments.compare --config=x"
  assert held["failures"] == []
  assert {m: list(by_seed) for m, by_seed in held["runs"].items()} == {
    "static8": ["5", "6"],
    "dpc": ["5", "6"],
  }
  statistics = held["statistics"]
  for i, method in enumerate(("static8", "dpc")):
    values = [run["test_accuracy"] for run in held["runs"][method].values()]
    figures = statistics["methods"][i]
    assert figures["method"] == method
    assert figures["final"]["mean"] == pytest.approx(sum(values) / 2)
  pair = statistics["against_static"][0]
  assert (pair["method"], pair["reference"]) == ("dpc", "static8")
  assert pair["seeds"] == [5, 6]
  first, second = (
    held["runs"]["dpc"][seed]["test_accuracy"]
    - held["runs"]["static8"][seed]["test_accuracy"]
    for seed in ("5", "6")
  )
  assert pair["difference"]["mean"] == pytest.approx((first + second) / 2)
  assert statistics["missing_references"] == ["uniform"]


@pytest.mark.parametrize(
  ("error", "said"),
  [
    (loop.DivergedError("the loss\nis nan"), "the loss is nan"),
    (config_lib.ConfigError("config.x = 1: no"), "config.x = 1: no"),
    (OSError(28, "No space left"), "OSError: [Errno 28] No space left"),
    (RuntimeError("RESOURCE_EXHAUSTED"), "RuntimeError: RESOURCE_EXHAUSTED"),
    (MemoryError(), "MemoryError"),
  ],
)
def test_a_failed_run_is_reported_and_the_others_go_on(
  run, trained, tmp_path, error, said
):
  trained.fail["dpc", 0] = error
  code, out, err = run("static8", "dpc", seeds=2)
  assert code == 1
  assert trained.calls[2:] == [("static8", 1), ("dpc", 1)]
  first, last = err.splitlines()
  assert first == f"error: dpc, seed 0: {said}"
  assert last.startswith("error: 1 of 4 runs failed")
  assert f"| dpc | 0 | `{said}` |" in (tmp_path / "report.md").read_text()
  held = results(tmp_path)
  assert held["failures"] == [{"method": "dpc", "seed": 0, "message": said}]
  assert held["statistics"]["against_static"][0]["seeds"] == [1]
  assert "against static8" in out
  # The next call tries it again.
  trained.fail.clear()
  trained.calls.clear()
  code, out, err = run("static8", "dpc", seeds=2)
  assert (code, err) == (0, "")
  assert out.count("finished already") == 3
  assert results(tmp_path)["failures"] == []


def test_a_fault_of_the_program_is_not_hidden(run, trained):
  trained.fail["dpc", 0] = KeyError("ours")
  with pytest.raises(KeyError, match="ours"):
    run("static8", "dpc")


def test_nothing_finished_is_nothing_reported(run, trained, tmp_path):
  trained.fail["dpc", 0] = RuntimeError("no")
  code, _, err = run("dpc")
  assert (code, err.count("\n")) == (1, 2)
  assert not (tmp_path / "report.md").exists()


def test_a_mistake_of_the_first_run_stops_the_grid(run, trained):
  trained.fail["static8", 0] = config_lib.ConfigError("config.data: none")
  with pytest.raises(config_lib.ConfigError, match="none"):
    run("static8", "dpc", seeds=3)
  assert trained.calls == [("static8", 0)]


def test_sigterm_stops_the_grid(run, trained, tmp_path):
  trained.fail["dpc", 0] = None
  code, _, err = run("static8", "dpc", seeds=2)
  assert (code, err) == (None, "")
  assert trained.calls == [("static8", 0), ("dpc", 0)]
  assert not (tmp_path / "report.md").exists()
  trained.fail.clear()
  code, out, _ = run("static8", "dpc", seeds=2)
  assert code == 0
  assert out.count("finished already") == 1


def test_a_signal_between_runs_stops_the_grid(trained, tmp_path):
  cells = grid.cells(tiny.make_config(), ["static8", "dpc"], 1)
  asked = []

  def is_stopping(step):
    asked.append(step)
    return len(asked) == 2

  assert grid.train(cells, tmp_path, is_stopping) is None
  assert trained.calls == [("static8", 0)]


def test_all_methods_of_a_seed_come_before_the_next_seed(run, trained):
  run("static8", "dpc", seeds=2, seed=5)
  assert trained.calls == [
    ("static8", 5),
    ("dpc", 5),
    ("static8", 6),
    ("dpc", 6),
  ]


def test_a_half_done_run_goes_on_from_its_checkpoint(run, monkeypatch):
  save = loop._Run._save

  def save_and_die(self):
    save(self)
    self.checkpoints.wait()
    raise RuntimeError("power cut")

  with monkeypatch.context() as patch:
    patch.setattr(loop._Run, "_save", save_and_die)
    code, _, err = run("dpc", steps=4, checkpoint_every=2)
  assert code == 1 and "power cut" in err
  code, out, _ = run("dpc", steps=4, checkpoint_every=2)
  assert code == 0
  assert "going on from the checkpoint of step 2" in out


def test_a_run_of_another_process_is_left_to_it(run, trained):
  busy = workdir.BusyError("workdir = x: another process trains this run")
  trained.fail["static8", 0] = busy
  code, _, err = run("static8", "dpc")
  assert code == 1
  assert "static8, seed 0" in err and "another process trains this run" in err
  assert trained.calls == [("static8", 0), ("dpc", 0)]
  trained.fail.clear()
  code, _, err = run("static8", "dpc")
  assert (code, err) == (0, "")


def test_halves_share_a_workdir_and_a_last_call_reports_both(
  run, trained, tmp_path
):
  run("static8")
  run("dpc")
  assert list(results(tmp_path)["runs"]) == ["dpc"]
  _, out, _ = run("static8", "dpc")
  assert out.count("finished already") == 2
  assert list(results(tmp_path)["runs"]) == ["static8", "dpc"]


@pytest.mark.parametrize(
  ("method", "field", "value"),
  [
    ("sttic8", "seed", 0),
    ("dpc", "precision.center", "middle"),
    ("dpc", "precision.delta", 3.0),
    ("dpc", "seed", 2**32 - 1),
  ],
)
def test_a_mistake_in_any_run_stops_before_the_first(
  run, tmp_path, method, field, value
):
  with pytest.raises(
    config_lib.ConfigError, match=r"sttic8|middle|3\.0|4294967296"
  ):
    run("static8", method, seeds=2, **{field: value})
  assert not list(tmp_path.iterdir())


def test_a_method_named_twice_is_trained_once(run, trained):
  run("dpc", "dpc")
  assert trained.calls == [("dpc", 0)]


def test_no_method_is_a_mistake(run):
  with pytest.raises(config_lib.ConfigError, match="--methods is empty"):
    run()


@pytest.mark.parametrize(
  ("seconds", "runs", "text"),
  [
    ([], 3, ""),
    ([90, 30], 3, ", 3 to train, about 3 min left"),
    ([3600], 2, ", 2 to train, about 2 h 0 min left"),
    ([3600], 0, ""),
  ],
)
def test_time_left(seconds, runs, text):
  assert grid._time_left(seconds, runs) == text


def test_flags_default_to_the_demo():
  assert flags.FLAGS["methods"].default == ["static8", "dpc"]
  assert flags.FLAGS["seeds"].default == 1
  with pytest.raises(ValueError, match="positive"):
    flags.FLAGS["seeds"].parser.parse("0")
