"""Bounds found on the way: before them b_max, after them the method's own."""

import pytest

import dpc_jax as dpc
from dpc_jax.policy import controls
from dpc_jax.training import auto_bounds, build, loop
from dpc_jax.training import config as config_lib
from tests.training import runs, tiny

# Four steps an epoch; the bounds come between two of their ends.
EPOCH = 4
STEPS = 20
FOUND_AT = 3
TAU = {"tau_min": 0.99, "tau_max": 0.9995}
# How often adaptive bits move is a matter of rounding.
METHODS = (
  *("dpc", "uniform", "cpt", "pfq"),
  pytest.param("adaptive", marks=pytest.mark.as_users),
)


def make_config(method, **changes):
  return tiny.make_config(
    method,
    **{
      "steps": STEPS,
      "data.train_size": 16 * EPOCH,
      "log_every": 5,
      "eval_every": 50,
      "checkpoint_every": 50,
      "optimizer.schedule": "constant",
      "precision.bounds": "auto",
      "precision.bounds_step": FOUND_AT,
      "precision.tau_min": TAU["tau_min"],
      "precision.tau_max": TAU["tau_max"],
      "precision.cycles": 5,
      "precision.pfq.window": 2,
      "precision.pfq.stages": 3,
      "precision.pfq.threshold": 9.0,
      "precision.adaptive.signal": "variance",
      "precision.adaptive.warmup": 1,
      "precision.adaptive.patience": 1,
      "precision.adaptive.threshold": 0.0,
      "precision.adaptive.freeze": 1.0,
      **changes,
    },
  )


def bounds_of(state):
  return dpc.precision_bounds(
    {"params": state.params, **state.model_state}, **TAU
  )


def everywhere(width):
  return {path: [width, width, 8] for path in runs.CAPACITIES}


def by_dpc(b_min, b_max):
  widths = dpc.dpc_bit_widths(runs.CAPACITIES, b_min, b_max)
  return {path: [b, b, 8] for path, b in widths.items()}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  """{method: (workdir, its result)}, made when asked for."""
  made = {}

  def get(method):
    if method not in made:
      workdir = tmp_path_factory.mktemp(method)
      made[method] = workdir, runs.train(make_config(method), workdir)
    return made[method]

  return get


@pytest.mark.parametrize("method", METHODS)
def test_widths_before_and_after(done, tmp_path, method):
  workdir, result = done(method)
  before = runs.train(make_config(method), tmp_path, stop=FOUND_AT)
  found = bounds_of(before.state)
  low, high = found.b_min, found.b_max
  assert 3 < low < high - 1 < 7
  widths = runs.widths_by_step(workdir, STEPS)
  assert widths[:FOUND_AT] == [everywhere(8)] * FOUND_AT
  assert runs.widths_of(before.state) == everywhere(8)
  after = widths[FOUND_AT:]
  if method == "dpc":
    assert after == [by_dpc(low, high)] * len(after)
  elif method == "uniform":
    costs = {k: v.macs for k, v in dpc.layer_costs(*model(method)).items()}
    state = dpc.schedules.uniform(low, high, macs=costs).init(runs.CAPACITIES)
    expected = {
      path: [int(b) for b in layer] for path, layer in state.bits.items()
    }
    assert after == [expected] * len(after)
    as_dpc = controls.cost(runs.as_bits(by_dpc(low, high)), costs)
    assert controls.cost(state.bits, costs) <= 1.2 * as_dpc
  elif method == "cpt":
    assert after == [
      everywhere(runs.cpt(low, high, 4, step))
      for step in range(FOUND_AT, STEPS)
    ]
  elif method == "pfq":
    # Two epochs of the new state, then the next stage.
    middle = round((low + high) / 2)
    assert after == (
      [everywhere(low)] * 5 + [everywhere(middle)] * 8 + [everywhere(high)] * 4
    )
  else:
    assert after[0] == by_dpc(low, high)
    chosen = {w for step in after for layer in step.values() for w in layer[:2]}
    assert len(set(map(str, after))) > 2
    assert low <= min(chosen) and max(chosen) <= high
  runs.assert_is_what_ran(workdir, result, make_config(method))
  assert result.summary["compile_count"] == 1
  assert (result.summary["b_min"], result.summary["b_max"]) == (low, high)
  # And the run that was stopped right there finds the same.
  resumed = runs.train(make_config(method), tmp_path)
  runs.assert_same_run(done(method), (tmp_path, resumed))


def model(method):
  parts = runs.parts_of(make_config(method))
  return parts.model, parts.feed.sample


