r"""Times ImageNet's training input: images/s of one core, and cores per host.

  python -m experiments.bench.input --data_dir=DIR

Reads a prepared imagenet2012 (experiments/prepare_imagenet.py makes a small
one out of any photos), decodes, crops and mirrors at 224, and does nothing
with the batches. Modes take turns, and each has its cores to itself as far as
the system lets it: the process is bound to them. Two rates are given: images
per second by the clock, which other programs on the machine lower, and images
per second of processor time, which they hardly touch. From the latter:

  cores = chips * images/s of a chip / images/s of a core
"""

import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from dpc_jax.analysis import report
from dpc_jax.data import imagenet, sources
from experiments import arguments

_PACKAGES = ("array-record", "grain", "numpy", "Pillow", "tensorflow-datasets")
_RESULTS = pathlib.Path(__file__).parents[1] / "results"
_BATCH_SIZE = 64
# {label: (cores, workers)}
_MODES = {
  "1 core, 1 thread": (1, None),
  "2 cores, 2 threads": (2, None),
  "2 cores, 2 worker processes": (2, 2),
}
# Of the example. Round numbers, not a measurement of any chip.
_CHIPS, _ASSUMED_RATE = 8, 2000


def cores_needed(
  chips: int, images_per_second_per_chip: float, per_core: float
) -> int:
  """Returns how many cores keep the chips of a host busy.

  Args:
    chips: accelerators of the host.
    images_per_second_per_chip: what one of them trains on.
    per_core: images/s that one core decodes, as measured here.
  """
  return math.ceil(chips * images_per_second_per_chip / per_core)


def measure_mode(
  split: imagenet.StreamedSplit, cores: int, workers: int | None, steps: int
) -> dict[str, float]:
  """Rates of one mode, bound to so many cores.

  The first batches do not count: worker processes take seconds to start, and
  all batches that were made ahead while nobody waited are read first.

  Args:
    split: the images.
    cores: how many of this process's cores it may use; also its threads.
    workers: as for `imagenet.TrainBatches`.
    steps: batches that count.
  """
  allowed = os.sched_getaffinity(0)
  os.sched_setaffinity(0, sorted(allowed)[:cores])
  try:
    batches = imagenet.TrainBatches(
      split, batch_size=_BATCH_SIZE, seed=0, workers=workers
    )
    ahead = 4 * (workers or cores) + 1
    stream = batches.iterate(0, ahead + steps)
    for _ in range(ahead):
      next(stream)
    clock, processor = time.perf_counter(), time.process_time()
    for _ in range(steps):
      next(stream)
    clock = time.perf_counter() - clock
    processor = time.process_time() - processor
    stream.close()
  finally:
    os.sched_setaffinity(0, allowed)
  images = steps * _BATCH_SIZE
  rates = {"images_per_second": images / clock}
  if workers is None:  # a worker's processor time is its own
    rates["images_per_processor_second"] = images / processor
  return rates


def measure(
  split: imagenet.StreamedSplit, steps: int, rounds: int
) -> dict[str, Any]:
  """Median rates of all modes, in turns, and what they say about a host."""
  rates = {label: [] for label in _MODES}
  for _ in range(rounds):
    for label, (cores, workers) in _MODES.items():
      print(f"timing {label}", flush=True)
      rates[label].append(measure_mode(split, cores, workers, steps))
  modes = {}
  for label, runs in rates.items():
    modes[label] = {
      name: statistics.median(run[name] for run in runs) for name in runs[0]
    }
    modes[label]["images_per_second_of_rounds"] = [
      run["images_per_second"] for run in runs
    ]
  per_core = modes[next(iter(_MODES))]["images_per_processor_second"]
  sizes = [len(encoded) for encoded, _ in split]
  return {
    "device": _processor(),
    "versions": {
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in _PACKAGES},
    },
    "images": len(split),
    "mean_file_kb": statistics.mean(sizes) / 1e3,
    "image_size": 224,
    "batch_size": _BATCH_SIZE,
    "steps_per_round": steps,
    "rounds": rounds,
    "modes": modes,
    "images_per_second_per_core": per_core,
    "example": {
      "formula": "cores = chips * images/s per chip / images/s per core",
      "chips": _CHIPS,
      "assumed_images_per_second_per_chip": _ASSUMED_RATE,
      "cores": cores_needed(_CHIPS, _ASSUMED_RATE, per_core),
    },
  }


def _processor() -> str:
  """The processor's name and how many cores this process may use."""
  cores = f"{len(os.sched_getaffinity(0))} cores"
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.is_file() else []
  names = [
    line.split(":", 1)[1].strip() for line in lines if "model name" in line
  ]
  return f"{names[0] if names else platform.machine()}, {cores}"


def _print(results: dict[str, Any]) -> None:
  table = [
    (
      label,
      f"{mode['images_per_second']:,.0f}",
      f"{mode['images_per_second'] / _MODES[label][0]:,.0f}",
      f"{mode['images_per_processor_second']:,.0f}"
      if "images_per_processor_second" in mode
      else "",
    )
    for label, mode in results["modes"].items()
  ]
  header = ("input", "images/s", "per core", "per processor second")
  print(
    f"\nImageNet at 224, files of {results['mean_file_kb']:.0f} kB, "
    f"{results['device']}\n"
  )
  print(report.text_table(table, header))
  example = results["example"]
  print(
    f"\n{example['chips']} chips at an assumed "
    f"{example['assumed_images_per_second_per_chip']:,} images/s each: "
    f"{example['cores']} cores"
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Measures, prints a table, writes the JSON file."""
  argv = sys.argv[1:] if argv is None else list(argv)
  parser = arguments.Parser("experiments.bench.input", __doc__)
  parser.add_argument("--data_dir", help="of tfds data sets")
  parser.add_argument("--steps", type=int, default=16, help="per round")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--note", default="", help="goes into the file")
  parser.add_argument(
    "--out", type=pathlib.Path, default=_RESULTS / "input_imagenet_cpu.json"
  )
  flags = parser.parse_args(argv)
  start = time.perf_counter()
  try:
    for field in ("steps", "rounds"):
      if getattr(flags, field) < 1:
        raise ValueError(
          f"--{field}={getattr(flags, field)}: must be at least 1"
        )
    if not hasattr(os, "sched_setaffinity"):
      raise ValueError("this system cannot bind a process to cores; use Linux")
    if len(os.sched_getaffinity(0)) < 2:
      raise ValueError("this process may use one core; the bench needs two")
    data = sources.load(imagenet.NAME, data_dir=flags.data_dir)
  except (OSError, ValueError, ModuleNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  results = measure(data.splits["train"], flags.steps, flags.rounds)
  results["command"] = shlex.join(["python", "-m", __spec__.name, *argv])
  results["note"] = flags.note
  results["wall_seconds"] = time.perf_counter() - start
  flags.out.parent.mkdir(parents=True, exist_ok=True)
  flags.out.write_text(json.dumps(results, indent=2) + "\n")
  _print(results)
  print(f"written: {flags.out}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
