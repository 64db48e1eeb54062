r"""Times how long the devices wait for input, and what longer calls save.

  python -m experiments.bench.calls --config=configs/cifar10_resnet8.py:dpc \
    --config.data.dir=DIR --workdir=experiments/results

Two inputs, the host's (whole batches cross over) and the device's
(`data.on_device`: row numbers do), times `steps_per_call` 1, 8 and 32. Each is
timed in turns twice over: fed, as a run is, and on one batch that is there
already. With the times t of a step,

  wait / step = 1 - t(one batch) / t(fed),

the share of a step in which the devices have nothing to do but wait for input;
where they are the host's own cores, the work of making the input is in it, too.
A ratio is the median over rounds. `input` is the host's time for a step's
batch by itself, until it is on the device.
"""

import copy
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from absl import flags

from dpc_jax.analysis import report
from dpc_jax.training import build, checks, sharding, summary
from dpc_jax.training import calls as calls_lib
from experiments import cli
from experiments.bench import builds, turns


def define_flags() -> None:
  """Defines the flags of this program on those of `cli`."""
  values = {"flag_values": cli.FLAGS}
  flags.DEFINE_integer(
    "rounds", 9, "Rounds of two timings each.", lower_bound=2, **values
  )
  flags.DEFINE_integer(
    "steps",
    64,
    "Steps per timing; a multiple of all --sizes.",
    lower_bound=1,
    **values,
  )
  flags.DEFINE_list(
    "sizes",
    ["1", "8", "32"],
    "Of steps_per_call; the first is the baseline.",
    **values,
  )


class Variant(NamedTuple):
  """A compiled program and where its batches come from.

  Attributes:
    parts: of the run.
    programs: compiled for `size` steps a call.
    size: steps of a call.
  """

  parts: build.Parts
  programs: build.Programs
  size: int


def variants(config: Any, sizes: Sequence[int]) -> dict[str, Any]:
  """{"INPUT, SIZE": config}; the data set must be images in memory."""
  configs = {}
  for label, on_device in (("host", False), ("device", True)):
    for size in sizes:
      variant = copy.deepcopy(config)
      variant.data.on_device = on_device
      variant.steps_per_call = size
      configs[f"{label}, {size}"] = variant
  return configs


def compile_variants(config: Any, sizes: Sequence[int]) -> dict[str, Variant]:
  """Compiles a program for each size; both inputs share it."""
  programs, compiled = {}, {}
  for label, parts in builds.build_all(variants(config, sizes)).items():
    size = parts.config.steps_per_call
    if size not in programs:
      print(f"compiling steps_per_call {size}", flush=True)
      programs[size] = build.compile_programs(parts)
    compiled[label] = Variant(parts, programs[size], size)
  return compiled


