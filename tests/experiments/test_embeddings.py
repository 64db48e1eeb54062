"""The figure of runs: exact features, and every mistake in one line."""

import functools
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dpc_jax import models
from dpc_jax.training import loop
from experiments import embeddings, features
from tests.training import runs as tiny_runs
from tests.training import tiny

METHODS = ("float", "dpc")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """The folder of finished runs, one for each method."""
  folder = tmp_path_factory.mktemp("runs")
  with tiny_runs.patched():
    for method in METHODS:
      config = tiny.make_config(method, **{"data.holdout": 300})
      loop.train_and_evaluate(config, folder / method)
  return folder


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
  monkeypatch.setitem(models._CONSTRUCTORS, "tiny", tiny.Tiny)


@pytest.fixture
def command(capsys, tmp_path):
  """Runs the program: (code, out, err)."""

  def call(workdirs, *arguments):
    out = tmp_path / "out"
    argv = [f"--workdirs={workdirs}", f"--workdir={out}", *arguments]
    try:
      code = embeddings.main(argv)
    except SystemExit as error:  # argparse's
      code = error.code
    return code, *capsys.readouterr()

  return call


def last_lines(run):
  """{split: the last evaluation in metrics.jsonl}."""
  return {x["split"]: x for x in tiny.read_lines(run / "metrics.jsonl")}


def test_the_figure_of_two_runs(runs, command, tmp_path):
  files = sorted(str(p) for p in runs.rglob("*"))
  folders = [str(runs / method) for method in METHODS]
  code, out, err = command(
    ",".join(folders), "--pictured=60", "--perplexity=12"
  )
  assert (code, err) == (0, "")
  assert sorted(str(p) for p in runs.rglob("*")) == files
  for text in ("[2/2]", "test: 360 images", "train: 1,137 images"):
    assert text in out
  result = json.loads((tmp_path / "out" / "embeddings.json").read_text())
  assert (result["examples"], result["pictured"]) == (360, 60)
  assert result["perplexity"] == 12
  assert [run["name"] for run in result["runs"]] == ["full precision", "DPC"]
  for method, run in zip(METHODS, result["runs"], strict=True):
    line = last_lines(runs / method)["test"]
    assert run["accuracy"]["test"] == pytest.approx(line["accuracy"], abs=1e-6)
    assert run["loss"]["test"] == pytest.approx(line["loss"], rel=1e-5)
    gap = run["accuracy"]["train"] - run["accuracy"]["test"]
    assert run["estimates"]["gap"]["value"] == pytest.approx(gap)
    assert (run["step"], run["steps"]) == (6, 6)
    assert list(run["weight_variance"]) == ["first", "second", "classifier"]
    assert run["workdir"] == str(runs / method)
  assert result["runs"][0]["bits_per_weight"] is None
  assert 3 <= result["runs"][1]["bits_per_weight"] <= 8
  assert "differences" not in result["runs"][0]
  assert result["runs"][1]["differences"]["silhouette"]["n"] == 360
  text = (tmp_path / "out" / "embeddings.md").read_text()
  assert "60 of the 360 examples" in text
  assert f"--workdirs={','.join(folders)}" in text
  with Image.open(tmp_path / "out" / "embeddings.png") as image:
    assert min(image.size) > 600
  assert (tmp_path / "out" / "embeddings.svg").stat().st_size > 1000


def test_features_are_exact_in_order_and_as_in_evaluation(runs):
  """Against one call of the model on the whole split, on one device."""
  config = features.config_of(str(runs / "dpc"))
  assert config.mesh.data == jax.device_count() == 8
  # 360 rows are no multiple: the last batch is filled up.
  config.eval_batch_size = 104
  run = features.load(str(runs / "dpc"), config)
  step = features.make_feature_step(run.parts)
  seen = features.embed(run, step, "test")
  split = run.parts.data.splits["test"]
  np.testing.assert_array_equal(seen.labels, split.labels)
  params, collections = jax.device_get(
    (run.state.params, run.state.model_state)
  )
  variables = {"params": params, **collections}

  @functools.partial(jax.jit, static_argnames="mutable")
  def apply(variables, images, mutable=()):
    # Within the program: rounded apart, pixels fall to other codes.
    (images,), _ = run.parts.task.inputs({"image": images}, (), None)
    return run.parts.model.apply(
      variables, images, mutable=["unused", *mutable]
    )[0]

  logits = apply(variables, split.images)
  np.testing.assert_array_equal(
    np.argmax(logits, 1) == split.labels, seen.correct
  )
  dense = params["classifier"]
  found = seen.features @ dense["kernel"] + dense["bias"]
  assert share_close(found, logits) == 1
  # The batch's ranges would be another network.
  of_batch = apply(variables, split.images, mutable=("quant_stats",))
  assert share_close(of_batch, logits) < 0.5


