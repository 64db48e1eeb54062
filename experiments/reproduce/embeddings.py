"""The paper's figure of embeddings: full precision and DPC side by side.

  python -m experiments.reproduce.embeddings --scale=smoke

To reach: classes better separated by DPC than in full precision, in t-SNE plots
of the features, and less variance (the DPC paper, which gives no number for
either that we know). A plot proves nothing alone, so the table has numbers of
feature space. Its smoke scale is a real one: ResNet-8 learns the digits in
seconds.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import Any

from dpc_jax.analysis import cells, embedding_report
from experiments import embeddings, reporting
from experiments.reproduce import program, scales, tables, trials

NAME = "embeddings"
TITLE = "Embeddings of full precision and DPC"
PICTURE = "embeddings.png"
_DIGITS = scales.Trial(("float", "static8", "dpc", "adaptive"))
# {scale: (recipe, trial)}; but for the digits those of the table for CIFAR-10,
# which are not trained twice.
RUNS = {
  "smoke": ("digits_resnet8", _DIGITS),
  "cpu-hour": ("cifar10_resnet8", scales.CPU),
  "gpu-hour": ("cifar10_resnet38", scales.GPU_FLOAT),
  "full": ("cifar10_resnet110", scales.FULL),
}
_METHODS = ("float", "static8", "dpc", "adaptive")
# {measure: (in words, what is claimed of DPC, without a figure)}
_MEASURES = {
  "silhouette": ("silhouette", "classes further apart"),
  "neighbor_accuracy": ("k-NN accuracy", "classes further apart"),
  "scatter_ratio": ("scatter ratio", "classes further apart"),
  "relative_variance": ("relative variance", "less variance"),
  "gap": ("train - test accuracy", "-"),
}


def reproduce(context: trials.Context) -> tables.Section:
  """The figure, in the folder of the scale, and its numbers.

  Raises:
    trials.Stopped: SIGTERM.
  """
  recipe, trial = RUNS[context.scale]
  # One seed of those that the table of accuracies trains.
  trial = dataclasses.replace(trial, methods=_pictured(trial), seeds=1)
  outcome = trials.train(recipe, trial, context, has_report=False)
  errors, found = outcome.errors(recipe), None
  made = [method for method in trial.methods if outcome.runs.get(method)]
  if {"float", "dpc"} <= set(made):
    seed = min(outcome.runs["dpc"])
    where = context.where / recipe
    folders = [reporting.folder(where, method, seed) for method in made]
    found = _measure(folders, context)
    if found is None:
      errors.append(f"{recipe}, no figure: see the line above")
  return tables.Section(
    name=NAME,
    title=TITLE,
    header=_header(found),
    table=_table(found),
    notes=[_about(found), *map(cells.plain, errors)],
    figures=found,
    errors=errors,
    environments=outcome.environments(),
    picture=PICTURE if found else None,
  )


def _pictured(trial: scales.Trial) -> tuple[str, ...]:
  """Full precision first: the others are compared with it."""
  return tuple(method for method in _METHODS if method in trial.methods)


def _measure(folders, context) -> dict[str, Any] | None:
  """embeddings.json; None where the program has said why there is none."""
  flags = [
    f"--workdirs={','.join(map(str, folders))}",
    f"--workdir={context.where}",
  ]
  if context.data_dir is not None:
    flags.append(f"--data_dir={context.data_dir}")
  if embeddings.main(flags):
    return None
  return json.loads((context.where / "embeddings.json").read_text())


def _header(found) -> list[str]:
  names = [run["name"] for run in found["runs"]] if found else ["ours"]
  return ["measure", *names, "DPC - full precision", "claimed of DPC"]


def _table(found) -> list[list[str]]:
  lines = []
  for name, (words, published) in _MEASURES.items():
    ours = [tables.NOT_RUN, "-"]
    if found:
      ours = [f"{run['estimates'][name]['value']:.4f}" for run in found["runs"]]
      (dpc,) = (run for run in found["runs"] if run["method"] == "dpc")
      estimate = dpc["differences"][name]
      ours.append(embedding_report.interval(estimate, sign=True))
    lines.append([words, *ours, published])
  return lines


def _about(found: Mapping[str, Any] | None) -> str:
  if found is None:
    return "No figure: the runs it needs were not made."
  first = found["runs"][0]
  return (
    f"{first['model']} on {first['dataset']}, {first['steps']:,} steps, one"
    f" seed; the {found['examples']:,} examples of the {found['split']} split."
    " Features before the classifier; intervals are 95 % and say what other"
    " examples would have given, with these networks. t-SNE of"
    f" {found['pictured']:,} points, perplexity {found['perplexity']:g}, is for"
    " the eye; `embeddings.md` has all numbers and what they do not show."
  )


if __name__ == "__main__":
  sys.exit(program.main(NAME, __doc__))
