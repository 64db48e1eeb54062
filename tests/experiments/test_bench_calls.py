"""The bench of input and calls runs, and its figures belong together."""

import pytest

from configs import digits_resnet8
from dpc_jax.training import checks
from experiments.bench import calls
from tests import compiling


@pytest.fixture(scope="module")
def results():
  config = digits_resnet8.get_config("float")
  config.batch_size = 16
  config.model.width = 2
  with compiling.fast():
    return calls.measure(config, [1, 2], rounds=2, steps=4)


def test_both_inputs_are_measured_at_each_size(results):
  assert list(results["variants"]) == [
    "host, 1",
    "host, 2",
    "device, 1",
    "device, 2",
  ]
  assert results["variants"]["host, 1"]["ratio"] == 1
  for figures in results["variants"].values():
    assert figures["wait"] < 1
    assert figures["input_milliseconds"] > 0
    rate = 16 / figures["milliseconds"] * 1e3
    assert figures["images_per_second"] == pytest.approx(rate)


def test_wait_is_what_the_fed_step_takes_longer():
  figures = calls._figures(
    [0.004, 0.004, 0.005], [0.003, 0.004, 0.004], [0.002, 0.004, 0.01], 8
  )
  assert figures["wait"] == pytest.approx(0.2)
  assert figures["ratio"] == pytest.approx(1)
  assert figures["milliseconds"] == pytest.approx(4)
  assert figures["images_per_second"] == pytest.approx(2_000)


def test_every_call_gets_the_next_batches(monkeypatch):
  """Fed, that is; else all get the first."""
  seen, taken = [], []

  class Batches:
    def __init__(self, parts, start):
      self.step = start

    def take(self, count):
      assert len(seen) == len(taken)
      self.step += count
      taken.append(self.step)
      return self.step

    def close(self):
      pass

  def run(programs, state, batch, count):
    seen.append(batch)
    return state, 0.0

  monkeypatch.setattr(calls.calls_lib, "Batches", Batches)
  monkeypatch.setattr(calls.calls_lib, "run", run)
  variant = calls.Variant(None, None, 2)
  calls.time_steps(variant, 0.0, 6, fed=True, start=10)
  # All but the first are taken while a call runs.
  assert seen == [12, 14, 16] and taken == [12, 14, 16, 18]
  seen.clear()
  taken.clear()
  calls.time_steps(variant, 0.0, 6, fed=False)
  assert seen == [2, 2, 2]


def test_sizes_that_do_not_divide_the_steps():
  with pytest.raises(
    checks.ConfigError,
    match="--steps=4: must be a multiple of --sizes=3; change either",
  ):
    calls.measure(digits_resnet8.get_config(), [1, 3], rounds=2, steps=4)
