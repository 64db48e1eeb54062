r"""Draws what the classifiers of finished runs see, with numbers beside it.

  python -m experiments.embeddings \
    --workdirs=runs/digits/float/seed0,runs/digits/dpc/seed0 \
    --workdir=runs/embeddings

The paper's figure: t-SNE of the features before the classifier, a panel for
each run, full precision first. Each run is taken from its newest checkpoint, as
evaluation does it, on the whole split. Written to the workdir: `embeddings.png`
and `.svg`, `embeddings.json`, all numbers, and `embeddings.md`, what they show
and what they do not. Runs must be of one data set.
"""

import argparse
import dataclasses
import json
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dpc_jax.analysis import (
  embedding_numbers,
  embedding_plot,
  embedding_report,
  embeddings,
  separation,
  variance,
)
from dpc_jax.data import prepared
from dpc_jax.training import config as config_lib
from dpc_jax.training import state as state_lib
from experiments import arguments, features

# What a figure calls a method.
_NAMES = {"float": "full precision", "dpc": "DPC", "adaptive": "adaptive DPC"}


def main(argv: Sequence[str] | None = None) -> int:
  """Draws the figure and writes the numbers; returns the exit code."""
  flags = _parser().parse_args(argv)
  words = sys.argv[1:] if argv is None else argv
  try:
    command = " ".join(
      ["python -m experiments.embeddings", *map(shlex.quote, words)]
    )
    _run(flags, command)
  except (config_lib.ConfigError, prepared.DataError) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = arguments.Parser("experiments.embeddings", __doc__)
  parser.add_argument(
    "--workdirs",
    required=True,
    metavar="A,B",
    help="workdirs of the runs, what the others are compared with first",
  )
  parser.add_argument(
    "--workdir",
    required=True,
    metavar="OUT",
    type=pathlib.Path,
    help="where the figure and the numbers go; made if absent",
  )
  parser.add_argument(
    "--split", default="test", help="whose features (default: test)"
  )
  parser.add_argument(
    "--perplexity",
    type=float,
    help="of t-SNE; default 30, less for fewer than 91 points",
  )
  parser.add_argument(
    "--pictured",
    type=int,
    default=embeddings.PICTURED,
    help="most points of a picture, of all classes alike (default:"
    " %(default)s); the numbers are of the whole split",
  )
  parser.add_argument(
    "--neighbors",
    type=int,
    default=separation.NEIGHBORS,
    help="k of the nearest neighbors (default: %(default)s)",
  )
  parser.add_argument(
    "--checkpoint",
    choices=("newest", "best"),
    default="newest",
    help="best: on the validation split, of those kept (default: newest)",
  )
  parser.add_argument(
    "--data_dir",
    help="where the data lies, if not where the runs found it",
  )
  return parser


def _run(flags: argparse.Namespace, command: str) -> None:
  folders = list(dict.fromkeys(filter(None, flags.workdirs.split(","))))
  if not folders:
    raise config_lib.ConfigError("--workdirs is empty: name at least one run")
  configs = [features.config_of(folder, flags.data_dir) for folder in folders]
  features.check_same_data(folders, configs)
  try:
    flags.workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise config_lib.ConfigError(
      f"--workdir={flags.workdir}: {error.strerror}; use another"
    ) from None
  data, seen = None, []
  for i, (folder, config) in enumerate(zip(folders, configs, strict=True), 1):
    print(f"[{i}/{len(folders)}] {folder}", flush=True)
    run = features.load(folder, config, data, flags.checkpoint)
    data = run.parts.data
    _check_flags(flags, config.data.name, data.splits)
    step = features.make_feature_step(run.parts)
    splits = dict.fromkeys(("train", "test", flags.split))
    print(f"  checkpoint of step {run.step:,}", flush=True)
    seen.append(
      (run, {split: features.embed(run, step, split) for split in splits})
    )
  result, panels = _measure(flags, seen)
  _write(result | {"command": command}, panels, data.class_names, flags.workdir)


def _check_flags(flags, dataset, splits) -> None:
  """Before a split is taken through a network, which may take long."""
  if flags.split not in splits:
    raise config_lib.ConfigError(
      f"--split={flags.split}: {dataset} has {', '.join(splits)}; use one of"
      " them"
    )
  pictured = min(flags.pictured, len(splits[flags.split]))
  voters = len(splits["train"]) - (flags.split == "train")
  # NaN is below no bound.
  perplexity = 1 if flags.perplexity is None else flags.perplexity
  for name, value, low, high, is_right in (
    ("pictured", flags.pictured, 4, "the split's size", pictured >= 4),
    ("neighbors", flags.neighbors, 1, voters, 1 <= flags.neighbors <= voters),
    (
      "perplexity",
      flags.perplexity,
      1,
      pictured - 1,
      1 <= perplexity <= pictured - 1,
    ),
  ):
    if not is_right:
      raise config_lib.ConfigError(f"--{name}={value}: use {low}..{high}")


