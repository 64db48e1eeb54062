"""Every method inside the train step, many of them in one compiled step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpc_jax as dpc
from dpc_jax.cost import bitops
from dpc_jax.data import pipeline
from dpc_jax.training import build, methods
from dpc_jax.training import step as step_lib
from tests.training import runs, tiny

METHODS = [name.replace("<b>", "6") for name in methods.names()]
# Four steps an epoch.
SIZES = {"steps": 32, "data.train_size": 64, "precision.cycles": 8}
PERIOD = 32 // 8


def parts_of(method, **changes):
  return runs.parts_of(tiny.make_config(method, **SIZES, **changes))


class Compiled(NamedTuple):
  """The programs of a method's run, what it is, and its batches."""

  programs: build.Programs
  run: methods.Run
  batch: Callable[[int], Any]

  def start(self, method, **changes):
    """The first state of another method, for the same program."""
    precision = tiny.make_config(method, **SIZES, **changes).precision
    schedule = methods.make_schedule(precision, self.run)
    return self.programs.init().replace(
      schedule_state=schedule.init(runs.CAPACITIES)
    )

  def step(self, state):
    """The state after one more step, which takes `state` for its own."""
    return self.programs.train_step(state, self.batch(int(state.step)))[0]


def compiled(method):
  config = tiny.make_config(method, **SIZES)
  parts = runs.parts_of(config)
  batches = pipeline.TrainBatches(
    parts.data.splits["train"], batch_size=16, seed=0
  )
  macs = {path: cost.macs for path, cost in parts.costs.items()}
  run = methods.Run(32, 4, macs, ())
  return Compiled(runs.programs_of(config), run, batches.batch)


@pytest.fixture(scope="module")
def fixed():
  return compiled("dpc")


@pytest.fixture(scope="module")
def cyclic():
  return compiled("cpt")


@pytest.fixture(scope="module")
def adaptive():
  return compiled("adaptive")


def test_names_and_what_is_known():
  assert set(METHODS) >= {
    *("float", "static6", "dpc", "dpc_log_midpoint", "adaptive"),
    *("adaptive_reversed", "cpt", "dpc_cpt", "pfq", "uniform"),
    *("uniform_log_midpoint", "reversed", "random"),
  }
  assert all(map(methods.is_known, METHODS))
  assert not methods.is_known("static<b>")
  assert not methods.is_known("static")
  assert not methods.is_known("_dpc")


@pytest.mark.parametrize("method", METHODS)
def test_builds_and_steps(method):
  """The state keeps its structure, shapes and dtypes."""
  parts = parts_of(method)
  train_step = step_lib.make_train_step(
    parts.model, parts.optimizer, parts.schedule, parts.task
  )
  before = jax.eval_shape(parts.init, jax.random.key(0))
  after, metrics = jax.eval_shape(train_step, before, parts.feed.train_batch)
  assert jax.tree.structure(after) == jax.tree.structure(before)
  for a, b in zip(*map(jax.tree.leaves, (after, before)), strict=True):
    assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
  assert metrics.loss.shape == ()
  bits = dpc.layer_bits(after.model_state) if method != "float" else {}
  assert set(bits) == (set() if method == "float" else set(runs.CAPACITIES))


def fixed_widths():
  """What each method is to have, worked out from the library's parts."""
  macs = {
    path: cost.macs
    for path, cost in dpc.layer_costs(
      tiny.Tiny(10), jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    ).items()
  }

  def control(make, **options):
    bits = make(3, 8, macs=macs, **options).init(runs.CAPACITIES).bits
    return {path: [int(b) for b in layer] for path, layer in bits.items()}

  def eq1(**options):
    widths = dpc.dpc_bit_widths(runs.CAPACITIES, 3, 8, **options)
    return {path: [b, b, 8] for path, b in widths.items()}

  def everywhere(b):
    return {path: [b, b, 8] for path in runs.CAPACITIES}

  # On CAPACITIES the midpoint is 8 and 3, the median 8 and 5.
  return {
    "dpc": (eq1(), {}),
    "dpc_log_midpoint": (eq1(center="log_midpoint"), {}),
    "static8": (everywhere(8), {}),
    "static6": (everywhere(6), {}),
    "uniform": (control(dpc.schedules.uniform), {}),
    "uniform_log_midpoint": (
      control(dpc.schedules.uniform, center="log_midpoint"),
      {},
    ),
    "reversed": (control(dpc.schedules.reversed_dpc), {}),
    "random": (
      control(dpc.schedules.random_layerwise, seed=1),
      {"precision.seed": 1},
    ),
  }


