"""The bounds of fresh weights, of trained ones, and of a run's checkpoint."""

import json
import shutil
import sys
import types

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

import dpc_jax as dpc
from dpc_jax import models
from dpc_jax.policy import bounds as bounds_lib
from dpc_jax.training import build, loop, metrics, sharding
from experiments import bounds, cli
from tests.training import runs as tiny_runs
from tests.training import tiny

# ml_collections reads a recipe by a way that Python will drop one day.
pytestmark = pytest.mark.filterwarnings(
  "ignore:the load_module:DeprecationWarning"
)

RECIPE = """
from tests.training import tiny


def get_config(method="dpc"):
  return tiny.make_config(method)
"""
WIDTHS = range(2, 9)
REACHED = "--tau_max=0.999"


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
  monkeypatch.setitem(models._CONSTRUCTORS, "tiny", tiny.Tiny)
  monkeypatch.setattr(metrics, "_event_writer", lambda workdir: None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Workdirs of finished runs, by method."""
  folder = tmp_path_factory.mktemp("runs")
  with tiny_runs.patched():
    for method in ("dpc", "float"):
      config = tiny.make_config(method, steps=2, batch_size=24)
      loop.train_and_evaluate(config, folder / method)
  return folder


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
  """Runs `python -m experiments.bounds`: (code, out, err, bounds.json)."""
  recipe = tmp_path / "recipe.py"
  recipe.write_text(RECIPE)

  def call(*arguments, method="dpc", workdir=tmp_path / "bounds"):
    argv = [
      "experiments/bounds.py",
      f"--config={recipe}:{method}",
      f"--workdir={workdir}",
      *arguments,
    ]
    monkeypatch.setattr(cli, "FLAGS", flags.FlagValues())
    monkeypatch.setattr(sys, "argv", argv)
    # A recipe is loaded into the module of the one before.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    cli.define_config()
    bounds.define_flags()
    code = cli.run(bounds.main, argv)
    captured = capsys.readouterr()
    path = tmp_path / "bounds" / "bounds.json"
    result = json.loads(path.read_text()) if path.exists() else None
    return code, captured.out, captured.err, result

  return call


def fresh_params(seed=0):
  config = tiny.make_config(seed=seed)
  return build.build(config).init(jax.random.key(seed)).params


def expected(params, **options):
  """Of the two layers of the tiny model that are quantized."""
  params = {name: params[name] for name in ("first", "second")}
  return bounds_lib.precision_bounds(
    {"params": jax.device_get(params)}, tau_max=0.999, **options
  )


def check(result, want):
  assert (result["b_min"], result["b_max"]) == (want.b_min, want.b_max)
  assert list(result["layers"]) == ["first", "second"]
  for name, layer in result["layers"].items():
    for width in want.mean:
      # One program or two: the last digits of float32 sums.
      assert layer["cosine"][str(width)] == pytest.approx(
        want.cosine[name][width], abs=1e-6
      )
  for width, value in want.mean.items():
    assert result["mean"][str(width)] == pytest.approx(value, abs=1e-6)
    assert result["worst"][str(width)]["layer"] == want.worst[width][0]


@pytest.mark.parametrize("method", ["dpc", "float"])
def test_fresh_weights(method, command, tmp_path, monkeypatch):
  monkeypatch.setattr(
    build, "compile_programs", lambda parts: pytest.fail("it compiles")
  )
  code, out, err, result = command(REACHED, "--config.seed=3", method=method)
  assert (code, err) == (0, "")
  want = expected(fresh_params(seed=3))
  check(result, want)
  assert result["weights"] == "fresh weights of seed 3"
  assert result["grid"] == "affine, per output channel"
  assert [x["weights"] for x in result["layers"].values()] == [36, 288]
  table = out[out.index("layer ") :].splitlines()
  assert table[0].split("bits")[0].split() == ["layer", "N_k", "2"]
  assert [line.split()[0] for line in table[2:6]] == [
    "first",
    "second",
    "mean",
    "worst",
  ]
  assert table[2].split()[1:3] == ["36", f"{want.cosine['first'][2]:.6f}"]
  assert table[3].split()[1] == "288"
  assert table[5].split()[-1] == f"{want.worst[8][1]:.6f}"
  last = out.splitlines()[-1]
  assert f"--config.precision.b_min={want.b_min} " in last
  assert f"--config.precision.b_max={want.b_max} " in last
  with Image.open(tmp_path / "bounds" / "bounds.png") as image:
    assert min(image.size) > 400


def test_the_grid_and_the_widths_are_those_asked_for(command):
  code, _, _, result = command(
    REACHED, "--config.precision.kind=symmetric", "--widths=4,7,11"
  )
  assert code == 0
  want = expected(
    fresh_params(), grid=dpc.Grid("symmetric", "channel"), widths=(4, 7, 11)
  )
  check(result, want)
  assert list(result["mean"]) == ["4", "7", "11"]


def test_after_some_steps(command):
  code, out, err, result = command("--steps=2", REACHED, method="float")
  assert (code, err) == (0, "")
  parts = build.build(tiny.make_config("static8"))
  programs = build.compile_programs(parts)
  state = programs.init()
  for rows in parts.feed.train(0, 2):
    state, _ = programs.train_step(state, sharding.put_batch(rows, parts.mesh))
  check(result, expected(state.params))
  assert result["weights"] == "after 2 steps of static8 from seed 0"
  assert "step 2: accuracy" in out
  assert np.any(
    state.params["first"]["kernel"] != fresh_params()["first"]["kernel"]
  )


@pytest.mark.parametrize("method", ["dpc", "float"])
def test_the_newest_checkpoint_of_a_run(method, command, runs):
  """Though the run's config, its batch size for one, is not --config's."""
  run = runs / method
  files = sorted(str(p) for p in run.rglob("*"))
  code, _, err, result = command(f"--checkpoint={run}", REACHED)
  assert (code, err) == (0, "")
  assert result["weights"] == f"checkpoint of step 2 in {run}"
  config = tiny.make_config(method, steps=2, batch_size=24)
  leaves = tiny.saved_state(config, run, 2)
  params = {
    name: {"kernel": leaves[f".params['{name}']['kernel']"]}
    for name in ("first", "second")
  }
  check(result, expected(params))
  assert sorted(str(p) for p in run.rglob("*")) == files


def test_a_run_of_a_larger_machine(command, runs, tmp_path):
  run = tmp_path / "run"
  shutil.copytree(runs / "dpc", run)
  config = json.loads((run / "config.json").read_text())
  config["mesh"]["data"] = 64
  (run / "config.json").write_text(json.dumps(config))
  code, _, err, _ = command(f"--checkpoint={run}", REACHED)
  assert (code, err) == (0, "")


def test_a_threshold_out_of_reach_shows_all_and_fails(command, tmp_path):
  code, out, err, result = command("--tau_max=1")
  assert code == 2
  assert err.startswith("error: --tau_max = 1.0: no width of 2, 3, 4, 5, 6, 7")
  assert err.count("\n") == 1
  assert result["b_min"] in WIDTHS
  assert result["b_max"] is None
  assert "mean of 2" in out
  assert (tmp_path / "bounds" / "bounds.png").exists()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--tau_min=2"], "--tau_min = 2.0 is no similarity; use one in (0, 1]"),
    (["--tau_min=0.9", "--tau_max=0.8"], "--tau_min = 0.9 is above tau_max"),
    (["--tau_min=high"], "--tau_min=high"),
    (["--widths=4,3"], "--widths: 3 comes after 4"),
    (["--widths=4,x"], "--widths: 'x' is not a width"),
    (["--widths="], "--widths is empty"),
    (["--steps=0"], "--steps=0: the run has 6 steps; use 1..6"),
    (["--steps=7"], "--steps=7: the run has 6 steps; use 1..6"),
    (["--steps=1", "--checkpoint=x"], "--steps=1: means nothing beside"),
    (["--checkpoint=no/such"], "--checkpoint=no/such: holds no run; name"),
    (["--config.model.name=lstm"], "config.model"),
    (["--step=1"], "--step: no such flag; did you mean --steps?"),
  ],
  ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_mistake_is_one_line(arguments, message, command, monkeypatch):
  monkeypatch.setattr(
    build, "compile_programs", lambda parts: pytest.fail("it compiles")
  )
  code, out, err, result = command(*arguments)
  assert (code, out, result) == (2, "", None)
  assert err.startswith("error: ") and err.count("\n") == 1, err
  assert message in err


def test_a_checkpoint_that_is_none(command, runs, tmp_path):
  flag = f"--checkpoint={runs / 'dpc'}"
  code, _, err, _ = command(flag, "--config.model.width=5")
  assert code == 2
  assert "a run with model.width = None, and --config has 5; give the" in err
  code, _, err, _ = command(flag, "--config.data.name=cifar10")
  assert code == 2
  assert "data.name = 'digits', and --config has 'cifar10'" in err
  young = tmp_path / "young"
  (young / "checkpoints").mkdir(parents=True)
  config = (runs / "dpc" / "config.json").read_text()
  (young / "config.json").write_text(config)
  code, _, err, _ = command(f"--checkpoint={young}")
  assert code == 2
  assert f"--checkpoint={young}: no checkpoint there yet" in err
  (young / "config.json").write_text(config[:-9])
  code, _, err, _ = command(f"--checkpoint={young}")
  assert code == 2
  assert "its config.json is damaged" in err


def test_a_workdir_that_cannot_be_made(command, tmp_path):
  (tmp_path / "file").write_text("")
  workdir = tmp_path / "file" / "bounds"
  code, _, err, _ = command(REACHED, workdir=workdir)
  assert code == 2
  assert f"--workdir={workdir}: Not a directory; use another" in err


def test_many_layers_are_left_to_the_file():
  by_width = {4: 0.5, 8: 0.75}
  result = {
    "layers": {
      f"layer{i}": {"weights": i, "cosine": by_width} for i in range(41)
    },
    "mean": by_width,
    "worst": {w: {"layer": "layer0", "cosine": x} for w, x in by_width.items()},
  }
  table = bounds._table(result).splitlines()
  assert [line.split()[0] for line in table] == [
    "layer",
    "-" * len(table[1]),
    "mean",
    "worst",
  ]
  assert table[2].split() == ["mean", "of", "41", "0.500000", "0.750000"]
  del result["layers"]["layer40"]
  assert len(bounds._table(result).splitlines()) == 44


def test_help(command):
  code, out, err, _ = command("--help")
  assert (code, err) == (0, "")
  for name in ("checkpoint", "steps", "tau_min", "tau_max", "widths", "config"):
    assert f"  --{name}: " in out
  assert all(len(line) <= 80 for line in out.splitlines())


def test_layers_are_in_the_network_s_order_and_stacked_ones_apart(monkeypatch):
  monkeypatch.setattr(cli, "FLAGS", types.SimpleNamespace(tau_min=0, tau_max=1))
  widths = dict.fromkeys(dpc.LayerBits._fields, np.zeros(2, np.int32))
  variables = {
    "params": {
      "a": {"kernel": np.ones((2, 3, 5))},
      "z": {"kernel": np.ones(4)},
    },
    "precision": {"a": widths, "z": dict.fromkeys(widths, np.int32(8))},
  }
  parts = types.SimpleNamespace(
    config=tiny.make_config(), costs={"z": None, "float": None, "a": None}
  )
  cosine = {"a": {2: np.array([0.5, 0.75])}, "z": {2: 0.25}}
  result = bounds._result(
    bounds.Weights(variables, "made up", parts), cosine, {"min": 2, "max": 2}
  )
  assert list(result["layers"].items()) == [
    ("z", {"weights": 4, "cosine": {2: 0.25}}),
    ("a[0]", {"weights": 15, "cosine": {2: 0.5}}),
    ("a[1]", {"weights": 15, "cosine": {2: 0.75}}),
  ]
  assert result["mean"] == {2: 0.5}