def _measure(flags, seen) -> tuple[dict[str, Any], list[embedding_plot.Panel]]:
  """(what embeddings.json holds but for the command, the panels)."""
  try:
    print("measuring", flush=True)
    numbers = [
      embedding_numbers.numbers(splits, flags.split, flags.neighbors)
      for _, splits in seen
    ]
    labels = numbers[0].labels
    rows = embeddings.balanced_subset(labels, flags.pictured)
    maps, perplexity = [], None
    for i, (_, splits) in enumerate(seen, 1):
      print(f"t-SNE {i}/{len(seen)}, {len(rows):,} points", flush=True)
      points, perplexity = embeddings.t_sne(
        splits[flags.split].features[rows], perplexity=flags.perplexity
      )
      maps.append(embeddings.turned_to(maps[0] if maps else points, points))
    runs = [
      _describe(run, splits, numbers[i], numbers[0] if i else None)
      for i, (run, splits) in enumerate(seen)
    ]
  except ValueError as error:
    raise config_lib.ConfigError(f"--workdirs={flags.workdirs}: {error}") from (
      error
    )
  _name(runs)
  for run in runs[1:]:
    run["weight_variance_ratio"] = variance.mean_ratio(
      run["weight_variance"], runs[0]["weight_variance"]
    )
  result = {
    "dataset": runs[0]["dataset"],
    "split": flags.split,
    "examples": len(labels),
    "pictured": len(rows),
    "perplexity": perplexity,
    "seed": embeddings.SEED,
    "neighbors": flags.neighbors,
    "silhouette_examples": len(embedding_numbers.silhouette_rows(labels)),
    "resamples": separation.RESAMPLES,
    "runs": runs,
  }
  panels = [
    embedding_plot.Panel(
      run["name"], points, labels[rows], embedding_report.panel_text(run)
    )
    for run, points in zip(runs, maps, strict=True)
  ]
  return result, panels


def _describe(run, splits, numbers, first) -> dict[str, Any]:
  """A run's part of embeddings.json; `first` is what it is compared with."""
  config = run.parts.config
  bits = jax.device_get(state_lib.layer_bits(run.state))
  found = {
    "workdir": run.workdir,
    "method": config.precision.method,
    "model": config.model.name,
    "dataset": config.data.name + (" (fake)" if config.data.fake else ""),
    "seed": config.seed,
    "step": run.step,
    "steps": config.steps,
    # Over weights, as the checkpoint has them; None for a float run.
    "bits_per_weight": _bits_per_weight(bits, run.parts.costs),
    "accuracy": {k: float(np.mean(x.correct)) for k, x in splits.items()},
    "loss": {k: x.loss for k, x in splits.items()},
    "estimates": _as_dicts(embedding_numbers.estimates(numbers)),
    "weight_variance": _weight_variances(run),
  }
  if first is not None:
    found["differences"] = _as_dicts(
      embedding_numbers.differences(numbers, first)
    )
  return found


def _weight_variances(run) -> dict[str, float]:
  """In the network's order, which parameters do not keep."""
  found = variance.weight_variances(jax.device_get(run.state.params))
  order = {path: i for i, path in enumerate(run.parts.costs)}
  # A tied kernel is nobody's cost.
  return dict(sorted(found.items(), key=lambda x: order.get(x[0], len(order))))


def _bits_per_weight(bits, costs) -> float | None:
  if not bits:
    return None
  sizes = [costs[path].weights for path in bits]
  widths = [float(np.mean(layer.weights)) for layer in bits.values()]
  return float(np.average(widths, weights=sizes))


def _as_dicts(estimates: Mapping[str, Any]) -> dict[str, dict[str, float]]:
  return {k: dataclasses.asdict(x) for k, x in estimates.items()}


def _name(runs: list[dict[str, Any]]) -> None:
  """Gives each run a name that says what tells it from the others."""
  forms = (
    lambda run: _NAMES.get(run["method"], run["method"]),
    lambda run: f"{forms[0](run)}, seed {run['seed']}",
    lambda run: f"{forms[1](run)}, {run['model']}",
    lambda run: run["workdir"],
  )
  for form in forms:
    names = [form(run) for run in runs]
    if len(set(names)) == len(names):
      break
  for run, name in zip(runs, names, strict=True):
    run["name"] = name


def _write(result, panels, class_names, workdir: pathlib.Path) -> None:
  paths = [workdir / f"embeddings.{suffix}" for suffix in ("png", "svg")]
  try:
    embedding_plot.draw(panels, class_names, paths)
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    (workdir / "embeddings.json").write_text(text)
    markdown = embedding_report.markdown(result)
    (workdir / "embeddings.md").write_text(markdown)
  except OSError as error:
    raise config_lib.ConfigError(
      f"--workdir={workdir}: {error.strerror}; use another"
    ) from None
  for run in result["runs"]:
    print(f"\n{run['name']}")
    for line in embedding_report.panel_text(run):
      print(f"  {line}")
  print("\nwritten:")
  for name, what in (
    ("embeddings.png", "the figure; .svg beside it"),
    ("embeddings.md", "the numbers, and what they do not show"),
    ("embeddings.json", "the same for programs"),
  ):
    print(f"  {workdir / name}  {what}")


if __name__ == "__main__":
  sys.exit(main())
