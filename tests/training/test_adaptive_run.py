"""Methods that decide on the way, in whole runs: adaptive DPC and PFQ."""

import itertools

import jax
import numpy as np
import pytest

import dpc_jax as dpc
from dpc_jax.training import bits_log, sharding, summary
from tests.training import runs, tiny

# Four steps an epoch: decisions at 4, 8, ..., 28.
EPOCH = 4
STEPS = 32
BOUNDS = (4, 12)
THRESHOLD = 0.01
RULE = {
  # Of so few steps no layer's mean gradient can be told from noise.
  "precision.adaptive.signal": "variance",
  "precision.adaptive.warmup": 1,
  "precision.adaptive.patience": 1,
  "precision.adaptive.threshold": THRESHOLD,
  "precision.adaptive.freeze": 0.8,  # the last move may come at step 25
}


def make_config(method="adaptive", **changes):
  return tiny.make_config(
    method,
    **{
      "steps": STEPS,
      "data.train_size": 16 * EPOCH,
      "log_every": 5,
      "eval_every": 50,
      "checkpoint_every": 50,
      "optimizer.schedule": "constant",
      # Room for moves either way.
      "precision.b_min": BOUNDS[0],
      "precision.b_max": BOUNDS[1],
      **RULE,
      **changes,
    },
  )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("adaptive")
  return workdir, runs.train(make_config(), workdir)


def test_the_log_holds_the_first_widths_and_every_move(undisturbed):
  workdir, result = undisturbed
  lines = runs.lines_of(workdir)
  widths = dpc.dpc_bit_widths(runs.CAPACITIES, *BOUNDS)
  assert lines[:2] == [
    {
      "step": 0,
      "path": path,
      "old": None,
      "new": [b, b, 8],
      "reason": "adaptive",
    }
    for path, b in widths.items()
  ]
  moves = lines[2:]
  assert len(moves) >= 4
  assert {line["reason"] for line in moves} >= {"noisy", "stable"}
  for line in moves:
    assert list(line) == ["step", "path", "old", "new", "reason", "signal"]
    # The first decision takes the reference, and the last is after the freeze.
    assert line["step"] in range(2 * EPOCH, 25, EPOCH)
    change = line["new"][0] - line["old"][0]
    assert line["new"] == [line["old"][0] + change] * 2 + [8]
    if line["reason"] == "noisy":
      assert line["signal"] > THRESHOLD
      assert change == 1
    elif line["reason"] == "stable":
      assert line["signal"] < -THRESHOLD
      assert change == -1
    else:
      assert line["reason"] == "over budget"
  runs.assert_is_what_ran(workdir, result, make_config())
  assert result.summary["compile_count"] == 1


def test_no_step_costs_more_than_one_of_dpc(undisturbed):
  workdir, _ = undisturbed
  costs = runs.parts_of(make_config()).costs
  totals = [
    dpc.bitops(costs, runs.as_bits(widths)).total
    for widths in runs.widths_by_step(workdir, STEPS)
  ]
  assert max(totals) == totals[0]
  assert min(totals) < totals[0]


def test_every_decision_is_in_signals_jsonl(undisturbed):
  workdir, _ = undisturbed
  lines = runs.lines_of(workdir, bits_log.SIGNALS)
  signals = {line["step"]: line["signals"] for line in lines}
  assert list(signals) == list(range(2 * EPOCH, STEPS, EPOCH))
  for line in runs.lines_of(workdir)[2:]:
    assert signals[line["step"]][line["path"]] == line["signal"]


def test_moves_are_told(undisturbed):
  workdir, result = undisturbed
  moves = runs.lines_of(workdir)[2:]
  told = [x for x in result.output.splitlines() if "bits from step" in x]
  assert told == [f"[tiny adaptive] {x}" for x in summary.moves_text(moves)]
  steps = sorted({line["step"] for line in moves})
  assert [int(x.split("step ")[1].split(":")[0]) for x in told] == steps


