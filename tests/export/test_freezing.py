"""Frozen kernels are what the layers compute with, in every family."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpc_jax as dpc
from dpc_jax import export
from dpc_jax.export import freezing
from dpc_jax.models import resnet_imagenet
from tests.export import small

TRANSFORMER = {"width": 12, "layers": 2, "heads": 2, "mlp_width": 8}
FAMILIES = {
  "resnet8": ({"width": 2}, small.IMAGES),
  "resnet14": ({"width": 2, "scan": True}, small.IMAGES),
  "mobilenet_v2": (
    {"width_multiplier": 0.1, "stages": [[1, 8, 1, 1], [6, 8, 2, 2]]},
    small.IMAGES,
  ),
  "vit_tiny": (TRANSFORMER | {"quantize_all": True}, small.IMAGES),
  "transformer_lm": (
    TRANSFORMER | {"cutoffs": [10], "scan": True},
    small.TOKENS,
  ),
  "lstm_lm": ({"width": 4, "quantize_all": True}, small.TOKENS),
}


def values_of(kernel, width, grid, axes):
  """The quantizer's formula in NumPy."""
  if width == 32:
    return kernel
  reduced = tuple(i for i in range(kernel.ndim) if i not in axes)
  lo, hi = (f(kernel, axis=reduced, keepdims=True) for f in (np.min, np.max))
  if grid.kind == "symmetric":
    scale = np.maximum(-lo, hi) / (2 ** (width - 1) - 1)
    return np.round(kernel / scale) * scale
  scale = (hi - lo) / (2**width - 1)
  return np.round((kernel - lo) / scale) * scale + lo


def check(model, variables, inputs, loaded, axes=None):
  """Widths, kernels on their grids, and all else bit for bit.

  Args:
    model: that was frozen.
    variables: of it.
    inputs: unused by it, for its signature's sake.
    loaded: its `Inference`.
    axes: {layer: output channels}; the last axis of others.
  """
  before, after = small.flat(variables), small.flat(loaded.variables)
  kernels = set()
  for path, layer in dpc.layer_bits(variables).items():
    prefix = f"{path}/" if path else ""
    name = f"params/{prefix}kernel"
    if name not in before:
      continue  # a product of two activations
    kernels |= {name, f"precision/{prefix}weights"}
    assert np.all(after[f"precision/{prefix}weights"] == 32)
    stack = np.shape(layer.weights)
    rows = before[name].reshape(-1, *before[name].shape[len(stack) :])
    found = after[name].reshape(rows.shape)
    for row, got, width in zip(
      rows, found, np.ravel(layer.weights), strict=True
    ):
      channels = (axes or {}).get(path, (row.ndim - 1,))
      want = values_of(row, int(width), model.quantization.weights, channels)
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
      if width < 16:
        assert len(np.unique(got[..., 0])) <= 2 ** int(width)
  assert before.keys() == after.keys()
  assert kernels
  for name in before.keys() - kernels:
    assert before[name].dtype == after[name].dtype
    np.testing.assert_array_equal(before[name], after[name], err_msg=name)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_back_from_the_disk(name, tmp_path):
  sizes, inputs = FAMILIES[name]
  model = dpc.models.create(name, num_classes=11, **sizes)
  variables = small.made_up(model, inputs)
  packed = export.freeze(model, variables, inputs)
  assert (packed.model["name"], packed.model["sizes"]) == (name, sizes)
  export.save(packed, tmp_path / "out")
  loaded = export.load(tmp_path / "out")
  assert type(loaded.model) is type(model)
  check(model, variables, inputs, loaded)


