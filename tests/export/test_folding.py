"""A folded network computes what it did, with its codes or near them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpc_jax as dpc
from dpc_jax import export
from dpc_jax.export import folding
from dpc_jax.models import mobilenet_v2, resnet_imagenet, stacking
from tests.export import small

STAGES = ((1, 8, 1, 1), (6, 8, 2, 2))
MODELS = {
  "basic": lambda: dpc.models.create(
    "resnet8", num_classes=3, width=2, quantization=None
  ),
  "bottleneck": lambda: resnet_imagenet.ResNetImageNet(
    3, blocks=(1,), bottleneck=True, width=4, quantization=None
  ),
  **{
    f"inverted, {'small' if s else 'large'} images": lambda s=s: (
      mobilenet_v2.MobileNetV2(
        3,
        small_images=s,
        width_multiplier=0.1,
        stages=STAGES,
        quantization=None,
      )
    )
    for s in (True, False)
  },
}


@pytest.mark.parametrize("name", MODELS)
def test_a_folded_network_computes_the_same(name, fast_compiler):
  model = MODELS[name]()
  variables = small.made_up(model, small.IMAGES)
  folded = export.fold_batch_norm(model, variables)
  x = small.example(small.IMAGES)
  apply = jax.jit(lambda v, x: model.apply(v, x))
  np.testing.assert_allclose(
    apply(folded, x), apply(variables, x), rtol=2e-4, atol=2e-5
  )
  before, after = small.flat(variables), small.flat(folded)
  for path, value in after.items():
    assert value.dtype == before[path].dtype
    if path.endswith("/var"):
      np.testing.assert_allclose(value + folding.EPSILON, 1, rtol=1e-7)
    elif "norm" in path and path.endswith(("/mean", "/scale")):
      assert np.all(value == path.endswith("/scale"))
  # What is in one is a convolution's, or a bias.
  assert np.any(after["params/stem/kernel"] != before["params/stem/kernel"])


def test_codes_stay_and_are_mirrored_where_the_factor_is_negative():
  model = small.tiny_model()
  variables = small.made_up(model, small.IMAGES)
  scale = variables["params"]["norm"]["scale"].at[:2].multiply(-1)
  variables["params"]["norm"]["scale"] = scale
  folded = export.fold_batch_norm(model, variables, {"norm": "first"})
  before, after = (
    export.freeze(model, v, small.IMAGES)
    .kernels["params/first/kernel"]
    .parts[0]
    for v in (variables, folded)
  )
  top = 2**before.width - 1
  want = before.codes.astype(int)
  want[..., :2] = top - want[..., :2]
  assert np.mean(after.codes == want) > 0.95
  np.testing.assert_allclose(after.codes, want, atol=1)


def test_stacked_blocks_fold_as_single_ones_do():
  single = dpc.models.create("resnet20", num_classes=3, width=2)
  stacked = dpc.models.create("resnet20", num_classes=3, width=2, scan=True)
  variables = small.made_up(single, small.IMAGES)
  want = stacking.stack_blocks(export.fold_batch_norm(single, variables))
  found = export.fold_batch_norm(stacked, stacking.stack_blocks(variables))
  want, found = small.flat(want), small.flat(found)
  assert want.keys() == found.keys()
  for name, value in want.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_bias_before_it_is_folded_too(fast_compiler):
  model = Biased()
  variables = small.made_up(model, small.IMAGES)
  pairs = {"after": "dense"}
  folded = export.fold_batch_norm(model, variables, pairs)
  assert not np.any(folded["params"]["dense"]["bias"])
  x = small.example(small.IMAGES)
  apply = jax.jit(model.apply)
  np.testing.assert_allclose(
    apply(folded, x), apply(variables, x), rtol=1e-4, atol=1e-5
  )


class Biased(nn.Module):
  """A dense layer with a bias, then BatchNorm."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(4, name="dense")(x)
    return nn.BatchNorm(not train, name="after")(x)


def test_what_cannot_be_folded_is_refused():
  def refused(match, model, *pairs, variables=None):
    if variables is None:
      variables = small.made_up(model, small.IMAGES)
    with pytest.raises(export.ExportError, match=match) as caught:
      export.fold_batch_norm(model, variables, *pairs)
    assert "\n" not in str(caught.value)

  vit = dpc.models.create(
    "vit_tiny", num_classes=3, width=4, heads=1, layers=1, mlp_width=4
  )
  refused("ViT: has no BatchNorm to fold", vit)
  tiny = small.tiny_model()
  refused("Tiny: 'norm': which convolution this BatchNorm follows", tiny)
  refused(
    "'norm': has 4 channels, and 'second' gives 8", tiny, {"norm": "second"}
  )
  refused("cannot be folded without params/x/kernel", tiny, {"norm": "x"})
  variables = small.made_up(tiny, small.IMAGES)
  del variables["params"]["norm"]["scale"]
  refused(
    "without params/norm/scale", tiny, {"norm": "first"}, variables=variables
  )


def test_the_variance_gives_a_factor_of_one():
  for epsilon in (1e-5, 1e-3, 0.1):
    total = folding._unit_variance(epsilon) + np.float32(epsilon)
    assert total.dtype == np.float32
    assert abs(total - 1) <= np.finfo(np.float32).eps
    assert float(jax.lax.rsqrt(jnp.float32(total))) == pytest.approx(
      1, rel=2e-7
    )
