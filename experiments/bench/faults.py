r"""Hurts real runs, and sees whether they end as if nothing had happened.

  python -m experiments.bench.faults \
    --config=configs/digits_resnet8.py:dpc --workdir=runs/faults --trials=20

Every trial trains the recipe, cut to a minute's part (see SHORT; what the
command line sets stays), in a child process, does it some harm, starts it
again with the same command until it ends, and compares what it leaves with a
run that was left alone: the checkpoint's arrays bit for bit, the metrics
without rates, the bits, the summary without times.

  kill -9        1 to 3 times a trial, in turns: at any moment of the run, in
                 training, and while a checkpoint is being written
  SIGTERM        in training: exit code 0, and no step lost
  full disk      in training: one line, the last checkpoint stays (needs the
  read-only disk right to mount)
  no folder      a file where the workdir should be: one line
  dead peer      one of two processes is killed: the other ends with a line
  stopped peer   one of two processes stands still: the other ends with a line
                 after the heartbeat's timeout

Steps lost are those logged before the fault and done again after it. A save
goes on beside the training, so a kill may cost the save under way, too: at
most two intervals.
"""

import json
import pathlib
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags

from dpc_jax.analysis import report
from experiments import cli
from experiments.bench import fault_runs, fault_trials

_TRIALS = flags.DEFINE_integer(
  "trials", 20, "Trials of kill -9; the others are tried less.", lower_bound=1
)
_SECONDS = flags.DEFINE_float(
  "seconds", 900.0, "After it no trial begins.", lower_bound=0.0
)
_FAULTS = flags.DEFINE_string(
  "faults", ".*", "Which of them, as a pattern of their names."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")

# A run of seconds whose logs, evaluations and saves fall on different steps.
SHORT = {
  "steps": 60,
  "batch_size": 16,
  "eval_batch_size": 64,
  "log_every": 3,
  "eval_every": 25,
  "checkpoint_every": 7,
  "model.width": 2,
}


def of_recipe(argv: Sequence[str]) -> list[str]:
  """Of a command line, --config=RECIPE and its overrides."""
  return [
    f"{argument}={argv[i + 1]}" if argument == "--config" else argument
    for i, argument in enumerate(argv)
    if argument.startswith("--config")
  ]


def with_short(arguments: Sequence[str]) -> tuple[list[str], int]:
  """The arguments of a short run, and the steps between its saves.

  Args:
    arguments: --config=RECIPE and overrides, which stay.
  """
  values = {
    name.removeprefix("--config."): value
    for name, _, value in (argument.partition("=") for argument in arguments)
  }
  added = [
    f"--config.{name}={value}"
    for name, value in SHORT.items()
    if name not in values
  ]
  interval = int(values.get("checkpoint_every", SHORT["checkpoint_every"]))
  return [*arguments, *added], interval


def plan(
  bench: fault_trials.Bench, trials: int, can_mount: bool
) -> list[tuple[str, Callable[[], fault_trials.Outcome | None], int]]:
  """(fault, its trial, how often); never where nothing can be mounted."""
  some = max(1, trials // 6)
  mounted = some if can_mount else 0
  stop = signal.SIGSTOP
  return [
    ("kill -9", lambda: bench.kill(None, None), trials),
    ("SIGTERM", bench.terminate, some),
    ("full disk", bench.fill_disk, mounted),
    ("read-only disk", bench.lock_disk, mounted),
    ("no folder", bench.block_folder, 1),
    ("dead peer, process 1", lambda: bench.lose_peer(1), some),
    ("dead peer, process 0", lambda: bench.lose_peer(0), some),
    ("stopped peer, process 1", lambda: bench.lose_peer(1, stop), 1),
    ("stopped peer, process 0", lambda: bench.lose_peer(0, stop), 1),
  ]


def measure(
  arguments: Sequence[str],
  folder: pathlib.Path,
  *,
  trials: int,
  seconds: float,
  seed: int,
  pattern: str = ".*",
) -> dict[str, Any]:
  """The campaign's results, as they go into the JSON file.

  Args:
    arguments: --config=RECIPE and overrides.
    folder: of the runs, absolute.
    trials: of kill -9.
    seconds: after which no trial begins.
    seed: of the moments.
    pattern: a regular expression of the whole names of the faults to try.

  Raises:
    AloneError, HangError: a run that is left alone fails, or is not
      reproducible.
  """
  end = time.monotonic() + seconds
  arguments, interval = with_short(arguments)
  bench = fault_trials.Bench(arguments, folder, interval, seed)
  workdir = bench.refer()
  own = json.loads((workdir / "summary.json").read_text())
  alone = bench.seconds, bench.training_seconds
  print(
    f"left alone: {alone[0]:.1f} s, {alone[1]:.1f} s of them in training",
    flush=True,
  )
  rows = []
  todo = plan(bench, trials, fault_trials.can_mount(folder / "disk"))
  for name, trial, count in todo:
    if not re.fullmatch(pattern, name):
      continue
    if "peer" in name and not bench.knows(2) and time.monotonic() < end:
      bench.refer(2)
    rows.append(_row(name, trial, count, end))
  return {
    "device": own["device"],
    "versions": own["versions"],
    "arguments": arguments,
    "steps_between_saves": interval,
    "seconds_left_alone": alone[0],
    "training_seconds_left_alone": alone[1],
    "seed": seed,
    "faults": rows,
  }


def _row(name, trial, count, end) -> dict[str, Any]:
  """The trials of one fault, summed up."""
  outcomes, missed = [], 0
  while len(outcomes) < count and time.monotonic() < end and missed < 10:
    try:
      outcome = trial()
    except fault_runs.HangError as error:
      outcome = fault_trials.Outcome((f"a hang: {error}",))
    if outcome is None:
      missed += 1
      continue
    outcomes.append(outcome)
    said = "; ".join(outcome.problems) or "survived"
    print(f"{name}: {len(outcomes)}/{count} {said}", flush=True)
  lost = [o.lost for o in outcomes if o.lost is not None]
  times = [o.seconds for o in outcomes if o.seconds is not None]
  return {
    "fault": name,
    "planned": count,
    "tried": len(outcomes),
    "survived": sum(not o.problems for o in outcomes),
    "faults": sum(o.faults for o in outcomes),
    "while_saving": sum(o.while_saving for o in outcomes),
    "steps_lost_max": max(lost, default=None),
    "seconds_to_end_max": max(times, default=None),
    "missed": missed,
    "problems": [p for o in outcomes for p in o.problems],
  }


def table(results: dict[str, Any]) -> str:
  """The results as text."""
  header = (
    *("fault", "trials", "survived", "faults", "in a save", "steps lost"),
    "s to end",
  )
  lines = []
  for row in results["faults"]:
    lost, seconds = row["steps_lost_max"], row["seconds_to_end_max"]
    lines.append(
      (
        row["fault"],
        str(row["tried"]) if row["planned"] else "cannot mount",
        str(row["survived"]),
        str(row["faults"]),
        str(row["while_saving"]),
        "" if lost is None else str(lost),
        "" if seconds is None else f"{seconds:.1f}",
      )
    )
  return report.text_table(lines, header)


def main() -> int:
  """Runs the campaign, prints a table, writes the JSON file.

  Returns:
    1 if any trial did not survive.
  """
  start = time.perf_counter()
  # The accelerator is the runs'; here arrays are only compared.
  jax.config.update("jax_platforms", "cpu")
  folder = pathlib.Path(cli.FLAGS.workdir).absolute()
  try:
    results = measure(
      of_recipe(sys.argv[1:]),
      folder,
      trials=_TRIALS.value,
      seconds=_SECONDS.value,
      seed=_SEED.value,
      pattern=_FAULTS.value,
    )
  except (fault_trials.AloneError, fault_runs.HangError) as error:
    print(f"error: left alone, the run fails: {error}", file=sys.stderr)
    return 1
  results["command"] = " ".join(
    ["python -m experiments.bench.faults", *map(shlex.quote, sys.argv[1:])]
  )
  results["wall_seconds"] = time.perf_counter() - start
  path = folder / "faults.json"
  path.write_text(json.dumps(results, indent=2) + "\n")
  print(
    f"\n{results['device']}, {results['steps_between_saves']} steps apart\n"
  )
  print(table(results))
  print(f"written: {path}")
  return int(any(row["problems"] for row in results["faults"]))


if __name__ == "__main__":
  cli.define_config()
  sys.exit(cli.run(main, sys.argv))
