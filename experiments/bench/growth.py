r"""Measures how step time and memory grow with the batch and the depth.

  python -m experiments.bench.growth --config=configs/cifar10_resnet38.py \
    --workdir=runs/growth

Two lines of points that cross at the recipe's own size: batches at the recipe's
depth, depths at the recipe's batch. At each point float and ours are compiled
anew and timed in turns, on made-up data. Then y = c * x^exponent is fitted to
the logarithms by least squares; x is the batch, or the forward multiply-
accumulates of an image, which stand for the depth. Linear growth has the
exponent 1; a constant part, such as the parameters, makes it less. A size that
does not fit into memory is left out, with a line that says so.
"""

import copy
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from absl import flags

from dpc_jax.analysis import report
from dpc_jax.training import checks, summary
from experiments import cli
from experiments.bench import builds, growth_fit, growth_plot, turns

FLOAT = "float"
_BATCHES = (32, 64, 128, 256, 512)
_DEPTHS = (20, 38, 74, 110)
_GIB = 2**30


class Size(NamedTuple):
  """A point: the number of layers in the model's name, and the batch."""

  depth: int
  batch: int


def define_flags() -> None:
  """Defines the flags of this program on those of `cli`."""
  values = {"flag_values": cli.FLAGS}
  for name, default in (("batches", _BATCHES), ("depths", _DEPTHS)):
    text = ",".join(map(str, default))
    flags.DEFINE_list(name, text, f"Sizes; by default {text}.", **values)
  flags.DEFINE_multi_string(
    "variant",
    None,
    "METHOD,FIELD=VALUE,..., fields of config.precision; may be given several"
    " times, besides float; default: the recipe's method.",
    **values,
  )
  flags.DEFINE_integer(
    "rounds", 5, "Rounds of one timing each.", lower_bound=2, **values
  )
  flags.DEFINE_integer("steps", 2, "Steps per timing.", lower_bound=1, **values)


def sizes(config: Any, batches: Sequence[int], depths: Sequence[int]):
  """The points of both lines, the recipe's own first, each once.

  Args:
    config: of a ResNet for CIFAR.
    batches: at the recipe's depth.
    depths: 6n + 2, at the recipe's batch.

  Raises:
    ConfigError: another model, or a depth that there is not.
  """
  name = config.model.name
  depth = re.fullmatch(r"resnet(\d+)", name)
  if depth is None:
    raise checks.ConfigError(
      f"config.model.name = {name!r}: has no depth to vary; use a ResNet for"
      " CIFAR, such as resnet38"
    )
  for n in depths:
    if n < 8 or n % 6 != 2:
      raise checks.ConfigError(
        f"--depths={n}: a ResNet for CIFAR has 6n + 2 layers: 8, 14, 20, ..."
      )
  own = Size(int(depth[1]), config.batch_size)
  points = [own, *(own._replace(batch=n) for n in batches)]
  return list(dict.fromkeys(points + [own._replace(depth=n) for n in depths]))


def measure(
  config: Any,
  points: Sequence[Size],
  variants: Sequence[str],
  rounds: int,
  steps: int,
) -> dict[str, Any]:
  """The measurements of one recipe, as they go into the JSON file.

  Args:
    config: the recipe, on data that is made up.
    points: of `sizes`; the first one is where the two lines cross.
    variants: besides float, as `builds.variant` reads them.
    rounds: of one timing each.
    steps: per timing.

  Returns:
    `points`: of every point `depth`, `batch`, `macs` of an image, `skipped`,
    None or why it was left out, and `variants`: {label: `ratio`,
    `ratio_quartiles`, `milliseconds`, `temporary_mib`, `peak_mib`,
    `compile_seconds`}; `fits`: {"batch" or "macs": {field: {label: see
    `turns.power_law`}}}, None with fewer than two points.
  """
  config = builds.without_data(config)
  configs = {FLOAT: builds.variant(config, FLOAT, "variant")}
  configs |= builds.variants(config, variants, "variant")
  # A mistake of the last size must not cost the time of the first ones.
  built = {
    point: builds.build_all(
      {label: _resized(variant, point) for label, variant in configs.items()}
    )
    for point in dict.fromkeys(points)
  }
  least = min(built, key=lambda point: point.depth * point.batch)
  turns.warm_up(built[least][FLOAT])
  measured = []
  for point, parts in built.items():
    print(f"ResNet-{point.depth}, batch {point.batch}", flush=True)
    measured.append(_measure_point(point, parts, rounds, steps))
    jax.clear_caches()
  return summary.environment(parts[FLOAT].mesh) | {
    "model": config.model.name,
    "batch_size": config.batch_size,
    "rounds": rounds,
    "steps_per_round": steps,
    "points": measured,
    "fits": {axis: growth_fit.fits(measured, axis) for axis in growth_fit.AXES},
  }


def _resized(config, point):
  config = copy.deepcopy(config)
  config.model.name = f"resnet{point.depth}"
  config.batch_size = point.batch
  return config


