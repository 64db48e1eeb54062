"""The numbers beside the picture: formulas, and what their intervals cover."""

import json
import math

import numpy as np
import pytest
from sklearn import metrics

from dpc_jax.analysis import (
  embedding_numbers,
  embedding_report,
  separation,
  variance,
)


def sample(count=60, seed=0, classes=3, apart=1.5, features=4):
  rng = np.random.default_rng(seed)
  labels = np.arange(count) % classes
  centers = apart * np.eye(features)[:classes]
  return centers[labels] + rng.normal(size=(count, features)), labels


def weighted_silhouette(x, labels, weights):
  """Written out: means over neighbors, and over examples, are weighted."""
  d = np.linalg.norm(x[:, None] - x, axis=2)
  scores = []
  for i in range(len(x)):
    others = np.arange(len(x)) != i
    means = {
      c: np.average(d[i][rows], weights=weights[rows])
      for c in np.unique(labels)
      if (rows := (labels == c) & others).any()
    }
    a = means.pop(labels[i], None)
    b = min(means.values())
    scores.append(0.0 if a is None else (b - a) / max(a, b))
  return np.average(scores, weights=weights)


def test_silhouette_is_the_known_one():
  x, labels = sample()
  labels = np.where(np.arange(60) == 7, 9, labels)  # alone in its class
  value = separation.silhouette(x, labels).value
  assert value == pytest.approx(metrics.silhouette_score(x, labels), abs=1e-12)
  assert value == pytest.approx(weighted_silhouette(x, labels, np.ones(60)))


def test_silhouette_s_influence_is_its_derivative():
  x, labels = sample(30)
  influence = separation.silhouette(x, labels).numerator
  step = 1e-5
  for k in (0, 1, 13, 29):
    ends = [
      weighted_silhouette(x, labels, 1 + sign * step * np.eye(30)[k])
      for sign in (1, -1)
    ]
    want = (ends[0] - ends[1]) / (2 * step)
    got = (influence[k] - influence.mean()) / 30
    assert got == pytest.approx(want, abs=1e-8)


def test_silhouette_of_equal_features_and_in_chunks(monkeypatch):
  x, labels = np.ones((6, 2)), np.arange(6) % 2
  assert separation.silhouette(x, labels).value == 0
  x, labels = sample(200)
  whole = separation.silhouette(x, labels).numerator
  monkeypatch.setattr(separation, "_MEMORY_MIB", 0.01)
  parts = separation.silhouette(x, labels).numerator
  np.testing.assert_allclose(parts, whole, atol=1e-12)


@pytest.mark.parametrize("name", ["silhouette", "scatter_ratio"])
def test_an_interval_is_as_wide_as_fresh_examples_say(name):
  measure = getattr(separation, name)
  drawn = [measure(*sample(90, seed)).value for seed in range(400)]
  widths = []
  for seed in range(5):
    found = separation.estimate(measure(*sample(90, seed)), resamples=400)
    widths.append(found.high - found.low)
  want = np.subtract(*np.percentile(drawn, [97.5, 2.5]))
  assert np.mean(widths) == pytest.approx(want, rel=0.2)


def test_scatter_ratio_is_its_formula_and_has_no_scale():
  x, labels = sample()
  centers = {c: x[labels == c].mean(0) for c in np.unique(labels)}
  within = sum(np.sum((x[i] - centers[c]) ** 2) for i, c in enumerate(labels))
  between = sum(
    np.sum(labels == c) * np.sum((mu - x.mean(0)) ** 2)
    for c, mu in centers.items()
  )
  value = separation.scatter_ratio(x, labels).value
  # 60 examples of 3 classes.
  corrected = (between / within - 2 / 57) * 57 / 60
  assert value == pytest.approx(corrected)
  turn = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
  moved = separation.scatter_ratio(7 * x @ turn + 3, labels)
  assert moved.value == pytest.approx(value)


CLASSES, EXAMPLES, FEATURES = 10, 360, 64


def gaussian(ratio, noise):
  """Features whose population has this scatter ratio; the noise has unit 1."""
  labels = np.arange(EXAMPLES) % CLASSES
  centers = np.random.default_rng(0).normal(size=(CLASSES, FEATURES))
  centers -= centers.mean(0)
  between = EXAMPLES / CLASSES * np.sum(centers**2)
  centers *= math.sqrt(ratio * EXAMPLES * FEATURES / between)
  return centers[labels] + noise, labels


def test_intervals_of_the_scatter_ratio_cover_that_of_the_population():
  # Without the correction 5 % of them do, and 46 % of those of a difference.
  covered, values = [], []
  for seed in range(80):
    noise = np.random.default_rng(seed).normal(size=(EXAMPLES, FEATURES))
    half, third = (
      separation.scatter_ratio(*gaussian(ratio, noise)) for ratio in (0.5, 0.3)
    )
    of_half = separation.estimate(half, resamples=300)
    between = separation.difference(half, third, resamples=300)
    values.append(of_half.value)
    covered.append(
      [
        of_half.low <= 0.5 <= of_half.high,
        between.low <= 0.2 <= between.high,
      ]
    )
  assert np.mean(values) == pytest.approx(0.5, abs=0.005)
  assert np.all(np.mean(covered, 0) > 0.85), np.mean(covered, 0)