def test_the_words_of_moves():
  several = [
    {
      "step": 4,
      "path": f"layer{i}",
      "old": [8, 4, 8],
      "new": [8, 3, 8],
      "reason": "stable",
    }
    for i in range(8)
  ]
  (text,) = summary.moves_text(several)
  # Of set weights the activations are told; of many moves a few.
  assert text.startswith("bits from step 4: layer0 4->3 (stable), layer1 4->3")
  assert "layer5" in text
  assert text.endswith(" and 2 more, in bits.jsonl")
  single = {"old": [8, 8, 8], "new": [7, 7, 8], "reason": "stable"}
  stacked = {"old": [[3, 4], [3, 4], [8, 8]], "new": [[3, 5], [3, 5], [8, 8]]}
  assert summary.moves_text(
    [
      {"step": 8, "path": "a", **single, "signal": -0.256},
      {"step": 8, "path": "b", **single, "signal": None},
      {
        "step": 12,
        "path": "c",
        **stacked,
        "reason": "noisy (1)",
        "signal": [0.0, 0.5],
      },
    ]
  ) == [
    "bits from step 8: a 8->7 (stable -0.26), b 8->7 (stable)",
    "bits from step 12: c [3, 4]->[3, 5] (noisy (1))",
  ]
  assert summary.moves_text([]) == []


# Between two decisions, a step before, right before and right after one.
@pytest.mark.parametrize("offset", [-2, -1, 0, 1])
def test_stopped_and_resumed(undisturbed, tmp_path, offset):
  lines = runs.lines_of(undisturbed[0])
  step = lines[4]["step"] + offset
  stopped = runs.train(make_config(), tmp_path, stop=step)
  assert f"stopped by SIGTERM at step {step}; saved" in stopped.output
  # A decision is the first act of the step that follows it.
  assert runs.lines_of(tmp_path) == [x for x in lines if x["step"] < step]
  resumed = runs.train(make_config(), tmp_path)
  assert f"going on from the checkpoint of step {step}" in resumed.output
  runs.assert_same_run(undisturbed, (tmp_path, resumed))


def test_killed_and_resumed(undisturbed, tmp_path):
  """Moves past the save are cut, and made again."""
  config = make_config()
  end = runs.lines_of(undisturbed[0])[-1]["step"]
  runs.train(config, tmp_path, stop=end - EPOCH - 2)
  runs.train(config, tmp_path, kill=end + 2)
  for name in ("bits.jsonl", bits_log.SIGNALS):
    # Written up to the log of a step that comes before the kill.
    assert runs.lines_of(tmp_path, name)[-1]["step"] >= end - EPOCH
  resumed = runs.train(config, tmp_path)
  assert f"the checkpoint of step {end - EPOCH - 2}" in resumed.output
  runs.assert_same_run(undisturbed, (tmp_path, resumed))


def test_one_seed_makes_the_same_moves(undisturbed, tmp_path):
  again = runs.train(make_config(), tmp_path, compiles=True)
  runs.assert_same_run(undisturbed, (tmp_path, again))


def test_every_device_has_the_same_statistics_and_bits(tmp_path):
  config = make_config(**{"mesh.data": 8})
  result = runs.train(config, tmp_path)
  assert any(line["step"] > 0 for line in runs.lines_of(tmp_path))
  runs.assert_is_what_ran(tmp_path, result, config)
  state = result.state
  known = dpc.gradient_statistics(state.opt_state)
  assert {s.count.item() for s in known.values()} == {STEPS}
  for x in jax.tree.leaves(
    (
      state.schedule_state,
      state.opt_state,
      state.model_state["precision"],
      state.cost,
      state.loss,
      known,
    )
  ):
    copies = [np.asarray(shard.data) for shard in x.addressable_shards]
    assert len(copies) == 8
    for copy in copies:
      assert copy.shape == x.shape
      np.testing.assert_array_equal(copy, copies[0])