def _measure_point(point, built, rounds, steps) -> dict[str, Any]:
  base = built[FLOAT]
  found = point._asdict() | {
    "macs": sum(cost.macs * cost.layers for cost in base.costs.values()),
    "skipped": None,
    "variants": {},
  }
  try:
    compiled = {}
    for label, parts in built.items():
      print(f"  compiling {label}", flush=True)
      compiled[label] = turns.compile_step(parts)
      check_room(compiled[label].peak_bytes)
    batch = turns.first_batch(base)
    seconds = turns.time_in_turns(compiled, batch, rounds, steps)
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    found["skipped"] = " ".join(str(error).split())[:120]
    print(f"  left out: {found['skipped']}", flush=True)
    return found
  for label, variant in compiled.items():
    found["variants"][label] = turns.spread(seconds[label], seconds[FLOAT]) | {
      "milliseconds": 1e3 * statistics.median(seconds[label]),
      "temporary_mib": variant.temporary_bytes / turns.MIB,
      "peak_mib": variant.peak_bytes / turns.MIB,
      "compile_seconds": variant.compile_seconds,
    }
  return found


def check_room(needed: int) -> None:
  """Raises MemoryError where a step needs more than there is."""
  stats = jax.local_devices()[0].memory_stats() or {}
  limit = stats.get("bytes_limit")
  if limit is None and hasattr(os, "sysconf"):
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  if limit is not None and needed > 0.9 * limit:
    raise MemoryError(
      f"a step needs {needed / _GIB:.1f} GiB of {limit / _GIB:.1f} GiB"
    )


def point_table(points: Sequence[dict[str, Any]]) -> str:
  """A text table, a line for each point and variant."""
  header = (
    "step",
    "MMACs",
    "variant",
    *growth_fit.FITTED.values(),
    "time/float",
  )
  header += ("quartiles", "temporaries/float", "compile s")
  table = []
  for point in sorted(points, key=lambda p: (p["depth"], p["batch"])):
    name = f"ResNet-{point['depth']}, batch {point['batch']}"
    if point["skipped"] is not None:
      continue
    base = point["variants"][FLOAT]
    for label, own in point["variants"].items():
      table.append(
        (
          name,
          f"{point['macs'] / 1e6:.0f}",
          label,
          *(f"{own[field]:,.1f}" for field in growth_fit.FITTED),
          f"{own['ratio']:.2f}",
          "{:.2f}..{:.2f}".format(*own["ratio_quartiles"]),
          f"{own['temporary_mib'] / base['temporary_mib']:.2f}",
          f"{own['compile_seconds']:.1f}",
        )
      )
  return report.text_table(table, header)


def fit_table(found: dict[str, Any]) -> str:
  """A text table of the exponents."""
  header = ("against", "of", "variant", "exponent", "R^2", "furthest off")
  names = {
    growth_fit.BATCH: "batch",
    growth_fit.DEPTH: "MACs of an image (depth)",
  }
  table = [
    (
      names[axis],
      growth_fit.FITTED[field],
      label,
      f"{fit['exponent']:.2f}",
      "" if fit["r_squared"] is None else f"{fit['r_squared']:.4f}",
      f"{fit['worst_percent']:.1f}%",
    )
    for axis, fields in found.items()
    for field, labels in (fields or {}).items()
    for label, fit in labels.items()
  ]
  return report.text_table(table, header)


def _numbers(name) -> list[int]:
  texts = cli.FLAGS[name].value
  for text in texts:
    if not text.isdecimal() or int(text) < 1:
      raise checks.ConfigError(
        f"--{name}={','.join(texts)}: must be positive integers, such as"
        " --batches=32,64"
      )
  return [int(text) for text in texts]


def main() -> None:
  """Measures `--config`, prints tables, writes the JSON file and pictures."""
  start = time.perf_counter()
  config, given = cli.FLAGS.config, cli.FLAGS
  method = config.precision.method
  variants = given["variant"].value or ["dpc" if method == FLOAT else method]
  points = sizes(config, _numbers("batches"), _numbers("depths"))
  workdir = cli.make_workdir()
  with turns.no_cache():
    results = measure(
      config, points, variants, given["rounds"].value, given["steps"].value
    )
  path = turns.write(results, workdir, "growth", sys.argv[1:], start)
  growth_plot.draw(results, path.with_suffix(".png"))
  print(f"\n{results['device']}\n\n{point_table(results['points'])}\n")
  print(fit_table(results["fits"]))
  for point in results["points"]:
    if point["skipped"] is not None:
      print(
        f"left out: ResNet-{point['depth']}, batch {point['batch']}:"
        f" {point['skipped']}"
      )
  print(f"written: {path}, {path.stem}.png, {path.stem}.svg")


if __name__ == "__main__":
  cli.define_config()
  define_flags()
  sys.exit(cli.run(main, sys.argv))
