"""Bad widths, capacities, patterns and shapes: ValueErrors of one line."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpc_jax as dpc


class Net(nn.Module):
  """Two layers, `a` and `b`."""

  @nn.compact
  def __call__(self, x):
    return dpc.QuantDense(2, name="b")(dpc.QuantDense(3, name="a")(x))


class Plain(nn.Module):
  """One layer, `a`, in float."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3, name="a")(x)


KEY = jax.random.key(0)
X = jnp.ones((2, 4))


@pytest.fixture(scope="module")
def variables():
  shapes = jax.eval_shape(Net().init, KEY, X)
  return jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)


def assign(bits):
  return lambda variables: dpc.assign_bits(variables, bits)


def fake(*args, **kwargs):
  return lambda variables: dpc.fake_quantize(*args, **kwargs)


def widths(capacities, *args, **kwargs):
  return lambda variables: dpc.dpc_bit_widths(capacities, *args, **kwargs)


def wrapped(*args, **kwargs):
  return lambda variables: jax.eval_shape(
    lambda: dpc.quantize(*args, **kwargs).init(KEY, X)
  )


def layer(module, x):
  return lambda variables: jax.eval_shape(module.init, KEY, x)


def created(name, **kwargs):
  return lambda variables: dpc.models.create(name, **kwargs)


CHANNEL = dpc.Grid(granularity="channel")
CALLS = [
  *(
    (
      assign(b),
      f"layer 'a': bits = {b!r} is not a bit-width: use an int in 2..",
    )
    for b in (-8, 0, 1, 17, 33, 8.0, True, "8", None, float("nan"))
  ),
  (assign({"a": 4}), "layer 'b' is missing; name all 2 layers, or pass one"),
  (assign({"a": 4, "b": 4, "c": 4}), "no quantized layer 'c'; the layers are"),
  (assign({"a": (4, 4), "b": 4}), "layer 'a': bits = (4, 4) must be one width"),
  (assign(dpc.LayerBits(4, 1, 8)), "layer 'a': activations = 1 is not a bit-w"),
  (assign({"a": jnp.array([4, 5]), "b": 4}), "weights has shape (2,); use an"),
  (
    lambda v: dpc.assign_bits({"params": v["params"]}, 4),
    "variables: no collection 'precision'; pass all that init",
  ),
  (
    lambda v: Net().apply({"params": v["params"]}, X),
    "a: no collection 'precision' in apply's variables; pass all that init",
  ),
  (fake(X, 1, CHANNEL), "bits = 1 is not a bit-width: use an int in 2..16"),
  (fake(X, 2.5, CHANNEL), "bits = 2.5 is not a bit-width: use an int in 2..16"),
  (fake(jnp.ones(3, int), 4, CHANNEL), "x.dtype = int32: pass a floating-poin"),
  (fake(X, 4, dpc.Grid(rounding="stochastic")), "key = None: stochastic round"),
  (lambda v: dpc.Grid("afine"), "Grid.kind = 'afine': use one of ('affine'"),
  (lambda v: dpc.Grid(granularity="row"), "granularity = 'row': use one of"),
  (
    lambda v: dpc.Quantization(storage_bits=4),
    "Quantization.storage_bits = 4: use one of (None, 8)",
  ),
  (widths({"a": 1}, 1, 8), "b_min=1 is not a width; use an int in 2..16"),
  (widths({"a": 1}, 3, 17), "b_max=17 is not a width; use an int in 2..16"),
  (widths({"a": 1}, 8, 3), "b_min=8 is above b_max=3; swap or equal them"),
  (widths({"a": 1}, 3, 8, delta=2), "delta=2 is out of range; use a value in"),
  (widths({"a": 1}, 3, 8, center="mid"), "center='mid' is unknown; use one of"),
  (widths({}, 3, 8), "capacities: no layer in {}; pass at least one count"),
  (widths({"a": -1}, 3, 8), "capacities['a']=-1 is not a count; use 1..2^63"),
  (widths({"a": 1.5}, 3, 8), "capacities['a']=1.5 is not a count; use an int"),
  (widths({"a": 0}, 3, 8), "capacities['a']=0, and no other layer has weights"),
  (wrapped(Plain(), include="("), "include = '(' is not a regular expression"),
  (
    wrapped(Plain(), include="c.*"),
    "include = 'c.*' matches no layer; the lay",
  ),
  (
    wrapped(Plain(), exclude="c.*"),
    "exclude = 'c.*' matches no layer; the lay",
  ),
  (wrapped(Plain), "Plain'>: pass an instance of a Flax Linen module"),
  (
    created("resnt8", num_classes=10),
    "'resnt8' is unknown; did you mean 'resne",
  ),
  (created(8, num_classes=10), "model.name = 8 is unknown; use one of resnet8"),
  (created("resnet8", num_classes=0), "num_classes = 0: must be at least 1"),
  (
    created("resnet8", num_classes=10.0),
    "num_classes = 10.0: must be an integer",
  ),
  (
    layer(dpc.models.create("lstm_lm", num_classes=9), jnp.ones(4, int)),
    "tokens: int32 of shape (4,); pass integers of shape (batch, steps)",
  ),
  (layer(dpc.QuantDense(3), jnp.float32(1)), "inputs ... shape ()"),
  (layer(dpc.QuantConv(3, (3, 3)), jnp.ones(4)), "inputs ... shape (4,)"),
  (
    layer(dpc.QuantConv(3, (3, 3)), jnp.ones((8, 3))),
    "inputs ... shape (8, 3)",
  ),
  (fake(X, 4, CHANNEL, axis=5), "axis = 5"),
  (fake(jnp.float32(3), 4, CHANNEL), "axis = "),
  (wrapped(Plain(), include=3), "include = 3"),
  (wrapped(Plain(), "affine"), "quantization = 'affine'"),
]


@pytest.mark.parametrize(
  ("mistake", "words"),
  [pytest.param(*case, id=case[1]) for case in CALLS],
)
def test_a_call_is_refused_in_one_line(mistake, words, variables):
  with pytest.raises(ValueError) as info:
    mistake(variables)
  message = str(info.value)
  assert "\n" not in message
  place = 0
  for part in words.split(" ... "):
    assert part in message[place:], message
    place = message.index(part, place) + len(part)
