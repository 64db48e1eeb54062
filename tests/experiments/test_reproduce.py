"""The paper's tables: figures to reach, ours beside them, and what is not."""

import importlib
import json
import re

import jax
import pytest

from dpc_jax.training import config as config_lib
from dpc_jax.training import loop, metrics
from experiments import grid
from experiments.reproduce import (
  cifar10,
  cifar100,
  embeddings,
  imagenet,
  language,
  program,
  savings,
  scales,
  tables,
  trials,
)
from tests.experiments import summaries, test_configs

TABLES = (cifar10, cifar100, imagenet, language)
RUNS = "3 x 3 steps"
ROWS = [(table, row) for table in TABLES for row in table.ROWS]


@pytest.fixture
def trained(monkeypatch):
  """Training in no time: `.fail` is {(model, method, seed): what it raises}.

  Of None it is stopped by SIGTERM; `.calls` has the configs.
  """
  calls, fail = [], {}

  def call(config, workdir):
    method, seed = config.precision.method, config.seed
    calls.append(config)
    cell = (config.model.name, method, seed)
    if cell in fail:
      if fail[cell] is None:
        return None
      raise fail[cell]
    workdir.mkdir(parents=True, exist_ok=True)
    found = summaries.made_up(method, seed)
    (workdir / "summary.json").write_text(json.dumps(found))
    return found

  monkeypatch.setattr(loop, "train_and_evaluate", call)
  call.calls, call.fail = calls, fail
  return call


@pytest.fixture
def run(tmp_path, capsys):
  """Runs a table's command: (code, out, err)."""

  def call(name, *flags):
    code = program.main(name, "", [f"--workdir={tmp_path}", *flags])
    return code, *capsys.readouterr()

  return call


def figures(tmp_path, scale, stem):
  return json.loads((tmp_path / scale / f"{stem}.json").read_text())


def lines(text):
  """{(network, method): the cells after them} of a table on a terminal."""
  rows = [re.split(r"\s{2,}", line) for line in text.splitlines()]
  found = {tuple(row[:2]): row[2:] for row in rows if len(row) == 8}
  del found["network", "method"]
  return found


def test_every_network_of_the_paper_is_in_a_table_at_both_ends_of_the_scale():
  for scale in ("smoke", "full"):
    recipes = [row.recipe for _, row in ROWS if scale in row.trials]
    assert sorted(recipes) == sorted(test_configs.MATRIX.split())


def test_the_tables_are_those_of_the_command():
  names = {table.NAME for table in (*TABLES, savings, embeddings)}
  assert names == set(program.TABLES)
  for name in program.TABLES:
    module = importlib.import_module(f"experiments.reproduce.{name}")
    assert f"python -m experiments.reproduce.{name}" in module.__doc__


def test_published_figures_are_those_of_the_recipes_and_of_the_docstrings():
  seen = 0
  for table, row in ROWS:
    recipe = importlib.import_module(f"configs.{row.recipe}").__doc__
    for figure in row.published.values():
      assert f"{figure.value:.2f}" in recipe
      assert f"{figure.value:.2f}" in table.__doc__
      source = {"CPT": "(CPT)", "DPC": "the DPC paper"}[figure.source]
      assert source in recipe and source in table.__doc__
      seen += 1
  assert seen == 15


@pytest.mark.parametrize("scale", scales.SCALES)
def test_what_a_scale_runs_is_valid(scale):
  jobs = [(row.recipe, row.trials.get(scale)) for _, row in ROWS]
  for recipe, trial in [*jobs, embeddings.RUNS[scale]]:
    if trial is not None:
      config = trials._config(recipe, trial, None)
      cells = grid.cells(config, list(trial.methods), trial.seeds)
      assert len(cells) == len(trial.methods) * trial.seeds
      assert config.data.fake == trial.is_smoke


def test_figures_that_count_come_from_full_recipes_and_all_images():
  for table, row in ROWS:
    if "full" in row.trials:
      trial = row.trials["full"]
      config = trials._config(row.recipe, trial, None)
      whole = importlib.import_module(f"configs.{row.recipe}").get_config()
      assert config.steps == whole.steps
      assert not config.data.holdout
      assert trial.seeds >= 3 and {"static8", "dpc"} <= set(trial.methods)
      assert set(row.published) <= set(trial.methods), table.NAME


