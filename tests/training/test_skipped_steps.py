"""Steps that are not finite are left out; layers that died are told."""

import contextlib
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpc_jax.quant import grids
from dpc_jax.training import build, checkpoint, health, loop
from dpc_jax.training import config as config_lib
from dpc_jax.training import state as state_lib
from dpc_jax.training import step as step_lib
from tests.training import runs, tiny

# First labels of a batch whose loss, or gradient alone, is not finite.
LOSS, GRADIENT = 101, 102
KEPT = (".params", ".opt_state", ".model_state", ".carry", ".loss")


@jax.custom_vjp
def spoil(x, by):
  """`x`, with a gradient that is NaN where `by` is."""
  del by
  return x


spoil.defvjp(lambda x, by: (x, by), lambda by, g: (g + by, jnp.zeros_like(by)))


def make_config(**changes):
  return tiny.make_config(
    **{
      "steps": 8,
      "log_every": 2,
      "eval_every": 8,
      "checkpoint_every": 2,
      "precision.method": "adaptive",
      "data.train_size": 64,
      "precision.adaptive.warmup": 1,
      "max_skipped": 3,
    }
    | changes
  )


@pytest.fixture(scope="module")
def parts():
  """A run with batches that say what goes wrong."""
  parts = runs.parts_of(make_config())
  outputs = parts.task.outputs

  def spoilt(output, batch):
    mark = batch["label"][0]
    label = jnp.where(batch["label"] > 100, 0, batch["label"])
    bad = jnp.float32(np.nan)
    output = spoil(output, jnp.where(mark == GRADIENT, bad, 0.0))
    metrics, carry = outputs(output, batch | {"label": label})
    loss = metrics.loss * jnp.where(mark == LOSS, bad, 1.0)
    return metrics.replace(loss=loss), carry

  return parts._replace(task=parts.task._replace(outputs=spoilt))


@pytest.fixture(scope="module")
def programs(parts):
  return build.compile_programs(parts)


def train(parts, programs, workdir, marks, stop=None, max_skipped=3):
  """(summary, state, output) of a run; `marks` are {step: mark}."""

  def train_step(state, batch):
    step = int(state.step)
    states.append(tiny.leaves(state))
    if step in marks:
      label = batch["label"].at[0].set(marks[step])
      label = jax.device_put(label, batch["label"].sharding)
      batch = batch | {"label": label}
    return programs.train_step(state, batch)

  states = []
  output = io.StringIO()
  changed = config_lib.ml_collections.ConfigDict(parts.config.to_dict())
  changed.max_skipped = max_skipped
  parts = parts._replace(config=changed)
  with runs.patched(), pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      build,
      "compile_programs",
      lambda parts: programs._replace(train_step=train_step),
    )
    with contextlib.redirect_stdout(output):
      run = loop._Run(parts, workdir)
      try:
        summary = run.train(lambda step: step == stop)
      finally:
        run.close()
  states.append(tiny.leaves(run.state))
  return summary, states, output.getvalue()


@pytest.mark.parametrize("mark", [LOSS, GRADIENT])
def test_a_skipped_step(parts, programs, tmp_path, mark):
  """All stays but what does not depend on the batch."""
  count = programs.traces[0]
  summary, states, output = train(parts, programs, tmp_path, {2: mark, 4: mark})
  assert programs.traces[0] == count == 1
  for step in (2, 4):
    before, after = states[step], states[step + 1]
    for name in before:
      equal = np.array_equal(before[name], after[name], equal_nan=True)
      if name.startswith(KEPT) and "precision" not in name:
        assert equal, name
      elif name in (".step", ".skips.total", ".skips.in_row"):
        assert after[name] == before[name] + 1
      elif name.startswith(".cost"):
        assert not equal or not np.any(after[name]), name
  # The others are taken, and everything stays finite.
  for step in (0, 1, 3, 5, 6, 7):
    kernel = ".params['second']['kernel']"
    assert not np.array_equal(states[step][kernel], states[step + 1][kernel])
    assert states[step + 1][".skips.in_row"] == 0
  for state in states[1:]:
    assert all(
      np.isfinite(x).all() for k, x in state.items() if k.startswith(KEPT)
    )
  assert states[-1][".skips.leaf"] == (0 if mark == LOSS else 1)
  # The host says so.
  assert summary["skipped_steps"] == 2
  lines = [
    line
    for line in tiny.read_lines(tmp_path / "metrics.jsonl")
    if line["split"] == "train"
  ]
  assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 2]
  assert all(np.isfinite(line["loss"]) for line in lines)
  what = "the loss" if mark == LOSS else "the gradient of classifier/bias"
  for step, total in ((4, 1), (6, 2)):
    line = (
      f"warning: 1 step skipped up to step {step}, {what} was not finite;"
      f" {total} in all"
    )
    assert output.count(line) == 1
  assert output.count("warning") == 2