@pytest.mark.as_users
@pytest.mark.parametrize("kind", ["affine", "symmetric"])
@pytest.mark.parametrize("storage_bits", [None, 8])
def test_logits_are_those_of_the_evaluation(kind, storage_bits):
  model = small.tiny_model(
    weights=dpc.Grid(kind, "channel"),
    activations=dpc.Grid(kind),
    storage_bits=storage_bits,
    ranges="delayed",
  )
  variables = small.made_up(model, small.IMAGES)
  x = small.example(small.IMAGES)
  loaded = export.restore(export.freeze(model, variables, x), model)
  assert loaded.model.quantization.storage_bits is None
  want = jax.jit(lambda v, x: model.apply(v, x))(variables, x)
  np.testing.assert_array_equal(loaded(x), want)
  # It is the widths of activations that decide, and they are in force.
  wide = dpc.assign_bits(loaded.variables, 32)
  assert np.any(loaded.model.apply(wide, x) != want)


def test_attention_and_state_evaluate_alike(fast_compiler):
  for name in ("transformer_lm", "lstm_lm"):
    sizes, inputs = FAMILIES[name]
    model = dpc.models.create(name, num_classes=11, **sizes)
    variables = small.made_up(model, inputs)
    tokens = small.example(inputs)
    loaded = export.restore(export.freeze(model, variables, inputs))
    want = jax.jit(lambda v, x, m=model: m.apply(v, x))(variables, tokens)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
      loaded(tokens),
      want,
    )


def test_float_layers_and_grids_per_tensor_keep_their_form():
  model = small.tiny_model(weights=dpc.Grid(), activations=None)
  variables = small.made_up(model, small.IMAGES)
  variables = dpc.assign_bits(variables, {"first": 32, "second": 16})
  packed = export.freeze(model, variables, small.IMAGES)
  first, second = (
    packed.kernels[f"params/{n}/kernel"] for n in ("first", "second")
  )
  assert first.parts[0].scale is None and first.parts[0].width == 32
  assert second.axes == () and second.parts[0].scale.shape == ()
  loaded = export.restore(packed)
  every = {"first": range(4), "second": ()}
  check(model, variables, small.IMAGES, loaded, every)