def test_what_is_written_and_told(done, tmp_path):
  workdir, result = done("dpc")
  stopped = runs.train(make_config("dpc"), tmp_path, stop=FOUND_AT)
  found = bounds_of(stopped.state)
  there = auto_bounds.read(workdir)
  assert there == {
    "step": FOUND_AT,
    "b_min": found.b_min,
    "b_max": found.b_max,
    "mean": {str(b): value for b, value in found.mean.items()},
    "worst": {str(b): [*pair] for b, pair in found.worst.items()},
  }
  assert list(there["mean"]) == [str(b) for b in range(2, 9)]
  reason = f"bounds {found.b_min}..{found.b_max}"
  assert runs.lines_of(workdir) == [
    {"step": 0, "path": path, "old": None, "new": [8, 8, 8], "reason": "dpc"}
    for path in runs.CAPACITIES
  ] + [
    {
      "step": FOUND_AT,
      "path": path,
      "old": [8, 8, 8],
      "new": new,
      "reason": reason,
    }
    for path, new in by_dpc(found.b_min, found.b_max).items()
    if new != [8, 8, 8]
  ]
  assert (
    f"bounds of the weights at step {FOUND_AT}: {found.b_min} bits (mean"
    f" similarity {found.mean[found.b_min]:.5f}) to {found.b_max} bits"
  ) in result.output
  assert result.output.count("bounds of the weights") == 1


# Right at the bounds is above, for every method.
@pytest.mark.parametrize("method", ["dpc", "pfq", "adaptive"])
@pytest.mark.parametrize("step", [FOUND_AT - 1, FOUND_AT + 1, FOUND_AT + 2])
def test_stopped_and_resumed(done, tmp_path, method, step):
  runs.train(make_config(method), tmp_path, stop=step)
  assert (auto_bounds.read(tmp_path) is None) == (step < FOUND_AT)
  resumed = runs.train(make_config(method), tmp_path)
  assert ("bounds of the weights" in resumed.output) == (step < FOUND_AT)
  runs.assert_same_run(done(method), (tmp_path, resumed))


def test_killed_and_found_again(done, tmp_path):
  config = make_config("adaptive")
  runs.train(config, tmp_path, stop=FOUND_AT - 1)
  runs.train(config, tmp_path, kill=FOUND_AT + 3)
  assert auto_bounds.read(tmp_path)
  resumed = runs.train(config, tmp_path)
  assert f"the checkpoint of step {FOUND_AT - 1}" in resumed.output
  runs.assert_same_run(done("adaptive"), (tmp_path, resumed))


def test_of_the_initial_weights(tmp_path):
  config = make_config("pfq", steps=2, **{"precision.bounds_step": 0})
  result = runs.train(config, tmp_path)
  programs = runs.programs_of(config)
  found = bounds_of(programs.init())
  assert auto_bounds.read(tmp_path)["step"] == 0
  widths = runs.widths_by_step(tmp_path, 2)
  assert widths == [everywhere(found.b_min)] * 2
  assert {x["reason"] for x in runs.lines_of(tmp_path)} == {
    f"bounds {found.b_min}..{found.b_max}"
  }
  runs.assert_is_what_ran(tmp_path, result, config)


def test_a_width_for_all_layers_has_no_bounds(tmp_path):
  # The last step is too late where there are bounds.
  config = make_config("static8", steps=2, **{"precision.bounds_step": 2})
  result = runs.train(config, tmp_path)
  assert not (tmp_path / "found_bounds.json").exists()
  assert runs.widths_by_step(tmp_path, 2) == [everywhere(8)] * 2
  assert "b_min" not in result.summary
  with runs.patched():
    build.build(make_config("float", steps=2))
    with pytest.raises(config_lib.ConfigError, match=r"bounds_step = 3: must"):
      build.build(make_config("dpc", steps=3))


def test_thresholds_out_of_reach_end_the_run_in_one_line(tmp_path):
  """b_max of the config is the widest width that is looked at."""
  config = make_config("dpc", **{"precision.b_max": 4})
  with runs.patched(), pytest.raises(config_lib.ConfigError) as caught:
    loop.train_and_evaluate(config, tmp_path)
  message = str(caught.value)
  assert message.startswith(
    "config.precision: tau_max = 0.9995: no width of 2, 3, 4 reaches it"
  )
  assert "lower tau_max or allow wider widths" in message
  assert "\n" not in message
  assert not (tmp_path / "summary.json").exists()
  assert not (tmp_path / "found_bounds.json").exists()


@pytest.mark.parametrize(("step", "epochs"), [(0, 0), (3, 1), (4, 1), (9, 3)])
def test_the_reference_waits_for_gradients_at_the_new_widths(step, epochs):
  parts = build.build(
    make_config("adaptive", **{"precision.bounds_step": step})
  )
  settings = parts.schedule_state(3, 8).settings
  assert int(settings.warmup) == 1 + epochs
  assert (int(settings.low), int(settings.high)) == (3, 8)


def test_a_budget_is_of_what_comes_after_the_bounds():
  parts = build.build(
    make_config("adaptive", **{"precision.adaptive.budget": 0.9})
  )
  assert float(parts.schedule_state(3, 8).settings.budget) == pytest.approx(
    0.9, abs=1e-4
  )
