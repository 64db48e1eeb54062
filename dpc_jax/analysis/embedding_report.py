"""The numbers beside a picture of embeddings, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpc_jax.analysis import cells, report

SEPARATION = {
  "silhouette": "silhouette",
  "neighbor_accuracy": "k-NN accuracy",
  "scatter_ratio": "scatter ratio",
}
VARIANCE = {
  "gap": "generalization gap",
  "relative_variance": "relative feature variance",
}
# Measures of which runs are compared: `feature_variance` has a scale of its own
# in each network.
COMPARED = (*SEPARATION, *VARIANCE)
_NOT_COMPARED = {"feature_variance": "feature variance"}
# Beyond these powers of ten a value is written with an exponent.
_LOWEST, _HIGHEST = -7, 7


def markdown(result: Mapping[str, Any]) -> str:
  """The text of `embeddings.md`.

  Args:
    result: what `embeddings.json` holds (see `experiments.embeddings`): runs,
      each with `estimates`, and all but the first with `differences` from the
      first, {measure: {value, low, high, n}}; differences of `COMPARED`.
  """
  runs = result["runs"]
  others = runs[1:]
  parts = [
    f"# Embeddings: {cells.plain(result['dataset'])}, {result['split']} split",
    "![t-SNE of the features before the classifier, one panel for each"
    " run](embeddings.png)",
    _about_the_picture(result),
    report.markdown_table(*_what_ran(runs)),
    "## Are classes further apart?",
    report.markdown_table(*_table(runs, "estimates", SEPARATION)),
    _about_separation(result),
    *_differences(others, runs[0], SEPARATION),
    "## Does low precision constrain variance?",
    report.markdown_table(*_accuracies(runs)),
    report.markdown_table(*_table(runs, "estimates", VARIANCE | _NOT_COMPARED)),
    _ABOUT_VARIANCE,
    *_differences(others, runs[0], VARIANCE),
    report.markdown_table(*_weights(runs)),
    _ABOUT_WEIGHTS,
    "## What this does not show",
    _limits(result),
    f"Command: {cells.code(result['command'])}",
  ]
  return "\n\n".join(parts) + "\n"


def panel_text(run: Mapping[str, Any]) -> list[str]:
  """The lines below a run's panel: each measure with its interval."""
  return [
    f"test accuracy {run['accuracy']['test']:.4f}",
    *(
      f"{name} {interval(run['estimates'][key])}"
      for key, name in SEPARATION.items()
    ),
  ]


def interval(estimate: Mapping[str, float], sign: bool = False) -> str:
  """A value with its 95 % interval, "0.812 [0.794, 0.830]".

  Its digits are those that the interval tells: half its width has two of them,
  or up to four where an end beside zero needs them (our decision). Without any
  width the value has four or more.

  Args:
    estimate: value, low and high, finite.
    sign: whether positive ones have a plus, as differences.
  """
  ends = [estimate[end] for end in ("value", "low", "high")]
  half = (estimate["high"] - estimate["low"]) / 2
  power = _power(max(map(abs, ends)))
  last = _power(half) - 1 if half > 0 else min(power - 3, 0)
  if half > 0:
    # An end beside zero shows on which side it is.
    nearest = min((abs(end) for end in ends[1:] if end), default=half)
    last = max(min(last, _power(nearest)), last - 2)
  plus = "+" if sign else ""
  if last < _LOWEST or power >= _HIGHEST:
    form = f"{{:{plus}.{max(power - last, 1)}e}}"
  else:
    # Tens and hundreds may be more than the interval tells, too.
    ends = [round(end, -last) for end in ends] if last > 0 else ends
    # z: what rounds to zero has no minus.
    form = f"{{:{plus}z,.{max(-last, 0)}f}}"
  value, low, high = (form.format(float(end)) for end in ends)
  return f"{value} [{low}, {high}]"


def _power(x: float) -> int:
  """Of ten, of the first of two significant digits; 0 of zero."""
  return int(f"{x:.1e}".partition("e")[2])


def _about_the_picture(result) -> str:
  shown = (
    f"all {result['examples']:,} examples"
    if result["pictured"] == result["examples"]
    else f"{result['pictured']:,} of the {result['examples']:,} examples, the"
    " same number of each class"
  )
  return (
    "t-SNE of the input of the layer `classifier`, begun from PCA: perplexity"
    f" {result['perplexity']:g}, seed {result['seed']}, {shown}."
    " Later panels are turned and mirrored to lie as the first does. Features"
    " are taken at the widths of evaluation, with the running ranges; the bits"
    " are those widths, averaged over all weights of the quantized layers."
  )


def _what_ran(runs):
  header = (
    *("run", "model", "method", "seed", "checkpoint"),
    "bits per quantized weight",
  )
  table = [
    (
      *(cells.plain(run[field]) for field in ("name", "model", "method")),
      str(run["seed"]),
      f"step {run['step']:,} of {run['steps']:,}",
      "-"
      if run["bits_per_quantized_weight"] is None
      else f"{run['bits_per_quantized_weight']:.2f}",
    )
    for run in runs
  ]
  return table, header