def time_steps(
  variant: Variant, state: Any, steps: int, *, fed: bool, start: int = 0
) -> tuple[Any, float]:
  """(the state afterwards, seconds per step).

  Args:
    variant: what is timed.
    state: donated.
    steps: a multiple of the variant's size.
    fed: whether every call gets its own batches, or all get the first ones.
    start: the run's step whose batch is read first.
  """
  size, ahead = variant.size, sharding.steps_ahead()
  batches = calls_lib.Batches(variant.parts, start)
  pending = []
  try:
    # What compiles at the first call is not the input's time.
    batch = jax.block_until_ready(batches.take(size))
    begin = time.perf_counter()
    for _ in range(steps // size):
      state, metrics = calls_lib.run(variant.programs, state, batch, size)
      pending.append(metrics)
      # The next call's batches while this one runs: of a few long calls, one
      # that nothing overlaps would look like a wait.
      if fed:
        batch = batches.take(size)
      # As a run does: it is no more than so many calls ahead.
      if len(pending) > ahead:
        jax.block_until_ready(pending.pop(0))
    jax.block_until_ready((state, metrics))
    return state, (time.perf_counter() - begin) / steps
  finally:
    batches.close()


def time_input(variant: Variant, steps: int) -> float:
  """Seconds per step of making its batch, nothing else under way."""
  batches = calls_lib.Batches(variant.parts, 0)
  try:
    jax.block_until_ready(batches.take(variant.size))
    seconds = []
    for _ in range(steps // variant.size):
      begin = time.perf_counter()
      jax.block_until_ready(batches.take(variant.size))
      seconds.append((time.perf_counter() - begin) / variant.size)
    return statistics.median(seconds)
  finally:
    batches.close()


def measure(
  config: Any, sizes: Sequence[int], rounds: int, steps: int
) -> dict[str, Any]:
  """The measurements of one recipe, as they go into the JSON file.

  Raises:
    ConfigError: data that is not images in memory; sizes that do not divide
      `steps`; fewer steps in the run than are timed at once.
  """
  for size in sizes:
    if size < 1 or steps % size:
      raise checks.ConfigError(
        f"--steps={steps}: must be a multiple of --sizes={size}; change either"
      )
  config = copy.deepcopy(config)
  config.epochs = None
  # One stretch of all rounds, the first one to warm up, and one call more.
  config.steps = (rounds + 1) * steps + max(sizes)
  compiled = compile_variants(config, sizes)
  states = {label: v.programs.init() for label, v in compiled.items()}
  seconds = {(label, fed): [] for label in compiled for fed in (True, False)}
  for i in range(rounds + 1):
    for label, fed in seconds:
      states[label], taken = time_steps(
        compiled[label], states[label], steps, fed=fed, start=i * steps
      )
      if i:  # the first round warms up
        seconds[label, fed].append(taken)
  base = next(iter(compiled))
  results = {
    label: _figures(
      seconds[label, True],
      seconds[label, False],
      seconds[base, True],
      config.batch_size,
    )
    | {"input_milliseconds": 1e3 * time_input(variant, steps)}
    for label, variant in compiled.items()
  }
  parts = compiled[base].parts
  return summary.environment(parts.mesh) | {
    "model": config.model.name,
    "method": config.precision.method,
    "dataset": config.data.name + (" (fake)" if config.data.fake else ""),
    "train_images": len(parts.data.splits["train"]),
    "batch_size": config.batch_size,
    "rounds": rounds,
    "steps_per_round": steps,
    "variants": results,
  }


def _figures(fed, unfed, base, rows) -> dict[str, Any]:
  waits = [1 - b / a for a, b in zip(fed, unfed, strict=True)]
  low, _, high = statistics.quantiles(waits, n=4)
  median = statistics.median(fed)
  return turns.spread(fed, base) | {
    "milliseconds": 1e3 * median,
    "one_batch_milliseconds": 1e3 * statistics.median(unfed),
    "wait": statistics.median(waits),
    "wait_quartiles": [low, high],
    "images_per_second": rows / median,
  }


def _table(results: dict[str, Any]) -> str:
  header = (
    "input, steps per call",
    "ms/step",
    "ratio",
    "quartiles",
    "wait/step",
    "quartiles",
    "input ms",
    "images/s",
  )
  rows = [
    (
      label,
      f"{r['milliseconds']:.2f}",
      f"{r['ratio']:.2f}",
      "{:.2f}..{:.2f}".format(*r["ratio_quartiles"]),
      f"{r['wait']:.1%}",
      "{:.1%}..{:.1%}".format(*r["wait_quartiles"]),
      f"{r['input_milliseconds']:.2f}",
      f"{r['images_per_second']:,.0f}",
    )
    for label, r in results["variants"].items()
  ]
  return report.text_table(rows, header)


def main() -> None:
  """Measures `--config`, prints a table, writes the JSON file."""
  start = time.perf_counter()
  try:
    sizes = [int(size) for size in cli.FLAGS.sizes]
  except ValueError:
    raise checks.ConfigError(
      f"--sizes={','.join(cli.FLAGS.sizes)}: must be whole numbers, as 1,8,32"
    ) from None
  if not sizes:
    raise checks.ConfigError("--sizes=: is empty; use numbers, as 1,8,32")
  workdir = cli.make_workdir()
  results = measure(cli.FLAGS.config, sizes, cli.FLAGS.rounds, cli.FLAGS.steps)
  path = turns.write(results, workdir, "calls", sys.argv[1:], start)
  print(
    f"\n{results['model']} {results['method']}, {results['dataset']}, batch"
    f" {results['batch_size']}, {results['device']}\n"
  )
  print(_table(results))
  print(f"written: {path}")


if __name__ == "__main__":
  cli.define_config()
  define_flags()
  sys.exit(cli.run(main, sys.argv))
