"""Summaries that no run has written."""


def summary(accuracy=0.98611, **changes):
  return {
    "model": "resnet8",
    "dataset": "digits",
    "seed": 3,
    "steps": 449,
    "metric": "accuracy",
    "test_accuracy": accuracy,
    "best_test_accuracy": accuracy + 0.001,
    "gbitops": 2373.36,
    "saving_vs_static": 0.4436,
    "saving_vs_float": 0.9,
    "mean_bits": 5.556,
    "seconds": 4.6,
    "device": "1 x cpu",
    "versions": {"jax": "0.10.2"},
    "bits": {"stem": [8, 8, 8]},
    "layers": {
      "stem": {"weights": 144, "macs": 9216, "layers": 1},
      "classifier": {"weights": 640, "macs": 640, "layers": 1},
    },
  } | changes