class Own(nn.Module):
  """Dense, DenseGeneral, Einsum: kernels with several channel axes."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(6, name="dense", dtype=jnp.bfloat16)(x)
    x = nn.DenseGeneral((2, 3), name="general", use_bias=False)(x)
    return nn.Einsum((3, 2, 4), "nab,bac->nc", name="einsum")(x)


def test_your_own_model_needs_to_be_given(tmp_path, fast_compiler):
  model = dpc.quantize(Own())
  inputs = jax.ShapeDtypeStruct((2, 5), jnp.float32)
  variables = small.made_up(model, inputs)
  packed = export.freeze(model, variables, inputs)
  axes = {n: packed.kernels[f"params/{n}/kernel"].axes for n in packed.bits}
  assert axes == {"dense": (1,), "general": (1, 2), "einsum": (2,)}
  export.save(packed, tmp_path / "out")
  with pytest.raises(export.ExportError, match=r"out: is of a model .* pass"):
    export.load(tmp_path / "out")
  with pytest.raises(export.ExportError, match="does not fit the export"):
    export.load(tmp_path / "out", dpc.quantize(nn.Dense(3)))
  loaded = export.load(tmp_path / "out", dpc.quantize(Own()))
  x = small.example(inputs)
  want = jax.jit(model.apply)(variables, x)
  np.testing.assert_allclose(loaded(x), want, rtol=1e-5, atol=1e-5)
  # In its own precision a layer sees a kernel that is rounded already.
  before, after = (
    v["params"]["dense"]["kernel"].astype(jnp.bfloat16)
    for v in (variables, loaded.variables)
  )
  width = dpc.layer_bits(variables)["dense"].weights
  grid = model.quantization.weights
  np.testing.assert_array_equal(
    after, jax.jit(lambda x: dpc.fake_quantize(x, width, grid))(before)
  )


def test_layers_with_8_bit_storage_of_their_own_are_refused():
  class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
      quantization = dpc.Quantization(storage_bits=8)
      return dpc.QuantDense(3, quantization=quantization, name="d")(x)

  inputs = jax.ShapeDtypeStruct((2, 5), jnp.float32)
  packed = export.freeze(Layers(), small.made_up(Layers(), inputs), inputs)
  with pytest.raises(export.ExportError, match="'d' has storage_bits = 8"):
    export.restore(packed, Layers())


def changed(variables, layer, value):
  params = jax.tree.map(lambda x: x, variables["params"])
  params[layer]["kernel"] = params[layer]["kernel"].at[0].set(value)
  return {**variables, "params": params}


def test_what_cannot_be_frozen_is_named():
  model = small.tiny_model()
  variables = small.made_up(model, small.IMAGES)
  wide = dpc.assign_bits(variables, 32)

  def refused(match, variables, *inputs):
    with pytest.raises(export.ExportError, match=match):
      export.freeze(model, variables, *inputs)

  refused("no collection 'precision'", {"params": {}}, small.IMAGES)
  refused("inputs: none", variables)
  for value, own in ((np.nan, variables), (np.inf, variables), (np.nan, wide)):
    damaged = changed(own, "second", value)
    refused("'second': its weights.*not finite", damaged, small.IMAGES)
  other = {**variables, "other": {"key": jax.random.key(0)}}
  refused("other/key: an array of key", other, small.IMAGES)
  stray = {**variables["precision"], "stray": variables["precision"]["first"]}
  stray = {**variables, "precision": stray}
  refused("'stray': has widths, but", stray, small.IMAGES)
  with pytest.raises(
    export.ExportError, match="about: a JSON file cannot hold"
  ):
    export.freeze(model, variables, small.IMAGES, about={"loss": np.nan})


class Stacked(nn.Module):
  """Three layers along the second axis of their kernels."""

  @nn.compact
  def __call__(self, x):
    layers = nn.scan(
      lambda layer, x, _: (layer(x), None),
      variable_axes={"params": 1, "precision": 0, "quant_stats": 0},
      split_rngs={"params": True, "quant": True},
      length=3,
    )
    return layers(dpc.QuantDense(4, name="layer"), x, None)[0]


def test_a_stack_along_another_axis_is_refused():
  inputs = jax.ShapeDtypeStruct((2, 4), jnp.float32)
  variables = small.made_up(Stacked(), inputs)
  assert variables["params"]["layer"]["kernel"].shape == (4, 3, 4)
  with pytest.raises(export.ExportError, match="'layer': its kernel of shape"):
    export.freeze(Stacked(), variables, inputs)


def test_a_kernel_that_sets_the_layers_dtype_is_refused():
  inputs = jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
  half = {"param_dtype": jnp.bfloat16}
  model = dpc.QuantDense(3, **half)
  with pytest.raises(export.ExportError, match="'': computes in bfloat16"):
    export.freeze(model, small.made_up(model, inputs), inputs)
  model = dpc.QuantDense(3, dtype=jnp.bfloat16, **half)
  export.freeze(model, small.made_up(model, inputs), inputs)


def test_a_model_is_described_by_what_differs_from_its_name():
  cases = {
    ("resnet26", ()): dpc.models.create("resnet26", num_classes=3),
    ("resnet8", (("dtype", "bfloat16"),)): dpc.models.create(
      "resnet8", num_classes=3, dtype=jnp.bfloat16
    ),
    ("vit_small", ()): dpc.models.create("vit_small", num_classes=3),
    ("mobilenet_v2_imagenet", ()): dpc.models.create(
      "mobilenet_v2_imagenet", num_classes=3
    ),
  }
  for (name, sizes), model in cases.items():
    found = export.description.describe(model)
    assert (found["name"], found["sizes"]) == (name, dict(sizes))
    assert export.description.build(found) == model
  # Its blocks are no number that a name has.
  other = resnet_imagenet.ResNetImageNet(3, blocks=(1, 1), bottleneck=False)
  assert export.description.describe(other) is None
  assert freezing.lowest(3, "symmetric") == -3
