"""The paper's tables: figures to reach, ours beside them, and what is not."""

import importlib
import itertools
import json
import pathlib
import re

import jax
import pytest

from dpc_jax.training import build, loop, metrics
from dpc_jax.training import config as config_lib
from experiments import grid
from experiments.reproduce import __main__ as everything
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
    found = summaries.made_up(method, seed) | {
      "model": config.model.name,
      "best_test_accuracy": 0.99,
    }
    if config.model.name == "transformer_lm":
      del found["test_accuracy"], found["best_test_accuracy"]
      found["metric"] = "perplexity"
      found |= {"test_perplexity": 300.0 + seed, "best_test_perplexity": 1.0}
    (workdir / "summary.json").write_text(json.dumps(found))
    return found

  monkeypatch.setattr(loop, "train_and_evaluate", call)
  # Its pictures take seconds; one test has them.
  call.write_comparison = trials.reporting.write_comparison
  monkeypatch.setattr(
    trials.reporting, "write_comparison", lambda *args, **kwargs: None
  )
  call.calls, call.fail = calls, fail
  return call


@pytest.fixture
def run(tmp_path, capsys):
  """Runs a table's command: (code, out, err)."""

  def call(name, *flags):
    made = {
      table.NAME: table.reproduce
      for table in everything.TABLES
      if name in (None, table.NAME)
    }
    code = program.main(made, "", [f"--workdir={tmp_path}", *flags])
    return code, *capsys.readouterr()

  return call


def figures(tmp_path, scale, stem):
  return json.loads((tmp_path / scale / f"{stem}.json").read_text())


def lines(text):
  """{(network, method): {column: cell}} of a table on a terminal."""
  rows = [re.split(r"\s{2,}", line) for line in text.splitlines()]
  (header,) = (row for row in rows if row[:2] == ["network", "method"])
  return {
    tuple(row[:2]): dict(zip(header[2:], row[2:], strict=True))
    for row in rows
    if len(row) == len(header) and row != header
  }


def test_every_network_of_the_paper_is_in_a_table_at_both_ends_of_the_scale():
  for scale in ("smoke", "full"):
    recipes = [row.recipe for _, row in ROWS if scale in row.trials]
    assert sorted(recipes) == sorted(test_configs.MATRIX.split())


def test_the_tables_are_those_of_the_command():
  assert set(everything.TABLES) == {*TABLES, savings, embeddings}
  for table in everything.TABLES:
    name = table.__name__
    assert name == f"experiments.reproduce.{table.NAME}"
    assert f"python -m {name}" in table.__doc__


# DESIGN, sections 1 and 6.
PUBLISHED = {
  ("cifar10_resnet38", "static8"): (92.66, "CPT"),
  ("cifar10_resnet74", "static8"): (93.04, "CPT"),
  ("cifar10_resnet110", "static8"): (93.44, "DPC"),
  ("cifar10_resnet110", "dpc"): (93.69, "DPC"),
  ("cifar10_wide_resnet38", "static8"): (93.90, "DPC"),
  ("cifar10_wide_resnet38", "dpc"): (94.38, "DPC"),
  ("cifar10_mobilenet_v2", "static8"): (92.83, "DPC"),
  ("cifar10_mobilenet_v2", "dpc"): (93.07, "DPC"),
  ("cifar100_resnet38", "static8"): (69.78, "CPT"),
  ("cifar100_resnet74", "static8"): (71.01, "CPT"),
  ("imagenet_resnet18", "static8"): (69.60, "CPT"),
  ("ptb_lstm", "static8"): (96.95, "CPT"),
  ("ptb_lstm", "cpt"): (96.39, "CPT"),
  ("wikitext103_transformer", "static8"): (31.77, "CPT"),
  ("wikitext103_transformer", "cpt"): (30.22, "CPT"),
}


def test_published_figures():
  found = {
    (row.recipe, method): (figure.value, figure.source)
    for _, row in ROWS
    for method, figure in row.published.items()
  }
  assert found == PUBLISHED


def test_published_figures_stand_in_the_docstrings_of_recipe_and_table():
  for table, row in ROWS:
    recipe = importlib.import_module(f"configs.{row.recipe}").__doc__
    for figure in row.published.values():
      assert f"{figure.value:.2f}" in recipe
      assert f"{figure.value:.2f}" in table.__doc__
      source = {"CPT": "(CPT)", "DPC": "the DPC paper"}[figure.source]
      assert source in recipe and source in table.__doc__


