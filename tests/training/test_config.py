"""Every kind of mistake in a config: one line with field, value, remedy."""

import json
import math
import pathlib

import jax
import pytest

from dpc_jax.data import pipeline, sources
from dpc_jax.quant import grids, integer
from dpc_jax.training import build, sharding, summary
from dpc_jax.training import config as config_lib
from tests.training import tiny

NAN = float("nan")

CPT = {"precision.method": "cpt"}
TEXT = {
  "data.name": "ptb",
  "data.fake": True,
  "data.unroll": 5,
  "model.name": "lstm_lm",
}

# (changes, what the message says)
MISTAKES = [
  ({"steps": None}, "config.steps = None: set steps or epochs"),
  ({"steps": 0}, "config.steps = 0: must be positive"),
  (
    {"optimizer.schedule": "steps", "optimizer.warmup": 0.6},
    "must come after the warm-up, 0.6 of the run",
  ),
  (
    {"optimizer.schedule": "steps", "optimizer.boundaries": (0.5, 0.51)},
    "two of them fall on one of the 6 steps",
  ),
  ({"steps": -3}, "config.steps = -3: must be positive"),
  ({"steps": 2**31}, "config.steps = 2147483648: must give at most"),
  ({"steps": None, "epochs": NAN}, "config.epochs = nan: must be positive"),
  ({"steps": None, "epochs": 0.0}, "config.epochs = 0.0: must be positive"),
  ({"steps": None, "epochs": 1e-3}, "config.epochs = 0.001: 1437 rows in"),
  ({"steps": None, "epochs": 1e9}, "config.epochs = 1000000000.0: must give"),
  ({"seed": -1}, "config.seed = -1: must be in 0..2^32-1"),
  ({"seed": 2**32}, "config.seed = 4294967296: must be in"),
  ({"batch_size": 0}, "config.batch_size = 0: must be at least 1"),
  (
    {"batch_size": 12, "mesh.data": 8},
    "config.batch_size = 12: must be a multiple of the 8 devices",
  ),
  ({"eval_batch_size": 0}, "config.eval_batch_size = 0: must be at least 1"),
  ({"eval_every": 0}, "config.eval_every = 0: must be at least 1"),
  ({"log_every": -1}, "config.log_every = -1: must be at least 1"),
  ({"checkpoint_every": 0}, "config.checkpoint_every = 0: must be at least"),
  ({"keep_checkpoints": 0}, "config.keep_checkpoints = 0: must be at least"),
  (
    {"matmul_precision": "best"},
    "config.matmul_precision = 'best': use one of default, high, hi",
  ),
  ({"data.name": "mnist"}, "data.name='mnist' is unknown; choose one of cifar"),
  ({"data.name": "CIFAR-10"}, "did you mean 'cifar10'? choose one of cifar10,"),
  (
    {"data.name": "cifar10", "data.dir": "/nowhere"},
    "'cifar10': /nowhere (data.dir) does not exist; correct it, or prepare",
  ),
  ({"data.holdout": -1}, "data.holdout=-1 is negative"),
  ({"data.holdout": 1437}, "data.holdout=1437 leaves no training image"),
  ({"data.train_size": 0}, "data.train_size=0: there are 1437 training images"),
  ({"data.train_size": -5}, "data.train_size=-5: there are 1437 training"),
  ({"data.train_size": 1438}, "data.train_size=1438: there are 1437 training"),
  (
    {"data.train_size": 1338, "data.holdout": 100},
    "data.train_size=1338: there are 1337 training images; use 1..1337",
  ),
  (
    {"data.train_size": 100, **TEXT},
    "data.train_size=100: text is read whole; leave it out",
  ),
  (
    {"model.name": "resnt14"},
    "'resnt14' is unknown; did you mean 'resnet14'? use one of",
  ),
  ({"model.width": 0}, "config.model.width = 0: must be at least 1"),
  (
    {"precision.method": "dcp"},
    "config.precision.method = 'dcp': use one of float, static<b>, dpc",
  ),
  (
    {"precision.method": "static1"},
    "config.precision.method = 'static1': the width must be in 2..16",
  ),
  ({"precision.method": "static32"}, "the width must be in 2..16"),
  ({"precision.method": "static-8"}, "config.precision.method = 'static-8'"),
  (
    {"precision.b_min": 6, "precision.b_max": 4},
    "config.precision: b_min",
  ),
  ({"precision.b_min": 1}, "config.precision.b_min = 1: must be in 2..16"),
  ({"precision.b_max": 17}, "config.precision.b_max = 17: must be in 2..16"),
  ({"precision.delta": 1.5}, "delta"),
  ({"precision.delta": NAN}, "delta"),
  ({"precision.center": "middle"}, "center"),
  ({"precision.log_form": "natural"}, "log_form"),
  (
    {"precision.weights": 1},
    "config.precision.weights = 1: must be in 2..16, or 32 for float",
  ),
  ({"precision.activations": 20}, "config.precision.activations = 20"),
  ({"precision.gradients": 0}, "config.precision.gradients = 0"),
  (
    {"precision.kind": "log"},
    "config.precision.kind = 'log': use one of affine, symmetric",
  ),
  (
    {"precision.storage_bits": 4},
    "config.precision.storage_bits = 4: use 8, or leave it out",
  ),
  (
    {"precision.storage_bits": 8, "precision.b_max": 9},
    "config.precision.storage_bits = 8: a width of 9 (weights) does not fit",
  ),
  (
    {"precision.storage_bits": 8, "precision.method": "static10"},
    "config.precision.storage_bits = 8: a width of 10",
  ),
  (
    {"precision.storage_bits": 8, "precision.activations": 32},
    "config.precision.storage_bits = 8: a width of 32 (activations)",
  ),
  (
    {"precision.bounds": "found"},
    "config.precision.bounds = 'found': use auto, or leave it out",
  ),
  (
    {"precision.bounds_step": -1},
    "config.precision.bounds_step = -1: must not be negative",
  ),
  (
    {"precision.bounds": "auto", "precision.bounds_step": 6},
    "config.precision.bounds_step = 6: must come before the end of the run, 6",
  ),
  (
    {"precision.bounds": "auto", "steps": None, "epochs": 1.0},
    "config.precision.bounds_step = 100: must come before the end of the run",
  ),
  ({"precision.tau_min": 0.0}, "config.precision.tau_min = 0.0: must be in (0"),
  ({"precision.tau_min": NAN}, "config.precision.tau_min = nan: must be in"),
  ({"precision.tau_max": 1.01}, "config.precision.tau_max = 1.01: must be in"),
  (
    {"precision.tau_min": 0.9, "precision.tau_max": 0.8},
    "config.precision.tau_min = 0.9: must not be above tau_max, 0.8",
  ),
  ({**CPT, "precision.cycles": 0}, "config.precision: cycles=0 is out of"),
  ({**CPT, "precision.cycles": -2}, "config.precision: cycles=-2 is out of"),
  (
    {"precision.method": "random", "precision.seed": -1},
    "config.precision: seed=-1 is out of range",
  ),
  *(
    (
      {"precision.method": "adaptive", f"precision.adaptive.{name}": value},
      f"config.precision.adaptive: {name} = {value!r}",
    )
    for name, value in (
      ("warmup", 0),
      ("patience", 0),
      ("threshold", -0.1),
      ("threshold", math.inf),
      ("threshold", NAN),
      ("freeze", 0.0),
      ("freeze", 1.1),
      ("signal", "norm"),
      ("budget", 0.0),
      ("budget", 1.5),
      ("budget", NAN),
    )
  ),
  (
    # Below what it costs at the start.
    {"precision.method": "adaptive", "precision.adaptive.budget": 0.1},
    "config.precision: budget = 0.1",
  ),
  *(
    (
      {f"precision.adaptive.{name}": value},
      f"config.precision.adaptive.{name} = {value!r}: ",
    )
    for name, value in (
      ("memory", "norm"),
      ("decay", 0.0),
      ("decay", 1.0),
      ("decay", NAN),
      ("average", 0.0),
      ("average", 1.0),
    )
  ),
  *(
    ({"precision.method": "pfq", f"precision.pfq.{name}": value}, message)
    for name, value, message in (
      ("stages", 0, "config.precision.pfq.stages = 0: must be at least 2"),
      ("stages", 1, "config.precision.pfq.stages = 1: must be at least 2"),
      ("window", 1, "config.precision.pfq: window=1 is out of range"),
      ("threshold", 0.0, "config.precision.pfq: threshold=0.0 is out of range"),
      ("threshold", NAN, "config.precision.pfq: threshold=nan is out of range"),
      ("decay", 0.0, "config.precision.pfq: decay=0.0 is out of range"),
      ("decay", 1.1, "config.precision.pfq: decay=1.1 is out of range"),
    )
  ),
  (
    {"optimizer.name": "lamb"},
    "config.optimizer.name = 'lamb': use one of sgd, adamw",
  ),
  (
    {"optimizer.schedule": "linear"},
    "config.optimizer.schedule = 'linear': use one of constant, cosine, steps",
  ),
  ({"optimizer.learning_rate": NAN}, "config.optimizer.learning_rate = nan"),
  ({"optimizer.learning_rate": math.inf}, "optimizer.learning_rate = inf"),
  ({"optimizer.learning_rate": -0.1}, "optimizer.learning_rate = -0.1"),
  ({"optimizer.weight_decay": NAN}, "config.optimizer.weight_decay = nan"),
  ({"optimizer.momentum": 1.0}, "config.optimizer.momentum = 1.0: must be in"),
  ({"optimizer.momentum": NAN}, "config.optimizer.momentum = nan"),
  ({"optimizer.warmup": 1.0}, "config.optimizer.warmup = 1.0: must be in"),
  ({"optimizer.warmup": -0.1}, "config.optimizer.warmup = -0.1"),
  ({"optimizer.boundaries": (0.7, 0.5)}, "must be increasing fractions"),
  ({"optimizer.boundaries": (0.5, 0.5)}, "must be increasing fractions"),
  ({"optimizer.boundaries": (0.5, 1.0)}, "must be increasing fractions"),
  ({"optimizer.boundaries": ("a",)}, "must be increasing fractions"),
  ({"optimizer.clip": 0.0}, "config.optimizer.clip = 0.0: must be positive"),
  ({"model.dropout": 1.0}, "config.model.dropout = 1.0: must be in [0, 1)"),
  ({"model.cutoffs": (5, 5)}, "config.model.cutoffs = (5, 5): must be incr"),
  ({"model.heads": 2}, "config.model: model 'tiny': has no size 'heads'"),
  ({"data.unroll": 0}, "config.data.unroll = 0: must be at least 1"),
  ({"data.unroll": 5}, "config.data.unroll = 5: means nothing for digits"),
  ({"data.workers": 1}, "config.data.workers = 1: means nothing for digits"),
  ({"data.image_size": 8}, "config.data.image_size = 8: means nothing for"),
  ({"mesh.data": 9}, "config.mesh.data = 9: there are 8 devices, and data 9"),
  ({"mesh.data": 0}, "config.mesh.data = 0: there are 8 devices"),
  ({"mesh.fsdp": 9}, "config.mesh.data = 1: there are 8 devices, and data 1"),
  ({"mesh.tensor": 0}, "config.mesh.tensor = 0: there are 8 devices; use 1.."),
  ({"mesh.tensor": 2}, "config.mesh.tensor = 2: splits no parameter"),
  (
    {"mesh.sharding": "fdsp"},
    "config.mesh.sharding = 'fdsp': use one of replicated, fsdp",
  ),
  ({"mesh.rules": (("x", ()),)}, "config.mesh.rules = 'x': no parameter meets"),
]


