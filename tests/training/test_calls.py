"""Several steps in one call: the same steps, logs and saves, cut or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.training import build, calls, notes, stacked
from dpc_jax.training import config as config_lib
from dpc_jax.training import step as step_lib
from dpc_jax.training import tasks as tasks_lib
from tests import compiling
from tests.training import runs, tiny


def make_config(size=1, method="cpt", **changes):
  """19 steps; with 4 a call, every boundary cuts one."""
  return tiny.make_config(
    method,
    **{
      "steps": 19,
      "log_every": 6,
      "eval_every": 7,
      "checkpoint_every": 9,
      "steps_per_call": size,
      "data.augment": True,
      "model.dropout": 0.3,
      "precision.cycles": 2,
    }
    | changes,
  )


def cuts(config):
  """The steps at which the calls of a run end."""
  found = [0]
  while found[-1] < config.steps:
    found.append(calls.end(config, found[-1]))
  return found[1:]


class TestWhereCallsEnd:
  def test_with_one_step_a_call(self):
    assert cuts(make_config()) == list(range(1, 20))

  def test_at_everything_that_the_host_does(self):
    assert cuts(make_config(4)) == [4, 6, 7, 9, 12, 14, 18, 19]

  def test_a_remainder(self):
    config = make_config(
      8, steps=449, log_every=100, eval_every=449, checkpoint_every=1_000
    )
    ends = cuts(config)
    assert ends[-2:] == [448, 449]
    assert {100, 200, 300, 400} <= set(ends)
    assert max(np.diff([0, *ends])) == 8
    assert len(ends) == 4 * 13 + 7

  def test_where_bounds_are_looked_for(self):
    config = make_config(
      8,
      "dpc",
      steps=19,
      log_every=19,
      eval_every=19,
      checkpoint_every=19,
      **{"precision.bounds": "auto", "precision.bounds_step": 3},
    )
    assert cuts(config) == [3, 11, 19]
    config.precision.bounds = None
    assert cuts(config) == [8, 16, 19]


class TestTheLoopOfSteps:
  """On integers, where nothing rounds."""

  @staticmethod
  def train_step(state, batch):
    state = {"x": 3 * state["x"] + jnp.sum(batch["image"])}
    loss = state["x"].astype(jnp.float32)
    return state, tasks_lib.Metrics(loss=loss, count=jnp.float32(2))

  @pytest.mark.parametrize("count", [1, 3, 4])
  def test_is_step_after_step(self, count):
    batches = {"image": jnp.arange(8, dtype=jnp.int32).reshape(4, 2)}
    state = wanted = {"x": jnp.int32(5)}
    losses = []
    for i in range(count):
      wanted, metrics = self.train_step(wanted, {"image": batches["image"][i]})
      losses.append(metrics.loss)
    run = jax.jit(step_lib.make_train_steps(self.train_step))
    state, metrics = run(state, batches, jnp.int32(count))
    assert state == wanted
    np.testing.assert_array_equal(metrics.loss[:count], losses)
    np.testing.assert_array_equal(metrics.count[:count], 2)
    np.testing.assert_array_equal(metrics.count[count:], 0)
    steps = calls.per_step([(metrics, count)])
    assert [m.loss for m in steps] == losses
    assert steps[0].correct is None

  def test_one_program_serves_every_count(self):
    traces = []

    def counted(*arguments):
      traces.append(1)
      return step_lib.make_train_steps(self.train_step)(*arguments)

    run = jax.jit(counted)
    batches = {"image": jnp.ones((4, 2), jnp.int32)}
    for count in (4, 1, 2):
      run({"x": jnp.int32(0)}, batches, jnp.int32(count))
    assert len(traces) == 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """(workdir, result) of runs that nothing stops, by steps_per_call."""
  found = {}
  with compiling.fast():
    for size in (1, 4):
      workdir = tmp_path_factory.mktemp("whole") / "run"
      found[size] = (workdir, runs.train(make_config(size), workdir))
  return found


def train_with(compiled, config, workdir):
  """Trains by the programs of another config, which must be the same."""
  programs = runs.programs_of(compiled)
  with pytest.MonkeyPatch.context() as patch:
    key = runs._key(runs.parts_of(config).config)
    patch.setitem(runs._compiled, key, programs)
    return runs.train(config, workdir)


def test_a_run_is_the_same_but_for_its_rounding(whole):
  """On CPUs XLA rounds otherwise in a loop, and quantized training is chaotic.

  What does not round is the same: the steps of all lines, the widths of each
  step, the cost. The batches and the noise are, too: the losses tell.
  """
  (one_dir, one), (many_dir, many) = whole[1], whole[4]
  assert runs.lines_of(one_dir) == runs.lines_of(many_dir)
  assert len(runs.lines_of(one_dir)) > 4
  for name in ("gbitops", "mean_bits", "bits", "steps", "compile_count"):
    assert one.summary[name] == many.summary[name], name
  assert many.summary["compile_count"] == 1
  assert int(many.state.step) == 19
  lines = [tiny.read_lines(d / "metrics.jsonl") for d in (one_dir, many_dir)]
  for a, b in zip(*lines, strict=True):
    assert (a["step"], a["split"]) == (b["step"], b["split"])
    assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)
  saved = [
    {p.name for p in (d / "checkpoints").iterdir()} for d in (one_dir, many_dir)
  ]
  assert saved[0] == saved[1] == {"9", "18", "19"}


def test_a_run_that_is_stopped_goes_on_bit_for_bit(whole, tmp_path):
  """SIGTERM inside a call: its end is saved, and other cuts change nothing."""
  config = make_config(4)
  stopped = runs.train(config, tmp_path, stop=10)
  assert "stopped by SIGTERM at step 12; saved" in stopped.output
  assert stopped.summary is None
  again = runs.train(config, tmp_path)
  assert "going on from the checkpoint of step 12" in again.output
  runs.assert_same_run((tmp_path, again), whole[4])


def test_how_calls_are_cut_changes_no_bit(whole, tmp_path):
  """The loop's program is the same for 1 step and for 4."""
  fine = train_with(make_config(4), make_config(4, log_every=1), tmp_path)
  tiny.assert_same(tiny.leaves(fine.state), tiny.leaves(whole[4][1].state))
  lines = tiny.read_lines(tmp_path / "metrics.jsonl")
  losses = [x["loss"] for x in lines if x["split"] == "train"]
  coarse = tiny.read_lines(whole[4][0] / "metrics.jsonl")
  coarse = [x for x in coarse if x["split"] == "train"]
  assert [x["step"] for x in coarse] == [6, 12, 18, 19]
  assert coarse[0]["loss"] == pytest.approx(np.mean(losses[:6]), rel=1e-6)
  assert coarse[3]["loss"] == losses[18]


