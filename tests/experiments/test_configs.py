"""Every recipe, with every method that its docstring names."""

import importlib
import itertools
import pathlib

import jax
import numpy as np
import pytest

from configs import default
from dpc_jax.training import build, loop, metrics, optimizer
from dpc_jax.training import config as config_lib

ROOT = pathlib.Path(__file__).parent.parent.parent
NAMES = sorted(
  path.stem
  for path in (ROOT / "configs").glob("*.py")
  if path.stem != "__init__"
)
METHODS = ("float", "static8", "dpc")


def get_config(name, method):
  return importlib.import_module(f"configs.{name}").get_config(method)


def flat(config):
  return set(config_lib._flat(config.to_dict()))


MATRIX = (
  "cifar10_resnet38 cifar10_resnet74 cifar10_resnet110 cifar10_wide_resnet38"
  " cifar10_mobilenet_v2 cifar100_resnet38 cifar100_resnet74"
  " cifar100_resnet110 cifar100_wide_resnet38 cifar100_mobilenet_v2"
  " imagenet_resnet18 imagenet_resnet34 imagenet_resnet50"
  " wikitext103_transformer ptb_lstm"
)
BEYOND = (
  "cifar10_resnet8 cifar10_resnet20 cifar10_vit_tiny digits_resnet8"
  " digits_vit_tiny imagenet_mobilenet_v2 imagenet_vit_small ptb_lstm_tiny"
  " wikitext2_transformer"
)
RECIPES = [name for name in NAMES if name != "default"]
ONE_OF_EACH_MODEL = (
  "cifar10_resnet8 cifar10_wide_resnet38 cifar10_mobilenet_v2"
  " imagenet_resnet18 digits_vit_tiny ptb_lstm_tiny wikitext2_transformer"
)
# CPT's bounds.
BOUNDS = {
  "cifar": (3, 8),
  "imagenet": (4, 8),
  "wikitext": (4, 8),
  "ptb": (5, 8),
}


def test_the_recipes_are_there():
  assert set(RECIPES) == {*MATRIX.split(), *BEYOND.split()}


@pytest.mark.parametrize("name", RECIPES)
def test_bounds_are_those_of_cpt(name):
  for start, bounds in BOUNDS.items():
    if name.startswith(start):
      precision = get_config(name, "dpc").precision
      assert (precision.b_min, precision.b_max) == bounds


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_recipe(name, method):
  config = get_config(name, method)
  assert config.precision.method == method
  assert flat(config) == flat(default.get_config())
  if name == "default":
    config.steps = 10
  config_lib.validate(config)
  build.make_model(config, num_classes=10)


@pytest.mark.parametrize("name", RECIPES)
def test_docstring_has_the_command(name):
  doc = importlib.import_module(f"configs.{name}").__doc__
  assert f"python -m experiments.train --config=configs/{name}.py:dpc" in doc
  assert (
    f"Methods: {', '.join(METHODS)} and others (README); METHOD,smoke" in doc
  )
  # Time or its absence, a reference figure or its absence, bounds.
  assert any(x in doc for x in ("Not run", "the figures and the time"))
  assert any(x in doc for x in ("Published", "No published"))
  start = next(
    s for s in BOUNDS if name.replace("digits", "cifar").startswith(s)
  )
  assert "Bounds: CPT's for" in doc and "{}..{}".format(*BOUNDS[start]) in doc


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_line_sets_the_length(name):
  """By steps too, which epochs would overrule."""
  assert get_config(name, "dpc").epochs is None


