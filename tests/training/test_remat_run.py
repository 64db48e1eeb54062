"""Runs whose backward pass computes normalizations anew: `config.remat`."""

import numpy as np
import pytest

from dpc_jax.training import build, checks, sharding
from dpc_jax.training import config as config_lib
from tests.training import tiny


@pytest.fixture(autouse=True, scope="module")
def table():
  tiny.register()


def first_step(remat):
  """(loss, {leaf: value} of the state) after one step of the tiny model."""
  config = tiny.make_config(**{"precision.storage_bits": 8})
  config.remat = remat
  parts = build.build(config)
  programs = build.compile_programs(parts)
  batches = parts.feed.train(0, 1)
  rows = sharding.put_batch(next(batches), parts.mesh)
  batches.close()
  state, metrics = programs.train_step(programs.init(), rows)
  return float(metrics.loss / metrics.count), tiny.leaves(state)


def test_a_step_is_the_step_without_it(fast_compiler):
  loss, want = first_step(None)
  for remat in ("norms", "norms8"):
    got_loss, got = first_step(remat)
    assert got_loss == pytest.approx(loss, rel=1e-6)
    assert got.keys() == want.keys()
    moved = [k for k in want if k.startswith(".params") or "stats" in k]
    # Behind a rounding tie a step of the gradient's grid may differ.
    tolerance = 1e-3 if remat == "norms" else 1e-2
    for name in moved:
      np.testing.assert_allclose(
        got[name], want[name], atol=tolerance * np.abs(want[name]).max()
      )
  # The approximation reaches the step.
  assert any(np.any(got[name] != want[name]) for name in moved)


def test_an_unknown_policy_is_refused():
  config = tiny.make_config(remat="all")
  with pytest.raises(
    checks.ConfigError,
    match=r"^config\.remat = 'all': use one of norms, norms8, or leave it out$",
  ):
    config_lib.validate(config)
