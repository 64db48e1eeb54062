r"""Draws what the classifiers of finished runs see, with numbers beside it.

  python -m experiments.embeddings \
    --workdirs=runs/digits/float/seed0,runs/digits/dpc/seed0 \
    --workdir=runs/embeddings

The paper's figure: t-SNE of the features before the classifier, a panel for
each run, full precision first. Each run is taken from its newest checkpoint, as
evaluation does it, on the whole split. Written to the workdir: `embeddings.png`
and `.svg`, `embeddings.json`, all numbers, and `embeddings.md`, what they show
and what they do not. Runs must be of one data set.

It is the work of one process, on all devices of its machine, and joins no
others: under srun or mpirun each would do all of it, and write the same files.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
from dpc_jax.training import config as config_lib
from experiments import arguments, features, finished, reporting

# What a figure calls a method.
_NAMES = {
  "float": "full precision",
  "dpc": "DPC",
  "adaptive": "adaptive DPC",
  "cpt": "CPT",
  "dpc_cpt": "DPC + CPT",
}


class _Seen(NamedTuple):
  """What is kept of a run; the features of whole splits are not.

  Attributes:
    found: its part of embeddings.json.
    numbers: what another run's are compared with.
    rows: int (P,), the examples of the picture.
    features: float32 (P, F), of these.
  """

  found: dict[str, Any]
  numbers: embedding_numbers.Numbers
  rows: np.ndarray
  features: np.ndarray


def main(argv: Sequence[str] | None = None) -> int:
  """Draws the figure and writes the numbers; returns the exit code."""
  return arguments.run(_parser(), _run, argv)


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
    type=arguments.folder,
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
  for folder in folders:
    _check_run(folder)
  configs = [features.config_of(folder, flags.data_dir) for folder in folders]
  features.check_same_data(folders, configs)
  try:
    flags.workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise config_lib.ConfigError(
      f"--workdir={flags.workdir}: {error.strerror}; use another"
    ) from None
  data, loaded, seen = None, [], []
  for folder, config in zip(folders, configs, strict=True):
    run = features.load(folder, config, data, flags.checkpoint)
    data = run.parts.data
    loaded.append((run, features.make_feature_step(run.parts)))
  _check_flags(flags, configs[0].data.name, data.splits)
  for i in range(1, len(folders) + 1):
    run, step = loaded.pop(0)
    print(f"[{i}/{len(folders)}] {run.workdir}", flush=True)
    print(f"  checkpoint of step {run.step:,}", flush=True)
    seen.append(_see(flags, run, step, seen[0].numbers if seen else None))
  result, panels = _picture(flags, seen)
  _write(result | {"command": command}, panels, data.class_names, flags.workdir)


def _check_run(folder: str) -> None:
  """Where no run is but some are near, the line names one."""
  where = pathlib.Path(folder).expanduser()
  if (where / "config.json").is_file():
    return
  found = finished.runs_meant(where)
  if found:
    raise config_lib.ConfigError(
      f"--workdirs: {folder}: holds no run; {finished.did_you_mean(found, '')}"
    )


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


def _see(flags, run, step, first) -> _Seen:
  """Takes the splits through a network; `first` is compared with, or None."""
  splits = {
    split: features.embed(run, step, split)
    for split in dict.fromkeys(("train", "test", flags.split))
  }
  print("  measuring", flush=True)
  try:
    numbers = embedding_numbers.numbers(splits, flags.split, flags.neighbors)
    found = _describe(run, splits, numbers, first)
  except ValueError as error:
    raise _of_run(run.workdir, error) from error
  rows = embeddings.balanced_subset(numbers.labels, flags.pictured)
  return _Seen(found, numbers, rows, splits[flags.split].features[rows])


def _of_run(workdir, error) -> config_lib.ConfigError:
  return config_lib.ConfigError(f"--workdirs: {workdir}: {error}")


def _describe(run, splits, numbers, first) -> dict[str, Any]:
  """A run's part of embeddings.json; `first` is what it is compared with."""
  config = run.parts.config
  bits = features.evaluation_bits(run)
  found = {
    "workdir": run.workdir,
    "method": config.precision.method,
    "model": config.model.name,
    "dataset": config.data.name + (" (fake)" if config.data.fake else ""),
    "seed": config.seed,
    "step": run.step,
    "steps": config.steps,
    # At the widths of evaluation; None for a float run.
    "bits_per_quantized_weight": features.bits_per_quantized_weight(
      bits, run.parts.costs
    ),
    "accuracy": {k: float(np.mean(x.correct)) for k, x in splits.items()},
    "loss": {k: x.loss for k, x in splits.items()},
    "estimates": _as_dicts(embedding_numbers.estimates(numbers)),
    "weight_variance": _weight_variances(run),
  }
  if first is not None:
    differences = embedding_numbers.differences(numbers, first)
    found["differences"] = _as_dicts(
      {name: differences[name] for name in embedding_report.COMPARED}
    )
  return found


def _picture(flags, seen) -> tuple[dict[str, Any], list[embedding_plot.Panel]]:
  """(what embeddings.json holds but for the command, the panels)."""
  maps, perplexity = [], None
  for i, of_run in enumerate(seen, 1):
    print(f"t-SNE {i}/{len(seen)}, {len(of_run.rows):,} points", flush=True)
    try:
      points, perplexity = embeddings.t_sne(
        of_run.features, perplexity=flags.perplexity
      )
    except ValueError as error:
      raise _of_run(of_run.found["workdir"], error) from error
    maps.append(
      embeddings.procrustes_align(maps[0] if maps else points, points)
    )
  runs = [of_run.found for of_run in seen]
  _name(runs)
  for run in runs[1:]:
    run["weight_variance_ratio"] = variance.geometric_mean_ratio(
      run["weight_variance"], runs[0]["weight_variance"]
    )
  labels, rows = seen[0].numbers.labels, seen[0].rows
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


def _weight_variances(run) -> dict[str, float]:
  """In the network's order, which parameters do not keep."""
  found = variance.weight_variances(jax.device_get(run.state.params))
  order = {path: i for i, path in enumerate(run.parts.costs)}
  # A tied kernel is nobody's cost.
  return dict(sorted(found.items(), key=lambda x: order.get(x[0], len(order))))


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
    caption = embedding_plot.parameters(result)
    embedding_plot.draw(panels, class_names, paths, caption=caption)
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    reporting.write_text(workdir / "embeddings.json", text)
    markdown = embedding_report.markdown(result)
    reporting.write_text(workdir / "embeddings.md", markdown)
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