@pytest.mark.parametrize("scale", scales.SCALES)
def test_what_a_scale_runs_is_valid(scale):
  jobs = [(row.recipe, row.trials.get(scale)) for _, row in ROWS]
  for recipe, trial in [*jobs, embeddings.RUNS[scale]]:
    if trial is not None:
      config = trials._config(recipe, trial, None)
      cells = grid.cells(config, list(trial.methods), trial.seeds)
      assert len(cells) == len(trial.methods) * trial.seeds
      assert config.data.fake == trial.is_smoke


@pytest.mark.parametrize("scale", ["gpu-hour", "full"])
def test_figures_that_count_come_from_the_recipe_and_all_images(scale):
  jobs = [row for _, row in ROWS if scale in row.trials]
  assert len(jobs) == {"gpu-hour": 2, "full": 15}[scale]
  for row in jobs:
    trial = row.trials[scale]
    config = trials._config(row.recipe, trial, None)
    recipe = importlib.import_module(f"configs.{row.recipe}").get_config()
    recipe.precision.method = trial.methods[0]
    recipe.data.holdout = 0
    recipe.mesh.data = config.mesh.data
    assert config.to_json() == recipe.to_json()
    assert {"static8", "dpc"} <= set(trial.methods)
    if scale == "full":
      assert trial.seeds == 3 and set(row.published) <= set(trial.methods)


def test_the_batch_is_split_over_what_devices_it_can_be(monkeypatch):
  for devices, parts in ((8, 4), (6, 2), (20, 20)):
    monkeypatch.setattr(jax, "device_count", lambda n=devices: n)
    config = trials._config("ptb_lstm", scales.FULL_TEXT, None)  # of 20 rows
    assert config.mesh.data == parts


def test_ours_stand_beside_the_published_figures(trained, run, tmp_path):
  code, out, err = run("cifar10", "--scale=full", "--data_dir=D")
  assert (code, err) == (0, "")
  assert len(trained.calls) == 5 * 8 * 3
  assert {config.data.dir for config in trained.calls} == {"D"}
  found = lines(out)
  # Accuracies .80 .81 .82; dpc's .80 .811 .824.
  static = found["ResNet-110", "static8"]
  assert static["published"] == "93.44 % (DPC)"
  assert static["ours"] == "81.00 ± 1.00 %"
  assert static["our difference from static"] == "-"
  made_up = summaries.made_up("dpc", 0)
  # Differences 0, .1, .4 %: t = 4.303, sd = .2082.
  difference = "+0.17 [-0.35, +0.68]"
  assert found["ResNet-110", "dpc"] == {
    "published": "93.69 % (DPC)",
    "ours": "81.17 ± 1.20 %",
    "published difference": "+0.25",
    "our difference from static": difference,
    "from uniform": difference,
    "cost": f"{1 - made_up['saving_vs_static']:.3f}x",
    "min a run": f"{made_up['seconds'] / 60:.1f}",
    "runs": RUNS,
  }
  # Not of this scale.
  assert ("ResNet-8", "static8") not in found and "ResNet-8" not in out
  held = figures(tmp_path, "full", "table_cifar10")
  (line,) = (
    x
    for x in held["tables"]["cifar10"]
    if (x["network"], x["method"]) == ("ResNet-110", "dpc")
  )
  assert line["published"] == {"value": 93.69, "source": "DPC"}
  assert line["ours"]["final"]["mean"] == pytest.approx(0.81166667)
  assert line["ours"]["seeds"] == [0, 1, 2]
  assert line["against_uniform"]["reference"] == "uniform"
  (environment,) = held["environments"]
  assert environment["device"] and environment["versions"]["jax"]
  report = (tmp_path / "full" / "table_cifar10.html").read_text()
  assert "81.17 ± 1.20 %" in report and "93.69 % (DPC)" in report
  assert tables.SOURCES["DPC"].split(",")[0] in report


def test_a_recipe_has_a_report_of_its_own(trained, run, tmp_path, monkeypatch):
  monkeypatch.setattr(
    trials.reporting, "write_comparison", trained.write_comparison
  )
  _, out, _ = run("cifar10", "--scale=cpu-hour")
  report = tmp_path / "cpu-hour" / "cifar10_resnet8" / "report.html"
  assert report.exists() and f"report: {report}" in out


def test_perplexities_are_no_percents(trained, run):
  _, out, _ = run("language", "--scale=cpu-hour")
  dpc = lines(out)["Transformer, WikiText-2", "dpc"]
  assert (dpc["ours"], dpc["our difference from static"]) == ("300.00", "+0.00")
  static = lines(out)["Transformer, WikiText-103", "static8"]
  assert static["published"] == "31.77 (CPT)"


