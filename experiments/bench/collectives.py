r"""Counts what devices send each other in a recipe's train step.

  python -m experiments.bench.collectives \
    --config=configs/cifar10_resnet38.py --workdir=runs/bench

Beside each other: float, quantized over the ranges of the batch, and over
those of the step before (`precision.ranges`). Read from the compiled program:
nothing is run. Where there is one CPU alone it poses as 8 devices, or as many
as JAX_NUM_CPU_DEVICES says; a compiler for other devices may join other
operands, but sends the same. The data is made up, in the data set's form.
"""

import copy
import json
import os
import shlex
import sys
from typing import Any

import jax

from dpc_jax.analysis import collectives, report
from dpc_jax.training import build, config_precision, summary
from experiments import cli
from experiments.bench import builds

_DEVICES = 8


def variants(config: Any) -> dict[str, Any]:
  """{label: config} of what is compared; delayed where the model allows."""
  method = config.precision.method
  method = "dpc" if method == "float" else method
  configs = {}
  for label, own, ranges in (
    ("float", "float", "batch"),
    ("quantized", method, "batch"),
    ("delayed ranges", method, "delayed"),
  ):
    if (
      ranges == "delayed"
      and config.model.name in config_precision.WITHOUT_DELAYED_RANGES
    ):
      continue
    variant = copy.deepcopy(config)
    variant.precision.method = own
    variant.precision.ranges = ranges
    configs[label] = variant
  return configs


def measure(config: Any) -> dict[str, Any]:
  """The counts of one recipe, as they go into the JSON file."""
  built = builds.build_all(variants(builds.without_data(config)))
  results = {}
  for label, parts in built.items():
    print(f"compiling {label}", flush=True)
    programs = build.compile_programs(parts)
    state = programs.abstract
    found = collectives.read(
      programs.train_step.as_text(),
      {"params": state.params, **state.model_state},
    )
    results[label] = collectives.summary(found)
  return summary.environment(parts.mesh) | {
    "model": config.model.name,
    "batch_size": config.batch_size,
    "mesh": dict(parts.mesh.shape),
    "variants": results,
  }


def main() -> None:
  """Counts for `--config`, prints a table, writes the JSON file."""
  workdir = cli.make_workdir()
  results = measure(cli.FLAGS.config)
  results["command"] = " ".join(
    ["python -m experiments.bench.collectives", *map(shlex.quote, sys.argv[1:])]
  )
  mesh = "x".join(str(size) for size in results["mesh"].values())
  name = f"collectives_{results['model']}_{mesh}.json"
  path = workdir / name
  path.write_text(json.dumps(results, indent=2) + "\n")
  counts = results["variants"]
  table = [
    (group, *(_cell(own[group]) for own in counts.values()))
    for group in (*collectives.GROUPS, "all")
  ]
  table.append(
    (
      "instructions",
      *(f"{c['all']['instructions']:,}" for c in counts.values()),
    )
  )
  print(
    f"\n{results['model']}, batch {results['batch_size']},"
    f" {results['device']}, mesh {mesh}: operands of collectives, bytes\n"
  )
  print(report.text_table(table, ("of", *counts)))
  print(f"written: {path}")


def pose_as_devices() -> None:
  """Makes one CPU 8 devices, if the environment does not say how many."""
  flags = os.environ.get("XLA_FLAGS", "")
  if (
    "JAX_NUM_CPU_DEVICES" not in os.environ
    and "host_platform_device_count" not in flags
  ):
    jax.config.update("jax_num_cpu_devices", _DEVICES)


def _cell(count: dict[str, int]) -> str:
  return f"{count['operands']:,} ({count['bytes']:,} B)"


if __name__ == "__main__":
  pose_as_devices()
  cli.define_config()
  sys.exit(cli.run(main, sys.argv))
