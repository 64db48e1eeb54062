r"""Times a recipe's train step: float, static, DPC, DPC in less memory.

  python -m experiments.bench.step --config=configs/cifar10_resnet38.py \
    --workdir=runs/bench

All variants take the same batch and are timed in turns, so that what else the
machine does hits all of them; a ratio is the median over rounds of a variant's
time to the float step's time in the same round. The data is made up, in the
data set's form: no files are needed, and ImageNet's input is for bench.input
to time. Memory is what the compiled program asks
for: arguments, results and temporaries, less what they share.
"""

import statistics
import sys
import time
from typing import Any

import jax
from absl import flags

from dpc_jax.analysis import report
from dpc_jax.data import imagenet
from dpc_jax.training import build, sharding, summary
from experiments import cli
from experiments.bench import builds, turns

_ROUNDS = flags.DEFINE_integer(
  "rounds", 15, "Rounds of one timing each.", lower_bound=2
)
_STEPS = flags.DEFINE_integer("steps", 3, "Steps per timing.", lower_bound=1)

_INPUT_STEPS = 30


def variants(config: Any) -> dict[str, Any]:
  """{label: config} of what is compared; the first one is the baseline."""
  b_max = config.precision.b_max
  texts = {"float": "float", f"static{b_max}": f"static{b_max}", "dpc": "dpc"}
  if b_max <= 8:
    stored = "dpc,storage_bits=8"
    texts |= {
      "dpc, 8-bit storage": stored,
      "dpc, 8-bit storage, norms": f"{stored},remat=norms",
      "dpc, 8-bit storage, norms8": f"{stored},remat=norms8",
    }
  return {
    label: builds.variant(config, text, "variant")
    for label, text in texts.items()
  }


def input_rate(parts: build.Parts) -> float:
  """Rows/s of the host's input alone, the copy to the device included."""
  rates = []
  batches = parts.feed.train(0, _INPUT_STEPS)
  start = time.perf_counter()
  for rows in batches:
    jax.block_until_ready(sharding.put_batch(rows, parts.mesh))
    now = time.perf_counter()
    rates.append(parts.config.batch_size / (now - start))
    start = now
  return statistics.median(rates)


def measure(config: Any, rounds: int, steps: int) -> dict[str, Any]:
  """The measurements of one recipe, as they go into the JSON file."""
  built = builds.build_all(variants(builds.without_data(config)))
  compiled = {}
  with turns.no_cache():
    turns.warm_up(next(iter(built.values())))
    for label, parts in built.items():
      print(f"compiling {label}", flush=True)
      compiled[label] = turns.compile_step(parts)
  seconds = turns.time_in_turns(
    compiled, turns.first_batch(parts), rounds, steps
  )
  base = next(iter(compiled))
  unit = parts.task.unit
  per_row = 1 if unit == "images" else config.data.unroll
  results = {}
  for label, variant in compiled.items():
    median = statistics.median(seconds[label])
    results[label] = turns.spread(seconds[label], seconds[base]) | {
      "milliseconds": 1e3 * median,
      f"{unit}_per_second": config.batch_size * per_row / median,
      "compile_seconds": variant.compile_seconds,
      "peak_mib": variant.peak_bytes / turns.MIB,
      "peak_ratio": variant.peak_bytes / compiled[base].peak_bytes,
      "temporary_mib": variant.temporary_bytes / turns.MIB,
      "temporary_ratio": variant.temporary_bytes
      / compiled[base].temporary_bytes,
    }
  measured = summary.environment(parts.mesh) | {
    "model": config.model.name,
    "unit": unit,
    "batch_size": config.batch_size,
    "rounds": rounds,
    "steps_per_round": steps,
    "variants": results,
  }
  if not isinstance(parts.data, imagenet.StreamedImages):
    measured[f"input_{unit}_per_second"] = per_row * input_rate(parts)
  return measured


def main() -> None:
  """Measures `--config`, prints a table, writes the JSON file."""
  start = time.perf_counter()
  workdir = cli.make_workdir()
  results = measure(cli.FLAGS.config, _ROUNDS.value, _STEPS.value)
  path = turns.write(results, workdir, "step", sys.argv[1:], start)
  unit = results["unit"]
  header = (
    "train step",
    "time/float",
    "quartiles",
    "ms",
    f"{unit}/s",
    "compile s",
    "peak MiB",
    "peak/float",
    "temporaries/float",
  )
  table = [
    (
      label,
      f"{r['ratio']:.2f}",
      "{:.2f}..{:.2f}".format(*r["ratio_quartiles"]),
      f"{r['milliseconds']:.1f}",
      f"{r[f'{unit}_per_second']:,.0f}",
      f"{r['compile_seconds']:.1f}",
      f"{r['peak_mib']:,.0f}",
      f"{r['peak_ratio']:.2f}",
      f"{r['temporary_ratio']:.2f}",
    )
    for label, r in results["variants"].items()
  ]
  print(
    f"\n{results['model']}, batch {results['batch_size']},"
    f" {results['device']}\n"
  )
  print(report.text_table(table, header))
  if f"input_{unit}_per_second" in results:
    rate = results[f"input_{unit}_per_second"]
    print(f"\ninput alone: {rate:,.0f} {unit}/s")
  print(f"written: {path}")


if __name__ == "__main__":
  cli.define_config()
  sys.exit(cli.run(main, sys.argv))