def test_one_compiled_step_serves_all_fixed_widths(fixed):
  costs = parts_of("dpc").costs
  expected = fixed_widths()
  assert len({str(bits) for bits, _ in expected.values()}) >= 6
  kernels = set()
  for method, (bits, changes) in expected.items():
    state = fixed.start(method, **changes)
    for _ in range(2):
      state = fixed.step(state)
      assert runs.widths_of(state) == bits, method
    run = bitops.run_bitops(costs, state.cost, steps=2, batch_size=16)
    widths = runs.as_bits(bits)
    assert run.total == dpc.bitops(costs, widths, samples=32).total, method
    kernels.add(np.asarray(state.params["second"]["kernel"]).tobytes())
  assert fixed.programs.traces == [1]
  # The widths are those of the products, not only of the books.
  assert len(kernels) == len({str(bits) for bits, _ in expected.values()})


def test_methods_with_numbers_of_their_own(fixed):
  """Bounds, delta and set widths are data of the same step."""
  for changes, bits in (
    ({"precision.b_min": 5, "precision.b_max": 6}, [6, 6, 8]),
    ({"precision.delta": -1.0}, [3, 3, 8]),
    ({"precision.weights": 4, "precision.gradients": 6}, [4, 8, 6]),
  ):
    state = fixed.start("dpc", **changes)
    state = fixed.step(state)
    assert runs.widths_of(state)["first"] == bits
  assert fixed.programs.traces == [1]


def test_one_compiled_step_serves_both_cyclic_methods(cyclic):
  eq1 = dpc.dpc_bit_widths(runs.CAPACITIES, 3, 8)
  for method, tops in (
    ("cpt", dict.fromkeys(runs.CAPACITIES, 8)),
    ("dpc_cpt", eq1),
  ):
    state = cyclic.start(method)
    seen = set()
    for step in range(PERIOD + 2):
      state = cyclic.step(state)
      widths = {
        path: runs.cpt(3, top, PERIOD, step) for path, top in tops.items()
      }
      assert runs.widths_of(state) == {
        path: [b, b, 8] for path, b in widths.items()
      }
      seen.add(widths["second"])
    assert len(seen) >= 2
  assert cyclic.programs.traces == [1]


# Moves at every decision, by what is known of every layer.
RULE = {
  "precision.adaptive.signal": "variance",
  "precision.adaptive.warmup": 1,
  "precision.adaptive.patience": 1,
  "precision.adaptive.threshold": 0.0,
  "precision.adaptive.freeze": 1.0,
  "precision.adaptive.keep_cost": False,
}


class TestAdaptive:
  def widths(self, compiled, method, steps=9, **changes):
    """Of `second`, at each step."""
    state = compiled.start(method, **(RULE | changes))
    found = []
    for _ in range(steps):
      state = compiled.step(state)
      found.append(runs.widths_of(state)["second"][0])
    return found

  @pytest.mark.as_users
  def test_one_compiled_step_serves_all_rules(self, adaptive):
    # The first decision is at step 8, on gradients that are the same.
    up = self.widths(adaptive, "adaptive")
    down = self.widths(adaptive, "adaptive_reversed")
    assert up[:8] == down[:8] == [5] * 8
    assert {up[8], down[8]} == {4, 6}
    for changes in (
      {"precision.adaptive.threshold": 50.0},
      {"precision.adaptive.warmup": 2},
      {"precision.adaptive.patience": 2},
      {"precision.adaptive.freeze": 0.24},
      {"precision.b_min": 5, "precision.b_max": 5},
    ):
      assert self.widths(adaptive, "adaptive", **changes) == [5] * 9, changes
    narrow = {"precision.b_min": 4, "precision.b_max": 6}
    widths = self.widths(adaptive, "adaptive", **narrow)
    b = dpc.dpc_bit_widths(runs.CAPACITIES, 4, 6)["second"]
    assert widths == [b] * 8 + [b + up[8] - 5]
    assert adaptive.programs.traces == [1]

  def test_the_budget_is_data(self, adaptive):
    """What is noisy goes up, where it may cost more."""
    noisy = (
      "adaptive"
      if self.widths(adaptive, "adaptive")[8] == 6
      else "adaptive_reversed"
    )
    kept = {"precision.adaptive.keep_cost": True}
    costs = parts_of("adaptive").costs
    totals = []
    for changes in ({}, kept):
      state = adaptive.start(noisy, **(RULE | changes))
      for _ in range(9):
        state = adaptive.step(state)
      widths = runs.as_bits(runs.widths_of(state))
      totals.append(dpc.bitops(costs, widths).total)
    start = dpc.dpc_bit_widths(runs.CAPACITIES, 3, 8)
    assert totals[0] > dpc.bitops(costs, start).total >= totals[1]
    assert adaptive.programs.traces == [1]

  def test_a_step_that_is_not_finite_is_skipped(self, adaptive):
    """The optimizer's state, statistics in it, is that of the step before."""
    state = adaptive.step(adaptive.start("adaptive"))
    before = jax.device_get(dpc.gradient_statistics(state.opt_state))
    assert {int(s.skipped) for s in before.values()} == {0}
    params = jax.tree.map(lambda x: x, state.params)
    params["classifier"]["bias"] = params["classifier"]["bias"] * jnp.nan
    broken = adaptive.step(state.replace(params=params))
    after = dpc.gradient_statistics(broken.opt_state)
    assert broken.skips.total == 1
    assert set(after) == set(runs.CAPACITIES)
    for path, old in before.items():
      assert old.count == 1
      tiny.assert_same(tiny.leaves(after[path]), tiny.leaves(old))