@pytest.mark.usefixtures("fast_compiler")
def test_what_a_skipped_step_moves_on_and_what_not(parts):
  """The widths, which change at every step here, but no range."""
  schedule = tiny.cyclic(period=1)
  model = tiny.Tiny(10, grids.Quantization(ranges="delayed"))
  optimizer = optax.sgd(0.1)
  sample = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
  init = state_lib.make_init(model, optimizer, schedule, sample)
  step = jax.jit(
    step_lib.make_train_step(model, optimizer, schedule, parts.task)
  )
  state = jax.jit(init)(jax.random.key(0))
  batches = parts.feed.train(0, 4)
  for i, mark in enumerate([0, GRADIENT, LOSS, 0]):
    batch = next(batches)
    if mark:
      label = np.array(batch["label"])
      label[0] = mark
      batch = batch | {"label": label}
    before, state = state, step(state, batch)[0]
    assert state.skips.in_row == (i if mark else 0)
    assert state.step == state.schedule_state["count"] == i + 1
    assert runs.widths_of(state) == tiny.cyclic_bits(i, period=1)
    assert runs.widths_of(state) != tiny.cyclic_bits(i + 1, period=1)
    assert jnp.all(state.rng == before.rng)
    old, new = (
      tiny.leaves(x.model_state["quant_stats"]) for x in (before, state)
    )
    for name in old:
      # All batches of digits have the input's range.
      if mark:
        assert old[name] == new[name], name
      elif "gradient" in name or "count" in name:
        assert old[name] != new[name], name
  batches.close()


def test_means_are_of_the_steps_that_were_taken(parts, programs, tmp_path):
  losses = []
  for name, marks in (("a", {}), ("b", {1: LOSS})):
    train(parts, programs, tmp_path / name, marks)
    lines = tiny.read_lines(tmp_path / name / "metrics.jsonl")
    losses.append(next(x["loss"] for x in lines if x["split"] == "train"))
  first = programs.init()
  rows = next(parts.feed.train(0, 8))
  batch = loop.sharding.put_batch(rows, parts.mesh)
  _, metrics = programs.train_step(first, batch)
  assert losses[1] == pytest.approx(float(metrics.loss / metrics.count))
  assert losses[0] != losses[1]


def test_no_line_of_an_interval_without_a_step(parts, programs, tmp_path):
  summary, _, _ = train(parts, programs, tmp_path, {2: LOSS, 3: GRADIENT})
  assert summary["skipped_steps"] == 2
  text = (tmp_path / "metrics.jsonl").read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  assert [x["step"] for x in lines if x["split"] == "train"] == [2, 6, 8]
  assert "NaN" not in text


def test_counts_and_state_survive_a_stop(parts, programs, tmp_path):
  marks = {2: LOSS, 3: GRADIENT, 5: LOSS}
  whole = train(parts, programs, tmp_path / "a", marks)
  train(parts, programs, tmp_path / "b", marks, stop=3)
  cut = train(parts, programs, tmp_path / "b", marks)
  tiny.assert_same(cut[1][-1], whole[1][-1])
  assert cut[0]["skipped_steps"] == whole[0]["skipped_steps"] == 3
  assert "1 step skipped up to step 6" in cut[2]
  assert "; 3 in all" in cut[2]


class TestTooMany:
  def fails(self, parts, programs, workdir, marks, max_skipped=3):
    with pytest.raises(loop.DivergedError) as caught:
      train(parts, programs, workdir, marks, max_skipped=max_skipped)
    message = str(caught.value)
    assert "\n" not in message
    return message

  def test_in_a_row(self, parts, programs, tmp_path):
    marks = dict.fromkeys(range(3, 8), GRADIENT)
    message = self.fails(parts, programs, tmp_path, marks)
    assert (
      "the gradient of classifier/bias is not finite, 3 steps in a row at step"
      " 6; the newest checkpoint is of step 4" in message
    )
    # It is good, and the run goes on from it.
    checkpoints = checkpoint.Checkpoints(tmp_path, 1)
    state, _ = checkpoints.restore(4, programs.abstract)
    checkpoints.close()
    assert state_lib.is_finite(state)
    summary, _, _ = train(parts, programs, tmp_path, {})
    assert summary["skipped_steps"] == 1

  def test_not_in_a_row(self, parts, programs, tmp_path):
    marks = dict.fromkeys((1, 2, 4, 5, 7), LOSS)
    summary, _, _ = train(parts, programs, tmp_path, marks)
    assert summary["skipped_steps"] == 5

  def test_none_stops_at_the_first(self, parts, programs, tmp_path):
    """Though the step after it was taken, before the host looked."""
    message = self.fails(parts, programs, tmp_path, {2: LOSS}, None)
    assert "the loss is not finite at step 4; the newest" in message
    assert "checkpoint is of step 2" in message


