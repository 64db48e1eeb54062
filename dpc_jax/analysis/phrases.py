"""What the reports of a run and of a grid say in the same words."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dpc_jax.analysis import cells

ABOUT_CURVES = (
  "Training loss is the mean since the line before, in the run's own"
  " precision. Against cost, the horizontal axis is the BitOPs so far, divided"
  " by those of a whole run at the static widths. An axis of accuracies spans"
  " at least 0.05, so that a few images do not fill it."
)
ABOUT_BANDS = (
  " Lines are means over seeds, bands reach from the lowest to the highest"
  " seed."
)
# What pictures of bits that moved show; the first is of runs with a rule.
SIGNALS = "Signals and bits"
BITS = "Bits over time"
_ABOUT_SIGNALS = (
  "Signals, above: what the rule decided by, z, at the end of every epoch, in"
  " nats against the other layers (below 0 the gradient is stable, above 0"
  " noisy). Gray: not known, and the layer asks for no other bits; so it is"
  " until the warm-up is over, in an epoch in which the learning rate jumps,"
  " and wherever a layer's mean gradient is lost in the noise of the batches."
  " Below: the bits from that step on."
)
_ABOUT_BITS = (
  "A picture without signals has the bits alone: over all steps of the run and,"
  " where they move often, over the first of them once more."
)
LEFT_OUT = (
  "BitOPs count the multiply-accumulates of convolutions, dense layers and"
  " attention products; normalization, activation functions, embedding"
  " look-ups, the optimizer and the quantizer itself are left out."
  " Quantization is simulated in float32, so seconds say nothing about integer"
  " hardware."
)

_Z = 1.959964  # of the normal distribution, beyond +-z 5 %


def title(run: Mapping[str, Any], prefix: str = "") -> str:
  """The heading of a report."""
  names = f"{prefix}{run['model']} on {run['dataset']}"
  return f"# {cells.plain(names)}"


def environment(summaries: Sequence[Mapping[str, Any]]) -> str:
  """On which devices, with which versions."""
  devices = cells.distinct(s["device"] for s in summaries)
  versions = cells.distinct(
    ", ".join(f"{k} {v}" for k, v in s["versions"].items()) for s in summaries
  )
  return f"on {cells.plain(devices)}; {cells.plain(versions)}"


def moves(pictures: Mapping[str, str]) -> list[str]:
  """Lines of the part on bits that moved; [] without a picture of them.

  Args:
    pictures: {file: what it shows}; those that begin with "moves" are taken,
      and of them what begins with `SIGNALS` is a picture of signals, too.
  """
  drawn = show(pictures, "moves")
  if not drawn:
    return []
  has_signals = [
    what.startswith(SIGNALS)
    for file, what in pictures.items()
    if file.startswith("moves")
  ]
  about = [_ABOUT_SIGNALS] if any(has_signals) else []
  about += [] if all(has_signals) else [_ABOUT_BITS]
  return ["## Bits over time", "", *drawn, "", " ".join(about), ""]


def bits(layers: Iterable[Sequence[Any]], space: str = " ") -> str:
  """Names the first of some widths, on an axis.

  Args:
    layers: (weights, activations, gradients) of all that is shown.
    space: before what weights and activations are that have the same bits.
  """
  are_alike = all(layer[0] == layer[1] for layer in layers)
  return (
    f"bits of weights{space}and activations" if are_alike else "bits of weights"
  )


def show(pictures: Mapping[str, str], start: str) -> list[str]:
  """Markdown of the pictures whose files begin with `start`."""
  return [
    f"![{cells.plain(what)}]({file})"
    for file, what in pictures.items()
    if file.startswith(start)
  ]


def binomial(mean: float, metric: str, examples: int | None) -> str:
  """What the size of the test set leaves open; "" where that is not known.

  Wilson's score interval (1927), which stays open where every answer is right
  or wrong: (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
  with z = 1.96.

  Args:
    mean: the accuracy, in [0, 1].
    metric: of which the mean is; nothing is said of a perplexity.
    examples: of the test set; None if unknown.
  """
  if metric != "accuracy" or not examples:
    return ""
  share = _Z**2 / examples
  middle = (mean + share / 2) / (1 + share)
  half = math.sqrt(max(mean * (1 - mean), 0) * share + share**2 / 4)
  half /= 1 + share
  low, high = max(middle - half, 0), min(middle + half, 1)
  return (
    f"The test set has {examples:,} examples: an accuracy of {mean:.4f} has a"
    f" binomial 95 % interval (Wilson's) of {low:.4f}..{high:.4f} from the"
    " choice of these examples alone, which no number of seeds makes narrower. "
  )
