"""Widths and ranges of a float model, without training it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpc_jax as dpc
from dpc_jax import export
from dpc_jax.policy import bounds
from tests.export import small


@pytest.fixture
def model():
  return small.tiny_model()


@pytest.fixture
def trained(model):
  """Variables of the float model."""
  return small.made_up(model.clone(quantization=None), small.IMAGES)


def batches(count):
  return [(i + 1) * small.example(small.IMAGES, i) for i in range(count)]


def widths(variables):
  return {
    path: [int(w) for w in layer]
    for path, layer in dpc.layer_bits(variables).items()
  }


def test_ranges_are_the_moving_average_of_the_batches(model, trained):
  data = batches(3)
  found = export.quantize_trained(model, trained, iter(data), 8)
  assert widths(found) == {"first": [8, 8, 8], "second": [8, 8, 8]}
  want = None
  for x in data:
    own = np.array([x.min(), x.max()])
    want = own if want is None else 0.9 * want + 0.1 * own
  ranges = found["quant_stats"]["first"]
  np.testing.assert_allclose([ranges["lo"], ranges["hi"]], want, rtol=1e-5)
  assert int(ranges["count"]) == 3
  for name in ("params", "batch_stats"):
    for a, b in zip(
      jax.tree.leaves(found[name]), jax.tree.leaves(trained[name]), strict=True
    ):
      np.testing.assert_array_equal(a, b)
  # From the start, whatever ranges there were.
  again = export.calibrate(model, found, data[:1])["quant_stats"]["first"]
  assert int(again["count"]) == 1
  assert float(again["lo"]) == float(data[0].min())


def test_a_float_model_is_packed_with_little_loss(
  model, trained, fast_compiler
):
  variables = export.quantize_trained(model, trained, batches(2), 12)
  x = batches(2)[0]
  got = export.restore(export.freeze(model, variables, x))(x)
  want = jax.jit(model.clone(quantization=None).apply)(trained, x)
  assert np.any(got != want)
  np.testing.assert_allclose(got, want, atol=0.02)


def test_widths_by_the_equation_and_by_similarity(model, trained):
  variables = small.made_up(model, small.IMAGES)
  variables["params"] = trained["params"]
  counts = dpc.layer_capacities(variables)
  for options in ({}, {"b_min": 4}, {"b_max": 6}, {"b_min": 2, "b_max": 16}):
    found = dpc.precision_bounds(variables)
    ends = {"b_min": found.b_min, "b_max": found.b_max} | options
    want = dpc.dpc_bit_widths(counts, **ends)
    got = export.choose_bits(variables, **options)
    assert {path: [int(w) for w in b] for path, b in got.items()} == {
      path: [b, b, 8] for path, b in want.items()
    }
  cosine = bounds.cosine_similarities(variables, widths=range(2, 17))
  for tau in (0.99, 0.9999):
    got = export.choose_bits(variables, "cosine", tau=tau, activations=7)
    for path, (weights, activations, _) in got.items():
      assert int(activations) == 7
      assert cosine[path][int(weights)] >= tau
      assert cosine[path][int(weights) - 1] < tau
  dpc.assign_bits(variables, got)


def test_stacked_layers_and_products_get_widths_in_their_form():
  model = dpc.models.create(
    "vit_tiny",
    num_classes=3,
    width=4,
    heads=1,
    layers=2,
    mlp_width=8,
    scan=True,
  )
  variables = small.made_up(model, small.IMAGES)
  for choice in ("dpc", "cosine"):
    bits = export.choose_bits(variables, choice)
    found = dpc.layer_bits(dpc.assign_bits(variables, bits))
    largest = max(int(np.max(layer.weights)) for layer in found.values())
    product = found["blocks/attention/qk"]
    assert np.all(product.weights == largest)
    assert np.all(product.activations == largest)
  product = export.choose_bits(variables, activations=6)["blocks/attention/av"]
  assert product.weights.tolist() == product.activations.tolist() == [6, 6]


def test_what_is_wrong_is_named(model, trained):
  def refused(match, call, error=ValueError):
    with pytest.raises(error, match=match):
      call()

  def quantize(data, *bits, **options):
    return export.quantize_trained(model, trained, data, *bits, **options)

  own = export.ExportError
  refused("batches: none", lambda: quantize([]), own)
  (batch,) = batches(1)
  refused(
    r"batches: one array of shape .*\[array\]", lambda: quantize(batch), own
  )
  refused(
    "choice = 'kl': use one of dpc, c", lambda: quantize(batches(1), "kl")
  )
  refused("tau: means nothing", lambda: quantize(batches(1), 8, tau=0.9))
  refused("bits = 1 is not", lambda: quantize(batches(1), 1))
  refused(
    r"'\w+' does not reach it with 3 bits; lower tau or raise b_max",
    lambda: quantize(batches(1), "cosine", tau=0.9999, b_max=3),
  )
  refused(
    "b_min=5 is above b_max=4; swap",
    lambda: quantize(batches(1), "cosine", b_min=5, b_max=4),
  )
  refused(
    "'first': the range of its input is not finite",
    lambda: quantize([jnp.full((1, 8, 8, 1), jnp.nan)], 8),
    own,
  )
  plain = model.clone(quantization=None)
  refused(
    "no quantized layer",
    lambda: export.quantize_trained(plain, trained, batches(1)),
    own,
  )