def test_a_control_of_another_cost_is_named(trained, run, monkeypatch):
  made_up = summaries.made_up

  def cheap(method, seed):
    gbitops = 1000.0 if method == "uniform" else 900.0
    return made_up(method, seed) | {"gbitops": gbitops}

  monkeypatch.setattr(summaries, "made_up", cheap)
  _, out, _ = run("imagenet", "--scale=full")
  found = lines(out)["ResNet-18", "dpc"]["from uniform"]
  assert found.endswith("], not of equal cost")


def test_every_device_is_named(trained, run, tmp_path, monkeypatch):
  made_up, numbers = summaries.made_up, itertools.count()

  def elsewhere(method, seed):
    return made_up(method, seed) | {"device": f"1 x {next(numbers)}"}

  monkeypatch.setattr(summaries, "made_up", elsewhere)
  run("imagenet", "--scale=full")
  report = (tmp_path / "full" / "table_imagenet.md").read_text()
  assert report.count("device: 1 x") == 3 * 8 * 3


def test_a_network_beside_the_paper_is_shown_where_it_is_run(trained, run):
  _, out, _ = run("cifar10", "--scale=cpu-hour")
  assert lines(out)["ResNet-8", "dpc"]["runs"] == "4 x 3 steps"
  assert lines(out)["ResNet-110", "dpc"]["runs"] == "not run"
  fields = {(c.steps, c.data.train_size) for c in trained.calls}
  assert fields == {(390, 5_000)}
  assert "ResNet-8 is not the paper's" in out
  assert len(trained.calls) == 8 * 4


def test_a_smoke_run_shows_no_figure(trained, run, tmp_path):
  code, out, _ = run("cifar10")
  assert code == 0
  assert {config.data.fake for config in trained.calls} == {True}
  found = lines(out)
  assert {row["ours"] for row in found.values()} == {"not run"}
  assert found["ResNet-110", "dpc"]["runs"] == "smoke ok, 3 steps"
  assert found["ResNet-110", "static8"]["runs"] == "not run"
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
  assert found["ResNet-38", "dpc"]["runs"] == "2 x 3 steps, others failed"
  assert found["MobileNetV2", "dpc"]["runs"] == RUNS
  assert line in figures(tmp_path, "full", "table_cifar100")["errors"]


def test_a_method_of_which_every_run_failed(trained, run):
  trained.fail["resnet18_imagenet", "dpc", 0] = loop.DivergedError("nan")
  code, out, _ = run("imagenet")
  assert code == 1 and lines(out)["ResNet-18", "dpc"]["runs"] == "failed"


def test_without_data_a_table_says_not_run(run, tmp_path):
  code, out, err = run("language", "--scale=cpu-hour", f"--data_dir={tmp_path}")
  assert code == 1
  assert "error: wikitext2_transformer, not run: config.data: " in err
  assert lines(out)["Transformer, WikiText-2", "dpc"]["runs"] == "not run"
  assert (tmp_path / "cpu-hour" / "table_language.md").exists()


