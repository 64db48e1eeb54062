"""Summaries of runs that no one has trained."""


def made_up(method, seed):
  accuracy = 0.8 + 0.01 * seed + (0.001 * seed**2 if method == "dpc" else 0)
  return {
    "method": method,
    "model": "tiny",
    "dataset": "digits",
    "seed": seed,
    "steps": 3,
    "metric": "accuracy",
    "test_accuracy": accuracy,
    "best_test_accuracy": accuracy,
    "gbitops": 1.0,
    "saving_vs_static": 0.0,
    "saving_vs_float": 0.9,
    "mean_bits": 8.0,
    "seconds": 1.0,
    "device": "1 x cpu",
    "versions": {"jax": "0"},
    "bits": {"first": [8, 8, 8]},
    "layers": {"first": {"weights": 9, "macs": 9, "layers": 1}},
  }
