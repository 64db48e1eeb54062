"""ImageNet's path through the loop: decoded in workers, resumed, exact."""

import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.data import imagenet
from dpc_jax.training import build, feed, loop
from dpc_jax.training import config as config_lib
from tests import compiling
from tests.training import tiny

pytestmark = pytest.mark.usefixtures("fast_compiler")


def make_config(**changes):
  return tiny.make_config(
    **{
      "data.name": "imagenet2012",
      "data.fake": True,
      "data.holdout": 10,
      "data.image_size": 16,
      "batch_size": 8,
      "eval_batch_size": 16,
      "eval_every": 6,
    }
    | changes
  )


@pytest.fixture(scope="module", autouse=True)
def tiny_in_the_table():
  tiny.register()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """An undisturbed run, decoded in threads, and its summary."""
  workdir = tmp_path_factory.mktemp("whole")
  with compiling.fast():
    return workdir, loop.train_and_evaluate(make_config(), workdir)


def test_workers_and_a_stop_change_nothing(whole, tmp_path):
  """Half in a worker process, then on in threads of this one."""
  config = make_config(**{"data.workers": 1})
  parts = build.build(config)
  config_lib.claim_workdir(parts.config, tmp_path)
  run = loop._Run(parts, tmp_path)
  try:
    assert run.train(lambda step: step == 4) is None
  finally:
    run.close()
  config = make_config()
  summary = loop.train_and_evaluate(config, tmp_path)
  reference, expected = whole
  assert summary["config_hash"] == expected["config_hash"]
  tiny.assert_same(
    tiny.saved_state(config, reference, 6),
    tiny.saved_state(config, tmp_path, 6),
  )
  lines = [
    tiny.read_lines(path / "metrics.jsonl", "images_per_second")
    for path in (reference, tmp_path)
  ]
  # Steps 1 to 4 are one interval of the log in both.
  assert lines[0] == lines[1]


def test_evaluation_is_exact_on_a_split_of_no_round_size(whole):
  workdir, summary = whole
  config = make_config()
  parts = build.build(config)
  test = parts.data.splits["test"]
  assert len(test) % 16
  state = build.checkpoint.Checkpoints(workdir, keep=20)
  saved, _ = state.restore(6, tiny.abstract(parts))
  state.close()
  (rows,) = imagenet.eval_batches(test, batch_size=len(test), image_size=16)
  assert rows["mask"].all()
  logits = parts.model.apply(
    {"params": saved.params, **saved.model_state},
    feed.make_prepare(config, parts.data)(jnp.asarray(rows["image"]), None),
  )
  right = np.argmax(logits, -1) == rows["label"]
  assert summary["test_accuracy"] == pytest.approx(right.mean())
  logits = np.asarray(logits, np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  loss = -log_p[np.arange(len(log_p)), rows["label"]].mean()
  (line,) = (
    x
    for x in tiny.read_lines(workdir / "metrics.jsonl")
    if x["split"] == "test"
  )
  assert line["loss"] == pytest.approx(loss, rel=1e-5)
