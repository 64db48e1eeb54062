"""Vision transformers: sizes, against one written out, steps, scan."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax import models
from dpc_jax.cost import macs
from dpc_jax.quant import precision
from tests.models import checks

SIZES = {"width": 12, "layers": 2, "heads": 3, "mlp_width": 16}
CASE = checks.image_case(
  functools.partial(models.create, "vit_tiny", **SIZES), size=8
)
# Of DeiT-tiny and DeiT-small, in timm `vit_tiny_patch16_224` and
# `vit_small_patch16_224`.
PARAMETERS = {"vit_tiny_imagenet": 5_717_416, "vit_small_imagenet": 22_050_664}
LAYERS = (
  *(f"attention/{n}" for n in ("av", "key", "out", "qk", "query", "value")),
  "mlp1",
  "mlp2",
)


def image(size, batch=1):
  return jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
  for scan in (False, True):
    model = models.create(name, num_classes=1000, scan=scan)
    assert checks.parameters(model, image(224)) == PARAMETERS[name]


def test_parameters_for_cifar():
  # 65 positions, not 197; a kernel of 4 x 4 x 3, not 16 x 16 x 3; 10 classes.
  for name, width in (("vit_tiny", 192), ("vit_small", 384)):
    fewer = width * (132 + 720 + 990) + 990
    model = models.create(name, num_classes=10)
    assert (
      checks.parameters(model, image(32))
      == PARAMETERS[f"{name}_imagenet"] - fewer
    )


@pytest.mark.parametrize("scan", [False, True])
def test_multiply_accumulates(scan):
  model = models.create("vit_tiny", num_classes=10, scan=scan)
  costs = macs.layer_costs(model, image(32, batch=2))
  t, width, mlp = 65, 192, 768
  block = {
    **{f"attention/{n}": t * width**2 for n in ("query", "key", "value")},
    "attention/qk": t * t * width,
    "attention/av": t * t * width,
    "attention/out": t * width**2,
    "mlp1": t * width * mlp,
    "mlp2": t * width * mlp,
  }
  want = {"patches": 64 * 48 * width, "classifier": 10 * width}
  for i in range(1 if scan else 12):
    prefix = "blocks" if scan else f"block{i}"
    want |= {f"{prefix}/{name}": n for name, n in block.items()}
  assert {path: cost.macs for path, cost in costs.items()} == want
  assert all(
    cost.layers == (12 if path.startswith("blocks/") else 1)
    for path, cost in costs.items()
  )
  # DeiT's table: 1.3 G and 4.6 G at 224 x 224, in multiply-accumulates.
  large = models.create("vit_small_imagenet", num_classes=1000, scan=True)
  total = sum(
    c.macs * c.layers for c in macs.layer_costs(large, image(224)).values()
  )
  assert total == pytest.approx(4.6e9, rel=0.01)


def test_names_and_shapes():
  variables = checks.initial(CASE, CASE.build())
  assert set(variables) == {"params", "precision", "quant_stats"}
  assert sorted(precision.layer_bits(variables)) == sorted(
    f"block{i}/{name}" for i in range(2) for name in LAYERS
  )
  params = variables["params"]
  assert set(params) == {
    "patches",
    "class_token",
    "positions",
    "block0",
    "block1",
    "norm",
    "classifier",
  }
  assert params["patches"]["kernel"].shape == (4, 4, 3, 12)
  assert params["positions"].shape == (1, 5, 12)
  logits = jax.eval_shape(
    CASE.build(dtype=jnp.bfloat16).apply, variables, *CASE.inputs(4)
  )
  assert logits.shape == (4, 3) and logits.dtype == jnp.bfloat16


@pytest.fixture
def unfused(monkeypatch):
  """Behind a fused GELU XLA adds up the bias's gradient in another order."""
  step = jax.jit(
    checks.step.__wrapped__,
    static_argnums=(0, 1),
    compiler_options={"xla_disable_hlo_passes": "fusion"},
  )
  monkeypatch.setattr(checks, "step", step)


@pytest.mark.as_users
def test_first_and_last_layer_can_be_quantized(unfused):
  model = CASE.build(quantize_all=True)
  bits = precision.layer_bits(checks.initial(CASE, model))
  assert set(bits) == {
    "patches",
    "classifier",
    *(f"block{i}/{name}" for i in range(2) for name in LAYERS),
  }
  checks.check_float_is_plain(CASE, quantize_all=True)


def norm(params, x):
  mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  return (x - mean) / np.sqrt(var + 1e-6) * params["scale"] + params["bias"]


def dense(params, x):
  kernel = params["kernel"]
  return x @ kernel.reshape(-1, kernel.shape[-1]) + params["bias"]