def test_a_recipe_whose_report_cannot_be_written(trained, run, monkeypatch):
  def fail(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(trials.reporting, "write_comparison", fail)
  code, out, err = run("imagenet", "--scale=full")
  assert code == 1 and err.count("no report: [Errno 28]") == 3
  assert lines(out)["ResNet-18", "dpc"]["ours"] == "81.17 ± 1.20 %"


def test_after_sigterm_nothing_more_begins(trained, run, tmp_path):
  trained.fail["resnet38", "dpc", 0] = None
  code, out, _ = run("cifar10")
  assert code == 0 and out.endswith("stopped; the same command goes on\n")
  assert len(trained.calls) == 1
  assert not list((tmp_path / "smoke").glob("table_*"))


def test_ctrl_c_is_one_line(trained, run, monkeypatch):
  monkeypatch.setattr(program.cli, "leave_interrupted", lambda: 130)
  trained.fail["resnet38", "dpc", 0] = KeyboardInterrupt()
  code, _, err = run("cifar10")
  assert code == 130
  assert err == "error: interrupted; the same command goes on\n"


def test_what_is_done_is_written_after_each_table(
  trained, run, tmp_path, monkeypatch
):
  trained.fail["resnet18_imagenet", "float", 0] = None
  monkeypatch.setattr(everything, "TABLES", (cifar100, imagenet))
  code, out, _ = run(None, "--scale=full")
  report = (tmp_path / "full" / "report.md").read_text()
  assert code == 0 and "## Accuracy on CIFAR-100" in report
  assert "## Accuracy on ImageNet" not in report
  assert "Accuracy on CIFAR-100" in out


def test_smoke_runs_are_made_anew_and_others_are_kept(trained, run, tmp_path):
  for scale in ("smoke", "full"):
    (tmp_path / scale / "imagenet_resnet18").mkdir(parents=True)
    (tmp_path / scale / "imagenet_resnet18" / "old").write_text("")
  run("imagenet")
  run("imagenet", "--scale=full")
  assert not (tmp_path / "smoke" / "imagenet_resnet18" / "old").exists()
  assert (tmp_path / "full" / "imagenet_resnet18" / "old").exists()


def test_all_tables_make_one_report(monkeypatch, run, tmp_path):
  section = tables.Section("x", "A title", ["a"], [["b"]], [], {}, [], [])

  def reproduce(context):
    assert context.scale == "gpu-hour"
    return section

  for table in (*TABLES, savings, embeddings):
    monkeypatch.setattr(table, "reproduce", reproduce)
  code, _, _ = run(None, "--scale=gpu-hour")
  assert code == 0
  report = (tmp_path / "gpu-hour" / "report.md").read_text()
  assert report.count("## A title") == 6


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
  found = savings.saving(config, savings._INPUTS[config.data.name].classes)
  assert found.quantized == pytest.approx(quantized, abs=5e-4)


@pytest.mark.usefixtures("fast_compiler")
@pytest.mark.parametrize("recipe", ["wikitext103_transformer", "ptb_lstm"])
def test_a_saving_is_what_a_run_says(recipe, tmp_path, monkeypatch):
  monkeypatch.setattr(metrics, "_event_writer", lambda workdir: None)
  config = importlib.import_module(f"configs.{recipe}").get_config("dpc,smoke")
  config.mesh.data = 1
  run = loop.train_and_evaluate(config, tmp_path)
  outside = set(run["layers"]) - set(run["bits"])
  classes = build.build(config).data.num_classes
  found = savings.saving(config, classes)
  assert found.total == pytest.approx(run["saving_vs_static"], rel=1e-12)
  costs = {
    path: layer["macs"]
    * layer["layers"]
    * (3 * 32**2 if path in outside else 192)
    for path, layer in run["layers"].items()
  }
  in_float = sum(costs[path] for path in outside) / sum(costs.values())
  assert found.in_float == pytest.approx(in_float, rel=1e-12)
  assert found.quantized * (1 - in_float) == pytest.approx(found.total)


def test_the_full_networks_see_their_data():
  """Multiply-accumulates of an image, or of a row of words."""
  for recipe, expected in (
    ("imagenet_resnet18", 1.814e9),
    ("cifar100_resnet38", 8.34e7),
  ):
    assert macs_of(recipe) == pytest.approx(expected, rel=2e-3)


def macs_of(recipe):
  """As `savings` asks for them."""
  config = importlib.import_module(f"configs.{recipe}").get_config("static8")
  layer_costs, seen = savings.macs.layer_costs, []

  def counted(model, sample):
    seen.append(layer_costs(model, sample))
    return seen[0]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(savings.macs, "layer_costs", counted)
    savings.saving(config, savings._INPUTS[config.data.name].classes)
  return sum(cost.macs for cost in seen[0].values())


def test_the_table_of_savings_counts_the_networks_in_range(monkeypatch, run):
  given = iter([savings.Saving(0.3, 0.1, 0.5), savings.Saving(0.5, 0.3, 0.1)])
  monkeypatch.setattr(savings, "saving", lambda config, classes: next(given))
  for table in (cifar10, cifar100, imagenet):
    monkeypatch.setattr(table, "ROWS", ())
  monkeypatch.setattr(language, "ROWS", language.ROWS[:1])
  code, out, _ = run("savings")
  text = " ".join(out.split())
  assert code == 0
  assert "LSTM, PTB 5..8 30.0% 50.0% 10.0% 30.0% 50.0%" in text
  assert (
    "In that range lie, of our 1 networks, counting the quantized layers, 1"
    " with the median as center and 0 with the logarithmic midpoint; counting"
    " all layers, 0 and 1."
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
  assert held["tables"]["embeddings"]["measured"] == [numbers]
  differences = numbers["runs"][1]["differences"]
  assert held["tables"]["embeddings"]["differences"] == {
    name: differences[name] for name in embeddings._MEASURES
  }
  first, dpc = numbers["runs"]
  assert (first["method"], dpc["method"]) == ("float", "dpc")
  value = dpc["estimates"]["silhouette"]["value"]
  assert re.search(rf"silhouette +\S+ +{value:.4f} +[-+]", out)
  page = (where / "table_embeddings.html").read_text()
  assert "data:image/svg+xml" in page
  assert "nothing of other seeds" in page


def test_several_seeds_give_an_interval_over_seeds(trained, run, monkeypatch):
  flags_seen = []

  def measure(flags):
    """Silhouettes .5, .6, .8 of DPC, and .5 in full precision."""
    flags_seen.append(flags)
    place = next(f for f in flags if f.startswith("--workdir="))
    seed = len(flags_seen) - 1
    names, gain = embeddings._MEASURES, (0.0, 0.1, 0.3)[seed]
    estimate = {name: {"value": 0.5} for name in names}
    dpc = {name: {"value": 0.5 + gain} for name in names}
    difference = {name: {"value": gain, "low": 0, "high": 0} for name in names}
    found = {
      "runs": [
        {"name": "full precision", "method": "float", "model": "m"}
        | {"dataset": "d", "steps": 3, "seed": seed, "estimates": estimate},
        {"name": "DPC", "method": "dpc", "estimates": dpc}
        | {"differences": difference},
      ],
      **{"examples": 9, "split": "test", "pictured": 9, "perplexity": 3},
    }
    where = pathlib.Path(place.partition("=")[2])
    where.mkdir(exist_ok=True)
    (where / "embeddings.json").write_text(json.dumps(found))
    return 0

  monkeypatch.setattr(embeddings.embeddings, "main", measure)
  code, out, _ = run("embeddings", "--scale=full")
  assert code == 0 and len(flags_seen) == 3
  # sd .1528, t = 4.303.
  assert re.search(r"silhouette +0.5000 +0.6333 +\+0.13 \[-0.25, \+0.51\]", out)
  assert "3 seeds: the interval is Student's over them" in " ".join(out.split())
  assert [f[1].split("/")[-1] for f in flags_seen] == [
    "full",
    "embeddings_seed1",
    "embeddings_seed2",
  ]


@pytest.mark.parametrize("method", ["float", "dpc"])
def test_without_one_of_its_runs_there_is_no_figure(
  trained, run, method, monkeypatch
):
  monkeypatch.setattr(embeddings.embeddings, "main", None)
  trained.fail["resnet8", method, 0] = loop.DivergedError("nan")
  code, out, _ = run("embeddings")
  assert code == 1 and "No figure" in out
  assert re.search(r"silhouette +not run", out)


def test_a_figure_that_fails_costs_no_table(trained, run, monkeypatch):
  called = []
  monkeypatch.setattr(
    embeddings.embeddings, "main", lambda flags: called.append(flags) or 2
  )
  code, out, err = run("embeddings", "--scale=full", "--data_dir=D")
  assert code == 1 and "cifar10_resnet110, seed 0, no figure" in err
  assert "No figure" in out
  # Three seeds of four methods, full precision first.
  workdirs, _, data_dir = called[0]
  assert [w.split("/")[-2] for w in workdirs.split(",")] == [
    "float",
    "static8",
    "dpc",
    "adaptive",
  ]
  assert data_dir == "--data_dir=D"
  assert len(trained.calls) == 12 and len(called) == 3


def test_recipes_without_the_same_data_share_a_line():
  lines = [
    "a, not run: no x",
    "b, dpc, seed 0, failed: nan",
    "c, not run: no x",
  ]
  assert tables.grouped([*lines, "d, not run: no y", "a, not run: no x"]) == [
    "b, dpc, seed 0, failed: nan",
    "a and 1 more, not run: no x",
    "d, not run: no y",
  ]


@pytest.mark.usefixtures("fast_compiler")
def test_a_smoke_run_is_a_run(monkeypatch, run, tmp_path):
  monkeypatch.setattr(metrics, "_event_writer", lambda workdir: None)
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  monkeypatch.setattr(language, "ROWS", language.ROWS[:1])
  code, out, _ = run("language")
  assert code == 0
  assert lines(out)["LSTM, PTB", "dpc"]["runs"] == "smoke ok, 4 steps"
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
  assert (
    code == 1
    and "imagenet_resnet18 and 2 more, not run: config.steps = 0" in err
  )
