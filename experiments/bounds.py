r"""Chooses B_min and B_max by how alike quantized weights are to their floats.

  python -m experiments.bounds --config=configs/digits_resnet8.py \
    --workdir=runs/bounds --steps=100

Takes fresh weights of the recipe's model, those after --steps of training with
static B_max, or the newest checkpoint of a run. Written to the workdir:
`bounds.json`, all layers and widths, and `bounds.png`.
"""

import copy
import json
import pathlib
import shlex
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import flags

from dpc_jax.analysis import plots, report
from dpc_jax.policy import bounds, capacity
from dpc_jax.quant import grids
from dpc_jax.training import build, metrics, sharding
from dpc_jax.training import config as config_lib
from experiments import cli, saved

# Layers that are printed one by one.
_PRINTED = 40


class Weights(NamedTuple):
  """What is measured.

  Attributes:
    variables: all collections; shapes will do for those beside `params`.
    origin: where the weights come from, in words.
    parts: of the run that the weights are of.
  """

  variables: Mapping[str, Any]
  origin: str
  parts: build.Parts


def define_flags() -> None:
  """Defines the flags besides --config and --workdir."""
  values = cli.FLAGS
  flags.DEFINE_string(
    "checkpoint",
    None,
    "The workdir of a run of the same model and data set, finished or not: its"
    " newest checkpoint is taken.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "steps",
    None,
    "Steps to train first, each layer at precision.b_max bits.",
    flag_values=values,
  )
  flags.DEFINE_list(
    "widths",
    list(map(str, bounds.WIDTHS)),
    "Widths to choose from, rising, each in 2..16.",
    flag_values=values,
  )
  for name, default, bound in (
    ("tau_min", bounds.TAU_MIN, "B_min"),
    ("tau_max", bounds.TAU_MAX, "B_max"),
  ):
    flags.DEFINE_float(
      name,
      default,
      f"The mean cosine similarity that {bound} must reach.",
      flag_values=values,
    )


def main() -> None:
  """Measures the weights, and writes and prints the bounds."""
  values = cli.FLAGS
  try:
    bounds.check_thresholds(values.tau_min, values.tau_max)
    widths = bounds.check_widths(_int(text) for text in values.widths)
  except ValueError as error:
    raise config_lib.ConfigError(f"--{error}") from None
  workdir = cli.make_workdir()
  weights = _weights(copy.deepcopy(values.config))
  grid = grids.Grid(weights.parts.config.precision.kind, "channel")
  try:
    cosine = bounds.cosine_similarities(
      weights.variables, widths=widths, grid=grid
    )
  except ValueError as error:
    raise config_lib.ConfigError(f"{weights.origin}: {error}") from None
  chosen, unreached = {}, []
  for name, tau in (("min", values.tau_min), ("max", values.tau_max)):
    try:
      chosen[name] = bounds.smallest_width(cosine, tau, f"--tau_{name}")
    except ValueError as error:
      chosen[name] = None
      unreached.append(str(error))
  result = _result(weights, cosine, chosen)
  print(f"\n{result['model']} on {result['dataset']}, {weights.origin}\n")
  print(_table(result))
  _write(result, workdir)
  if unreached:
    raise config_lib.ConfigError(unreached[0])
  print(_sentence(result))


def _int(text: str) -> int | str:
  """The number, or the text, which is no width."""
  return int(text) if text.strip().isdecimal() else text


def _weights(config: ml_collections.ConfigDict) -> Weights:
  """The weights that the flags ask for."""
  steps, run = cli.FLAGS.steps, cli.FLAGS.checkpoint
  if steps is None and run is None:
    return _fresh(config)
  if run is None:
    return _trained(config, steps)
  if steps is not None:
    raise config_lib.ConfigError(
      f"--steps={steps}: means nothing beside --checkpoint; leave one out"
    )
  return _restored(config, pathlib.Path(run).expanduser())


def _fresh(config: ml_collections.ConfigDict) -> Weights:
  # Its float variant has the same weights, but does not say which are layers.
  config.precision.method = "dpc"
  parts = build.build(config)
  state = jax.jit(parts.init)(jax.random.key(parts.config.seed))
  return Weights(
    {"params": state.params, **state.model_state},
    f"fresh weights of seed {parts.config.seed}",
    parts,
  )


def _trained(config: ml_collections.ConfigDict, steps: int) -> Weights:
  method = f"static{config.precision.b_max}"
  config.precision.method = method
  parts = build.build(config)
  if not 1 <= steps <= parts.config.steps:
    raise config_lib.ConfigError(
      f"--steps={steps}: the run has {parts.config.steps} steps; use"
      f" 1..{parts.config.steps}"
    )
  print(f"compiling, then {steps} steps of {method}", flush=True)
  programs = build.compile_programs(parts)
  state = programs.init()
  batches = parts.feed.train(0, steps)
  try:
    for rows in batches:
      state, last = programs.train_step(
        state, sharding.put_batch(rows, parts.mesh)
      )
      jax.block_until_ready(last)
  finally:
    batches.close()
  sums = metrics.Sums()
  sums.add([last])
  print(f"step {steps}: {metrics.as_text(sums.means())}")
  return Weights(
    {"params": state.params, **state.model_state},
    f"after {steps} steps of {method} from seed {parts.config.seed}",
    parts,
  )


