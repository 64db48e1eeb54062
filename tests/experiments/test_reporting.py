"""What the pictures of a report are drawn from."""

import pytest

from dpc_jax.analysis import comparison, plots
from experiments import reporting


@pytest.mark.parametrize(
  ("metric", "highest"), [("accuracy", 1.0), ("perplexity", None)]
)
def test_the_picture_of_cost_knows_its_metric(
  metric, highest, monkeypatch, tmp_path
):
  seen = {}

  def record(points, frontier, path, **rest):
    seen.update(points=points, frontier=frontier, path=path, **rest)

  monkeypatch.setattr(plots, "pareto", record)
  run = {
    "metric": metric,
    "seed": 0,
    f"test_{metric}": 0.5,
    f"best_test_{metric}": 0.75,
    "gbitops": 100.0,
    "saving_vs_static": 0.25,
    "saving_vs_float": 0.875,
    "mean_bits": 6.0,
    "seconds": 1.0,
  }
  result = comparison.compare({"dpc": {0: run}}, b_max=6)
  reporting._draw_pareto(result, tmp_path)
  assert seen == {
    "points": {"dpc": (0.75, 0.5, None, None)},
    "frontier": ("dpc",),
    "path": tmp_path / "pareto.png",
    "metric": f"final test {metric}",
    "unit": "static 6/6",
    "highest": highest,
  }
