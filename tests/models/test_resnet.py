"""CIFAR ResNets: sizes, names, float against quantized, one step."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax import models
from dpc_jax.cost import macs
from dpc_jax.models import resnet
from dpc_jax.quant import grids, precision
from tests.models import checks

# Arithmetic, not a citation, for shortcuts of option B. He et al., 2016, table
# 6, print 0.27M and 1.7M for 20 and 110 layers with shortcuts of option A,
# which have none of these 2,752 parameters.
PARAMETERS = {
  "resnet20": 272_474,
  "resnet38": 564_122,
  "resnet74": 1_147_418,
  "resnet110": 1_730_714,
}
# Arithmetic too, rounded.
CONV_MACS = {"resnet38": 83.3e6, "resnet74": 168.2e6, "resnet110": 253.1e6}
IMAGE = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)


def shapes(model, image=IMAGE):
  return jax.eval_shape(model.init, jax.random.key(0), image)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
  variables = shapes(models.create(name, num_classes=10))
  sizes = [
    math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"])
  ]
  assert sum(sizes) == PARAMETERS[name]
  n = (int(name[6:]) - 2) // 6
  # A product's weights, and scale and bias of its normalization.
  stem = (9 * 3 + 2) * 16
  stages = sum(
    (9 * inputs + 2) * f + (2 * n - 1) * (9 * f + 2) * f
    for inputs, f in ((16, 16), (16, 32), (32, 64))
  )
  shortcuts = (16 + 2) * 32 + (32 + 2) * 64
  assert shortcuts == 2752
  assert sum(sizes) == stem + stages + shortcuts + (64 + 1) * 10
  # Every convolution has widths and a running range, the classifier none.
  assert len(precision.layer_bits(variables)) == 1 + 6 * n + 2


@pytest.mark.parametrize("name", CONV_MACS)
def test_forward_macs_of_the_convolutions(name):
  model = models.create(name, num_classes=10)
  costs = macs.layer_costs(model, IMAGE)
  convs = {path: c.macs for path, c in costs.items() if path != "classifier"}
  assert set(convs) == set(precision.layer_bits(shapes(model)))
  assert sum(convs.values()) == pytest.approx(CONV_MACS[name], abs=0.05e6)
  assert costs["classifier"].macs == 640


def test_names_of_the_layers():
  variables = shapes(models.create("resnet14", num_classes=7))
  assert list(precision.layer_bits(variables)) == [
    "stage1/block0/conv1",
    "stage1/block0/conv2",
    "stage1/block1/conv1",
    "stage1/block1/conv2",
    "stage2/block0/conv1",
    "stage2/block0/conv2",
    "stage2/block0/shortcut",
    "stage2/block1/conv1",
    "stage2/block1/conv2",
    "stage3/block0/conv1",
    "stage3/block0/conv2",
    "stage3/block0/shortcut",
    "stage3/block1/conv1",
    "stage3/block1/conv2",
    "stem",
  ]
  assert set(variables) == {
    "params",
    "batch_stats",
    "precision",
    "quant_stats",
  }
  assert variables["params"]["classifier"]["kernel"].shape == (64, 7)


@pytest.mark.parametrize("depth", [8, 14, 26, 32, 44, 56, 62, 1202])
def test_any_number_of_blocks(depth):
  model = models.create(f"resnet{depth}", num_classes=10, width=4)
  assert model.blocks == (depth - 2) // 6 and model.width == 4


def test_unknown_names_and_sizes():
  for name in ("resnet9", "resnet2", "resnet", "vgg", "resnet08x"):
    with pytest.raises(
      ValueError, match=f"model.name = '{name}' is unknown"
    ) as e:
      models.create(name, num_classes=10)
    assert "resnet38" in str(e.value) and "\n" not in str(e.value)
  with pytest.raises(ValueError, match="num_classes = 0: must be"):
    models.create("resnet8", num_classes=0)
  for field, value in (("width", 8.0), ("width", 0.5), ("width", True)):
    with pytest.raises(
      ValueError, match=f"^{field} = {value}: must be an integer$"
    ):
      models.create("resnet8", num_classes=10, **{field: value})
  for name in ("resnet8", "vit_tiny", "lstm_lm", "mobilenet_v2"):
    with pytest.raises(ValueError, match=r"^num_classes = 10\.0: must be an"):
      models.create(name, num_classes=10.0)
  assert models.create("resnet8", num_classes=np.int64(10)).num_classes == 10
  with pytest.raises(ValueError, match="'widht'"):
    models.create("resnet8", num_classes=10, widht=8)
  assert {"resnet8", "resnet20", "resnet110"} <= set(models.names())


def images(n, size=12):
  random = np.random.default_rng(n)
  return jnp.asarray(random.normal(size=(n, size, size, 3)), jnp.float32)


LABELS = jnp.arange(4) % 3


@functools.partial(jax.jit, static_argnums=0)
def step(model, variables, x, labels, key):
  """Loss, updated collections, gradients of one training step."""
  others = {c: v for c, v in variables.items() if c != "params"}

  def loss(params):
    logits, updates = model.apply(
      {**others, "params": params},
      x,
      train=True,
      mutable=[c for c in ("batch_stats", "quant_stats") if c in others],
      rngs={"quant": key},
    )
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], 1)), updates

  (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(
    variables["params"]
  )
  return value, updates, grads


@pytest.fixture(scope="module")
def small():
  """ResNet-8 with 4 channels, quantized and float, with their variables."""
  build = functools.partial(models.create, "resnet8", num_classes=3, width=4)
  quantized, plain = build(), build(quantization=None)
  # Threefry's initial values would take longer to compile than all else.
  key = jax.random.key(0, impl="rbg")
  init = [jax.jit(m.init)(key, images(4)) for m in (quantized, plain)]
  return quantized, plain, *init


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for one, two in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(one, two)


@pytest.mark.as_users
def test_at_width_32_it_is_the_float_model_bit_for_bit(small):
  quantized, plain, variables, plain_variables = small
  assert set(plain_variables) == {"params", "batch_stats"}
  for collection in plain_variables:
    assert_same(variables[collection], plain_variables[collection])
  key = jax.random.key(1)
  value, updates, grads = step(
    quantized, precision.assign_bits(variables, 32), images(4), LABELS, key
  )
  want = step(plain, plain_variables, images(4), LABELS, key)
  assert_same(want, (value, {"batch_stats": updates["batch_stats"]}, grads))


@pytest.mark.as_users
def test_a_step_at_few_bits_reaches_every_parameter(small):
  quantized, _, variables, _ = small
  losses = set()
  for bits in (3, 4, 8):
    value, updates, grads = step(
      quantized,
      precision.assign_bits(variables, bits),
      images(4),
      LABELS,
      jax.random.key(1),
    )
    losses.add(float(value))
    for leaf in jax.tree.leaves((value, updates, grads)):
      assert np.all(np.isfinite(leaf))
    for path, leaf in jax.tree.leaves_with_path(grads):
      assert np.any(leaf != 0), jax.tree_util.keystr(path)
    assert jax.tree.structure(updates["quant_stats"]) == jax.tree.structure(
      variables["quant_stats"]
    )
  assert len(losses) == 3


def test_a_batch_of_one():
  checks.check_batch_of_one(DEEPER)


def test_evaluation_changes_nothing_and_needs_no_train_argument(small):
  quantized, _, variables, _ = small
  evaluate = jax.jit(
    functools.partial(quantized.apply, mutable=["batch_stats"])
  )
  logits, updates = evaluate(variables, images(1))
  assert logits.shape == (1, 3)
  assert_same(updates["batch_stats"], variables["batch_stats"])


def test_a_stride_pads_both_sides_like_the_reference():
  seen = []

  def spy(next_fun, args, kwargs, context):
    if isinstance(context.module, nn.Conv):
      seen.append((context.module.name, context.module.padding))
    return next_fun(*args, **kwargs)

  model = models.create("resnet8", num_classes=3, quantization=None)
  with nn.intercept_methods(spy):
    shapes(model)
  by_name = dict(seen)
  assert by_name.pop("shortcut") == "VALID"
  assert set(by_name) == {"stem", "conv1", "conv2"}
  assert set(by_name.values()) == {((1, 1), (1, 1))}


def test_bfloat16_computes_in_it_and_keeps_float32_parameters():
  model = models.create("resnet8", num_classes=3, dtype=jnp.bfloat16)
  variables = shapes(model)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {
    jnp.dtype(jnp.float32)
  }
  logits = jax.eval_shape(model.apply, variables, IMAGE)
  assert logits.dtype == jnp.bfloat16


def test_the_grids_reach_every_convolution():
  signed = grids.Quantization(activations=None)
  variables = shapes(
    models.create("resnet8", num_classes=3, quantization=signed)
  )
  assert "quant_stats" not in variables
  assert len(precision.layer_bits(variables)) == 9


def test_a_name_cannot_lie():
  with pytest.raises(ValueError, match="blocks: the model's name sets"):
    models.create("resnet8", num_classes=10, blocks=3)
  with pytest.raises(ValueError, match="width = 0: must be at least 1"):
    models.create("resnet8", num_classes=10, width=0)


# Two blocks: stage 1 is stacked, the others have a single block left.
DEEPER = checks.image_case(
  functools.partial(resnet.ResNet, blocks=2, width=4), size=8
)


def test_scanned_is_unrolled():
  checks.check_scan_is_unroll(DEEPER)


def test_each_row_has_its_own_width():
  checks.check_stacked_widths(DEEPER, "stage1/blocks/conv2")


def test_a_scanned_step_at_few_bits_reaches_every_parameter():
  checks.check_few_bits(DEEPER, scan=True)


@pytest.mark.parametrize("name", ["resnet38", "resnet110"])
def test_scanned_form(name):
  build = functools.partial(models.create, name, num_classes=10)
  checks.check_scan_form(build(), build(scan=True), IMAGE)


def test_scanned_layers_and_costs():
  model = models.create("resnet20", num_classes=10, scan=True)
  variables = shapes(model)
  bits = precision.layer_bits(variables)
  assert {path: b.weights.shape for path, b in bits.items()} == {
    "stem": (),
    "stage1/blocks/conv1": (3,),
    "stage1/blocks/conv2": (3,),
    **{
      f"stage{stage}/{name}": shape
      for stage in (2, 3)
      for name, shape in {
        "block0/conv1": (),
        "block0/conv2": (),
        "block0/shortcut": (),
        "blocks/conv1": (2,),
        "blocks/conv2": (2,),
      }.items()
    },
  }
  total = [
    sum(cost.macs * cost.layers for cost in macs.layer_costs(m, IMAGE).values())
    for m in (model, models.create("resnet20", num_classes=10))
  ]
  assert total[0] == total[1]
  assert checks.parameters(model, IMAGE) == PARAMETERS["resnet20"]
  # Resnet-8 has nothing to stack but stays what it is.
  unrolled = models.create("resnet8", num_classes=10)
  scanned = models.create("resnet8", num_classes=10, scan=True)
  assert checks.form(shapes(unrolled)) == checks.form(shapes(scanned))
