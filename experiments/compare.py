r"""Trains one recipe with several methods and compares them.

  python -m experiments.compare --config=configs/digits_resnet8.py \
    --methods=static8,dpc --workdir=runs/demo

Each method has its own folder in the workdir; finished runs are not trained
again. Beside them: `report.md`, `bits.png`, and all summaries in
`comparison.json`.
"""

import copy
import json
import pathlib
import shlex
import sys

from absl import flags

from dpc_jax.analysis import plots, report
from dpc_jax.training import config as config_lib
from dpc_jax.training import loop
from experiments import cli

_METHODS = flags.DEFINE_list(
  "methods", ["static8", "dpc"], "Methods to train: float, static<b>, dpc."
)


def main() -> None:
  """Trains `--config` once per method in `--workdir/METHOD`."""
  workdir = pathlib.Path(cli.FLAGS.workdir)
  configs = {}
  for method in dict.fromkeys(_METHODS.value):
    config = copy.deepcopy(cli.FLAGS.config)
    config.precision.method = method
    # All of them first: a mistake in the last must not cost the first's time.
    config_lib.validate(config)
    configs[method] = config
  if not configs:
    raise config_lib.ConfigError("--methods is empty: name at least one")
  summaries = {}
  for method, config in configs.items():
    summaries[method] = loop.train_and_evaluate(config, workdir / method)
    if summaries[method] is None:
      return
  first = next(iter(summaries.values()))
  capacities = {
    path: cost["weights"]
    for path, cost in first["layers"].items()
    if any(path in run["bits"] for run in summaries.values())
  }
  if capacities:
    plots.bits_per_layer(
      {label: run["bits"] for label, run in summaries.items()},
      capacities,
      workdir / "bits.png",
    )
  command = " ".join(
    ["python -m experiments.compare", *map(shlex.quote, sys.argv[1:])]
  )
  b_max = cli.FLAGS.config.precision.b_max
  text = report.comparison(summaries, command=command, b_max=b_max)
  (workdir / "report.md").write_text(text)
  (workdir / "comparison.json").write_text(
    json.dumps({"command": command, "runs": summaries}, indent=2) + "\n"
  )
  print(f"\n{first['model']} on {first['dataset']}, {first['steps']} steps\n")
  print(report.text_table(report.rows(summaries), report.header(summaries)))
  print(f"\nsaving: against static {b_max}/{b_max} with 8-bit gradients\n")
  _print_paths(workdir, summaries)


def _print_paths(workdir, summaries):
  print("written:")
  for name, what in (
    ("report.md", "the comparison, layer by layer"),
    ("bits.png", "bits and N_k per layer"),
    ("comparison.json", "the summaries of the runs"),
  ):
    if (workdir / name).exists():
      print(f"  {workdir / name}  {what}")
  for label in summaries:
    print(
      f"  {workdir / label}/  metrics.jsonl, bits.jsonl, checkpoints/,"
      " TensorBoard events"
    )


if __name__ == "__main__":
  cli.define_config()
  sys.exit(cli.run(main, sys.argv))
