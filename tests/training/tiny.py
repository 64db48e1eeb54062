"""A network, a schedule and a config that are small, not simple."""

import json
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

import dpc_jax as dpc
from configs import default
from dpc_jax import models
from dpc_jax.policy import schedules
from dpc_jax.quant import grids
from dpc_jax.training import build, checkpoint, sharding


class Tiny(nn.Module):
  """conv - norm - relu - dropout - conv - mean - float dense; compiles fast."""

  num_classes: int
  quantization: grids.Quantization | None = grids.Quantization()
  width: int = 4
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x, train=False):
    conv = nn.Conv
    arguments = {"padding": ((1, 1), (1, 1)), "use_bias": False}
    if self.quantization is not None:
      conv = dpc.QuantConv
      arguments["quantization"] = self.quantization
    x = conv(self.width, (3, 3), strides=(2, 2), name="first", **arguments)(x)
    x = nn.BatchNorm(not train, momentum=0.9, name="norm")(x)
    x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
    x = conv(2 * self.width, (3, 3), name="second", **arguments)(x)
    x = jnp.mean(nn.relu(x), axis=(1, 2))
    return nn.Dense(self.num_classes, name="classifier")(x)


def register() -> None:
  """Makes it a model of the table, `tiny`."""
  models._CONSTRUCTORS["tiny"] = Tiny


def make_config(method: str = "dpc", **changes: Any) -> config_dict.ConfigDict:
  """Six steps on the digits, on one device; `changes` are fields by path."""
  config = default.get_config(method)
  config.update_from_flattened_dict(
    {
      "model.name": "tiny",
      "data.name": "digits",
      "steps": 6,
      "batch_size": 16,
      "eval_batch_size": 96,
      "eval_every": 5,
      "log_every": 4,
      "checkpoint_every": 3,
      "keep_checkpoints": 20,
      "mesh.data": 1,
    }
    | changes
  )
  return config


def cyclic(period: int = 3) -> schedules.Schedule:
  """Widths that change every `period` steps, by a count in the state.

  The layers take 2, 3, 4, 5, 6, 2, ... with an offset each.
  """

  def init(capacities):
    return {
      "offset": {
        path: jnp.int32(i) for i, path in enumerate(sorted(capacities))
      },
      "count": jnp.int32(0),
    }

  def update(state, *, step, statistics=None):
    del step, statistics
    phase = state["count"] // period
    bits = {
      path: grids.LayerBits(
        2 + (phase + offset) % 5, 3 + (phase + offset) % 4, jnp.int32(8)
      )
      for path, offset in state["offset"].items()
    }
    return bits, {**state, "count": state["count"] + 1}

  return schedules.Schedule(init, update)


def cyclic_bits(step: int, period: int = 3) -> dict[str, list[int]]:
  """The widths of `cyclic` at a step, worked out apart."""
  phase = step // period
  return {
    path: [2 + (phase + i) % 5, 3 + (phase + i) % 4, 8]
    for i, path in enumerate(["first", "second"])
  }


def abstract(parts: build.Parts) -> Any:
  """The state's shapes, dtypes and shardings."""
  shapes = jax.eval_shape(parts.init, jax.random.key(0))
  return checkpoint.abstract_state(
    shapes, sharding.of_state(shapes, parts.mesh)
  )


def saved_state(
  config: config_dict.ConfigDict, workdir: pathlib.Path, step: int
) -> dict[str, np.ndarray]:
  """{leaf: array} of the checkpoint of a step."""
  checkpoints = checkpoint.Checkpoints(workdir, keep=20)
  try:
    return leaves(checkpoints.restore(step, abstract(build.build(config)))[0])
  finally:
    checkpoints.close()


def leaves(tree: Any) -> dict[str, np.ndarray]:
  """{path of a leaf: its array on the host}, keys of a PRNG as their words."""
  flat = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    flat[jax.tree_util.keystr(path)] = np.array(jax.device_get(leaf))
  return flat


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
  """Bit for bit."""
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype, name
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def read_lines(path: pathlib.Path, *without: str) -> list[dict[str, Any]]:
  """The objects of a JSON-lines file, without some of their keys."""
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  return [{k: v for k, v in x.items() if k not in without} for x in lines]
