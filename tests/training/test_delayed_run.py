"""Whole runs with the ranges of the step before, and every model's step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpc_jax import models
from dpc_jax.policy import schedules
from dpc_jax.quant import grids
from dpc_jax.training import config_precision, tasks
from dpc_jax.training import state as state_lib
from dpc_jax.training import step as step_lib
from tests.training import runs, tiny, topologies

DELAYED = grids.Quantization(ranges="delayed")
LAYERS = ("first", "second")
PREVIOUS = ("previous_lo", "previous_hi", "gradient_lo", "gradient_hi")


def ranges_of(state):
  """{(layer, name): a previous range's end}, of leaves by path."""
  return {
    (layer, name): state[f".model_state['quant_stats']['{layer}']['{name}']"]
    for layer in LAYERS
    for name in PREVIOUS
  }


def test_a_run_that_stops_goes_on_bit_for_bit(tmp_path):
  config = tiny.make_config(**{"precision.ranges": "delayed"})
  whole = tmp_path / "whole", runs.train(config, tmp_path / "whole")
  runs.train(config, tmp_path / "cut", stop=4)
  cut = tmp_path / "cut", runs.train(config, tmp_path / "cut")
  runs.assert_same_run(cut, whole)
  # Where it went on, the checkpoint had the ranges of the step before.
  saved = ranges_of(tiny.saved_state(config, tmp_path / "cut", 4))
  last = ranges_of(tiny.leaves(cut[1].state))
  for layer in LAYERS:
    for end in ("previous", "gradient"):
      lo, hi = (saved[layer, f"{end}_{x}"] for x in ("lo", "hi"))
      assert np.isfinite(lo) and np.isfinite(hi) and lo < hi
    # Later steps have others. (All batches of digits have the input's.)
    assert saved[layer, "gradient_lo"] != last[layer, "gradient_lo"]


def test_devices_agree():
  """At 16 bits, where a tie that is rounded otherwise does not show."""
  found = {}
  for name, mesh in {
    "one": {"mesh.data": 1},
    "eight": {"mesh.data": 8},
    "split": {"mesh.data": 2, "mesh.fsdp": 4},
  }.items():
    config = topologies.make_config("dpc", mesh)
    config.steps = 3
    config.precision.ranges = "delayed"
    for operand in grids.LayerBits._fields:
      config.precision[operand] = 16
    found[name] = topologies.train(config)[0]
  one = found.pop("one")
  assert len(set(one["losses"])) == 3
  ends = ranges_of(one)
  assert all(ends[x, "gradient_lo"] < ends[x, "gradient_hi"] for x in LAYERS)
  for name, many in found.items():
    assert many.keys() == one.keys()
    for leaf in one:
      np.testing.assert_allclose(
        many[leaf], one[leaf], rtol=1e-3, atol=1e-3, err_msg=f"{name} {leaf}"
      )


# One of each kind: others of the table have more blocks, or are wider. With
# what makes it small enough to trace in a second or two.
MODELS = {
  "resnet8": {},
  "wide_resnet38": {"scan": True},
  "resnet18_imagenet": {"scan": True},
  "mobilenet_v2": {"stages": ((1, 8, 1, 1), (6, 8, 2, 2))},
  "vit_tiny": {"width": 12, "layers": 2, "heads": 2, "mlp_width": 16},
  "transformer_lm": {
    **{"width": 16, "layers": 2, "heads": 2, "mlp_width": 16},
    "cutoffs": (8, 20),
  },
}


def create(name):
  return models.create(
    name, num_classes=40, quantization=DELAYED, **MODELS.get(name, {})
  )


def traced(name):
  """(shapes of a train step's state before it, and after)."""
  model = create(name)
  rows = jax.ShapeDtypeStruct((4,), jnp.int32)
  if name in models.LANGUAGE_MODELS:
    task = tasks.language_model()
    sample = jax.ShapeDtypeStruct((4, 6), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets"), sample)
    batch["mask"] = jax.ShapeDtypeStruct((4, 6), jnp.float32)
  else:
    task = tasks.classification(lambda images, key: images / jnp.float32(255))
    sample = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    batch = {"image": sample, "label": rows}
  optimizer, schedule = optax.sgd(0.1), schedules.constant(4)
  init = state_lib.make_init(model, optimizer, schedule, sample)
  state = jax.eval_shape(init, jax.random.key(0))
  step = step_lib.make_train_step(model, optimizer, schedule, task)
  return state, jax.eval_shape(step, state, batch)[0]


def test_every_kind_of_model_is_here():
  refused = config_precision.WITHOUT_DELAYED_RANGES
  kinds = {type(create(name)) for name in (*MODELS, *refused)}
  named = [name for name in models.names() if name != "tiny"]
  assert kinds == {type(create(name)) for name in named}
  assert not set(MODELS) & set(refused)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_but_loops_over_time(name):
  state, after = traced(name)
  assert after.model_state == state.model_state
  flat = {
    jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(state.model_state)
  }
  counts = [
    sum(path.endswith(f"['{end}']") for path in flat)
    for end in ("weights", "previous_lo", "gradient_hi")
  ]
  # One of each in every quantized layer.
  assert counts[0] == counts[1] == counts[2] > 0


@pytest.mark.parametrize("name", config_precision.WITHOUT_DELAYED_RANGES)
def test_a_loop_over_time_is_refused_by_the_model_too(name):
  with pytest.raises(ValueError, match=r"needs ranges = 'batch'"):
    traced(name)