@pytest.mark.as_users
@pytest.mark.parametrize("method", ["cpt", "dpc_cpt"])
def test_a_cycle_is_evaluated_at_its_top(method, cyclic):
  """Though the last step was not trained there."""
  parts = parts_of(method)
  state = cyclic.start(method)
  for _ in range(2):
    state = cyclic.step(state)
  top = dict.fromkeys(runs.CAPACITIES, 8)
  if method == "dpc_cpt":
    top = dpc.dpc_bit_widths(runs.CAPACITIES, 3, 8)
  last = runs.widths_of(state)
  assert all(last[path][0] < b for path, b in top.items())
  by_hand = state.replace(
    model_state=dpc.assign_bits(
      state.model_state,
      {path: dpc.LayerBits(b, b, 8) for path, b in top.items()},
    )
  )
  batch = next(iter(parts.feed.evaluate("test")))
  plain = jax.jit(step_lib.make_eval_step(parts.model, parts.task))
  # The program of the loop.
  loss = float(cyclic.programs.eval_step(state, batch, ())[0].loss)
  assert loss == pytest.approx(float(plain(by_hand, batch)[0].loss), rel=1e-6)
  assert loss != pytest.approx(float(plain(state, batch)[0].loss), rel=1e-4)


def test_what_depends_on_the_bounds():
  assert [m for m in METHODS if not methods.has_bounds(m)] == [
    "float",
    "static6",
  ]


@pytest.mark.parametrize("schedule", ["steps", "cosine"])
def test_epochs_of_a_jump_are_not_looked_at(schedule):
  parts = parts_of(
    "adaptive",
    **{"optimizer.schedule": schedule, "optimizer.boundaries": (0.3, 0.75)},
  )
  settings = parts.schedule_state(3, 8).settings
  # Steps 10 and 24 are in the epochs 3 and 7.
  expected = [0, 3, 7] if schedule == "steps" else [0]
  assert settings.skipped.tolist() == expected
  assert settings.period == 4


def test_the_tracker_sees_raw_gradients_of_quantized_layers():
  """First in the chain: before the clipping and the weight decay."""
  parts = parts_of(
    "adaptive", **{"optimizer.clip": 1e-6, "optimizer.weight_decay": 10.0}
  )
  shapes = jax.eval_shape(parts.init, jax.random.key(0)).params
  params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)

  @jax.jit
  def track(params):
    gradients = jax.tree.map(lambda x: 0.5 * x, params)
    state = parts.optimizer.init(params)
    return dpc.gradient_statistics(
      parts.optimizer.update(gradients, state, params)[1]
    )

  known = track(params)
  assert set(known) == set(runs.CAPACITIES)
  for path, weights in runs.CAPACITIES.items():
    assert float(known[path].norm) == pytest.approx(0.5 * weights**0.5)


def test_one_step_an_epoch_can_be_averaged():
  with runs.patched():
    build.build(tiny.make_config("adaptive", **{"data.train_size": 16}))