def test_a_scatter_ratio_of_chance_alone_is_about_zero():
  found = [
    separation.scatter_ratio(
      *gaussian(
        0, np.random.default_rng(seed).normal(size=(EXAMPLES, FEATURES))
      )
    ).value
    for seed in range(20)
  ]
  assert np.mean(found) == pytest.approx(0, abs=0.004)
  assert min(found) < 0 < max(found)


def votes(x, labels, there, voters, k, skip_self):
  right = []
  for i, row in enumerate(x):
    order = np.argsort(np.linalg.norm(there - row, axis=1), kind="stable")
    near = [j for j in order if not (skip_self and j == i)][:k]
    names, counts = np.unique(voters[near], return_counts=True)
    right.append(names[counts.argmax()] == labels[i])
  return np.mean(right)


@pytest.mark.parametrize("k", [1, 4, 10])
def test_neighbors_vote(k):
  x, labels = sample(seed=1)
  train = sample(90, seed=2)
  alone = separation.neighbor_accuracy(x, labels, k=k).value
  assert alone == votes(x, labels, x, labels, k, skip_self=True)
  found = separation.neighbor_accuracy(x, labels, train, k).value
  assert found == votes(x, labels, *train, k, skip_self=False)
  assert found != alone


def test_variances():
  x, _ = sample()
  x += 5
  assert separation.feature_variance(x).value == pytest.approx(x.var(0).mean())
  relative = separation.relative_variance(x)
  assert relative.value == pytest.approx(
    x.var(0).sum() / np.square(x).mean(0).sum()
  )
  assert separation.relative_variance(3 * x).value == pytest.approx(
    relative.value
  )


def test_weight_variance():
  a, b = np.arange(6.0).reshape(2, 3), np.arange(4.0)
  params = {
    "first": {"kernel": a, "bias": b},
    "block": {"conv": {"kernel": 2 * b}},
    "norm": {"scale": b},
  }
  found = variance.weight_variances(params)
  assert found == {"first": a.var(), "block/conv": 4 * b.var()}
  reference = {"first": a.var() / 2, "block/conv": b.var() / 2, "other": 1.0}
  assert variance.geometric_mean_ratio(found, reference) == pytest.approx(
    math.sqrt(2 * 8)
  )
  assert variance.geometric_mean_ratio(found, {"other": 1.0}) is None


def test_an_interval_of_a_mean():
  values = np.random.default_rng(0).normal(2, 3, size=400)
  found = separation.estimate(separation.mean(values))
  assert (found.value, found.n) == (values.mean(), 400)
  half = 1.96 * values.std() / 20
  assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
  assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
  assert found == separation.estimate(separation.mean(values))
  assert found != separation.estimate(separation.mean(values), seed=1)


def test_a_difference_is_paired():
  rng = np.random.default_rng(0)
  shared, own = rng.normal(size=300), 0.01 * rng.normal(size=300)
  a, b = separation.mean(shared + own + 0.1), separation.mean(shared)
  found = separation.difference(a, b)
  assert found.value == pytest.approx(0.1 + own.mean())
  assert 0.095 < found.low < found.value < found.high < 0.105
  same = separation.difference(a, a)
  assert (same.value, same.low, same.high) == (0, 0, 0)
  with pytest.raises(ValueError, match="of other examples"):
    separation.difference(a, separation.mean(shared[1:]))


def test_a_gap():
  rng = np.random.default_rng(0)
  train = separation.mean(rng.random(2000) < 0.9)
  test = separation.mean(rng.random(500) < 0.8)
  found = separation.gap(train, test)
  assert found.value == train.value - test.value
  sd = math.sqrt(0.9 * 0.1 / 2000 + 0.8 * 0.2 / 500)
  assert found.high - found.low == pytest.approx(2 * 1.96 * sd, rel=0.1)
  same = separation.gap(train, test, (train, test))
  assert (same.value, same.low, same.high) == (0, 0, 0)
  # The two sets are drawn on their own: the same draw would leave no width.
  alike = separation.gap(test, test)
  sd = math.sqrt(2 * 0.8 * 0.2 / 500)
  assert alike.high - alike.low == pytest.approx(2 * 1.96 * sd, rel=0.1)
  none = separation.mean(np.zeros(500))
  other = separation.gap(train, test, (train, none))
  assert other.value == pytest.approx(-test.value)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda x, y: separation.silhouette(x, 0 * y), "all examples are of one"),
    (lambda x, y: separation.scatter_ratio(x, y[1:]), "there are 60 examples"),
    (lambda x, y: separation.scatter_ratio(0 * x, y), "do not vary within"),
    (lambda x, y: separation.scatter_ratio(x / 0, y), "finite"),
    (lambda x, y: separation.neighbor_accuracy(x, y, k=60), "use 1..59"),
    (lambda x, y: separation.neighbor_accuracy(x, y, (x, y), 61), "use 1..60"),
    (lambda x, y: separation.relative_variance(0 * x), "all features are 0"),
  ],
)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_what_cannot_be_measured(call, message):
  with pytest.raises(ValueError, match=message):
    call(*sample())