@pytest.mark.parametrize("value", [0, -1])
def test_a_limit_that_is_none(value):
  with pytest.raises(config_lib.ConfigError, match=r"config\.max_skipped = "):
    config_lib.validate(tiny.make_config(max_skipped=value))


@pytest.mark.parametrize("leaf", range(1, 6))
def test_the_first_leaf_is_named(parts, programs, leaf):
  """With the widths of its layer, if it has any."""
  state = programs.init()
  grads = jax.tree.map(jnp.zeros_like, state.params)
  leaves, tree = jax.tree.flatten(grads)
  for i in (leaf - 1, len(leaves) - 1):
    leaves[i] = leaves[i].at[(0,) * leaves[i].ndim].set(np.inf)
  new = state.replace(step=state.step + 1, loss=jnp.float32(1))
  metrics = loop.metrics_lib.tasks.Metrics(jnp.float32(1), jnp.float32(2))
  kept, metrics = state_lib.keep_if_finite(
    state, new, jax.tree.unflatten(tree, leaves), metrics
  )
  assert kept.skips == (1, 1, leaf)
  assert (metrics.loss, metrics.count, metrics.correct) == (0, 0, None)
  watch = health.Watch(parts, state)
  problem, line = watch.skipped(kept, 1)
  assert problem is None
  widths = state_lib.layer_bits(state)
  path = [
    "classifier/bias",
    "classifier/kernel",
    "first/kernel",
    "norm/bias",
    "norm/scale",
  ][leaf - 1]
  bits = widths.get(path.split("/")[0])
  shown = "" if bits is None else " ({}/{}/{} bits)".format(*bits)
  assert f", the gradient of {path}{shown} was not finite; 1 in all" in line
  assert watch.skipped(kept, 1) == (None, None)


class TestDeadLayers:
  def watched(self, parts, state, *kernels):
    watch = health.Watch(parts, state)
    lines = []
    for kernel in kernels:
      second = state.params["second"] | {"kernel": kernel}
      params = state.params | {"second": second}
      lines.append(watch.dead(state.replace(params=params)))
    return lines

  def test_one_line_at_the_second_look(self, parts, programs):
    state = programs.init()
    kernel = state.params["second"]["kernel"]
    dead = jnp.full_like(kernel, 0.25)
    lines = self.watched(parts, state, kernel, dead, dead, dead)
    widths = "/".join(str(b) for b in state_lib.layer_bits(state)["second"])
    assert lines == [
      [],
      [],
      [
        f"warning: layer second ({widths} bits): all its weights are equal,"
        " which is one code for all; it has died"
      ],
      [],
    ]

  def test_zeros_that_move_are_no_news(self, parts, programs):
    state = programs.init()
    kernel = state.params["second"]["kernel"]
    zeros = jnp.zeros_like(kernel)
    assert self.watched(parts, state, zeros, kernel, zeros) == [[], [], []]

  def test_one_layer_of_a_stack(self):
    """Two layers under `nn.scan`, of which the second is dead."""
    kernel = jnp.stack([jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3))])
    width = jnp.full(2, 8, jnp.int32)
    layer = dict.fromkeys(("weights", "activations", "gradients"), width)
    state = state_lib.TrainState(
      step=jnp.int32(1),
      params={"block": {"kernel": kernel}},
      model_state={"precision": {"block": layer}},
      opt_state=(),
      schedule_state=(),
      cost=(),
      rng=None,
    )
    found = health.equal_weights(state)
    np.testing.assert_array_equal(found["block"], [False, True])

  def test_in_a_run(self, parts, programs, tmp_path):
    """Never an error."""
    init = programs.init

    def died():
      state = init()
      second = {"kernel": jnp.zeros_like(state.params["second"]["kernel"])}
      classifier = jax.tree.map(jnp.zeros_like, state.params["classifier"])
      more = {"second": second, "classifier": classifier}
      return state.replace(params=state.params | more)

    _, _, output = train(parts, programs._replace(init=died), tmp_path, {})
    assert output.count("warning: layer second (") == 1
    assert output.count("warning") == 1