def test_ours_stand_beside_the_published_figures(trained, run, tmp_path):
  code, out, err = run("cifar10", "--scale=full", "--data_dir=D")
  assert (code, err) == (0, "")
  assert len(trained.calls) == 5 * 8 * 3
  assert {config.data.dir for config in trained.calls} == {"D"}
  found = lines(out)
  # Accuracies .80 .81 .82; dpc's .80 .811 .824.
  *static, _, _ = found["ResNet-110", "static8"]
  assert static == ["93.44 % (DPC)", "81.00 ± 1.00 %", "-", "-"]
  published, ours, gain, our_gain, cost, ran = found["ResNet-110", "dpc"]
  assert (published, gain, ran) == ("93.69 % (DPC)", "+0.25", RUNS)
  assert ours == "81.17 ± 1.20 %"
  # Differences 0, .1, .4 %: t = 4.303, sd = .2082.
  assert our_gain == "+0.17 [-0.35, +0.68]"
  made_up = summaries.made_up("dpc", 0)
  assert cost == f"{1 - made_up['saving_vs_static']:.3f}x"
  # Not of this scale.
  assert ("ResNet-8", "static8") not in found and "ResNet-8" not in out
  held = figures(tmp_path, "full", "table_cifar10")
  (line,) = (
    x
    for x in held["tables"]["cifar10"]
    if (x["network"], x["method"]) == ("ResNet-110", "dpc")
  )
  assert line["published"] == {"value": 93.69, "source": "DPC"}
  assert line["ours"]["mean"] == pytest.approx(0.81166667)
  assert held["device"] and held["versions"]["jax"]
  report = (tmp_path / "full" / "table_cifar10.html").read_text()
  assert "81.17 ± 1.20 %" in report and "93.69 % (DPC)" in report
  assert tables.SOURCES["DPC"].split(",")[0] in report


def test_a_network_beside_the_paper_is_shown_where_it_is_run(trained, run):
  _, out, _ = run("cifar10", "--scale=cpu-hour")
  assert lines(out)["ResNet-8", "dpc"][-1] == "4 x 3 steps"
  assert lines(out)["ResNet-110", "dpc"][-1] == "not run"
  assert "ResNet-8 is not the paper's" in out
  assert len(trained.calls) == 8 * 4


def test_a_smoke_run_shows_no_figure(trained, run, tmp_path):
  code, out, _ = run("cifar10")
  assert code == 0
  assert {config.data.fake for config in trained.calls} == {True}
  found = lines(out)
  assert {row[1] for row in found.values()} == {"not run"}
  assert found["ResNet-110", "dpc"][-1] == "smoke ok, 3 steps"
  assert found["ResNet-110", "static8"][-1] == "not run"
  held = figures(tmp_path, "smoke", "table_cifar10")["tables"]["cifar10"]
  assert all(line["ours"] is None for line in held)
  # What the runs printed.
  assert (tmp_path / "smoke" / "cifar10_resnet38" / "log.txt").exists()
  assert "seed 0" not in out


def test_a_failed_run_is_said_and_the_others_go_on(trained, run, tmp_path):
  trained.fail["resnet38", "dpc", 1] = loop.DivergedError("loss is nan")
  code, out, err = run("cifar100", "--scale=full")
  assert code == 1
  line = "cifar100_resnet38, dpc, seed 1, failed: loss is nan"
  assert f"error: {line}" in err and line in " ".join(out.split())
  found = lines(out)
  assert found["ResNet-38", "dpc"][-1] == "2 x 3 steps, others failed"
  assert found["MobileNetV2", "dpc"][-1] == RUNS
  assert line in figures(tmp_path, "full", "table_cifar100")["errors"]


def test_a_method_of_which_every_run_failed(trained, run):
  trained.fail["resnet18_imagenet", "dpc", 0] = loop.DivergedError("nan")
  code, out, _ = run("imagenet")
  assert code == 1 and lines(out)["ResNet-18", "dpc"][-1] == "failed"


def test_without_data_a_table_says_not_run(run, tmp_path):
  code, out, err = run("language", "--scale=cpu-hour", f"--data_dir={tmp_path}")
  assert code == 1
  assert "error: wikitext2_transformer, not run: config.data: " in err
  assert lines(out)["Transformer, WikiText-2", "dpc"][-1] == "not run"
  assert (tmp_path / "cpu-hour" / "table_language.md").exists()


def test_after_sigterm_nothing_more_begins(trained, run, tmp_path):
  trained.fail["resnet38", "dpc", 0] = None
  code, out, _ = run("cifar10")
  assert code == 0 and out.endswith("stopped; the same command goes on\n")
  assert len(trained.calls) == 1
  assert not list((tmp_path / "smoke").glob("table_*"))


def test_all_tables_make_one_report(monkeypatch, run, tmp_path):
  section = tables.Section("x", "A title", ["a"], [["b"]], [], {}, [], {})

  def reproduce(context):
    assert context.scale == "gpu-hour"
    return section

  for table in (*TABLES, savings, embeddings):
    monkeypatch.setattr(table, "reproduce", reproduce)
  code, _, _ = run(None, "--scale=gpu-hour")
  assert code == 0
  report = (tmp_path / "gpu-hour" / "report.md").read_text()
  assert report.count("## A title") == 6
  assert "not measured on one" in report


