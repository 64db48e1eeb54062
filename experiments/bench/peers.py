r"""Measures our train step beside those of other libraries.

  pip install -r experiments/bench/requirements.txt
  python -m experiments.bench.peers --workdir=runs/peers

Float Flax, qwix and AQT with 8 bits, forward and forward with backward, and
ours: one network, one optimizer, one batch of made-up data, timed in turns.
What a library cannot do is a row that says so, in its own words. Columns: time
of a step and time to compile it, relative to float; memory for temporaries,
relative to float; programs that are compiled in a run whose widths change, and
the seconds that these changes cost. A second table has the widths that a
library supports, each tried on a small layer. Without the two libraries their
rows say so, and the rest is measured.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from configs import cifar10_resnet38, wikitext2_transformer
from dpc_jax import models
from dpc_jax.analysis import report
from dpc_jax.training import checks, sharding, summary
from experiments import arguments
from experiments.bench import (
  peer_plot,
  peer_rows,
  peer_tools,
  peer_widths,
  turns,
)

_TRANSFORMER = "transformer"
_WIDTHS = tuple(range(2, 9))


def recipe(name: str, batch_size: int | None, smoke: bool) -> Any:
  """The float recipe of a network.

  Args:
    name: "transformer", or a ResNet for CIFAR.
    batch_size: None leaves the recipe's own.
    smoke: whether it is the recipe's smoke variant, on tiny shapes.

  Raises:
    ConfigError: another name.
  """
  argument = "float,smoke" if smoke else "float"
  if name == _TRANSFORMER:
    config = wikitext2_transformer.get_config(argument)
  else:
    known = [n for n in models.names() if n[6:].isdigit() and "resnet" in n]
    if name not in known:
      raise checks.ConfigError(
        f"--models={name}: use {_TRANSFORMER}, {', '.join(known)}"
      )
    config = cifar10_resnet38.get_config(argument)
    config.model.name = name
    # Convolutions in a loop are slow on a CPU.
    config.model.scan = False
  if batch_size is not None:
    config.batch_size = batch_size
  return config


def measure(
  configs: dict[str, Any],
  chosen: peer_rows.Settings,
  widths: Sequence[int] = _WIDTHS,
) -> dict[str, Any]:
  """All measurements, as they go into the JSON file.

  Args:
    configs: {name: float recipe}.
    chosen: what to measure.
    widths: of the second table; none leaves it out.

  Raises:
    ConfigError: of a recipe, or of a variant of ours.
  """
  tools = [t for t in chosen.tools if peer_tools.version(t) is not None]
  supported = {}
  for tool in (*tools, peer_tools.OURS) if widths else ():
    for kind in peer_widths.KINDS:
      print(f"trying widths: {tool.name}, {kind}", flush=True)
      found = peer_widths.probe(tool, kind, widths)
      supported[f"{tool.name}, {kind}"] = found._asdict()
  networks = {}
  for name, config in configs.items():
    print(f"{name}, batch {config.batch_size}", flush=True)
    networks[name] = {
      "batch_size": config.batch_size,
      "rows": peer_rows.measure(config, chosen),
    }
    jax.clear_caches()
  found = summary.environment(sharding.make_mesh(None, 1, 1))
  found["versions"] |= {
    tool.package: peer_tools.version(tool) for tool in chosen.tools
  }
  return found | {
    "rounds": chosen.rounds,
    "steps_per_round": chosen.steps,
    "networks": networks,
    "widths": supported,
  }


def network_table(rows: dict[str, Any], changes: int) -> str:
  """The text table of one network, and below it what the rows do not say."""
  header = (
    "train step",
    "time/float",
    "quartiles",
    "ms",
    "compile/float",
    "temporaries/float",
    f"compiles in {changes} changes",
    "s for them",
  )
  table, remarks = [], []
  for label, row in rows.items():
    if row["cannot"] is not None:
      remarks.append(f"{label}: cannot; {row['cannot']}")
      table.append((label, *["-"] * (len(header) - 1)))
      continue
    remarks += [f"{label}: {note}" for note in row["notes"]]
    table.append(
      (
        label,
        f"{row['ratio']:.2f}",
        "{:.2f}..{:.2f}".format(*row["ratio_quartiles"]),
        f"{row['milliseconds']:.1f}",
        f"{row['compile_ratio']:.2f}",
        f"{row['temporary_ratio']:.2f}",
        *_change_cells(label, row["changes"], remarks),
      )
    )
  return "\n".join([report.text_table(table, header), "", *remarks]).rstrip()


def _change_cells(label, changes, remarks) -> tuple[str, str]:
  if changes is None:
    return "", ""
  if changes["note"]:
    remarks.append(f"{label}: changes of widths: {changes['note']}")
  if not changes["made"]:
    return "", ""
  if changes["made"] < changes["asked"]:
    remarks.append(
      f"{label}: {changes['made']} changes were made, in"
      f" {changes['measured_seconds']:.1f} s; {changes['asked']} are"
      " extrapolated from their mean"
    )
  return f"{changes['compiles']}", f"{changes['seconds']:.2f}"


def width_table(supported: dict[str, Any]) -> str:
  """The text table of widths, and below it what is wrong with the others."""
  header = (
    "layer",
    "forward",
    "with gradients of 8 bits",
    "gradients",
    "of them stochastic",
    "widths as data",
  )
  table, remarks = [], []
  for label, found in supported.items():
    columns = ("forward", "training", "backward", "stochastic")
    for name in columns:
      for reason in sorted(set(found[name].values())):
        if reason != peer_widths.YES:
          where = [b for b, r in found[name].items() if r == reason]
          remarks.append(f"{label}, {name} {ranges(where)}: {reason}")
    traced = found["traced"] == peer_widths.YES
    if not traced:
      remarks.append(f"{label}, a traced width: {found['traced']}")
    table.append(
      (
        label,
        *(ranges(peer_widths.supported(found[name])) for name in columns),
        "yes" if traced else "no",
      )
    )
  return "\n".join([report.text_table(table, header), "", *remarks]).rstrip()


def ranges(numbers: Sequence[int]) -> str:
  """Ascending integers in words: "2-4, 8"; "none" without any."""
  runs = []
  for n in numbers:
    if runs and runs[-1][1] == n - 1:
      runs[-1][1] = n
    else:
      runs.append([n, n])
  return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs) or "none"


def main(argv: Sequence[str] | None = None) -> int:
  """Measures, prints the tables, writes JSON and pictures."""
  argv = sys.argv[1:] if argv is None else list(argv)
  given = _parser().parse_args(argv)
  start = time.perf_counter()
  chosen = peer_rows.Settings(
    ours=tuple(given.ours or peer_rows.Settings().ours),
    rounds=given.rounds,
    steps=given.steps,
    changes=given.changes,
    peer_changes=min(given.peer_changes, given.changes),
  )
  try:
    configs = {
      name: recipe(name, given.batch_size, given.smoke)
      for name in given.models.split(",")
    }
    _make(given.workdir)
    with turns.no_cache():
      results = measure(configs, chosen)
  except checks.ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  path = turns.write(results, given.workdir, "peers", argv, start)
  peer_plot.draw(results["networks"], path.with_suffix(".png"))
  for name, network in results["networks"].items():
    print(f"\n{name}, batch {network['batch_size']}, {results['device']}\n")
    print(network_table(network["rows"], chosen.changes))
  print(f"\n{width_table(results['widths'])}\n")
  print(f"written: {path}, {path.stem}.png, {path.stem}.svg")
  return 0


def _make(workdir) -> None:
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise checks.ConfigError(
      f"--workdir={workdir}: {error.strerror}; use another"
    ) from None


def _parser() -> argparse.ArgumentParser:
  parser = arguments.Parser("experiments.bench.peers", __doc__)
  add = parser.add_argument
  add("--workdir", required=True, type=arguments.folder, metavar="DIR")
  add(
    "--models",
    default="resnet14,resnet38,transformer",
    help="transformer, and ResNets for CIFAR; default: %(default)s",
  )
  add(
    "--ours",
    action="append",
    metavar="METHOD,FIELD=VALUE,...",
    help="a row of ours with fields of config.precision, may be given several"
    " times; default: static8, dpc, adaptive",
  )
  add("--batch_size", type=turns.count(1), help="default: the recipe's")
  add("--rounds", type=turns.count(2), default=9, help="of one timing each")
  add("--steps", type=turns.count(1), default=1, help="per timing")
  add(
    "--changes",
    type=turns.count(1),
    default=50,
    help="of all widths, in one run; default: %(default)s",
  )
  add(
    "--peer_changes",
    type=turns.count(1),
    default=3,
    help="how many of them are made where each compiles anew; the seconds of"
    " all are their mean times --changes; default: %(default)s",
  )
  add("--smoke", action="store_true", help="tiny shapes: does it work here?")
  return parser


if __name__ == "__main__":
  sys.exit(main())
