"""What the pictures of a report are drawn from."""

import pytest

from dpc_jax.analysis import adaptive_plot, comparison, plots
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


def move(step, old, new):
  widths = [None if b is None else [b, b, 8] for b in (old, new)]
  return {"step": step, "path": "a", "old": widths[0], "new": widths[1]}


STAYS, MOVES = [move(0, None, 5)], [move(0, None, 5), move(9, 5, 6)]
SIGNALS = [{"step": 4, "signals": {"a": 0.1}}]


@pytest.mark.parametrize(
  ("signals", "moves", "drawn", "what"),
  [
    ([], STAYS, None, None),
    ([], MOVES, "bits_alone", "Bits over time of cpt"),
    (SIGNALS, STAYS, "bits_over_time", "Signals and bits of cpt"),
    (SIGNALS, MOVES, "bits_over_time", "Signals and bits of cpt"),
  ],
)
def test_every_method_whose_bits_move_has_a_picture_of_them(
  signals, moves, drawn, what, monkeypatch, tmp_path
):
  seen = []
  for name in ("bits_alone", "bits_over_time"):
    monkeypatch.setattr(
      adaptive_plot,
      name,
      lambda *_, name=name, steps: seen.append((name, steps)),
    )
  run = {"layers": {"a": {}}, "steps": 20}
  path = tmp_path / "moves_cpt.png"
  found = reporting._draw_moves(signals, moves, run, path, " of cpt")
  assert found == ({path.name: what} if what else {})
  assert seen == ([(drawn, 20)] if drawn else [])


def test_the_picture_of_layers_is_by_size_and_knows_what_moved(
  monkeypatch, tmp_path
):
  seen = {}

  def record(runs, capacities, path, **rest):
    seen.update(runs=list(runs), capacities=capacities, **rest)

  monkeypatch.setattr(plots, "bits_per_layer", record)
  layers = {"a": {"weights": 9}, "classifier": {"weights": 4}}
  run = {"layers": layers, "bits": {"a": [5, 5, 8]}}
  runs = {"float": run | {"bits": {}}, "cpt": run}
  assert reporting._draw_bits(runs, tmp_path, ["cpt"])
  assert seen == {
    "runs": ["float", "cpt"],
    "capacities": {"a": 9},
    "by_size": True,
    "moved": ["cpt"],
  }
