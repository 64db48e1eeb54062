"""ImageNet ResNets: literature's sizes, a written-out reference, scan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax import models
from dpc_jax.cost import macs
from dpc_jax.models import resnet_imagenet
from dpc_jax.quant import grids, precision
from tests.models import checks, reference

IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
# torchvision's counts at 1000 classes.
PARAMETERS = {
  "resnet18_imagenet": 11_689_512,
  "resnet34_imagenet": 21_797_672,
  "resnet50_imagenet": 25_557_032,
}
# torchvision's GFLOPS at 224x224, which are multiply-accumulates.
GIGA_MACS = {
  "resnet18_imagenet": 1.814,
  "resnet34_imagenet": 3.664,
  "resnet50_imagenet": 4.089,
}
BLOCKS = {
  "resnet18_imagenet": (2, 2, 2, 2),
  "resnet34_imagenet": (3, 4, 6, 3),
  "resnet50_imagenet": (3, 4, 6, 3),
}


def case(blocks, bottleneck, **sizes):
  build = functools.partial(
    resnet_imagenet.ResNetImageNet,
    blocks=blocks,
    bottleneck=bottleneck,
    width=4,
    **sizes,
  )
  return checks.image_case(build, size=32)


# Stage 1 of basic blocks is stacked whole, else all but the first block.
CASES = {
  "basic": (case((2, 1), False), "stage1/blocks/conv1"),
  "bottleneck": (
    case((3, 1), True, quantize_all=True),
    "stage1/blocks/conv2",
  ),
}


@functools.cache
def costs(name):
  return macs.layer_costs(models.create(name, num_classes=1000), IMAGE)


def formula(name):
  """{path: MACs} of every product at 224x224."""
  bottleneck = name == "resnet50_imagenet"
  found = {"stem": 112**2 * 7 * 7 * 3 * 64}
  inputs, edge = 64, 56
  for stage, blocks in enumerate(BLOCKS[name]):
    inner = 64 * 2**stage
    outputs = inner * (4 if bottleneck else 1)
    for block in range(blocks):
      path = f"stage{stage + 1}/block{block}"
      before = edge
      if block == 0 and stage > 0:
        edge //= 2
      if bottleneck:
        # The stride sits in the 3x3 convolution: v1.5.
        found[f"{path}/conv1"] = before**2 * inputs * inner
        found[f"{path}/conv2"] = edge**2 * 9 * inner * inner
        found[f"{path}/conv3"] = edge**2 * inner * outputs
      else:
        found[f"{path}/conv1"] = edge**2 * 9 * inputs * inner
        found[f"{path}/conv2"] = edge**2 * 9 * inner * inner
      if inputs != outputs:
        found[f"{path}/shortcut"] = edge**2 * inputs * outputs
      inputs = outputs
  found["classifier"] = inputs * 1000
  return found


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
  model = models.create(name, num_classes=1000)
  assert checks.parameters(model, IMAGE) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_macs(name):
  found = {path: cost.macs for path, cost in costs(name).items()}
  assert found == formula(name)
  total = sum(found.values())
  assert total == pytest.approx(GIGA_MACS[name] * 1e9, abs=0.5e6)


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("quantize_all", [False, True])
def test_what_is_quantized(name, quantize_all):
  model = models.create(name, num_classes=7, quantize_all=quantize_all)
  variables = jax.eval_shape(model.init, jax.random.key(0), IMAGE)
  in_float = {
    path
    for path in costs(name)
    if path in ("stem", "classifier") or path.endswith("shortcut")
  }
  assert len(in_float) == (6 if name == "resnet50_imagenet" else 5)
  expected = set(costs(name)) - (set() if quantize_all else in_float)
  assert set(precision.layer_bits(variables)) == expected
  logits = jax.eval_shape(model.apply, variables, IMAGE)
  assert logits.shape == (1, 7)


@pytest.mark.as_users
@pytest.mark.parametrize("name", CASES)
def test_float_is_plain(name):
  checks.check_float_is_plain(CASES[name][0])


@pytest.mark.as_users
@pytest.mark.parametrize("name", CASES)
def test_few_bits(name):
  checks.check_few_bits(CASES[name][0])


@pytest.mark.parametrize("name", CASES)
def test_few_bits_scanned(name):
  checks.check_few_bits(CASES[name][0], scan=True)


@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_one(name):
  checks.check_batch_of_one(CASES[name][0])


@pytest.mark.parametrize("name", CASES)
def test_scanned_is_unrolled(name):
  checks.check_scan_is_unroll(CASES[name][0])


@pytest.mark.parametrize("name", PARAMETERS)
def test_scanned_form(name):
  build = functools.partial(models.create, name, num_classes=1000)
  checks.check_scan_form(build(), build(scan=True), IMAGE)


@pytest.mark.parametrize("name", CASES)
def test_each_row_has_its_own_width(name):
  checks.check_stacked_widths(*CASES[name])


class Reference(reference.Network):
  def __call__(self, x, blocks, bottleneck):
    x = self.conv(np.asarray(x, np.float64), "stem", stride=2)
    x = reference.max_pool(np.maximum(self.norm(x, "stem_norm"), 0))
    for stage, count in enumerate(blocks):
      for block in range(count):
        stride = 2 if stage > 0 and block == 0 else 1
        path = f"stage{stage + 1}/block{block}"
        x = self.block(x, path, stride, bottleneck)
    return self.dense(x, "classifier")

  def block(self, x, path, stride, bottleneck):
    strides = (1, stride, 1) if bottleneck else (stride, 1)
    y = x
    for i, conv_stride in enumerate(strides, 1):
      y = self.conv(y, f"{path}/conv{i}", conv_stride)
      y = self.norm(y, f"{path}/norm{i}")
      if i < len(strides):
        y = np.maximum(y, 0)
    if x.shape != y.shape:
      x = self.conv(x, f"{path}/shortcut", stride)
      x = self.norm(x, f"{path}/shortcut_norm")
    return np.maximum(x + y, 0)


@pytest.mark.parametrize("name", CASES)
def test_against_a_reference_with_weights_at_3_bits(name):
  built = CASES[name][0]
  model = built.build()
  variables = reference.seasoned(checks.initial(built, model))
  variables = precision.assign_bits(variables, grids.LayerBits(3, 32, 32))
  (x,) = built.inputs(built.batch)
  network = Reference(variables)
  want = network(x, model.blocks, model.bottleneck)
  got = jax.jit(model.apply)(variables, x)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  assert network.quantized == set(precision.layer_bits(variables))


def test_the_scales_of_all_norms_start_at_one():
  built = CASES["bottleneck"][0]
  params = checks.initial(built, built.build())["params"]
  scales = [
    leaf
    for path, leaf in jax.tree.leaves_with_path(params)
    if path[-1].key == "scale"
  ]
  assert len(scales) == 1 + 4 * 3 + 2
  assert all(np.all(scale == 1) for scale in scales)


def test_names_and_sizes():
  for name in PARAMETERS:
    assert name in models.names()
    for field, value in {"blocks": (1, 1, 1, 1), "bottleneck": True}.items():
      with pytest.raises(ValueError, match=f"{field}: the model's name sets"):
        models.create(name, num_classes=10, **{field: value})
  with pytest.raises(ValueError, match=r"name = 'resnet101_imagenet'"):
    models.create("resnet101_imagenet", num_classes=10)