def test_one_step_of_the_loop_is_a_train_step(whole):
  config = make_config(4)
  programs = runs.programs_of(config)
  parts = runs.parts_of(config)
  batches = calls.Batches(parts, 0)
  first = jax.tree.map(lambda x: x[0], batches.take(1))
  batches.close()
  state, metrics = programs.train_step(programs.init(), first)
  assert int(state.step) == 1
  assert np.ndim(metrics.loss) == 0 and metrics.count == 16


@pytest.fixture(scope="module")
def parts():
  """{(steps_per_call, data.on_device): parts} on 8 devices."""
  with runs.patched():
    return {
      (size, where): build.build(
        make_config(size, **{"mesh.data": 8, "data.on_device": where})
      )
      for size in (1, 3)
      for where in (False, True)
    }


class TestDataOnTheDevices:
  @pytest.mark.parametrize("size", [1, 3])
  def test_the_batches_are_those_of_the_host(self, parts, size):
    host, device = (calls.Batches(parts[size, w], 4) for w in (False, True))
    for count in (size, 1, size):
      a, b = host.take(count), device.take(count)
      assert a.keys() == b.keys()
      for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].sharding == b[name].sharding
        got, wanted = np.asarray(b[name]), np.asarray(a[name])
        if size > 1:
          got, wanted = got[:count], wanted[:count]
        np.testing.assert_array_equal(got, wanted)
    host.close()
    device.close()

  def test_every_device_takes_its_rows_alone(self, parts):
    batches = calls.Batches(parts[3, True], 0)
    rows = stacked.put(
      {"row": np.zeros((3, 16), np.int32)}, parts[3, True].mesh
    )
    text = (
      batches._gather.lower(batches._arrays, rows["row"]).compile().as_text()
    )
    for collective in ("all-gather", "all-reduce", "all-to-all", "permute("):
      assert collective not in text
    batches.close()

  def test_what_none_means(self, monkeypatch):
    config = make_config()
    with runs.patched():
      assert build.build(config).feed.resident is None
      monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
      resident = build.build(config).feed.resident
      assert resident.arrays["image"].shape == (1437, 8, 8, 1)
      monkeypatch.setattr(build.feed_lib, "_MOST_ON_DEVICE", 1000)
      assert build.build(config).feed.resident is None

  def test_a_run_is_the_same(self, whole, tmp_path):
    """Bit for bit: the train step's program is."""
    config = make_config(**{"data.on_device": True})
    result = train_with(make_config(), config, tmp_path)
    tiny.assert_same(tiny.leaves(result.state), tiny.leaves(whole[1][1].state))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"steps_per_call": 0},
      r"config\.steps_per_call = 0: must be in 1\.\.1024: a call's batches",
    ),
    (
      {"steps_per_call": 1025},
      r"config\.steps_per_call = 1025: must be in 1\.\.1024: a call's batches",
    ),
    (
      {
        "data.name": "ptb",
        "data.fake": True,
        "data.unroll": 5,
        "data.augment": None,
        "data.on_device": True,
        "model.name": "lstm_lm",
        "model.dropout": 0.0,
      },
      r"config\.data\.on_device = True: means nothing for ptb; leave it out",
    ),
  ],
)
def test_mistakes(changes, message):
  with pytest.raises(config_lib.ConfigError, match=message):
    build.build(make_config(**changes))


def test_the_console_names_the_cache():
  programs = runs.programs_of(make_config())._replace(seconds=2.0, cached=True)
  line = "compiled in 2.0 s, the train step from the cache"
  assert notes.compiled(programs) == line
