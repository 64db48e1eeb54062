"""MobileNetV2 in both forms: literature's sizes, a written-out reference."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax import models
from dpc_jax.cost import macs
from dpc_jax.models import mobilenet_v2
from dpc_jax.quant import grids, precision
from tests.models import checks, reference

CIFAR = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
IMAGENET = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
FORMS = {
  "mobilenet_v2": (CIFAR, 10),
  "mobilenet_v2_imagenet": (IMAGENET, 1000),
}
# Blocks of each kind: expansion 1, stride 2, the same shape, other channels.
# A quarter of these channels: 8 in the stem, 16 in the stages.
STAGES = {
  "mobilenet_v2": ((1, 64, 1, 1), (3, 64, 1, 2), (3, 64, 1, 2)),
  "mobilenet_v2_imagenet": ((1, 64, 1, 1), (3, 64, 2, 2)),
}


def case(name, size, **sizes):
  build = functools.partial(
    models.create, name, width_multiplier=0.25, stages=STAGES[name], **sizes
  )
  return checks.image_case(build, size=size)


CASES = {
  "mobilenet_v2": case("mobilenet_v2", 8),
  "mobilenet_v2_imagenet": case("mobilenet_v2_imagenet", 16, quantize_all=True),
}


@functools.cache
def costs(name):
  image, num_classes = FORMS[name]
  return macs.layer_costs(models.create(name, num_classes=num_classes), image)


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    # kuangliu/pytorch-cifar, the same network as CPT's.
    ("mobilenet_v2", 2_296_922),
    # torchvision.
    ("mobilenet_v2_imagenet", 3_504_872),
  ],
)
def test_parameters(name, expected):
  image, num_classes = FORMS[name]
  model = models.create(name, num_classes=num_classes)
  assert checks.parameters(model, image) == expected


def formula(name):
  """{path: MACs} of every product at full width, written out."""
  small = name == "mobilenet_v2"
  edge = 32 if small else 112
  found = {"stem": edge**2 * 9 * 3 * 32}
  inputs = 32
  for stage, (expansion, features, blocks, stride) in enumerate(
    [
      (1, 16, 1, 1),
      (6, 24, 2, 1 if small else 2),
      (6, 32, 3, 2),
      (6, 64, 4, 2),
      (6, 96, 3, 1),
      (6, 160, 3, 2),
      (6, 320, 1, 1),
    ],
    1,
  ):
    for block in range(blocks):
      path = f"stage{stage}/block{block}"
      inner = inputs * expansion
      if small or expansion > 1:
        found[f"{path}/expand"] = edge**2 * inputs * inner
      if block == 0:
        edge //= stride
      found[f"{path}/depthwise"] = edge**2 * 9 * inner
      found[f"{path}/project"] = edge**2 * inner * features
      if small and inputs != features and (block > 0 or stride == 1):
        found[f"{path}/shortcut"] = edge**2 * inputs * features
      inputs = features
  found["head"] = edge**2 * 320 * 1280
  found["classifier"] = 1280 * FORMS[name][1]
  return found


@pytest.mark.parametrize("name", FORMS)
def test_macs_by_formula(name):
  found = {path: cost.macs for path, cost in costs(name).items()}
  assert found == formula(name)


def test_macs_of_the_literature():
  # torchvision lists 0.30 GFLOPS, which are multiply-accumulates.
  total = sum(cost.macs for cost in costs("mobilenet_v2_imagenet").values())
  assert total == 300_774_272
  assert sum(cost.macs for cost in costs("mobilenet_v2").values()) == 91_154_944


def test_capacity_of_a_depthwise_convolution_is_nine_per_channel():
  assert costs("mobilenet_v2")["stage2/block0/depthwise"].weights == 9 * 96


@pytest.mark.parametrize(
  ("name", "in_float"),
  [
    ("mobilenet_v2", {"classifier"}),
    ("mobilenet_v2_imagenet", {"stem", "classifier"}),
  ],
)
def test_what_is_quantized(name, in_float):
  image, _ = FORMS[name]
  for quantize_all in (False, True):
    model = models.create(name, num_classes=7, quantize_all=quantize_all)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    expected = set(costs(name)) - (set() if quantize_all else in_float)
    assert set(precision.layer_bits(variables)) == expected
    logits = jax.eval_shape(model.apply, variables, image)
    assert logits.shape == (1, 7)


@pytest.mark.as_users
@pytest.mark.parametrize("name", CASES)
def test_float_is_plain(name):
  checks.check_float_is_plain(CASES[name])


@pytest.mark.as_users
@pytest.mark.parametrize("name", CASES)
def test_few_bits(name):
  checks.check_few_bits(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_one(name):
  checks.check_batch_of_one(CASES[name])


class Reference(reference.Network):
  def __call__(self, x, stages, small):
    self.small = small
    x = np.asarray(x, np.float64)
    x = self.active(self.conv(x, "stem", 1 if small else 2), "stem_norm")
    for stage, (expansion, _, blocks, stride) in enumerate(stages, 1):
      stride = 1 if small and stage == 2 else stride
      for block in range(blocks):
        path = f"stage{stage}/block{block}"
        x = self.block(x, path, expansion, stride if block == 0 else 1)
    x = self.active(self.conv(x, "head"), "head_norm")
    return self.dense(x, "classifier")

  def active(self, x, path):
    return np.clip(self.norm(x, path), 0, np.inf if self.small else 6)

  def block(self, x, path, expansion, stride):
    y = x
    if self.small or expansion > 1:
      y = self.active(self.conv(y, f"{path}/expand"), f"{path}/expand_norm")
    y = self.conv(y, f"{path}/depthwise", stride, groups=y.shape[-1])
    y = self.active(y, f"{path}/depthwise_norm")
    y = self.norm(self.conv(y, f"{path}/project"), f"{path}/project_norm")
    if stride == 1 and x.shape == y.shape:
      return x + y
    if stride == 1 and self.small:
      x = self.norm(self.conv(x, f"{path}/shortcut"), f"{path}/shortcut_norm")
      return x + y
    return y


@pytest.mark.parametrize("name", CASES)
def test_against_a_reference_with_weights_at_3_bits(name):
  built = CASES[name]
  model = built.build()
  variables = reference.seasoned(checks.initial(built, model))
  variables = precision.assign_bits(variables, grids.LayerBits(3, 32, 32))
  # Large enough for relu6 to cut.
  x = 20 * built.inputs(built.batch)[0]
  network = Reference(variables)
  want = network(x, STAGES[name], name == "mobilenet_v2")
  got = jax.jit(model.apply)(variables, x)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  assert network.quantized == set(precision.layer_bits(variables))


@pytest.mark.parametrize(
  ("name", "rate"), [("mobilenet_v2", 0.0), ("mobilenet_v2_imagenet", 0.2)]
)
def test_dropout_before_the_classifier(name, rate):
  seen = []

  def spy(call, args, kwargs, context):
    result = call(*args, **kwargs)
    if isinstance(context.module, nn.Dropout | nn.Dense):
      seen.append(context.module)
    return result

  image, _ = FORMS[name]
  model = models.create(name, num_classes=7, dropout=rate)
  assert model == models.create(name, num_classes=7)
  variables = jax.eval_shape(model.init, jax.random.key(0), image)
  train = functools.partial(
    model.apply, mutable=list(checks.STATISTICS), rngs={"dropout": checks.KEY}
  )
  for is_train in (True, False):
    with nn.intercept_methods(spy):
      jax.eval_shape(functools.partial(train, train=is_train), variables, image)
    dropout, dense = seen[-2:]
    assert dropout.rate == rate and dropout.deterministic is not is_train
    assert dense.name == "classifier" and len(seen) == 2
    seen.clear()


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("rate", [1.5, 1, -0.2])
def test_dropout_is_a_share(name, rate):
  image, _ = FORMS[name]
  model = models.create(name, num_classes=7, dropout=rate)
  with pytest.raises(
    ValueError, match=rf"^dropout = {rate}: must be in \[0, 1\)"
  ):
    jax.eval_shape(model.init, jax.random.key(0), image)


@pytest.mark.parametrize(
  ("channels", "multiplier", "expected"),
  [
    (32, 1.0, 32),
    (32, 1.4, 48),  # 44.8
    (16, 0.35, 8),  # 5.6, the least is 8
    (24, 0.75, 24),  # 18 would fall to 16, below 90 %
    (96, 0.35, 32),  # 33.6
    (160, 1.3, 208),
    (12, 1.0, 16),  # a half goes up
  ],
)
def test_channels_are_multiples_of_8(channels, multiplier, expected):
  assert mobilenet_v2.scaled(channels, multiplier) == expected


# The authors' table at 224x224, in millions; theirs counts no normalization.
@pytest.mark.parametrize(
  ("multiplier", "million_macs", "million_weights", "head"),
  [(0.35, 59, 1.66, 1280), (0.5, 97, 1.95, 1280), (1.4, 582, 6.06, 1792)],
)
def test_width_multiplier(multiplier, million_macs, million_weights, head):
  model = models.create(
    "mobilenet_v2_imagenet", num_classes=1000, width_multiplier=multiplier
  )
  found = macs.layer_costs(model, IMAGENET)
  total = sum(cost.macs for cost in found.values())
  assert total == pytest.approx(million_macs * 1e6, abs=1e6)
  weights = sum(cost.weights for cost in found.values()) + 1000
  assert weights == pytest.approx(million_weights * 1e6, abs=1e4)
  assert found["classifier"].weights == head * 1000


@pytest.mark.parametrize("multiplier", [0.0, -1.0, float("nan")])
def test_a_multiplier_must_be_above_0(multiplier):
  model = models.create(
    "mobilenet_v2", num_classes=2, width_multiplier=multiplier
  )
  with pytest.raises(ValueError, match=r"width_multiplier = .* above 0"):
    jax.eval_shape(model.init, jax.random.key(0), CIFAR)


def test_a_form_cannot_be_changed_by_a_size():
  with pytest.raises(ValueError, match="small_images"):
    models.create("mobilenet_v2", num_classes=2, small_images=False)
