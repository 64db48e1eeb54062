"""What a classifier sees, and its flat picture."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import threadpoolctl
from sklearn import manifold

import dpc_jax as dpc
from dpc_jax.analysis import embeddings
from tests.training import tiny


class Head(nn.Module):
  """Its layer is quantized."""

  calls: int

  @nn.compact
  def __call__(self, x):
    layer = dpc.QuantDense(5, name="classifier")
    return sum(layer(jnp.tanh(x)) for _ in range(self.calls))


class Nested(nn.Module):
  """The layer is not at the top."""

  calls: int = 1

  @nn.compact
  def __call__(self, x):
    return Head(self.calls, name="head")(x)


def variables_of(model, x):
  return jax.jit(model.init)(jax.random.key(0), x)


def test_features_are_what_the_classifier_gets():
  model = tiny.Tiny(num_classes=10)
  x = jax.random.normal(jax.random.key(1), (6, 8, 8, 1))
  variables = variables_of(model, x)

  @jax.jit
  def both(variables, x):
    seen = embeddings.apply_with_features(model, variables, x, train=False)
    return seen, model.apply(variables, x)

  (logits, features), alone = both(variables, x)
  assert features.shape == (6, 8)
  dense = variables["params"]["classifier"]
  np.testing.assert_allclose(
    features @ dense["kernel"] + dense["bias"][None], logits, atol=1e-6
  )
  np.testing.assert_allclose(logits, alone, atol=1e-6)


def test_a_quantized_layer_anywhere():
  x = jax.random.normal(jax.random.key(1), (4, 3, 2))
  variables = variables_of(Nested(), x)
  _, features = embeddings.apply_with_features(Nested(), variables, x)
  np.testing.assert_allclose(features, np.tanh(x).reshape(4, 6), atol=1e-6)


@pytest.mark.parametrize(
  ("model", "layer", "count"),
  [(Nested(2), "classifier", 2), (Nested(), "output", 0)],
)
def test_no_such_layer_and_two_calls_are_refused(model, layer, count):
  x = jnp.ones((4, 2))
  variables = variables_of(model, x)
  with pytest.raises(
    ValueError, match=rf"Nested calls .*'{layer}' {count} tim"
  ):
    embeddings.apply_with_features(model, variables, x, layer=layer)


def test_a_balanced_subset():
  labels = np.repeat([0, 1, 2], [50, 3, 40])
  rows = embeddings.balanced_subset(labels, 20)
  assert np.bincount(labels[rows]).tolist() == [9, 3, 8]
  assert np.all(np.diff(rows) > 0)
  np.testing.assert_array_equal(rows, embeddings.balanced_subset(labels, 20))
  assert set(rows) != set(embeddings.balanced_subset(labels, 20, seed=1))
  for count in (93, 1000):
    np.testing.assert_array_equal(
      embeddings.balanced_subset(labels, count), np.arange(93)
    )
  with pytest.raises(ValueError, match="count = 0"):
    embeddings.balanced_subset(labels, 0)


def blobs(count=60, classes=3, features=6, apart=12.0, seed=0):
  rng = np.random.default_rng(seed)
  labels = np.arange(count) % classes
  centers = apart * np.eye(features)[:classes]
  return centers[labels] + rng.normal(size=(count, features)), labels


def test_t_sne_keeps_blobs_apart_and_repeats_itself():
  features, labels = blobs()
  points, perplexity = embeddings.t_sne(features)
  assert points.shape == (60, 2)
  assert perplexity == pytest.approx(59 / 3)
  centers = np.stack([points[labels == i].mean(0) for i in range(3)])
  distances = np.linalg.norm(points[:, None] - centers, axis=2)
  np.testing.assert_array_equal(distances.argmin(1), labels)
  np.testing.assert_array_equal(points, embeddings.t_sne(features)[0])


def test_t_sne_is_on_one_thread(monkeypatch):
  seen = []

  def record(self, features):
    seen.extend(pool["num_threads"] for pool in threadpoolctl.threadpool_info())
    return features[:, :2]

  monkeypatch.setattr(manifold.TSNE, "fit_transform", record)
  with threadpoolctl.threadpool_limits(2):
    embeddings.t_sne(blobs()[0])
    after = [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]
  assert set(seen) == {1}
  assert set(after) == {2}


def test_what_cannot_be_pictured():
  features, _ = blobs()
  for perplexity in (0, 60, -1, np.nan):
    with pytest.raises(ValueError, match=r"perplexity = .* below the 60"):
      embeddings.t_sne(features, perplexity=perplexity)
  with pytest.raises(ValueError, match="3 examples are too few"):
    embeddings.t_sne(features[:3])
  with pytest.raises(ValueError, match=r"\(60, 1\): a picture needs two"):
    embeddings.t_sne(features[:, :1])
  with pytest.raises(ValueError, match="all features are equal"):
    embeddings.t_sne(np.ones((9, 4)))
  features[2, 3] = np.nan
  with pytest.raises(ValueError, match=r"must be \(N, F\) and finite"):
    embeddings.t_sne(features)


def test_a_map_is_turned_and_mirrored_only():
  rng = np.random.default_rng(0)
  points = rng.normal(size=(20, 2))
  turn = np.array([[0.6, -0.8], [0.8, 0.6]])
  turned = (points * [1, -1]) @ turn + [3, 7]
  back = embeddings.procrustes_align(points, turned)
  np.testing.assert_allclose(back, points - points.mean(0), atol=1e-12)
  # Of another size: it stays so.
  np.testing.assert_allclose(
    embeddings.procrustes_align(points, 2 * turned), 2 * back, atol=1e-12
  )