@pytest.fixture(scope="module")
def digits():
  return sources.load("digits")


@pytest.mark.parametrize(
  ("changes", "message"), MISTAKES, ids=[str(c) for c, _ in MISTAKES]
)
def test_a_mistake_is_one_line(changes, message, digits):
  reads = any(name.startswith("data.") for name in changes)
  with pytest.raises(config_lib.ConfigError) as caught:
    build.build(tiny.make_config(**changes), None if reads else digits)
  text = str(caught.value)
  assert message in text
  assert "\n" not in text


def test_what_is_no_mistake(digits):
  for changes in (
    {"precision.method": "float", "precision.storage_bits": 8},
    {"precision.bounds": "auto", "precision.bounds_step": 5},
    {"precision.bounds_step": 6},
    {"precision.tau_min": 0.99, "precision.tau_max": 0.99},
    {"precision.method": "adaptive", "precision.adaptive.freeze": 1.0},
    {"precision.method": "adaptive", "precision.adaptive.threshold": 0.0},
    {"precision.method": "adaptive", "precision.adaptive.budget": 1.0},
    {"precision.method": "adaptive", "precision.adaptive.memory": "sketch"},
    {"precision.method": "pfq", "precision.pfq.stages": 2},
    {**CPT, "precision.cycles": 100},
    {"precision.storage_bits": 8},
    {"precision.weights": 32, "precision.activations": 32},
    {"precision.method": "static16"},
    {"precision.kind": "symmetric"},
    {"precision.delta": -1.0},
    {"optimizer.momentum": 0.0},
    {"optimizer.boundaries": ()},
    {"optimizer.boundaries": [0.5]},
    {"matmul_precision": "highest"},
    {"seed": 2**32 - 1},
    {"model.name": "resnet14", "model.width": 2},
  ):
    build.build(tiny.make_config(**changes), digits)


