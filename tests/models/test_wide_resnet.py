"""WideResNet-38: sizes by formula, names, steps, scan."""

import functools

import jax
import jax.numpy as jnp
import pytest

from dpc_jax import models
from dpc_jax.cost import macs
from dpc_jax.models import wide_resnet
from dpc_jax.quant import precision
from tests.models import checks

IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


CASE = checks.image_case(
  functools.partial(wide_resnet.wide_resnet, blocks=1, width=2), size=8
)


def convs(widening, blocks=6):
  """(weights, edge of the output) of every convolution, images of 32x32."""
  found = [(3 * 3 * 3 * 16, 32)]
  inputs = 16
  for stage, edge in enumerate((32, 16, 8)):
    features = 16 * widening * 2**stage
    for block in range(blocks):
      if block == 0:
        found.append((inputs * features, edge))  # the shortcut
      found.append((9 * inputs * features, edge))
      found.append((9 * features * features, edge))
      inputs = features
  return found


# No count is in the literature, as the variant is ours: by formula. 2,243,994
# is the formula's value at the default widening, written down.
@pytest.mark.parametrize(("widening", "weights"), [(2, 2_243_994), (3, None)])
def test_parameters_by_formula(widening, weights):
  model = models.create("wide_resnet38", num_classes=10, widening=widening)
  # Scales and biases: of the stem, 12 norms and a shortcut's per stage.
  norms = 2 * (16 + sum(13 * 16 * widening * 2**stage for stage in range(3)))
  classifier = (64 * widening + 1) * 10
  formula = sum(size for size, _ in convs(widening)) + norms + classifier
  assert checks.parameters(model, IMAGE) == formula
  assert weights in (None, formula)


def test_two_is_the_default():
  assert models.create("wide_resnet38", num_classes=10) == models.create(
    "wide_resnet38", num_classes=10, widening=2
  )
  with pytest.raises(ValueError, match="blocks: the model's name sets"):
    models.create("wide_resnet38", num_classes=10, blocks=2)
  with pytest.raises(ValueError, match="widening = 0: must be at least 1"):
    models.create("wide_resnet38", num_classes=10, widening=0)


@pytest.mark.parametrize("widening", [2, 3])
def test_macs_by_formula(widening):
  model = models.create("wide_resnet38", num_classes=10, widening=widening)
  costs = macs.layer_costs(model, IMAGE)
  assert costs.pop("classifier").macs == 640 * widening
  assert sum(cost.macs for cost in costs.values()) == sum(
    size * edge * edge for size, edge in convs(widening)
  )


def test_layers_and_shapes():
  model = models.create("wide_resnet38", num_classes=10)
  variables = jax.eval_shape(model.init, jax.random.key(0), IMAGE)
  bits = precision.layer_bits(variables)
  assert len(bits) == 1 + 36 + 3
  assert "stage1/block0/shortcut" in bits
  assert "stage1/block1/shortcut" not in bits
  params = variables["params"]
  assert params["stem"]["kernel"].shape == (3, 3, 3, 16)
  for stage, features in enumerate((32, 64, 128), 1):
    kernel = params[f"stage{stage}"]["block5"]["conv2"]["kernel"]
    assert kernel.shape == (3, 3, features, features)
  assert jax.eval_shape(model.apply, variables, IMAGE).shape == (1, 10)


@pytest.mark.as_users
def test_float_is_plain():
  checks.check_float_is_plain(CASE)


@pytest.mark.as_users
def test_few_bits():
  checks.check_few_bits(CASE)


def test_a_batch_of_one():
  checks.check_batch_of_one(CASE)


# Values and widths of stacks: tests/models/test_resnet.py, the same class.
def test_the_first_block_of_stage_1_is_not_stacked():
  build = functools.partial(models.create, "wide_resnet38", num_classes=10)
  checks.check_scan_form(build(), build(scan=True), IMAGE)
  variables = jax.eval_shape(build(scan=True).init, jax.random.key(0), IMAGE)
  assert set(variables["params"]["stage1"]) == {"block0", "blocks"}
  assert checks.parameters(build(scan=True), IMAGE) == 2_243_994
