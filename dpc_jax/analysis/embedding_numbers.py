"""All numbers of a run's embeddings, with intervals, and against another's.

Intervals are those of `separation`: they hold the network, also where it was
fitted to the examples (the gap's training part, and the training split).
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dpc_jax.analysis import embeddings, separation


class Embedded(NamedTuple):
  """A whole split as a network sees it, in the data's order.

  Attributes:
    features: float32 (N, F).
    labels: int32 (N,).
    correct: bool (N,), whether the network's answer is right.
    loss: the mean cross-entropy, in nats.
  """

  features: np.ndarray
  labels: np.ndarray
  correct: np.ndarray
  loss: float


class Numbers(NamedTuple):
  """Of one network.

  Attributes:
    measures: {name: Measure} of the split's examples: silhouette,
      neighbor_accuracy, scatter_ratio, feature_variance, relative_variance.
    accuracies: of the training split and of the test split.
    labels: int (N,) of the split.
  """

  measures: dict[str, separation.Measure]
  accuracies: tuple[separation.Measure, separation.Measure]
  labels: np.ndarray


def silhouette_rows(labels: np.ndarray) -> np.ndarray:
  """Rows that the silhouette takes: all, or a balanced subset of many."""
  return embeddings.balanced_subset(labels, separation.SILHOUETTE_LIMIT)


def numbers(
  splits: Mapping[str, Embedded],
  split: str,
  neighbors: int = separation.NEIGHBORS,
) -> Numbers:
  """Measures a split of a network; see `separation` for each measure.

  Args:
    splits: of the same network: `train`, `test` and `split`.
    split: whose separation and variance are measured. The neighbors that vote
      are the training examples (our decision: as a classifier is used); for the
      training split itself, all others in it. Of that one, intervals leave out
      that other examples would have trained another network.
    neighbors: how many vote.

  Raises:
    ValueError: features that are not finite or do not vary, no more examples
      than classes, or more neighbors than there are.
  """
  seen, train = splits[split], splits["train"]
  features, labels = seen.features, seen.labels
  rows = silhouette_rows(labels)
  reference = None if split == "train" else (train.features, train.labels)
  return Numbers(
    measures={
      "silhouette": separation.silhouette(features[rows], labels[rows]),
      "neighbor_accuracy": separation.neighbor_accuracy(
        features, labels, reference, neighbors
      ),
      "scatter_ratio": separation.scatter_ratio(features, labels),
      "feature_variance": separation.feature_variance(features),
      "relative_variance": separation.relative_variance(features),
    },
    accuracies=(
      separation.mean(train.correct),
      separation.mean(splits["test"].correct),
    ),
    labels=labels,
  )


def estimates(of: Numbers) -> dict[str, separation.Estimate]:
  """{name: Estimate} of all measures, and `gap`: train minus test accuracy.

  Raises:
    ValueError: too few examples for an interval.
  """
  found = {k: separation.estimate(m) for k, m in of.measures.items()}
  return found | {"gap": separation.gap(*of.accuracies)}


def differences(
  of: Numbers, reference: Numbers
) -> dict[str, separation.Estimate]:
  """The same names, `of` minus `reference`, paired by example.

  Raises:
    ValueError: the two are of other examples, or of too few.
  """
  if not np.array_equal(of.labels, reference.labels):
    raise ValueError("labels differ: the two are of other examples")
  found = {
    k: separation.difference(m, reference.measures[k])
    for k, m in of.measures.items()
  }
  return found | {"gap": separation.gap(*of.accuracies, reference.accuracies)}
