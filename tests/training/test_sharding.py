"""Eight devices compute what one computes."""

import jax
import numpy as np
import pytest

from dpc_jax.data import pipeline
from dpc_jax.training import build, sharding
from dpc_jax.training import config as config_lib
from tests.training import tiny, topologies


def train(devices, steps, changes):
  """The metrics of each step, the last state, and the mesh."""
  config = tiny.make_config(
    **{
      "mesh.data": devices,
      "batch_size": 32,
      "data.augment": True,
      "optimizer.learning_rate": 0.02,
      **changes,
    }
  )
  parts = build.build(config)
  programs = build.compile_programs(parts)
  state = programs.init()
  batches = pipeline.TrainBatches(
    parts.data.splits["train"], batch_size=32, seed=0
  )
  losses = []
  for step in range(steps):
    batch = sharding.put_batch(batches.batch(step), parts.mesh)
    state, metrics = programs.train_step(state, batch)
    losses.append(float(metrics.loss) / float(metrics.count))
  return losses, tiny.leaves(state)


def parts_of(state, *names):
  return {k: v for k, v in state.items() if any(name in k for name in names)}


@pytest.mark.parametrize("case", ["float", "width 32"])
def test_eight_devices_as_one(case):
  one, state_of_one = train(1, 5, topologies.CASES[case])
  eight, state_of_eight = train(8, 5, topologies.CASES[case])
  assert len(set(one)) == 5
  np.testing.assert_allclose(eight, one, rtol=0, atol=1e-5)
  a = parts_of(state_of_one, ".params")
  b = parts_of(state_of_eight, ".params")
  assert a
  for name in a:
    np.testing.assert_allclose(a[name], b[name], atol=1e-5, err_msg=name)


def test_eight_devices_as_one_quantized():
  """Rounding ties make it chaotic: the first loss is close, bits are equal."""
  one, state_of_one = train(1, 3, topologies.CASES["dpc"])
  eight, state_of_eight = train(8, 3, topologies.CASES["dpc"])
  assert abs(eight[0] - one[0]) < 1e-3
  np.testing.assert_allclose(eight, one, atol=0.05)
  names = ("'precision'", ".cost", ".schedule_state", ".step", ".rng")
  exact = parts_of(state_of_one, *names)
  assert len(exact) >= 12
  tiny.assert_same(exact, parts_of(state_of_eight, *names))


def test_state_is_replicated_and_the_batch_is_split():
  parts = build.build(tiny.make_config(**{"mesh.data": 8, "batch_size": 32}))
  programs = build.compile_programs(parts)
  rows = pipeline.TrainBatches(
    parts.data.splits["train"], batch_size=32, seed=0
  ).batch(0)
  batch = sharding.put_batch(rows, parts.mesh)
  for name, x in batch.items():
    assert len(x.addressable_shards) == 8
    for i, shard in enumerate(x.addressable_shards):
      assert shard.data.shape[0] == 4
      np.testing.assert_array_equal(shard.data, rows[name][4 * i : 4 * i + 4])
  state = programs.init()
  first = jax.tree.map(lambda x: x.sharding, state)
  state, metrics = programs.train_step(state, batch)
  for x in jax.tree.leaves((state, metrics)):
    assert x.sharding.is_fully_replicated
    assert len(x.sharding.device_set) == 8
  assert jax.tree.map(lambda x: x.sharding, state) == first
  kernel = state.params["first"]["kernel"]
  copies = [np.asarray(shard.data) for shard in kernel.addressable_shards]
  assert all(np.array_equal(copies[0], copy) for copy in copies)


@pytest.mark.parametrize("devices", [0, -1, 9])
def test_a_mesh_that_does_not_fit(devices):
  with pytest.raises(
    config_lib.ConfigError, match=r"mesh\.data = .*use 1\.\.8"
  ):
    sharding.make_mesh(devices)


def test_all_devices_by_default():
  assert sharding.make_mesh().shape == {"data": 8, "fsdp": 1, "tensor": 1}
