"""dpc.quantize: an existing Flax model, quantized in one call."""

import warnings

import flax.linen as nn
import jax
import numpy as np
import pytest

from dpc_jax.quant import grids, layers, precision, wrap
from tests.quant import running

KEY = jax.random.key(5)
NEAREST = grids.Quantization(gradients=grids.Grid())


class Inner(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.DenseGeneral((2, 4), name="split")(x))
    return nn.DenseGeneral(6, axis=(-2, -1), name="join")(x)


class Zoo(nn.Module):
  """One of each kind that can be quantized."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(6, (3,), name="conv")(x)
    x = nn.LayerNorm(name="norm")(x)
    x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x)
    x = Inner(name="inner")(x)
    x = nn.Einsum((6, 2, 3), "ntc,chd->nthd", name="einsum")(x)
    x = x.reshape(*x.shape[:2], 6)
    shared = nn.Dense(6, name="shared")
    return nn.Dense(3, name="head")(shared(nn.relu(shared(x))))


class Setup(nn.Module):
  """Layers made in setup, and a method beside __call__."""

  def setup(self):
    self.encoder = nn.Dense(6)
    self.blocks = [nn.Dense(6), nn.Dense(6)]
    self.inner = Inner()

  def encode(self, x):
    return self.encoder(x)

  def __call__(self, x):
    x = self.encode(x)
    for block in self.blocks:
      x = nn.relu(block(x))
    return self.inner(x)


ZOO_PATHS = {
  "conv",
  "attention/query",
  "attention/key",
  "attention/value",
  "attention/out",
  "inner/split",
  "inner/join",
  "einsum",
  "shared",
  "head",
}
MODELS = {
  "zoo": (Zoo(), ZOO_PATHS),
  "setup": (
    Setup(),
    {"encoder", "blocks_0", "blocks_1", "inner/split", "inner/join"},
  ),
  "root": (nn.Dense(3), {""}),
  "root_einsum": (nn.Einsum((4, 3), "abc,cd->abd", use_bias=False), {""}),
  "remat": (nn.remat(Inner)(), {"split", "join"}),
}


def inputs(seed=1, shape=(2, 5, 4)):
  return jax.random.normal(jax.random.key(seed), shape)


def shapes(model, *args):
  return jax.eval_shape(model.init, jax.random.key(0), *args)


@pytest.mark.parametrize("name", MODELS)
def test_same_parameters_and_at_width_32_the_same_model(name):
  plain, paths = MODELS[name]
  quantized = wrap.quantize(plain)
  x = inputs()
  want, got = running.init(plain, x), running.init(quantized, x)
  assert set(got) == {"params", "precision", "quant_stats"}
  running.assert_same(want["params"], got["params"])
  assert set(precision.layer_bits(got)) == paths
  g = inputs(2, jax.eval_shape(plain.apply, want, x).shape)
  y, grads, _ = running.step(plain, want, x, g, KEY)
  float_y, float_grads, _ = running.step(
    quantized, precision.assign_bits(got, 32), x, g, KEY
  )
  running.assert_same((y, grads), (float_y, float_grads))

  low_y, low_grads, updates = running.step(
    quantized, precision.assign_bits(got, 4), x, g, KEY
  )
  assert not np.allclose(low_y, y, atol=1e-3)
  assert jax.tree.structure(updates) == jax.tree.structure(
    {"quant_stats": got["quant_stats"]}
  )
  for a, b in zip(
    jax.tree.leaves(low_grads), jax.tree.leaves(grads), strict=True
  ):
    assert np.all(np.isfinite(a)) and a.shape == b.shape


def test_it_equals_quant_dense_and_quant_conv():
  class ByHand(nn.Module):
    conv: type
    dense: type

    @nn.compact
    def __call__(self, x):
      x = nn.relu(self.conv(6, (3, 3), strides=(2, 2), name="conv")(x))
      return self.dense(3, name="dense")(x.mean((1, 2)))

  by_hand = ByHand(layers.QuantConv, layers.QuantDense)
  wrapped = wrap.quantize(ByHand(nn.Conv, nn.Dense))
  x = inputs(shape=(2, 6, 5, 4))
  want, got = running.init(by_hand, x), running.init(wrapped, x)
  running.assert_same(want, got)
  variables = precision.assign_bits(got, 4)
  g = inputs(2, (2, 3))
  a = running.step(by_hand, variables, x, g, KEY)
  b = running.step(wrapped, variables, x, g, KEY)
  running.assert_same(a, b)
  float_y = jax.jit(by_hand.apply)(precision.assign_bits(got, 32), x)
  assert not np.allclose(a[0], float_y, atol=1e-3)


def test_patterns_select_by_the_whole_path():
  x = inputs()

  def quantized_paths(**patterns):
    return set(
      precision.layer_bits(shapes(wrap.quantize(Zoo(), **patterns), x))
    )

  assert quantized_paths(include="inner/.*") == {"inner/split", "inner/join"}
  assert quantized_paths(include=("conv", "head")) == {"conv", "head"}
  assert quantized_paths(exclude="attention/.*") == {
    path for path in ZOO_PATHS if not path.startswith("attention")
  }
  assert quantized_paths(include="inner/.*", exclude=["inner/join"]) == {
    "inner/split"
  }


def test_patterns_that_match_nothing():
  x = inputs()
  for name, pattern in (
    ("include", "inner"),
    ("exclude", "hea"),
    ("include", ""),
  ):
    with pytest.raises(
      ValueError, match=f"{name} = '{pattern}' matches no"
    ) as e:
      shapes(wrap.quantize(Zoo(), **{name: pattern}), x)
    assert "'attention/query'" in str(e.value) and "\n" not in str(e.value)
  with pytest.raises(ValueError, match="the layers are \\(none\\)"):
    running.init(wrap.quantize(nn.LayerNorm()), x)
  with pytest.raises(ValueError, match=r"include = '\(' is not a regular"):
    wrap.quantize(Zoo(), include="(")


class OwnProduct(nn.Dense):
  @nn.compact
  def __call__(self, x):
    shape = (x.shape[-1], self.features)
    return x @ self.param("kernel", self.kernel_init, shape)


class Odd(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.ConvTranspose(4, (3,), name="up")(x)
    x = nn.ConvLocal(4, (1,), name="local")(x)
    x = OwnProduct(4, name="own")(x)
    return nn.Dense(3, name="dense")(x)


def test_one_warning_lists_what_it_cannot_quantize():
  x = inputs()
  with pytest.warns(UserWarning, match="leaves in float") as caught:
    variables = wrap.quantize(Odd()).init(jax.random.key(0, impl="rbg"), x)
  assert len(caught) == 1
  assert str(caught[0].message).endswith(
    "'up' (ConvTranspose), 'local' (ConvLocal), 'own' (OwnProduct)"
  )
  assert set(precision.layer_bits(variables)) == {"dense"}
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    wrap.quantize(Odd(), exclude=["up|local|own", "dense"], include=".*")
    wrap.quantize(Odd()).apply(variables, x)
    wrap.quantize(Odd(), include="dense").init(jax.random.key(0, impl="rbg"), x)


class Doubled(nn.Dense):
  @nn.compact
  def __call__(self, x):
    return 2 * super().__call__(x)


class DoubledEinsum(nn.Einsum):
  @nn.compact
  def __call__(self, x):
    return 2 * super().__call__(x)


@pytest.mark.parametrize(
  "plain", [Doubled(3), DoubledEinsum((4, 3), "abc,cd->abd")], ids=["d", "e"]
)
def test_subclasses_that_call_flaxs_own_product(plain):
  x = inputs()
  quantized = wrap.quantize(plain)
  variables = running.init(quantized, x)
  assert set(precision.layer_bits(variables)) == {""}
  np.testing.assert_array_equal(
    jax.jit(quantized.apply)(precision.assign_bits(variables, 32), x),
    jax.jit(plain.apply)({"params": variables["params"]}, x),
  )
  low = jax.jit(quantized.apply)(precision.assign_bits(variables, 2), x)
  assert len(np.unique(np.round(low, 5))) < low.size


def test_quantized_layers_of_the_model_are_left_alone():
  class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x):
      symmetric = grids.Quantization(activations=None)
      x = layers.QuantDense(6, quantization=symmetric, name="ours")(x)
      return nn.Dense(3, name="theirs")(x)

  x = inputs()
  variables = shapes(wrap.quantize(Mixed(), include="theirs"), x)
  assert set(precision.layer_bits(variables)) == {"ours", "theirs"}
  assert set(variables["quant_stats"]) == {"theirs"}
  assert shapes(wrap.quantize(Mixed()), x) == variables


def test_a_quantized_model_is_not_quantized_again():
  once = wrap.quantize(Setup(), include="inner/.*")
  with pytest.raises(ValueError, match="module is quantized already"):
    wrap.quantize(once, exclude="inner/.*")


class Compact(nn.Module):
  model: nn.Module

  @nn.compact
  def __call__(self, x):
    return nn.Dense(2, name="head")(self.model(x))


def test_a_wrapped_module_inside_another_counts_paths_from_itself():
  x = inputs()
  outer = Compact(wrap.quantize(Setup(), include=("encoder", "inner/.*")))
  variables = shapes(outer, x)
  assert shapes(Compact(Setup()), x)["params"] == variables["params"]
  assert set(precision.layer_bits(variables)) == {
    "model/encoder",
    "model/inner/split",
    "model/inner/join",
  }


def test_another_method_runs_by_name():
  plain, x = Setup(), inputs()
  quantized = wrap.quantize(plain)
  variables = running.init(quantized, x)
  kernel = variables["params"]["encoder"]
  want = layers.QuantDense(6).apply(
    {
      "params": kernel,
      "precision": variables["precision"]["encoder"],
      "quant_stats": variables["quant_stats"]["encoder"],
    },
    x,
  )
  got = quantized.apply(variables, "encode", x, method="run")
  np.testing.assert_array_equal(got, want)
  assert not np.allclose(got, plain.apply(variables, x, method="encode"))
  alone = quantized.init(
    jax.random.key(0, impl="rbg"), "encode", x, method="run"
  )
  assert set(precision.layer_bits(alone)) == {"encoder"}


def test_einsum_without_an_arrow_is_flaxs_error():
  model = wrap.quantize(nn.Einsum((4, 3), "abc,cd"))
  with pytest.raises(ValueError, match="must be explicit"):
    model.init(jax.random.key(0, impl="rbg"), inputs())


def test_a_shared_layer_counts_its_calls():
  x = inputs()
  quantized = wrap.quantize(Zoo())
  variables = running.init(quantized, x)
  g = inputs(2, (2, 5, 3))
  _, _, updates = running.step(quantized, variables, x, g, KEY)
  counts = {
    name: int(updates["quant_stats"][name]["count"])
    for name in ("shared", "head")
  }
  assert counts == {"shared": 2, "head": 1}


@pytest.mark.parametrize("module", [nn.Dense, object()])
def test_only_linen_instances(module):
  with pytest.raises(ValueError, match="pass an instance of a Flax Linen"):
    wrap.quantize(module)
