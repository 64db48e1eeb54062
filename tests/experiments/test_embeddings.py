"""The figure of runs: exact features, and every mistake in one line."""

import functools
import itertools
import json
import re
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import linalg

import dpc_jax as dpc
from dpc_jax import models
from dpc_jax.analysis import embedding_plot
from dpc_jax.cost import bitops, macs
from dpc_jax.training import config as config_lib
from dpc_jax.training import loop, state
from experiments import embeddings, features
from tests.training import runs as tiny_runs
from tests.training import tiny

METHODS = ("float", "dpc", "cpt")
# Each step begins a cycle: training is at b_min, evaluation at b_max.
CHANGES = {"cpt": {"precision.b_min": 2, "precision.cycles": 6}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """The folder of finished runs, one for each method."""
  folder = tmp_path_factory.mktemp("runs")
  with tiny_runs.patched():
    for method in METHODS:
      changes = {"data.holdout": 300} | CHANGES.get(method, {})
      config = tiny.make_config(method, **changes)
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


@pytest.fixture
def panels(monkeypatch):
  """The panels and the captions of figures that are drawn."""
  found, draw = [], embedding_plot.draw

  def record(panels, class_names, paths, *, caption):
    found.append((panels, caption))
    draw(panels, class_names, paths, caption=caption)

  monkeypatch.setattr(embedding_plot, "draw", record)
  return found


def test_the_figure_of_three_runs(runs, command, tmp_path, panels):
  files = sorted(str(p) for p in runs.rglob("*"))
  folders = [str(runs / method) for method in METHODS]
  code, out, err = command(
    ",".join(folders), "--pictured=60", "--perplexity=12"
  )
  assert (code, err) == (0, "")
  assert sorted(str(p) for p in runs.rglob("*")) == files
  for text in ("[3/3]", "test: 360 images", "train: 1,137 images"):
    assert text in out
  result = json.loads((tmp_path / "out" / "embeddings.json").read_text())
  assert (result["examples"], result["pictured"]) == (360, 60)
  assert result["perplexity"] == 12
  names = ["full precision", "DPC", "CPT"]
  assert [run["name"] for run in result["runs"]] == names
  for method, run in zip(METHODS, result["runs"], strict=True):
    line = last_lines(runs / method)["test"]
    assert run["accuracy"]["test"] == pytest.approx(line["accuracy"], abs=1e-6)
    assert run["loss"]["test"] == pytest.approx(line["loss"], rel=1e-5)
    gap = run["accuracy"]["train"] - run["accuracy"]["test"]
    assert run["estimates"]["gap"]["value"] == pytest.approx(gap)
    assert (run["step"], run["steps"]) == (6, 6)
    assert list(run["weight_variance"]) == ["first", "second", "classifier"]
    assert run["workdir"] == str(runs / method)
  found = [run["bits_per_quantized_weight"] for run in result["runs"]]
  assert found == [None, pytest.approx(dpc_bits()), 8]
  assert "differences" not in result["runs"][0]
  assert "feature_variance" in result["runs"][1]["estimates"]
  assert "feature_variance" not in result["runs"][1]["differences"]
  assert result["runs"][1]["differences"]["silhouette"]["n"] == 360
  text = (tmp_path / "out" / "embeddings.md").read_text()
  assert "60 of the 360 examples" in text
  assert f"--workdirs={','.join(folders)}" in text
  (drawn, caption) = panels[0]
  assert "perplexity 12, seed 0, 60 points of 360" in caption
  first, *others = (panel.points for panel in drawn)
  for points in others:
    turn, _ = linalg.orthogonal_procrustes(points, first - first.mean(0))
    np.testing.assert_allclose(turn, np.eye(2), atol=1e-4)
  with Image.open(tmp_path / "out" / "embeddings.png") as image:
    assert min(image.size) > 600
  assert (tmp_path / "out" / "embeddings.svg").stat().st_size > 1000


def dpc_bits():
  """Of the tiny model's layers, the larger one at 5 bits, the other at 8."""
  return (36 * 8 + 288 * 5) / (36 + 288)


def test_bits_count_every_quantized_weight_once():
  costs = {
    "stacked": bitops.LayerCost(macs=7, weights=10, layers=3),
    "one": bitops.LayerCost(macs=7, weights=20),
    "product": bitops.LayerCost(macs=7, weights=0),
    "float": bitops.LayerCost(macs=7, weights=500),
  }
  bits = {
    "stacked": dpc.LayerBits(np.array([2, 4, 6]), 3, 8),
    "one": dpc.LayerBits(8, 3, 8),
    "product": dpc.LayerBits(5, 3, 8),
  }
  found = features.bits_per_quantized_weight(bits, costs)
  assert found == pytest.approx((10 * (2 + 4 + 6) + 20 * 8) / 50)
  assert features.bits_per_quantized_weight({}, costs) is None


def test_a_scanned_network_has_the_bits_of_the_unrolled_one():
  images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  found = []
  for scan in (False, True):
    model = models.create("vit_tiny", num_classes=10, scan=scan)
    costs = macs.layer_costs(model, images)
    bits = {}
    for path in costs:
      block, _, layer = path.partition("/")
      if layer not in ("mlp1", "mlp2"):
        continue
      place = np.arange(12) if scan else int(block.removeprefix("block"))
      width = 3 + place % 5 if layer == "mlp1" else 9
      bits[path] = dpc.LayerBits(width, 8, 8)
    # Beside the blocks.
    bits["classifier"] = dpc.LayerBits(16, 8, 8)
    found.append(features.bits_per_quantized_weight(bits, costs))
  assert found[0] == pytest.approx(found[1]) != 8.0


def test_bits_are_those_of_evaluation(runs):
  for method, first, second in (("dpc", 8, 5), ("cpt", 8, 8)):
    folder = str(runs / method)
    run = features.load(folder, features.config_of(folder))
    found = features.evaluation_bits(run)
    assert {k: int(v.weights) for k, v in found.items()} == {
      "first": first,
      "second": second,
    }
  # In training the last step was at b_min.
  assert int(state.layer_bits(run.state)["first"].weights) == 2


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


def test_the_best_checkpoint(runs, command):
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
    for flags, step in ((["--checkpoint=best"], 3), ([], 6)):
      code, out, _ = command(runs / "dpc", "--pictured=9", *flags)
      assert code == 0
      assert f"checkpoint of step {step}\n" in out
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
  code, _, err = command(runs)
  assert (code, err.count("\n")) == (2, 1)
  assert f"{runs}: holds no run; did you mean {runs / 'cpt'}, or anot" in err
  inside = runs / "dpc" / "checkpoints"
  assert f"; did you mean {runs / 'dpc'}?\n" in command(inside)[2]
  assert command(",")[2].startswith("error: --workdirs is empty")
  run = changed(runs, tmp_path)
  code, _, err = command(run)
  assert code == 2
  assert f"--workdirs: {run}: no checkpoint there yet; wait" in err
  (run / "config.json").write_text("{")
  assert "its config.json is damaged" in command(run)[2]


def test_data_may_have_moved(runs, command, monkeypatch):
  seen = []

  def load(folder, config, *_):
    seen.append(config.data.dir)
    raise config_lib.ConfigError("enough")

  monkeypatch.setattr(features, "load", load)
  for flags in (["--data_dir=/elsewhere"], []):
    assert command(runs / "dpc", *flags)[2] == "error: enough\n"
  assert seen == ["/elsewhere", None]


def damaged(run, layer):
  """The run with kernels of a layer that are NaN."""
  params = jax.tree.map(lambda x: x, run.state.params)
  params[layer]["kernel"] *= np.nan
  return run._replace(state=run.state.replace(params=params))


def test_a_run_that_has_diverged_is_named(runs):
  folder = str(runs / "float")
  run = features.load(folder, features.config_of(folder))
  step = features.make_feature_step(run.parts)
  for layer, what in (
    ("second", "360 of 360 feature rows of the test split are not finite"),
    ("classifier", "the loss on the test split is nan"),
  ):
    message = f"--workdirs: {folder}: {what}; its training has diverged: leave"
    with pytest.raises(config_lib.ConfigError, match=re.escape(message)):
      features.embed(damaged(run, layer), step, "test")


def test_every_example_comes_through_once(runs):
  folder = str(runs / "float")
  run = features.load(folder, features.config_of(folder))
  step = features.make_feature_step(run.parts)
  evaluate = run.parts.feed.evaluate
  feed = run.parts.feed._replace(
    evaluate=lambda split: itertools.islice(evaluate(split), 1, None)
  )
  less = run._replace(parts=run.parts._replace(feed=feed))
  with pytest.raises(RuntimeError, match=r"264 examples .* not its 360"):
    features.embed(less, step, "test")


def test_a_model_without_the_layer_is_refused(runs):
  config = features.config_of(str(runs / "dpc"))
  run = features.load(str(runs / "dpc"), config)
  with pytest.raises(ValueError, match="'tiny': has no layer named 'classif"):
    features.make_feature_step(run.parts._replace(model=Nameless()))


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
