"""The programs of the study of the adaptive rule."""

import json

import numpy as np
import pytest

from dpc_jax import models
from dpc_jax.training import build, loop, metrics
from experiments import report
from experiments.adaptive import autocorrelation, curves
from tests.training import tiny


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
  monkeypatch.setitem(models._CONSTRUCTORS, "tiny", tiny.Tiny)
  monkeypatch.setattr(metrics, "_event_writer", lambda workdir: None)


def test_autocorrelation_of_known_gradients():
  rng = np.random.default_rng(0)
  fixed, noise = rng.normal(size=400), rng.normal(size=(60, 400))
  rows = {
    "constant": [fixed] * 60,
    "alternating": [(-1) ** t * fixed for t in range(60)],
    "noise": list(noise),
    # Half of the power is signal.
    "signal": list(noise / np.std(noise) + fixed / np.std(fixed)),
  }
  gradients = [{k: v[t] for k, v in rows.items()} for t in range(60)]
  rho = autocorrelation._rho(gradients)
  assert rho["constant"] == pytest.approx(dict.fromkeys(rho["noise"], 1.0))
  assert rho["alternating"] == pytest.approx(
    {lag: (-1.0) ** lag for lag in rho["noise"]}
  )
  for lag in rho["noise"]:
    assert rho["noise"][lag] == pytest.approx(0, abs=0.05)
    assert rho["signal"][lag] == pytest.approx(0.5, abs=0.1)


def test_autocorrelation_of_a_run():
  parts = build.build(tiny.make_config(steps=60))
  result = autocorrelation.measure(parts, [0, 10], 40)
  assert list(result) == [0, 10]
  for layers in result.values():
    assert list(layers) == ["first", "second", "classifier"]
    assert all(abs(r) < 1.2 for rho in layers.values() for r in rho.values())
  # Of the run's own windows: they share thirty steps, not all.
  assert result[0] != result[10]


def test_curves_of_a_run(tmp_path, capsys):
  config = tiny.make_config(
    "adaptive",
    **{
      "steps": 24,
      "data.train_size": 64,
      "precision.adaptive.threshold": 0.01,
      "precision.adaptive.warmup": 1,
      "precision.adaptive.patience": 1,
    },
  )
  loop.train_and_evaluate(config, tmp_path / "run")
  lines = (tmp_path / "run" / "signals.jsonl").read_text().splitlines()
  assert len(lines) >= 2
  assert {*json.loads(lines[0])["signals"]} == {"first", "second"}
  capsys.readouterr()
  assert curves.main([str(tmp_path / "run")]) == 0
  assert (tmp_path / "run" / "adaptive.png").stat().st_size > 5_000
  assert b"<svg" in (tmp_path / "run" / "adaptive.svg").read_bytes()
  assert capsys.readouterr().out.strip().endswith("adaptive.png")
  # The run's report has the same picture.
  assert report.main([f"--workdir={tmp_path / 'run'}"]) == 0
  assert "moves.png" in capsys.readouterr().out
  text = (tmp_path / "run" / "report.md").read_text()
  assert "(moves.png)" in text and "(curves_cost.png)" in text


def test_curves_of_what_is_no_adaptive_run(tmp_path, capsys):
  assert curves.main([str(tmp_path)]) == 2
  assert "not a finished adaptive run" in capsys.readouterr().err
