"""Which folder was meant, where one was given that holds no finished run."""

import pathlib

import pytest

from experiments import finished, report


@pytest.fixture
def grid(tmp_path):
  """Two methods, two finished runs each, in a folder of grids."""
  for method in ("dpc", "static8"):
    for seed in (5, 6):
      begin(tmp_path / "runs" / "grid" / method / f"seed{seed}", True)
  return tmp_path / "runs" / "grid"


def begin(run, is_finished=False):
  run.mkdir(parents=True)
  (run / "config.json").write_text("{}")
  if is_finished:
    (run / "summary.json").write_text("{}")


@pytest.mark.parametrize("level", ["..", "dpc", "dpc/seed5/checkpoints"])
def test_a_report_one_level_off(level, grid, capsys):
  where = (grid / level).resolve()
  where.mkdir(exist_ok=True)
  assert report.main([f"--workdir={where}"]) == 2
  said = "no finished run in it, as METHOD/seedN/summary.json would be"
  assert capsys.readouterr().err == (
    f"error: --workdir={where}: {said}; did you mean {grid}?\n"
  )


def test_a_method_of_a_grid_by_its_relative_name(grid, monkeypatch):
  monkeypatch.chdir(grid.parent)
  assert finished.grids_meant(pathlib.Path("grid/dpc")) == [
    pathlib.Path("grid")
  ]
  monkeypatch.chdir(grid / "dpc")
  assert finished.grids_meant(pathlib.Path(".")) == [grid]


def test_only_finished_runs_are_meant_by_a_report(tmp_path):
  begin(tmp_path / "a")
  assert finished.runs_meant(tmp_path) == [tmp_path / "a"]
  assert finished.grids_meant(tmp_path) == []
  begin(tmp_path / "b", True)
  assert finished.grids_meant(tmp_path) == [tmp_path / "b"]


def test_of_many_one_is_named(grid):
  found = finished.runs_meant(grid.parent)
  assert len(found) == 4
  first = grid / "dpc" / "seed5"
  assert finished.did_you_mean(found, "no") == (
    f"did you mean {first}, or another of 4 there?"
  )
  assert finished.did_you_mean(found[:1], "no") == f"did you mean {first}?"
  assert finished.did_you_mean([], "no") == "no"