def _table(runs, field, names):
  table = [
    (
      cells.plain(run["name"]),
      *(interval(run[field][key]) for key in names),
    )
    for run in runs
  ]
  return table, ("run", *names.values())


def _about_separation(result) -> str:
  voters = (
    "all others of the split"
    if result["split"] == "train"
    else "the training split, whose features come from the same network"
  )
  silhouette = (
    "every example"
    if result["silhouette_examples"] == result["examples"]
    else f"a class-balanced subset of {result['silhouette_examples']:,}"
  )
  return (
    f"In feature space, of {result['examples']:,} examples (the silhouette of"
    f" {silhouette}); k-NN: {result['neighbors']} neighbors out of {voters}."
    " The scatter ratio is tr(S_B) / tr(S_W), between classes to within, less"
    " what chance adds to estimated centers: 0 is no more than chance, and it"
    " can fall below; it does not depend on the features' scale. Of all three,"
    " more means further apart. In brackets, 95 % bootstrap intervals"
    f" over the examples ({result['resamples']:,} resamples); what is"
    " resampled, see `dpc_jax.analysis.separation`. Where every answer is"
    " right, an"
    " interval has no width and says nothing."
  )


def _differences(others, first, names) -> list[str]:
  """A table of paired differences from the first run, and what they say."""
  if not others:
    return []
  table = [
    (
      cells.plain(run["name"]),
      *(interval(run["differences"][key], sign=True) for key in names),
    )
    for run in others
  ]
  lines = [
    f"- {cells.plain(run['name'])}: {_verdicts(run, names)}." for run in others
  ]
  return [
    f"Difference from {cells.plain(first['name'])}, paired by example:",
    report.markdown_table(table, ("run", *names.values())),
    "\n".join(lines),
  ]


def _verdicts(run, names) -> str:
  found = []
  for key, name in names.items():
    estimate = run["differences"][key]
    if estimate["low"] > 0:
      found.append(f"{name} higher")
    elif estimate["high"] < 0:
      found.append(f"{name} lower")
    else:
      found.append(f"no difference shown in {name}")
  return "; ".join(found)


def _accuracies(runs):
  header = (
    *("run", "train accuracy", "test accuracy"),
    *("train loss", "test loss"),
  )
  table = [
    (
      cells.plain(run["name"]),
      *(f"{run['accuracy'][split]:.4f}" for split in ("train", "test")),
      *(f"{run['loss'][split]:.4f}" for split in ("train", "test")),
    )
    for run in runs
  ]
  return table, header


_ABOUT_VARIANCE = (
  "The gap is train minus test accuracy, both on whole splits in evaluation"
  " mode, without augmentation. The feature variance is over examples, averaged"
  " over features. It is no measure to compare networks by: each has a scale of"
  " its own, so no difference is given. Relative to the mean square it does not"
  " depend on that scale."
)
_ABOUT_WEIGHTS = (
  "Variance of the entries of each layer's float32 master weights; in brackets"
  " relative to the first run, and last the geometric mean of that over layers."
  " Ahead of a normalization the scale of weights changes nothing in what the"
  " network computes."
)


def _weights(runs):
  first = runs[0]["weight_variance"]
  layers = dict.fromkeys(
    path for run in runs for path in run["weight_variance"]
  )
  table = []
  for path in layers:
    line = []
    for run in runs:
      value, unit = run["weight_variance"].get(path), first.get(path)
      text = "" if value is None else f"{value:#.3g}"
      if run is not runs[0] and value is not None and unit:
        text += f" ({value / unit:.2f})"
      line.append(text)
    table.append((cells.code(path or "(root)"), *line))
  ratios = [run.get("weight_variance_ratio") for run in runs]
  table.append(
    (
      "geometric mean of ratios",
      *("" if ratio is None else f"{ratio:.3f}" for ratio in ratios),
    )
  )
  names = (cells.plain(run["name"]) for run in runs)
  return table, ("weight variance", *names)


def _limits(result) -> str:
  fitted = "those of the gap and, here, of every measure: it is the training"
  if result["split"] != "train":
    fitted = "that of the gap: its training part is of the training"
  lines: Sequence[str] = (
    "One trained network stands behind each line. The intervals say what other"
    " examples would have given, not what another seed of training would: an"
    " effect of the method takes several seeds"
    " (`python -m experiments.compare --seeds=5`).",
    f"Intervals over training examples say less still ({fitted} split). The"
    " examples are resampled with the network held, although it was fitted to"
    " them; that others would have trained another network is left out.",
    "A t-SNE picture proves nothing by itself: sizes of its clusters and the"
    " distances between them mean nothing, and another seed draws another one.",
    "Several differences are shown side by side, and their intervals are not"
    " corrected for that.",
    "A variance that is lower is no cause: precision, the learning rate and"
    " weight decay all act on it.",
    "Whether low precision constrains variance is a wider question than is"
    " answered here. Of activations one place is looked at, the classifier's"
    " input, in float and ahead of any quantizer: no quantized activation is."
    " The weights are float32 masters, not their quantized copies, and their"
    " variances have no interval.",
  )
  if any(run["step"] < run["steps"] for run in result["runs"]):
    lines = (*lines, "Not every run is at its end: see its checkpoint's step.")
  return "\n".join(f"- {line}" for line in lines)
