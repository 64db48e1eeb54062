"""Embeddings: what a classifier layer sees, and a flat picture of it.

t-SNE keeps neighbors and little else: sizes of clusters and the distances
between them mean nothing, and what looks apart need not be. The numbers beside
such a picture are those of `separation`, taken in the space of the features.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

LAYER = "classifier"
SEED = 0
PERPLEXITY = 30.0
# Points of a picture: more would hide each other.
PICTURED = 2000
_COLLECTION = "embeddings"


def apply_with_features(
  model: nn.Module,
  variables: Mapping[str, Any],
  *args: Any,
  layer: str = LAYER,
  **kwargs: Any,
) -> tuple[Any, jax.Array]:
  """Applies a model, and returns what goes into one of its layers, too.

  Nothing is mutable, so quantized layers take their running ranges, as in
  evaluation. The features are the layer's input before any quantizer of its
  own. Works under `jit`.

  Args:
    model: with one layer of that name, called once, wherever it is.
    variables: all collections of the model.
    *args: of the model's call.
    layer: the name of the layer.
    **kwargs: of the model's call.

  Returns:
    (the model's output, features (N, F): axes after the first are flattened).

  Raises:
    ValueError: no such layer, or several calls of it.
  """

  inside = []

  def record(call, arguments, options, context):
    module = context.module
    # A quantized layer calls its parent's `__call__` within its own.
    if (module.name, context.method_name) != (layer, "__call__") or inside:
      return call(*arguments, **options)
    module.sow(_COLLECTION, "input", arguments[0])
    inside.append(module)
    try:
      return call(*arguments, **options)
    finally:
      inside.pop()

  with nn.intercept_methods(record):
    output, recorded = model.apply(
      variables, *args, **kwargs, mutable=[_COLLECTION]
    )
  found = jax.tree.leaves(recorded)
  if len(found) != 1:
    raise ValueError(
      f"{type(model).__name__} calls a layer named {layer!r} {len(found)} times"
      " and not once; use a model that classifies images"
    )
  return output, found[0].reshape(found[0].shape[0], -1)


def balanced_subset(
  labels: np.ndarray, count: int, seed: int = SEED
) -> np.ndarray:
  """Rows of a subset with the same number of every class, in rising order.

  Args:
    labels: int (N,).
    count: wanted. The classes get equal parts, the first ones one more where it
      does not divide; of a class with fewer rows, all: the others fill up.
    seed: of the choice within a class.

  Returns:
    int (min(count, N),); all rows where count >= N.

  Raises:
    ValueError: count < 1.
  """
  if count < 1:
    raise ValueError(f"count = {count}: a subset needs an example; use 1 or up")
  labels = np.asarray(labels)
  order = np.random.default_rng(seed).permutation(len(labels))
  # A row's place within its class: the first of every class come first.
  place = np.empty(len(labels), int)
  for name in np.unique(labels):
    rows = order[labels[order] == name]
    place[rows] = np.arange(len(rows))
  chosen = np.lexsort((labels, place))[:count]
  return np.sort(chosen)


def t_sne(
  features: np.ndarray,
  *,
  perplexity: float | None = None,
  seed: int = SEED,
) -> tuple[np.ndarray, float]:
  """t-SNE (van der Maaten & Hinton 2008) by scikit-learn, begun from PCA.

  On one thread, which is our decision: the number of threads changes the last
  bits of the principal components, and with them the map; and at every one of
  1,000 iterations threads wait for each other, busily: on two cores that had
  other work, too, this took six times as long.

  Args:
    features: float (N, F), N >= 4, F >= 2, finite.
    perplexity: about how many neighbors a point has, in (0, N); None is 30, or
      (N - 1) / 3 where that is less.
    seed: scikit-learn's random_state.

  Returns:
    (coordinates float32 (N, 2), the perplexity).

  Raises:
    ValueError: an argument outside these ranges.
  """
  import threadpoolctl
  from sklearn import manifold

  count = check_features(features)
  if count < 4:
    raise ValueError(f"{count} examples are too few for a picture; use 4 or up")
  if np.shape(features)[1] < 2:
    raise ValueError(
      f"features of shape {np.shape(features)}: a picture needs two or more"
    )
  if perplexity is None:
    perplexity = min(PERPLEXITY, (count - 1) / 3)
  if not 0 < perplexity < count:
    raise ValueError(
      f"perplexity = {perplexity:g}: must be above 0 and below the {count}"
      " points"
    )
  mapping = manifold.TSNE(
    perplexity=perplexity, init="pca", random_state=seed, learning_rate="auto"
  )
  # Features without any spread have no principal components.
  if not np.any(np.ptp(features, axis=0) > 0):
    raise ValueError("all features are equal: there is nothing to picture")
  with threadpoolctl.threadpool_limits(1):
    points = mapping.fit_transform(np.asarray(features, np.float32))
  return points, perplexity


def procrustes_align(reference: np.ndarray, points: np.ndarray) -> np.ndarray:
  """`points`, centered, turned and mirrored to lie as `reference` does.

  A map has no up and no left: distances within it stay as they are. The best
  rotation or reflection is that of the orthogonal Procrustes problem.

  Args:
    reference: float (N, 2).
    points: float (N, 2), of the same examples.
  """
  from scipy import linalg

  reference = reference - reference.mean(0)
  points = points - points.mean(0)
  rotation, _ = linalg.orthogonal_procrustes(points, reference)
  return points @ rotation


def check_features(features: np.ndarray) -> int:
  """Returns the number of examples.

  Raises:
    ValueError: features that are not (N, F) and finite.
  """
  if np.ndim(features) != 2 or not np.all(np.isfinite(features)):
    raise ValueError(
      f"features of shape {np.shape(features)}: must be (N, F) and finite"
    )
  return len(features)
