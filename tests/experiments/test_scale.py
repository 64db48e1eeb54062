"""The plan's figures follow from layer_costs and from its formulas."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

import dpc_jax as dpc
from configs import digits_resnet8
from dpc_jax.training import build
from experiments.launch import scale


def test_it_has_no_flags(capsys):
  assert scale.main(["--chips=8"]) == 2
  assert capsys.readouterr() == (
    "",
    "error: --chips=8: there are no flags; see --help\n",
  )
  assert scale.main(["--help"]) == 0
  assert capsys.readouterr().out.startswith("What two recipes")


README = pathlib.Path(scale.__file__).parent / "README.md"


def digits(**changes):
  config = digits_resnet8.get_config("dpc,smoke")
  given = scale.Case("x", config, 10, (8, 8, 1), jnp.float32, 64, 16, "images")
  return given._replace(**changes)


def test_sizes_of_a_small_network():
  given = digits()
  found = scale.sizes(given)
  model = build.make_model(given.config, 10)
  image = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
  costs = dpc.layer_costs(model, image)
  assert found.macs == sum(c.macs for c in costs.values())
  variables = jax.eval_shape(model.init, jax.random.key(0), image)
  count = sum(x.size for x in jax.tree.leaves(variables["params"]))
  assert found.parameters == count
  # 9 convs, each with a BatchNorm; the classifier is in float.
  assert (found.quantized, found.norms) == (9, 9)
  # Parameters and momentum, 2 statistics per channel of the norms, 3 widths
  # and 3 of a range per conv, and what is smaller.
  channels = 3 * 4 + 3 * 8 + 3 * 16
  expected = 4 * (2 * count + 2 * channels + 6 * 9)
  assert expected <= found.state <= expected + 500
  # At least the input of each conv is kept: its map, which it has once.
  maps = 64 * (1 + 2 * 4) + 64 * 4 + 64 * 4 + 16 * 8 + 16 * 8 + 4 * 16
  assert 4 * maps < found.kept < 20 * 4 * maps
  three, four = (scale._kept(model, variables, given, n) for n in (3, 4))
  assert found.kept == four - three


def test_stacked_layers_count_each(monkeypatch):
  """A scanned model is as large as its layers one by one."""
  monkeypatch.setattr(scale, "_kept", lambda *arguments: arguments[-1])
  config = digits_resnet8.get_config("dpc,smoke")
  config.model.name = "vit_tiny"
  config.model.update(width=16, layers=2, heads=2, mlp_width=32, patch_size=2)
  found = []
  for scan in (False, True):
    config.model.scan = scan
    given = digits(config=config.copy_and_resolve_references())
    found.append(scale.sizes(given))
  one, stacked = found
  assert one.macs == stacked.macs > 0
  assert one.parameters == stacked.parameters
  assert one.quantized == stacked.quantized
  assert one.norms == stacked.norms == 0


def test_formulas():
  found = scale.Sizes(
    macs=5_000,
    parameters=100,
    state=1_000,
    kept=50,
    quantized=7,
    norms=3,
  )
  chip = scale.Chip(1e6, 1e9, 1e4, 4e3, 4, 8)
  result = scale.estimate(digits(), found, chip)
  # 4 rows per chip.
  flops = 2 * 3 * 5_000 * 4
  assert result.compute_s == (flops / 0.5e6, flops / 0.2e6)
  moved = 4 * 100 * 8
  # What is kept and its gradient, each written and read, or moved 5 times.
  assert result.memory == (moved + 4 * 50 * 4, moved + 10 * 50 * 4)
  assert result.reduced == 2 * 15 / 16 * 400
  assert result.reduce_s == (750 / 4e3, 750 / 1e3)
  assert result.waits == (20, 40)
  assert result.delayed == (7, 13)
  assert result.delayed_s == pytest.approx((7 * 10e-6, 13 * 50e-6))
  assert result.waits_s == pytest.approx((20 * 10e-6, 40 * 50e-6))
  assert result.step_s[0] == pytest.approx(max(0.24, 0.40, 0.1875) + 200e-6)
  assert result.step_s[1] == pytest.approx(0.6 + 0.52 + 0.75 + 2e-3)
  assert result.rate == pytest.approx([64 / s for s in result.step_s])
  # Two hosts; the best case of one is the worst of the other.
  cores = (64 / result.step_s[0] / 2 / 560, 64 / result.step_s[1] / 2 / 670)
  assert result.cores == pytest.approx(cores)
  assert result.held == 1_000 + 400 + 200
  assert result.checkpoint == 1_000


def test_the_plan_is_of_the_recipes():
  images, text = scale.cases()
  assert images.config.model.name == "resnet50_imagenet"
  assert (images.chips, text.chips) == (256, 64)
  for case in (images, text):
    assert case.batch % case.chips == 0
    assert case.chips % scale.V5E.per_host == 0
  assert text.shape == (text.config.data.unroll,)
  assert text.per_row == 512
  assert scale.estimate(text, scale.Sizes(1, 1, 1, 1, 1, 0)).cores is None
  for label in scale._LABELS:
    assert f"| {label} |" in README.read_text()
