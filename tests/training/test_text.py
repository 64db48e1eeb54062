"""Language models through the loop: exact evaluation, carry, resumption."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.data import sources
from dpc_jax.training import build, loop, sharding
from tests.training import tiny

pytestmark = pytest.mark.usefixtures("fast_compiler")
LSTM = {
  "data.name": "ptb",
  "data.fake": True,
  "data.unroll": 7,
  "model.name": "lstm_lm",
  "model.width": 4,
  "model.layers": 1,
  "batch_size": 8,
  "eval_batch_size": 3,
}
TRANSFORMER = LSTM | {
  "model.name": "transformer_lm",
  "model.width": 16,
  "model.layers": 2,
  "model.heads": 2,
  "model.mlp_width": 8,
  "model.cutoffs": (20, 60),
}


def make_config(method="dpc", base=LSTM, **changes):
  return tiny.make_config(method, **base | changes)


@pytest.fixture(scope="module")
def text():
  """The made-up corpus, its splits short and of no round length."""
  data = sources.load("ptb", fake=True)
  sizes = {"train": 400, "validation": 101, "test": 67}
  splits = {name: data.splits[name][:n] for name, n in sizes.items()}
  return dataclasses.replace(data, splits=splits)


def evaluate(config, text, state=None):
  """(means of the split test, the state on the host)."""
  run = loop._Run.__new__(loop._Run)
  run.parts = build.build(config, text)
  run.programs = build.compile_programs(run.parts)
  if state is None:
    run.state = run.programs.init()
    for rows in run.parts.feed.train(0, 3):
      batch = sharding.put_batch(rows, run.parts.mesh)
      run.state, _ = run.programs.train_step(run.state, batch)
    key = jax.random.key_data(run.state.rng)
    state = jax.device_get(run.state.replace(rng=key))
  run.state = jax.device_put(
    state.replace(rng=jax.random.wrap_key_data(state.rng), carry=()),
    sharding.replicated(run.parts.mesh),
  )
  zero = run.parts.task.initial_carry(config.batch_size)
  run.state = run.state.replace(
    carry=jax.device_put(zero, sharding.batch(run.parts.mesh))
  )
  return run._evaluate_split("test"), state


def test_evaluation_is_the_likelihood_of_every_token(text):
  """At few bits, whatever the unroll and the devices; then written out."""
  config = make_config()
  means, state = evaluate(config, text)
  for changes in ({"data.unroll": 23}, {"data.unroll": 30, "mesh.data": 8}):
    other, _ = evaluate(make_config(**changes), text, state)
    assert other["loss"] == pytest.approx(means["loss"], rel=1e-6)
  # Three rows of 23, 23 and 21 tokens, each predicted from those before it.
  test = text.splits["test"]
  before = np.concatenate([[text.eos], test[:-1]])
  total = 0.0
  for start in (0, 23, 46):
    rows = slice(start, min(start + 23, 67))
    log_p, _ = build.build(config, text).model.apply(
      {"params": state.params, **state.model_state},
      jnp.asarray(before[None, rows]),
    )
    log_p = np.asarray(log_p, np.float64)[0]
    total -= log_p[np.arange(len(log_p)), test[rows]].sum()
  assert means["loss"] == pytest.approx(total / 67, rel=1e-5)
  assert means["perplexity"] == np.exp(means["loss"])


@pytest.mark.parametrize("base", [LSTM, TRANSFORMER], ids=["lstm", "attention"])
def test_eight_devices_as_one(text, base):
  losses = []
  for devices in (1, 8):
    config = make_config(
      "float", base, **{"mesh.data": devices, "model.dropout": 0.3}
    )
    parts = build.build(config, text)
    programs = build.compile_programs(parts)
    state = programs.init()
    for leaf in jax.tree.leaves(state.carry):
      assert len(leaf.sharding.device_set) == devices
      assert leaf.addressable_shards[0].data.shape[0] == 8 // devices
    losses.append([])
    for rows in parts.feed.train(0, 5):
      state, metrics = programs.train_step(
        state, sharding.put_batch(rows, parts.mesh)
      )
      losses[-1].append(float(metrics.loss / metrics.count))
  assert len(set(losses[0])) == 5
  np.testing.assert_allclose(losses[1], losses[0], atol=1e-5)


def test_a_run_goes_on_with_its_recurrent_state(tmp_path):
  """Stopped inside an epoch, it ends where an undisturbed one does."""
  config = make_config(steps=8, checkpoint_every=5, eval_every=8)
  loop.train_and_evaluate(config, tmp_path / "whole")
  parts = build.build(config)
  build.config_lib.claim_workdir(parts.config, tmp_path / "cut")
  run = loop._Run(parts, tmp_path / "cut")
  try:
    assert run.train(lambda step: step == 5) is None
  finally:
    run.close()
  loop.train_and_evaluate(config, tmp_path / "cut")
  whole, cut = (
    tiny.saved_state(config, tmp_path / name, 8) for name in ("whole", "cut")
  )
  assert any(".carry" in name and np.any(x) for name, x in whole.items())
  tiny.assert_same(whole, cut)


def test_a_run_of_text_writes_perplexities(tmp_path):
  config = make_config(steps=4, eval_every=2, log_every=2)
  summary = loop.train_and_evaluate(config, tmp_path)
  lines = tiny.read_lines(tmp_path / "metrics.jsonl")
  for line in lines:
    assert line["perplexity"] == pytest.approx(np.exp(line["loss"]))
    assert line["tokens_per_second"] > 0 and "accuracy" not in line
  test = {x["step"]: x["perplexity"] for x in lines if x["split"] == "test"}
  validation = {
    x["step"]: x["perplexity"] for x in lines if x["split"] == "validation"
  }
  best = min(validation, key=validation.get)
  assert summary["metric"] == "perplexity"
  assert summary["test_perplexity"] == test[4]
  assert summary["best_test_perplexity"] == min(test.values())
  assert summary["test_perplexity_at_best_validation"] == test[best]


def test_models_and_data_of_different_kinds(text):
  with pytest.raises(build.config_lib.ConfigError) as caught:
    build.build(make_config(**{"model.name": "resnet8"}), text)
  assert "'resnet8': reads images, but ptb is text" in str(caught.value)
  with pytest.raises(build.config_lib.ConfigError) as caught:
    build.build(make_config(**{"data.name": "digits"}))
  assert "'lstm_lm': reads text, but digits is images" in str(caught.value)


@pytest.mark.parametrize("field", ["batch_size", "eval_batch_size"])
def test_more_rows_than_tokens(text, field):
  """Before anything compiles: of evaluation too, which comes late."""
  with pytest.raises(
    build.config_lib.ConfigError, match=r"config\.data: |eval_batch_size = 1000"
  ) as e:
    build.build(make_config(**{field: 1000}), text)
  assert "\n" not in str(e.value)


def test_an_unroll_longer_than_a_row(text):
  with pytest.raises(build.config_lib.ConfigError) as caught:
    build.build(make_config(**{"data.unroll": 51}), text)
  assert "config.data.unroll = 51: the 8 rows of a batch have 50" in str(
    caught.value
  )
  build.build(make_config(**{"data.unroll": 50}), text)
