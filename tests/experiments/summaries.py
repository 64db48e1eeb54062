"""Summaries of runs that no one has trained."""

from tests.analysis import summaries


def made_up(method, seed):
  accuracy = 0.8 + 0.01 * seed + (0.001 * seed**2 if method == "dpc" else 0)
  return summaries.summary(
    accuracy,
    method=method,
    model="tiny",
    seed=seed,
    steps=3,
    best_test_accuracy=accuracy,
    layers={"first": {"weights": 9, "macs": 9, "layers": 1}},
    bits={"first": [8, 8, 8]},
  )