TWO_AND_ONE = (np.array([[0.0], [1], [5]]), np.array([0, 0, 1]))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: separation.scatter_ratio(np.eye(3), np.arange(3)),
      "too few examples: each of the 3 is alone",
    ),
    # Of three draws, all may be the one that is alone.
    (
      lambda: separation.estimate(separation.scatter_ratio(*TWO_AND_ONE)),
      "too few examples: a resample of the 3",
    ),
    (
      lambda: separation.estimate(separation.relative_variance(np.eye(4, 1))),
      "too few examples: a resample of the 4",
    ),
    # In sums 3 * 0.1 is not 0.1 + 0.1 + 0.1.
    (
      lambda: separation.scatter_ratio(
        np.repeat([[0.1], [0.7]], 3, 0), np.repeat([0, 1], 3)
      ),
      "do not vary within any class",
    ),
  ],
)
def test_too_few_examples_are_refused_without_a_warning(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_the_silhouette_takes_a_balanced_subset_of_many(monkeypatch):
  labels = np.repeat([0, 1], [29_000, 1000])
  rows = embedding_numbers.silhouette_rows(labels)
  assert np.bincount(labels[rows]).tolist() == [9000, 1000]
  monkeypatch.setattr(separation, "SILHOUETTE_LIMIT", 30)
  found = embedding_numbers.numbers(splits_of(1), "test").measures
  assert len(found["silhouette"].numerator) == 30
  assert len(found["scatter_ratio"].numerator) == 60


def splits_of(apart, seed=0):
  found = {}
  for i, name in enumerate(("train", "test")):
    x, labels = sample(60, seed + i, apart=apart)
    correct = np.arange(60) % (9 - 4 * i) > 0
    found[name] = embedding_numbers.Embedded(x, labels, correct, 0.5 + i)
  return found


def test_all_numbers_of_two_networks_and_the_report():
  numbers = [
    embedding_numbers.numbers(splits_of(apart), "test") for apart in (1, 4)
  ]
  runs = [
    {
      "name": name,
      "method": name,
      "model": "tiny",
      "seed": 0,
      "step": 5 + i,
      "steps": 6,
      "bits_per_quantized_weight": None if i == 0 else 4.5,
      "accuracy": {"train": 0.75, "test": 0.5},
      "loss": {"train": 0.125, "test": 1.5},
      "estimates": {
        k: vars(x) for k, x in embedding_numbers.estimates(numbers[i]).items()
      },
      "weight_variance": {"first": 2.0 + i, "": 1.0},
    }
    for i, name in enumerate(("one", "two"))
  ]
  found = embedding_numbers.differences(numbers[1], numbers[0])
  runs[1]["differences"] = {k: vars(x) for k, x in found.items()}
  runs[1]["weight_variance_ratio"] = 1.25
  result = {
    "dataset": "digits",
    "split": "test",
    "examples": 60,
    "pictured": 30,
    "perplexity": 20.0,
    "seed": 0,
    "neighbors": 10,
    "silhouette_examples": 60,
    "resamples": 2000,
    "runs": runs,
    "command": "the command",
  }
  json.dumps(result, allow_nan=False)
  text = embedding_report.markdown(result)
  for part in (
    "perplexity 20, seed 0, 30 of the 60 examples",
    "| two | tiny | two | 0 | step 6 of 6 | 4.50 |",
    "10 neighbors out of the training split",
    "silhouette higher; k-NN accuracy higher; scatter ratio higher",
    "no difference shown in generalization gap",
    "| one | 0.7500 | 0.5000 | 0.1250 | 1.5000 |",
    "| `first` | 2.00 | 3.00 (1.50) |",
    "| `(root)` | 1.00 | 1.00 (1.00) |",
    "| geometric mean of ratios |  | 1.250 |",
    "Not every run is at its end",
    "Command: `the command`",
  ):
    assert part in text, part
  assert "Difference from" not in embedding_report.markdown(
    result | {"runs": runs[:1]}
  )


def test_other_examples_do_not_pair():
  a = embedding_numbers.numbers(splits_of(1), "test")
  b = a._replace(labels=a.labels[::-1])
  with pytest.raises(ValueError, match="of other examples"):
    embedding_numbers.differences(a, b)


def test_the_training_split_is_its_own_reference():
  splits = splits_of(1)
  x, labels, *_ = splits["train"]
  found = embedding_numbers.numbers(splits, "train", 5).measures
  want = separation.neighbor_accuracy(x, labels, None, 5).value
  assert found["neighbor_accuracy"].value == want < 1