@pytest.mark.parametrize(
  ("recipe", "method", "quantized"),
  [
    ("cifar10_resnet38", "dpc", 0.302),
    ("cifar10_resnet38", "dpc_log_midpoint", 0.428),
    # All its layers are equal and get 7 bits of 5..8.
    ("ptb_lstm", "dpc", 1 - (7 * 7 + 2 * 7 * 8) / (8 * 8 + 2 * 8 * 8)),
  ],
)
def test_savings_are_those_of_the_design(recipe, method, quantized):
  config = importlib.import_module(f"configs.{recipe}").get_config(method)
  found = savings.saving(config, savings._INPUTS[config.data.name])
  assert found.quantized == pytest.approx(quantized, abs=5e-4)
  assert found.total == pytest.approx(found.quantized * (1 - found.in_float))


def test_the_table_of_savings_counts_the_networks_in_range(monkeypatch, run):
  given = iter([savings.Saving(0.3, 0.1, 0.5), savings.Saving(0.5, 0.3, 0.1)])
  monkeypatch.setattr(savings, "saving", lambda config, seen: next(given))
  for table in (cifar10, cifar100, imagenet):
    monkeypatch.setattr(table, "ROWS", ())
  monkeypatch.setattr(language, "ROWS", language.ROWS[:1])
  code, out, _ = run("savings")
  text = " ".join(out.split())
  assert code == 0
  assert "LSTM, PTB 5..8 30.0% 50.0% 10.0% 30.0% 50.0%" in text
  assert (
    "Of our 1 lie in that range: over the quantized layers 1 with the median"
    " center and 0 with the logarithmic midpoint; over all layers 0 and 1."
  ) in text


@pytest.mark.usefixtures("fast_compiler")
def test_the_figure_is_made_of_real_runs(monkeypatch, run, tmp_path):
  monkeypatch.setattr(metrics, "_event_writer", lambda workdir: None)
  short = {"steps": 20, "eval_every": 20, "checkpoint_every": 20}
  trial = scales.Trial(("float", "dpc"), fields=short | {"mesh.data": 1})
  monkeypatch.setitem(embeddings.RUNS, "smoke", ("digits_resnet8", trial))
  code, out, _ = run("embeddings")
  assert code == 0
  where = tmp_path / "smoke"
  numbers = json.loads((where / "embeddings.json").read_text())
  held = figures(tmp_path, "smoke", "table_embeddings")
  assert held["tables"]["embeddings"] == numbers
  first, dpc = numbers["runs"]
  assert (first["method"], dpc["method"]) == ("float", "dpc")
  value = dpc["estimates"]["silhouette"]["value"]
  assert re.search(rf"silhouette +\S+ +{value:.4f} +[-+]", out)
  page = (where / "table_embeddings.html").read_text()
  assert "data:image/svg+xml" in page
  assert "one seed" in page


def test_without_one_of_its_runs_there_is_no_figure(trained, run):
  trained.fail["resnet8", "dpc", 0] = loop.DivergedError("nan")
  code, out, _ = run("embeddings")
  assert code == 1 and "No figure" in out
  assert re.search(r"silhouette +not run", out)


@pytest.mark.usefixtures("fast_compiler")
def test_a_smoke_run_is_a_run(monkeypatch, run, tmp_path):
  monkeypatch.setattr(metrics, "_event_writer", lambda workdir: None)
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  monkeypatch.setattr(language, "ROWS", language.ROWS[:1])
  code, out, _ = run("language")
  assert code == 0
  assert lines(out)["LSTM, PTB", "dpc"][-1] == "smoke ok, 4 steps"
  folder = tmp_path / "smoke" / "ptb_lstm" / "dpc" / "seed0"
  assert json.loads((folder / "summary.json").read_text())["steps"] == 4


@pytest.mark.parametrize(
  ("flag", "words"),
  [
    ("--scale=day", "argument --scale: invalid choice: 'day'"),
    ("--what", "unrecognized arguments: --what"),
  ],
)
def test_a_mistake_is_one_line(run, capsys, flag, words):
  with pytest.raises(SystemExit) as error:
    run("savings", flag)
  assert error.value.code == 2
  line = capsys.readouterr().err
  assert line.count("\n") == 1
  assert words.removeprefix("argument ") in line


def test_a_file_where_the_folder_should_be(run, tmp_path):
  (tmp_path / "smoke").write_text("")
  code, _, err = run("savings")
  assert code == 2 and err.count("\n") == 1 and "smoke" in err


def test_a_mistake_in_a_recipe_is_no_crash(monkeypatch, run):
  def fail(*args):
    raise config_lib.ConfigError("config.steps = 0: must be positive")

  monkeypatch.setattr(grid, "cells", fail)
  code, _, err = run("imagenet")
  assert code == 1 and "imagenet_resnet18, not run: config.steps = 0" in err