# Those for CIFAR-100 are those for CIFAR-10 with more classes; 74 is a depth
# between 38 and 110.
@pytest.mark.parametrize(
  "name",
  [x for x in RECIPES if not x.startswith(("cifar100", "cifar10_resnet74"))],
)
def test_the_full_recipe_builds_on_data_like_its_own(name):
  """Shapes alone: nothing of the full size is computed."""
  config = get_config(name, "dpc")
  config.mesh.data = 1
  config.data.fake = True
  config.data.holdout = min(config.data.holdout, 16)
  if config.data.unroll is not None:
    # The made-up text is shorter than a row of the real one.
    config.data.unroll = min(config.data.unroll, 40)
  parts = build.build(config)
  assert parts.config.steps >= 1
  state = jax.eval_shape(parts.init, jax.random.key(0))
  assert set(state.model_state["precision"])
  assert set(state.cost.sums) <= set(parts.costs)
  schedule = optimizer.learning_rate(parts.config)
  peak = config.optimizer.learning_rate
  end = float(schedule(parts.config.steps - 1))
  assert end < 0.011 * peak


# CIFAR-100's differ from CIFAR-10's in the classifier: one of them is enough.
# Their blocks are scanned: depths between two others differ in a count.
BETWEEN = ("cifar10_resnet38", "cifar10_resnet74", "imagenet_resnet34")
TRAINED = [
  name
  for name in RECIPES
  if name == "cifar100_resnet38" or not name.startswith(("cifar100_", *BETWEEN))
]


@pytest.mark.usefixtures("fast_compiler")
@pytest.mark.parametrize("name", TRAINED)
def test_the_smoke_variant_trains_saves_goes_on_and_evaluates(
  name, tmp_path, monkeypatch
):
  monkeypatch.setattr(metrics, "_event_writer", lambda workdir: None)
  config = get_config(name, "dpc,smoke")
  config.mesh.data = 1
  parts = build.build(config)
  config_lib.claim_workdir(parts.config, tmp_path)
  run = loop._Run(parts, tmp_path)
  programs = run.programs
  try:
    assert run.train(lambda step: step == 2) is None
  finally:
    run.close()
  # A second start would build and compile the very same programs.
  monkeypatch.setattr(build, "build", lambda config: parts)
  monkeypatch.setattr(build, "compile_programs", lambda parts: programs)
  summary = loop.train_and_evaluate(config, tmp_path)
  assert summary["steps"] == 4 and summary["dataset"].endswith("(fake)")
  lines = metrics.read_lines(tmp_path / "metrics.jsonl")
  assert [x["step"] for x in lines if x["split"] == "train"] == [1, 2, 3, 4]
  score = "perplexity" if "lm" in summary["model"] else "accuracy"
  assert summary["metric"] == score
  for split in parts.data.splits.keys() - {"train"}:
    (line,) = (x for x in lines if x["split"] == split)
    assert line["step"] == 4 and np.isfinite(line[score])
  widths = {bits[0] for bits in map(np.ravel, summary["bits"].values())}
  b_min, b_max = config.precision.b_min, config.precision.b_max
  assert widths and b_min <= min(widths) and max(widths) <= b_max
  assert 0 < summary["saving_vs_static"] < 1


@pytest.mark.parametrize(
  ("name", "method"),
  [
    *itertools.product(ONE_OF_EACH_MODEL.split(), ("float", "static8")),
    *itertools.product(BETWEEN, ("dpc",)),
  ],
)
def test_the_smoke_variant_of_others_builds(name, method):
  config = get_config(name, f"{method},smoke")
  assert config.precision.method == method
  config.mesh.data = 1
  parts = build.build(config)
  state = jax.eval_shape(parts.init, jax.random.key(0))
  assert bool(state.cost.sums) == (method != "float")


def test_an_unknown_variant_is_refused():
  with pytest.raises(ValueError, match="'dpc,smok': after the colon use"):
    get_config("cifar10_resnet8", "dpc,smok")


def test_cpts_recipe():
  config = get_config("cifar10_resnet38", "dpc")
  assert (config.steps, config.batch_size) == (64_000, 128)
  assert config.optimizer.to_dict() == {
    "name": "sgd",
    "learning_rate": 0.1,
    "weight_decay": 1e-4,
    "momentum": 0.9,
    "nesterov": False,
    "clip": None,
    "schedule": "steps",
    "warmup": 0.0,
    "boundaries": (0.5, 0.75),
  }
