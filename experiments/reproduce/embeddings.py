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
import statistics
import sys
from typing import Any

from dpc_jax.analysis import cells, embedding_report, significance
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
_ABOUT = (
  "The paper claims better separated classes, by t-SNE plots, and less"
  " variance; it gives no figure that we know. Ours are not corrected for their"
  " number."
)
# {measure: (in words, what is claimed of DPC, without a figure)}
_MEASURES = {
  "silhouette": ("silhouette", "more"),
  "neighbor_accuracy": ("k-NN accuracy", "more"),
  "scatter_ratio": ("scatter ratio", "more"),
  "relative_variance": ("relative variance", "less"),
  "gap": ("train - test accuracy", "-"),
}


def reproduce(context: trials.Context) -> tables.Section:
  """The figure of the first seed, in the folder of the scale; numbers of all.

  Raises:
    trials.Stopped: SIGTERM.
  """
  recipe, trial = RUNS[context.scale]
  # Full precision first: the others are compared with it.
  names = tuple(method for method in _METHODS if method in trial.methods)
  trial = dataclasses.replace(trial, methods=names)
  outcome = trials.train(recipe, trial, context, has_report=False)
  errors, found = outcome.errors(recipe), []
  runs = outcome.runs
  seeds = sorted(set(runs.get("float", ())) & set(runs.get("dpc", ())))
  for seed in seeds:
    folders = [
      reporting.folder(context.where / recipe, method, seed)
      for method in names
      # Each column has the same seeds.
      if set(seeds) <= set(runs[method])
    ]
    measured = _measure(folders, context, seed, is_first=seed == seeds[0])
    if measured is None:
      errors.append(f"{recipe}, seed {seed}, no figure: see the line above")
    else:
      found.append(measured)
  return tables.Section(
    name=NAME,
    title=TITLE,
    header=_header(found),
    table=_table(found),
    notes=[_ABOUT, _about(found), *map(cells.plain, errors)],
    figures={"measured": found, "differences": _differences(found)},
    errors=errors,
    environments=outcome.environments(),
    picture=PICTURE if found else None,
  )


def _measure(folders, context, seed, is_first) -> dict[str, Any] | None:
  """embeddings.json; None where the program has said why there is none."""
  where = context.where
  if not is_first:
    where = where / f"embeddings_seed{seed}"
  flags = [f"--workdirs={','.join(map(str, folders))}", f"--workdir={where}"]
  if context.data_dir is not None:
    flags.append(f"--data_dir={context.data_dir}")
  if embeddings.main(flags):
    return None
  return json.loads((where / "embeddings.json").read_text())


def _differences(found) -> dict[str, dict[str, float]]:
  """{measure: value, low, high} of DPC minus full precision.

  Of several seeds the mean of theirs, with Student's interval over them; of one
  its own, with the bootstrap interval over examples.
  """
  of_dpc = [
    run["differences"]
    for measured in found
    for run in measured["runs"]
    if run["method"] == "dpc"
  ]
  if len(of_dpc) < 2:
    return {name: of_dpc[0][name] for name in _MEASURES} if of_dpc else {}
  samples = {
    name: significance.sample([each[name]["value"] for each in of_dpc])
    for name in _MEASURES
  }
  return {
    name: {"value": x.mean, "low": x.low, "high": x.high}
    for name, x in samples.items()
  }


def _header(found) -> list[str]:
  names = [run["name"] for run in found[0]["runs"]] if found else ["ours"]
  return ["measure", *names, "DPC - full precision", "claimed of DPC"]


def _table(found) -> list[list[str]]:
  lines = []
  for name, (words, claimed) in _MEASURES.items():
    ours = [tables.NOT_RUN, "-"]
    if found:
      ours = [
        f"{statistics.fmean(values):.4f}"
        for values in zip(
          *(
            [run["estimates"][name]["value"] for run in measured["runs"]]
            for measured in found
          ),
          strict=True,
        )
      ]
      difference = _differences(found)[name]
      ours.append(embedding_report.interval(difference, sign=True))
    lines.append([words, *ours, claimed])
  return lines


def _about(found) -> str:
  if not found:
    return "No figure: the runs it needs were not made."
  first, seeds = found[0]["runs"][0], len(found)
  interval = (
    "the interval is Student's over them, at 95 %"
    if seeds > 1
    else "the 95 % interval says what other examples would have given, with"
    " these two networks, and nothing of other seeds"
  )
  return (
    f"{first['model']} on {first['dataset']}, {first['steps']:,} steps;"
    f" {seeds} {'seeds' if seeds > 1 else 'seed'}: {interval}. Features before"
    f" the classifier, of the {found[0]['examples']:,} examples of the"
    f" {found[0]['split']} split. t-SNE of {found[0]['pictured']:,} points,"
    f" perplexity {found[0]['perplexity']:g}, of seed {first['seed']}, is for"
    " the eye; `embeddings.md` has all its numbers and what they do not show."
  )


if __name__ == "__main__":
  sys.exit(program.main({NAME: reproduce}, __doc__))
