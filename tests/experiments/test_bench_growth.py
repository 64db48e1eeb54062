"""How time and memory grow: the points, what is left out, the exponents."""

import json
import types

import jax
import pytest

from configs import cifar10_resnet20, digits_vit_tiny
from dpc_jax.cost import bitops
from dpc_jax.training import build, checks, sharding
from experiments.bench import growth, growth_fit, growth_plot, turns

MIB = 2**20


def make_config():
  config = cifar10_resnet20.get_config("dpc,smoke")
  config.model.name = "resnet8"
  return config


def test_points_are_two_lines_that_cross():
  config = make_config()
  assert growth.sizes(config, [8, 16], [14, 8]) == [
    (8, 8),
    (8, 16),
    (14, 8),
  ]
  with pytest.raises(checks.ConfigError, match="--depths=15: a ResNet"):
    growth.sizes(config, [8], [15])
  with pytest.raises(checks.ConfigError, match="has no depth to vary"):
    growth.sizes(digits_vit_tiny.get_config(), [8], [14])


@pytest.fixture(scope="module")
def measured():
  """(measurements, what was compiled in order); nothing is, in truth.

  That takes long, and other tests do it. Temporaries grow as batch * MACs^2,
  time as their square root.
  """
  order = []

  def build_one(config):
    depth = int(config.model.name.removeprefix("resnet"))
    # A scanned block, twice as often at 14 layers as at 8.
    cost = bitops.LayerCost(macs=100, weights=9, layers=(depth - 2) // 6)
    mesh = sharding.make_mesh(1, 1, 1)
    return types.SimpleNamespace(config=config, costs={"a": cost}, mesh=mesh)

  def compile_step(parts):
    batch = parts.config.batch_size
    method = parts.config.precision.method
    order.append((parts.config.model.name, batch, method))
    if batch > 32:
      raise MemoryError(f"no room for {batch}")
    size = 2**20 * batch * parts.costs["a"].layers ** 2
    size *= 2 if method == "float" else 1
    return turns.Variant(None, None, 1.5, 3 * size, size)

  def time_in_turns(compiled, batch, rounds, steps):
    return {
      label: [variant.temporary_bytes**0.5] * rounds
      for label, variant in compiled.items()
    }

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(build, "build", build_one)
    patch.setattr(turns, "compile_step", compile_step)
    patch.setattr(turns, "first_batch", lambda parts: None)
    patch.setattr(turns, "time_in_turns", time_in_turns)
    points = growth.sizes(make_config(), [16, 64], [14])
    return growth.measure(make_config(), points, ["dpc"], 2, 1), order


@pytest.fixture(scope="module")
def results(measured):
  return measured[0]


def test_the_first_that_is_compiled_is_not_counted(measured):
  smallest = ("resnet8", 8, "float")
  assert measured[1][:3] == [smallest, smallest, ("resnet8", 8, "dpc")]


def test_each_size_is_measured_or_left_out(results):
  found = {(p["depth"], p["batch"]): p for p in results["points"]}
  assert list(found) == [(8, 8), (8, 16), (8, 64), (14, 8)]
  assert found[8, 64]["skipped"] == "no room for 64"
  assert found[8, 64]["variants"] == {}
  assert found[8, 8]["skipped"] is None
  ours = found[14, 8]["variants"]["dpc"]
  assert ours["ratio"] == pytest.approx(0.5**0.5)
  assert ours["peak_mib"] == pytest.approx(3 * ours["temporary_mib"])
  assert (found[8, 8]["macs"], found[14, 8]["macs"]) == (100, 200)


def test_exponents_are_those_of_the_growth(results):
  fits = results["fits"]
  for label in ("float", "dpc"):
    batch = fits["batch"]["temporary_mib"][label]
    assert batch["exponent"] == pytest.approx(1, abs=1e-4)
    assert fits["macs"]["peak_mib"][label]["exponent"] == pytest.approx(
      2, abs=1e-4
    )
    time = fits["macs"]["milliseconds"][label]
    assert time["exponent"] == pytest.approx(1, abs=1e-4)
  assert turns.power_law([1, 2, 4], [3, 6, 12])["r_squared"] == pytest.approx(1)
  assert growth_fit.fits(results["points"][:1], "batch") is None


def test_a_bad_fit_says_so():
  assert turns.power_law([1, 2], [1, 4])["r_squared"] is None
  fit = turns.power_law([1, 10, 100], [1, 20, 100])
  assert fit["exponent"] == pytest.approx(1)
  assert 0.9 < fit["r_squared"] < 0.98
  # The middle lies 2^(2/3) above the line.
  assert fit["worst_percent"] == pytest.approx(100 * (2 ** (2 / 3) - 1))


def test_tables_and_picture_show_them(results, tmp_path):
  assert json.loads(json.dumps(results))["fits"] == results["fits"]
  assert "ResNet-8, batch 16" in growth.point_table(results["points"])
  table = growth.fit_table(results["fits"])
  assert "MACs of an image (depth)" in table and "2.00" in table
  growth_plot.draw(results, tmp_path / "growth.png")
  assert {p.name for p in tmp_path.iterdir()} == {"growth.png", "growth.svg"}


def test_more_memory_than_there_is_is_left_out():
  growth.check_room(1)
  with pytest.raises(MemoryError, match=r"needs 1048576.0 GiB of"):
    growth.check_room(2**50)


def test_programs_that_are_compiled_are_counted():
  double, x = jax.jit(lambda x: 2 * x + 41), jax.numpy.ones(3)
  with turns.no_cache(), turns.compilations() as first:
    double(x)
  with turns.compilations() as again:
    double(x)
  assert len(first) == 1 and first[0] > 0 and again == []
