"""The command packs a run, and reports what was read back from the disk."""

import json
import shutil

import jax
import numpy as np
import pytest

from dpc_jax import export, models
from dpc_jax.training import build, checkpoint, loop
from dpc_jax.training import config as config_lib
from dpc_jax.training import step as step_lib
from experiments import export as program
from experiments import exporting
from tests.training import runs as tiny_runs
from tests.training import tiny


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """A folder with a run of CPT, and one of float that has not begun to learn.

  Each step of CPT begins a cycle: training is at b_min, evaluation at b_max.
  """
  folder = tmp_path_factory.mktemp("runs")
  changes = {"precision.b_min": 2, "precision.cycles": 6}
  with tiny_runs.patched():
    loop.train_and_evaluate(tiny.make_config("cpt", **changes), folder / "cpt")
    parts = build.build(tiny.make_config("float"))
    config_lib.claim_workdir(parts.config, folder / "float")
    checkpoints = checkpoint.Checkpoints(folder / "float", keep=2)
    checkpoints.save(0, jax.jit(parts.init)(jax.random.key(0)), {}, {})
    checkpoints.close()
  return folder


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
  monkeypatch.setitem(models._CONSTRUCTORS, "tiny", tiny.Tiny)


@pytest.fixture
def command(capsys, tmp_path):
  """Runs the program: (code, out, err)."""

  def call(run, *arguments):
    argv = [f"--workdir={run}", f"--out={tmp_path / 'out'}", *arguments]
    return program.main(argv), *capsys.readouterr()

  return call


def by_name(result):
  return {row["name"]: row for row in result["evaluations"]}


def test_a_run_is_packed_as_it_is_evaluated(runs, command, tmp_path):
  before = {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file()}
  code, out, err = command(runs / "cpt", "--stablehlo")
  assert (code, err) == (0, "")
  assert {
    p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file()
  } == before
  result = json.loads((tmp_path / "out" / "report.json").read_text())
  rows = by_name(result)
  assert list(rows) == ["run", "exported", "stablehlo"]
  line = [
    x
    for x in tiny.read_lines(runs / "cpt" / "metrics.jsonl")
    if x["split"] == "test"
  ][-1]
  for row in rows.values():
    assert row["accuracy"] == pytest.approx(line["accuracy"], abs=1e-6)
    assert row["loss"] == pytest.approx(line["loss"], rel=1e-4)
    assert (row["flips"], row["examples"]) == (0, 360)
  assert rows["exported"]["from_run"] < 1e-5
  assert {n: x["bits"] for n, x in result["layers"].items()} == {
    "first": [8, 8, 8],
    "second": [8, 8, 8],
  }
  assert result["layers"]["second"]["packed_bytes"] == 288 + 8 * 8
  sizes = {p.name: p.stat().st_size for p in (tmp_path / "out").iterdir()}
  assert result["files"] == {
    name: sizes[name] for name in exporting.FILES if "report" not in name
  }
  assert result["stablehlo_batch"] == "any"
  text = (tmp_path / "out" / "report.md").read_text()
  for part in (
    "method cpt",
    "| exported |",
    "| second |",
    "batches of size: any",
  ):
    assert part.lower() in text.lower()
  assert "checkpoint of step 6 of 6" in out and "exported" in out


def test_a_program_has_the_precision_of_the_run(
  runs, command, tmp_path, monkeypatch
):
  copy = shutil.copytree(runs / "cpt", tmp_path / "copy")
  config = json.loads((copy / "config.json").read_text())
  assert config["matmul_precision"] is None
  config["matmul_precision"] = "highest"
  (copy / "config.json").write_text(json.dumps(config))

  def lower(packed):
    precision = jax.config.jax_default_matmul_precision
    raise export.ExportError(f"lowered with {precision}")

  monkeypatch.setattr(export, "stablehlo", lower)
  code, _, err = command(copy, "--stablehlo")
  assert (code, err) == (2, "error: lowered with highest\n")


def test_a_float_run_is_quantized_with_what_that_costs(runs, command, tmp_path):
  code, _, err = command(
    runs / "float", "--bits=static2", "--activations=8", "--calibration=3"
  )
  assert (code, err) == (0, "")
  result = json.loads((tmp_path / "out" / "report.json").read_text())
  rows = by_name(result)
  assert list(rows) == ["run", "before packing", "exported"]
  assert rows["exported"]["from_previous"] < 1e-5
  assert rows["exported"]["from_run"] > 1e-3
  assert rows["exported"]["flips"] == rows["before packing"]["flips"]
  assert result["layers"]["first"]["bits"] == [2, 8, 8]
  loaded = export.load(tmp_path / "out")
  about = loaded.manifest["about"]
  assert about["bits"] == "static2"
  # Digits: one channel, whose mean and deviation the data have.
  assert 0.2 < about["preprocessing"]["mean"][0] < 0.4
  assert len(about["preprocessing"]["std"]) == 1
  assert "workdir" not in json.dumps(loaded.manifest)
  count = loaded.variables["quant_stats"]["first"]["count"]
  assert int(count) == result["calibration_batches"] == 3


def test_flips_are_counted_against_the_run(runs):
  flags = program._parser().parse_args(
    [f"--workdir={runs / 'cpt'}", "--out=unused"]
  )
  run = program._read(flags)
  inference = jax.jit(lambda x: run.model.apply(run.variables, x))
  found = exporting.evaluate(
    run.parts, run.state, {"same": inference, "other": lambda x: -inference(x)}
  )
  assert [row.name for row in found] == ["run", "same", "other"]
  assert (found[1].flips, found[2].flips) == (0, 360)
  assert found[2].from_previous == found[2].from_run > 0
  assert np.isclose(found[1].loss, found[0].loss)


TEXT = {
  "model.name": "lstm_lm",
  "model.width": 4,
  "model.layers": 1,
  "data.name": "ptb",
  "data.fake": True,
  "data.unroll": 8,
  "batch_size": 4,
  "eval_batch_size": 8,
}


def test_a_language_model_keeps_its_state():
  parts = build.build(tiny.make_config("dpc", **TEXT))
  state = jax.jit(parts.init)(jax.random.key(0))
  # Larger, so that what came before matters.
  params = jax.tree.map(lambda x: 8 * x, state.params)
  state = state.replace(params=params)
  variables = {"params": params, **state.model_state}
  packed = export.freeze(parts.model, variables, parts.feed.sample)
  run, exported = exporting.evaluate(
    parts, state, {"exported": export.restore(packed)}
  )
  assert (exported.flips, run.examples) == (0, len(parts.data.splits["test"]))
  assert exported.from_run < 1e-4
  step = jax.jit(step_lib.make_eval_step(parts.model, parts.task))
  carry, loss = parts.task.initial_carry(8), 0.0
  for rows in parts.feed.evaluate("test"):
    metrics, carry = step(state, rows, carry)
    loss += float(metrics.loss)
  assert run.loss == pytest.approx(loss / run.examples, rel=1e-5)


def test_a_run_is_meant_and_an_export_is_not_overwritten(
  runs, command, tmp_path
):
  code, _, err = command(runs)
  assert code == 2
  assert f"--workdir={runs}: holds no run; did you mean {runs / 'cpt'}" in err
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine").write_text("")
  code, _, err = command(runs / "cpt")
  assert code == 2
  assert "out: is there already; nothing is overwritten" in err