@pytest.mark.parametrize(
  ("epochs", "size", "batch", "steps"),
  [
    (2.0, 45_000, 128, 703),
    (20.0, 1437, 64, 449),
    (0.29, 100, 1, 29),
    (1.0, 100, 100, 1),
    (0.5, 100, 100, None),
  ],
)
def test_epochs_are_whole_steps(epochs, size, batch, steps):
  config = tiny.make_config(steps=5, epochs=epochs, batch_size=batch)
  if steps is None:
    with pytest.raises(config_lib.ConfigError, match="give no step"):
      config_lib.resolve(config, size, 1)
  else:
    resolved = config_lib.resolve(config, size, 1)
    assert resolved.steps == steps
    assert resolved.epochs == epochs
    assert config.steps == 5


class TestWorkdir:
  def config(self, **changes):
    return config_lib.resolve(tiny.make_config(**changes), 1437, 1)

  def refused(self, workdir, **changes):
    with pytest.raises(config_lib.ConfigError) as caught:
      config_lib.claim_workdir(self.config(**changes), workdir)
    assert "\n" not in str(caught.value)
    assert str(workdir) in str(caught.value)
    assert "another workdir" in str(caught.value)
    return str(caught.value)

  def test_of_another_config(self, tmp_path):
    config_lib.claim_workdir(self.config(), tmp_path)
    before = (tmp_path / "config.json").read_text()
    message = self.refused(tmp_path, **{"precision.b_min": 4})
    assert "precision.b_min: there 3, here 4; use" in message
    assert "steps: there 6, here 12" in self.refused(tmp_path, steps=12)
    assert (tmp_path / "config.json").read_text() == before

  @pytest.mark.parametrize("text", ["", '{"steps": 6', "[1]", "3", "\x00"])
  def test_with_a_damaged_config(self, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert "config.json is damaged" in self.refused(tmp_path)

  def test_with_checkpoints_of_nobody(self, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert "config.json is missing" in self.refused(tmp_path)

  def test_that_is_a_file(self, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    self.refused(path)
    self.refused(path / "below")

  def test_that_cannot_be_made(self):
    # Nobody, root included, makes folders there.
    self.refused(pathlib.Path("/proc/none"))

  def test_a_new_field_left_at_none_is_no_other_config(self, tmp_path):
    config_lib.claim_workdir(self.config(), tmp_path)
    path = tmp_path / "config.json"
    there = json.loads(path.read_text())
    del there["matmul_precision"]
    path.write_text(json.dumps(there))
    config_lib.claim_workdir(self.config(), tmp_path)

  def test_of_an_older_program(self, tmp_path):
    config_lib.claim_workdir(self.config(), tmp_path)
    path = tmp_path / "config.json"
    there = json.loads(path.read_text())
    for name in ("remat", "steps_per_call"):
      del there[name]
    del there["data"]["on_device"]
    for name in ("ranges", "backend", "input_gradient"):
      del there["precision"][name]
    path.write_text(json.dumps(there))
    same = {"steps_per_call": 2, "data.on_device": True}
    config_lib.claim_workdir(self.config(**same), tmp_path)
    for name, value in (
      ("remat", "norms"),
      ("precision.backend", "int8"),
      ("precision.input_gradient", "scaled"),
    ):
      message = self.refused(tmp_path, **{name: value})
      assert f"{name}: there no such field, here {value!r}" in message


def test_the_model_has_the_grids_of_the_config(digits):
  config = tiny.make_config(
    **{
      "precision.kind": "symmetric",
      "precision.storage_bits": 8,
      "precision.backend": "bf16_codes",
      "precision.input_gradient": "scaled",
    }
  )
  quantization = build.build(config, digits).model.quantization
  assert quantization == grids.Quantization(
    weights=grids.Grid("symmetric", "channel", "nearest"),
    activations=grids.Grid("symmetric", "tensor", "nearest"),
    gradients=grids.Grid("symmetric", "tensor", "stochastic"),
    storage_bits=8,
    backend="bf16_codes",
    input_gradient="scaled",
  )


def test_sums_that_cannot_be_exact_are_a_mistake(digits, monkeypatch):
  # 9 products in a pixel fit; of the weights' gradient, 16 of an image do not.
  short = integer.BACKENDS["int8"]._replace(largest=15 * 128 * 128)
  monkeypatch.setitem(integer.BACKENDS, "int8", short)
  config = tiny.make_config(
    **{"precision.storage_bits": 8, "precision.backend": "int8"}
  )
  with pytest.raises(config_lib.ConfigError) as caught:
    build.compile_programs(build.build(config, digits))
  assert str(caught.value).startswith(
    "config.precision.backend = 'int8': second: sums of 256 products of codes"
  )


@pytest.mark.parametrize("precision", [None, "highest"])
def test_programs_take_the_matmul_precision(digits, monkeypatch, precision):
  seen = []
  make_train_step = build.step_lib.make_train_step

  def spy(*args):
    train_step = make_train_step(*args)

    def spied(state, batch):
      seen.append(jax.config.jax_default_matmul_precision)
      return train_step(state, batch)

    return spied

  monkeypatch.setattr(build.step_lib, "make_train_step", spy)
  with jax.default_matmul_precision("high"):
    build.compile_programs(
      build.build(tiny.make_config(matmul_precision=precision), digits)
    )
  assert seen == [precision or "high"]


def test_the_train_step_donates_the_state(digits):
  parts = build.build(tiny.make_config(), digits)
  programs = build.compile_programs(parts)
  rows = pipeline.TrainBatches(
    digits.splits["train"], batch_size=16, seed=0
  ).batch(0)
  state = programs.init()
  programs.train_step(state, sharding.put_batch(rows, parts.mesh))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_a_run_names_its_own_devices(digits):
  parts = build.build(tiny.make_config(**{"mesh.data": 2}), digits)
  device = summary.environment(parts.mesh)["device"]
  assert device == f"2 x {jax.devices()[0].device_kind}"