def written_out(params, images, patch, heads):
  """The float model in numpy, float64."""
  n, height, width, channels = images.shape
  rows, columns = height // patch, width // patch
  x = images.reshape(n, rows, patch, columns, patch, channels)
  x = x.swapaxes(2, 3).reshape(n, rows * columns, -1)
  x = dense(params["patches"], x)
  token = np.broadcast_to(params["class_token"], (n, 1, x.shape[-1]))
  x = np.concatenate([token, x], 1) + params["positions"]
  i = 0
  while (block := params.get(f"block{i}")) is not None:
    y = norm(block["norm1"], x)
    q, k, v = (
      dense(block["attention"][name], y)
      .reshape(n, x.shape[1], heads, -1)
      .swapaxes(1, 2)
      for name in ("query", "key", "value")
    )
    p = np.exp(q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]))
    y = (p / p.sum(-1, keepdims=True)) @ v
    x = x + dense(block["attention"]["out"], y.swapaxes(1, 2).reshape(x.shape))
    y = dense(block["mlp1"], norm(block["norm2"], x))
    y = y * 0.5 * (1 + np.vectorize(math.erf)(y / np.sqrt(2)))
    x = x + dense(block["mlp2"], y)
    i += 1
  return dense(params["classifier"], norm(params["norm"], x)[:, 0])


def loud(params):
  """Larger parameters than the initial ones, so that every part shows."""
  leaves, treedef = jax.tree.flatten(params)
  random = np.random.default_rng(0)
  return treedef.unflatten(
    [random.normal(0, 0.5, leaf.shape).astype(np.float32) for leaf in leaves]
  )


def test_against_a_model_written_out():
  model = CASE.build(quantization=None)
  params = loud(checks.initial(CASE, model)["params"])
  (images,) = CASE.inputs(3)
  got = jax.jit(model.apply)({"params": params}, images)
  as_double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  want = written_out(as_double, np.asarray(images, np.float64), 4, 3)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.as_users
def test_float_is_plain(unfused):
  checks.check_float_is_plain(CASE)


def test_few_bits():
  checks.check_few_bits(CASE)


def test_few_bits_scanned():
  checks.check_few_bits(CASE, scan=True)


def test_batch_of_one():
  checks.check_batch_of_one(CASE)


def test_scan_is_unroll():
  checks.check_scan_is_unroll(CASE)


@pytest.mark.parametrize("layer", ["attention/query", "attention/qk"])
def test_stacked_widths(layer):
  checks.check_stacked_widths(CASE, f"blocks/{layer}")


def test_evaluation_is_row_by_row():
  model = CASE.build()
  variables = precision.assign_bits(checks.initial(CASE, model), 4)
  variables["params"] = loud(variables["params"])
  (images,) = CASE.inputs(4)
  _, updates, _ = checks.step(CASE, model, variables, (images,))
  variables |= updates
  evaluate = jax.jit(model.apply)
  before = evaluate(variables, images)
  after = evaluate(variables, images.at[2].set(7 * images[1]))
  same = np.all(np.asarray(before) == np.asarray(after), axis=-1)
  assert same.tolist() == [True, True, False, True]


def test_dropout_in_training_alone():
  quiet, model = (
    CASE.build(quantization=None),
    CASE.build(quantization=None, dropout=0.3),
  )
  variables = checks.initial(CASE, quiet)
  (images,) = CASE.inputs(4)
  want = quiet.apply(variables, images)
  np.testing.assert_array_equal(model.apply(variables, images), want)
  rngs = {"dropout": jax.random.key(1)}
  got = model.apply(variables, images, train=True, rngs=rngs)
  assert np.all(got != want)


def test_mistakes():
  key = jax.random.key(0)
  model = models.create("vit_tiny", num_classes=10)
  with pytest.raises(
    ValueError, match=r"patch_size = 4: must divide .* 30 x 30"
  ):
    jax.eval_shape(model.init, key, image(30))
  for sizes, message in (
    ({"heads": 5}, "heads = 5: must divide the width, which is 192"),
    ({"dropout": 1.0}, r"dropout = 1\.0: must be in \[0, 1\)"),
  ):
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(
        models.create("vit_tiny", num_classes=10, **sizes).init, key, image(8)
      )
  with pytest.raises(ValueError, match="patch_size = 0: must be at least 1"):
    models.create("vit_tiny", num_classes=10, patch_size=0)
  with pytest.raises(ValueError, match="'depth'"):
    models.create("vit_small", num_classes=10, depth=3)


def test_sizes_come_before_those_of_the_name():
  model = models.create(
    "vit_small_imagenet", num_classes=10, width=24, patch_size=2
  )
  assert (model.width, model.patch_size, model.heads) == (24, 2, 6)
