"""`make demo`, shrunk: two methods, a table, a picture, a report."""

import json
import sys

import pytest
from absl import flags

from configs import digits_resnet8
from dpc_jax.training import config as config_lib
from dpc_jax.training import metrics
from experiments import compare


@pytest.fixture
def run(monkeypatch, tmp_path):
  """Calls compare.main with a config, as the flags would."""
  monkeypatch.setattr(metrics, "_event_writer", lambda workdir: None)
  monkeypatch.setattr(sys, "argv", ["compare", "--config=x"])

  def call(config, methods):
    class Flags:
      workdir = str(tmp_path)

    Flags.config = config
    monkeypatch.setattr(compare.cli, "FLAGS", Flags)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(compare, "_METHODS", type("M", (), {"value": methods}))
      compare.main()
    return tmp_path

  return call


def small():
  config = digits_resnet8.get_config()
  config.steps = 3
  config.batch_size = 16
  config.model.width = 4
  config.eval_every = config.log_every = config.checkpoint_every = 3
  return config


def test_compare_writes_and_prints(run, capsys):
  workdir = run(small(), ["static8", "dpc"])
  out = capsys.readouterr().out
  table = out[out.index("method ") :].splitlines()
  assert [line.split()[0] for line in table[2:4]] == ["static8", "dpc"]
  assert "0.0%" in table[2]
  for name in ("bits.png", "report.md", "static8/summary.json"):
    assert (workdir / name).exists()
  runs = json.loads((workdir / "comparison.json").read_text())["runs"]
  assert runs["dpc"]["gbitops"] < runs["static8"]["gbitops"]
  assert str(workdir / "bits.png") in out
  # A second call trains nothing and says the same.
  run(small(), ["static8", "dpc"])
  again = capsys.readouterr().out
  assert again.count("finished already") == 2
  assert "step 3/3" not in again
  assert again[again.index("method ") :] == out[out.index("method ") :]


@pytest.mark.parametrize(
  ("method", "field", "value"),
  [
    ("sttic8", "seed", 0),
    ("dpc", "precision.center", "middle"),
    ("dpc", "precision.delta", 3.0),
  ],
)
def test_a_mistake_in_any_method_stops_before_the_first(
  run, tmp_path, method, field, value
):
  config = small()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(config_lib.ConfigError, match=r"sttic8|middle|3\.0"):
    run(config, ["static8", method])
  assert not list(tmp_path.iterdir())


def test_methods_flag_defaults_to_the_demo():
  assert flags.FLAGS["methods"].default == ["static8", "dpc"]
