"""The bench runs, and its figures belong together."""

import statistics

import pytest

from configs import digits_resnet8, ptb_lstm_tiny
from dpc_jax import models
from experiments.bench import step, turns
from tests import compiling
from tests.training import tiny


@pytest.fixture(scope="module")
def results():
  with compiling.fast(), pytest.MonkeyPatch.context() as patch:
    patch.setitem(models._CONSTRUCTORS, "tiny", tiny.Tiny)
    return step.measure(tiny.make_config(), rounds=4, steps=1)


def test_all_variants_are_measured(results):
  assert list(results["variants"]) == [
    "float",
    "static8",
    "dpc",
    "dpc, 8-bit storage",
    "dpc, 8-bit storage, norms",
    "dpc, 8-bit storage, norms8",
  ]
  for figures in results["variants"].values():
    assert figures["peak_mib"] > 0
    low, high = figures["ratio_quartiles"]
    assert low <= figures["ratio"] <= high
    rate = 16 / figures["milliseconds"] * 1e3
    assert figures["images_per_second"] == pytest.approx(rate)


def test_ratios_are_to_the_float_step(results):
  float_step = results["variants"]["float"]
  assert float_step["ratio"] == float_step["peak_ratio"] == 1
  for figures in results["variants"].values():
    assert figures["peak_ratio"] == pytest.approx(
      figures["peak_mib"] / float_step["peak_mib"]
    )


def test_each_variant_is_what_its_label_says():
  config = digits_resnet8.get_config()
  assert {
    label: (c.precision.method, c.precision.storage_bits, c.remat)
    for label, c in step.variants(config).items()
  } == {
    "float": ("float", None, None),
    "static8": ("static8", None, None),
    "dpc": ("dpc", None, None),
    "dpc, 8-bit storage": ("dpc", 8, None),
    "dpc, 8-bit storage, norms": ("dpc", 8, "norms"),
    "dpc, 8-bit storage, norms8": ("dpc", 8, "norms8"),
  }
  config.precision.b_max = 10
  assert list(step.variants(config)) == ["float", "static10", "dpc"]


@pytest.mark.usefixtures("fast_compiler")
def test_text_is_counted_in_tokens():
  config = ptb_lstm_tiny.get_config("dpc,smoke")
  results = step.measure(config, rounds=2, steps=1)
  assert results["unit"] == "tokens" and results["input_tokens_per_second"] > 0
  for figures in results["variants"].values():
    # 8 rows of 16 tokens.
    rate = 8 * 16 / figures["milliseconds"] * 1e3
    assert figures["tokens_per_second"] == pytest.approx(rate)


def test_variants_take_turns():
  order = []

  def variant(label):
    def run(state, batch):
      order.append(label)
      return state, batch

    return turns.Variant(run, 0.0, 0.0, 1, 1)

  compiled = {label: variant(label) for label in ("a", "b")}
  seconds = turns.time_in_turns(compiled, 0.0, rounds=2, steps=2)
  assert "".join(order) == "aabb" * 3
  assert {len(s) for s in seconds.values()} == {2}
  assert statistics.median(seconds["a"]) > 0