def test_statistics_are_those_of_the_whole_gradient():
  """Of eight devices as of one, in float: quantized runs are chaotic."""
  names = ("weights", "activations", "gradients")
  config = make_config(**{f"precision.{name}": 32 for name in names})
  in_float = jax.device_get(runs.parts_of(config).schedule_state(*BOUNDS))
  found = []
  for devices in (1, 8):
    config = make_config(**{"mesh.data": devices})
    parts, programs = runs.parts_of(config), runs.programs_of(config)
    replicated = sharding.replicated(parts.mesh)
    state = programs.init().replace(
      schedule_state=jax.device_put(in_float, replicated)
    )
    for rows in itertools.islice(parts.feed.train(0, STEPS), 5):
      state, _ = programs.train_step(
        state, sharding.put_batch(rows, parts.mesh)
      )
    assert runs.widths_of(state)["first"] == [32, 32, 32]
    known = dpc.gradient_statistics(state.opt_state)
    found.append(jax.device_get(known))
  for path in runs.CAPACITIES:
    one, eight = (statistics[path] for statistics in found)
    assert one.count == eight.count == 5
    for name in ("norm", "variance"):
      np.testing.assert_allclose(
        getattr(eight, name), getattr(one, name), rtol=1e-3, err_msg=name
      )


def test_moves_of_a_state_are_those_of_the_log(undisturbed):
  workdir, result = undisturbed
  schedule = runs.parts_of(make_config()).schedule
  moves = schedule.moves(jax.device_get(result.state.schedule_state))
  assert [move._asdict() for move in moves] == runs.lines_of(workdir)[2:]


@pytest.fixture(scope="module")
def progressive(tmp_path_factory):
  """PFQ, which every two epochs takes the loss for flat."""
  config = make_config(
    "pfq",
    **{
      "steps": 24,
      "log_every": 1,
      "precision.b_min": 3,
      "precision.b_max": 8,
      "precision.pfq.stages": 3,
      "precision.pfq.window": 2,
      "precision.pfq.threshold": 9.0,
      "precision.pfq.decay": 0.5,
    },
  )
  workdir = tmp_path_factory.mktemp("pfq")
  return config, workdir, runs.train(config, workdir)


def test_switches_are_logged_with_their_reason(progressive):
  config, workdir, result = progressive
  widths = [w["first"][0] for w in runs.widths_by_step(workdir, 24)]
  assert widths == [3] * 8 + [6] * 8 + [8] * 8
  moves = runs.lines_of(workdir)[2:]
  assert [(x["step"], x["path"]) for x in moves] == [
    (8, "first"),
    (8, "second"),
    (16, "first"),
    (16, "second"),
  ]
  # Of the losses of whole epochs, each heard by the step that comes next.
  lines = runs.lines_of(workdir, "metrics.jsonl")
  losses = np.array([x["loss"] for x in lines if x["split"] == "train"])
  epochs = losses.reshape(-1, EPOCH).mean(1)
  for line, last, threshold, entry in (
    (moves[0], 2, "9", "2 of 3"),
    (moves[2], 4, "4.5", "3 of 3"),
  ):
    scale = epochs[:last].mean()
    indicator = abs(epochs[last - 2] - epochs[last - 1]) / scale
    assert line["signal"] == pytest.approx(indicator, abs=1e-6)
    assert line["reason"].startswith("loss plateau: indicator ")
    assert line["reason"].endswith(f"at most {threshold}; entry {entry}")
  assert float(result.state.loss) == pytest.approx(losses[-1], rel=1e-6)
  runs.assert_is_what_ran(workdir, result, config)
  assert "bits from step 8: first 3->6 (loss plateau" in result.output


@pytest.mark.parametrize("step", [7, 8, 9])
def test_stopped_and_resumed_at_a_switch(progressive, tmp_path, step):
  config, workdir, result = progressive
  runs.train(config, tmp_path, stop=step)
  resumed = runs.train(config, tmp_path)
  runs.assert_same_run((workdir, result), (tmp_path, resumed))