def share_close(a, b):
  return np.mean(np.isclose(a, b, atol=1e-4).all(1))


def test_the_best_checkpoint(runs):
  scores = {
    line["step"]: line["accuracy"]
    for line in tiny.read_lines(runs / "dpc" / "metrics.jsonl")
    if line["split"] == "validation"
  }
  assert set(scores) == {5, 6}
  lines = [
    {"step": step, "split": "validation", "accuracy": value}
    for step, value in ((3, 0.9), (5, 0.99), (6, 0.1))
  ]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  path = runs / "dpc" / "metrics.jsonl"
  before = path.read_text()
  path.write_text(text)
  try:
    # Of step 5 there is none.
    assert features._best_step(runs / "dpc", "accuracy") == 3
  finally:
    path.write_text(before)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--split=dev"], "--split=dev: digits has train, validation, test; use"),
    (["--perplexity=360"], "--perplexity=360.0: use 1..359"),
    (["--perplexity=nan"], "--perplexity=nan: use 1..359"),
    (["--perplexity=x"], "--perplexity: invalid float value"),
    (["--pictured=3"], "--pictured=3: use 4..the split's size"),
    (["--neighbors=0"], "--neighbors=0: use 1..1137"),
    (["--checkpoint=last"], "--checkpoint: invalid choice"),
  ],
  ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_a_wrong_flag_is_one_line(arguments, message, runs, command):
  code, _, err = command(runs / "dpc", *arguments)
  assert code == 2
  assert err.startswith("error: ") and err.count("\n") == 1, err
  assert message in err


def changed(runs, tmp_path, **fields):
  """A copy of the run without checkpoints, of another config."""
  run = tmp_path / "changed"
  (run / "checkpoints").mkdir(parents=True)
  config = json.loads((runs / "dpc" / "config.json").read_text())
  for path, value in fields.items():
    group, name = path.split("__")
    config[group][name] = value
  (run / "config.json").write_text(json.dumps(config))
  return run


def test_runs_that_do_not_go_together(runs, command, tmp_path):
  run = changed(runs, tmp_path, data__name="cifar10")
  code, _, err = command(f"{runs / 'dpc'},{run}")
  assert code == 2
  assert "has data.name = 'digits'" in err and "has 'cifar10'; give" in err
  shutil.rmtree(run)
  run = changed(runs, tmp_path, data__holdout=0)
  code, _, err = command(f"{runs / 'dpc'},{run}")
  assert code == 2
  assert "data.holdout = 300" in err


def test_no_run_no_checkpoint_and_a_damaged_config(runs, command, tmp_path):
  code, _, err = command("no/such")
  assert (code, err.count("\n")) == (2, 1)
  assert err.startswith("error: --workdirs: no/such: holds no run; name")
  assert command(",")[2].startswith("error: --workdirs is empty")
  run = changed(runs, tmp_path)
  code, _, err = command(run)
  assert code == 2
  assert f"--workdirs: {run}: no checkpoint there yet; wait" in err
  (run / "config.json").write_text("{")
  assert "its config.json is damaged" in command(run)[2]


def test_a_model_without_the_layer_is_refused(runs):
  config = features.config_of(str(runs / "dpc"))
  run = features.load(str(runs / "dpc"), config)
  for parts in (
    run.parts._replace(task=run.parts.task._replace(metric="perplexity")),
    run.parts._replace(model=Nameless()),
  ):
    with pytest.raises(ValueError, match="'tiny': has no layer named 'classif"):
      features.make_feature_step(parts)


class Nameless(nn.Module):
  """Logits without any layer."""

  @nn.compact
  def __call__(self, x, train=False):
    return jnp.mean(x, (1, 2, 3))[:, None] * jnp.ones(10)


def test_a_workdir_that_cannot_be_made(runs, capsys, tmp_path):
  (tmp_path / "file").write_text("")
  out = tmp_path / "file" / "out"
  argv = [f"--workdirs={runs / 'dpc'}", f"--workdir={out}"]
  assert embeddings.main(argv) == 2
  assert f"--workdir={out}: Not a directory; use" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("runs_there", "names"),
  [
    ([("float", 0, "a"), ("dpc", 0, "a")], ["full precision", "DPC"]),
    ([("dpc", 0, "a"), ("dpc", 1, "a")], ["DPC, seed 0", "DPC, seed 1"]),
    ([("x", 0, "a"), ("x", 0, "b")], ["x, seed 0, a", "x, seed 0, b"]),
    ([("x", 0, "a"), ("x", 0, "a")], ["/0", "/1"]),
  ],
)
def test_names_tell_runs_apart(runs_there, names):
  found = [
    {"method": m, "seed": s, "model": model, "workdir": f"/{i}"}
    for i, (m, s, model) in enumerate(runs_there)
  ]
  embeddings._name(found)
  assert [run["name"] for run in found] == names