def _restored(config: ml_collections.ConfigDict, run: pathlib.Path) -> Weights:
  config = _config_of(config, run)
  parts = build.build(config)
  # A float run does not say which of its weights are layers.
  if config.precision.method == "float":
    config.precision.method = "dpc"
    layers = build.build(config, parts.data)
  else:
    layers = parts
  step, state = saved.restore(run, parts, f"--checkpoint={run}")
  abstract = jax.eval_shape(layers.init, jax.random.key(0))
  return Weights(
    {"params": state.params, **abstract.model_state},
    f"checkpoint of step {step} in {run}",
    parts,
  )


def _config_of(
  config: ml_collections.ConfigDict, run: pathlib.Path
) -> ml_collections.ConfigDict:
  """The run's own config, which must be of the same model and data set."""
  own = copy.deepcopy(config)
  saved.update_config(run, own, f"--checkpoint={run}")
  for group, name in [("data", "name"), *(("model", n) for n in own.model)]:
    here, there = config[group].get(name), own[group][name]
    if here != there:
      raise config_lib.ConfigError(
        f"--checkpoint={run}: a run with {group}.{name} = {there!r}, and"
        f" --config has {here!r}; give the run's recipe"
      )
  # Where the data lies and how many devices there are is this machine's.
  own.data.dir, own.data.workers = config.data.dir, config.data.workers
  own.mesh.update(data=1, fsdp=1, tensor=1, sharding=None, rules=None)
  return own


def _result(weights, cosine, chosen) -> dict[str, Any]:
  """What bounds.json holds."""
  config = weights.parts.config
  counts = capacity.layer_capacities(weights.variables)
  layers = {}
  # In the network's order, which compiled programs do not keep.
  for path in sorted(cosine, key=list(weights.parts.costs).index):
    # Of stacked layers, all have one N_k.
    count = int(np.max(counts[path]))
    for name, by_width in bounds.single_layers({path: cosine[path]}).items():
      layers[name] = {"weights": count, "cosine": by_width}
  return {
    "command": " ".join(
      ["python -m experiments.bounds", *map(shlex.quote, sys.argv[1:])]
    ),
    "model": config.model.name,
    "dataset": config.data.name,
    "weights": weights.origin,
    "grid": f"{config.precision.kind}, per output channel",
    "tau_min": cli.FLAGS.tau_min,
    "tau_max": cli.FLAGS.tau_max,
    "b_min": chosen["min"],
    "b_max": chosen["max"],
    "mean": bounds.mean(cosine),
    "worst": {
      width: {"layer": layer, "cosine": value}
      for width, (layer, value) in bounds.worst(cosine).items()
    },
    "layers": layers,
  }


def _table(result: Mapping[str, Any]) -> str:
  """Layers, where they are not too many, the mean and the worst."""
  layers = result["layers"]
  rows = []
  if len(layers) <= _PRINTED:
    rows = [
      (name or "(root)", f"{layer['weights']:,}", *_cells(layer["cosine"]))
      for name, layer in layers.items()
    ]
  worst = {width: row["cosine"] for width, row in result["worst"].items()}
  rows += [
    (f"mean of {len(layers)}", "", *_cells(result["mean"])),
    ("worst", "", *_cells(worst)),
  ]
  header = ("layer", "N_k", *(f"{width} bits" for width in result["mean"]))
  return report.text_table(rows, header)


def _cells(by_width: Mapping[int, float]) -> list[str]:
  return [f"{value:.6f}" for value in by_width.values()]


def _write(result: Mapping[str, Any], workdir: pathlib.Path) -> None:
  """Writes bounds.json and bounds.png, and says so."""
  try:
    (workdir / "bounds.json").write_text(json.dumps(result, indent=2) + "\n")
  except OSError as error:
    raise config_lib.ConfigError(
      f"--workdir={workdir}: {error.strerror}; use another"
    ) from None
  plots.similarity_per_width(
    {name: layer["cosine"] for name, layer in result["layers"].items()},
    (result["tau_min"], result["tau_max"]),
    (result["b_min"], result["b_max"]),
    workdir / "bounds.png",
  )
  print(f"\nwritten:\n  {workdir / 'bounds.json'}  all layers and widths")
  print(f"  {workdir / 'bounds.png'}  similarity against width\n")


def _sentence(result: Mapping[str, Any]) -> str:
  """The bounds in one line, in the form of the flags that set them."""
  return "  ".join(
    f"--config.precision.b_{name}={result[f'b_{name}']}"
    f" (mean {result['mean'][result[f'b_{name}']]:.6g}"
    f" >= {result[f'tau_{name}']:g})"
    for name in ("min", "max")
  )


if __name__ == "__main__":
  cli.define_config()
  define_flags()
  sys.exit(cli.run(main, sys.argv))
