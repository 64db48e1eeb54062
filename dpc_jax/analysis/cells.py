"""How figures of runs are written in a table; a dash stands for none."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from dpc_jax.analysis import comparison, significance


def figure(x: float | None, metric: str, sign: str = "") -> str:
  """An accuracy with four digits, a perplexity with two."""
  if x is None:
    return "-"
  return f"{x:{sign}.{4 if metric == 'accuracy' else 2}f}"


def spread(sample: significance.Sample, metric: str) -> str:
  """Mean ± standard deviation; of one value the value."""
  text = figure(sample.mean, metric)
  return text if sample.sd is None else f"{text} ± {figure(sample.sd, metric)}"


def difference(d: significance.Difference, metric: str) -> str:
  """Mean [low, high], with signs; without an interval the mean."""
  text = figure(d.mean, metric, sign="+")
  if d.low is None:
    return text
  low, high = (figure(x, metric, sign="+") for x in (d.low, d.high))
  return f"{text} [{low}, {high}]"


def p_value(p: float | None) -> str:
  """Three digits."""
  if p is None:
    return "-"
  return "<0.001" if p < 0.001 else f"{p:.3f}"


def cost(method: comparison.Method) -> list[str]:
  """GBitOPs, saving, mean bits; what costs more shows a multiple instead."""
  relative = method.relative_to_static
  return [
    f"{method.gbitops:,.0f}",
    f"{1 - relative:.1%}" if relative <= 1 else f"none ({relative:.1f}x)",
    f"{method.mean_bits:.2f}",
  ]


def control_cost(pair: comparison.Pair) -> str:
  """The control's cost as a multiple of the method's, and whether equal."""
  if pair.relative_cost is None:
    return "-"
  suffix = "" if pair.equal_cost else ", **not of equal cost**"
  return f"{pair.relative_cost:.3f}x{suffix}"


def yes_or_no(flag: bool | None) -> str:
  """A flag in words."""
  return "-" if flag is None else "yes" if flag else "no"


def seeds(numbers: Sequence[int]) -> str:
  """Seeds with their noun."""
  noun = "seeds" if len(numbers) > 1 else "seed"
  return f"{noun} {', '.join(map(str, numbers))}"


def distinct(texts: Iterable[str]) -> str:
  """Different texts, in their order."""
  return " and ".join(dict.fromkeys(texts))


def widths(bits: Sequence[Any] | None) -> str:
  """Weights/activations/gradients; None is a layer in float."""
  return "float" if bits is None else "/".join(str(width) for width in bits)


def code(text: str) -> str:
  """Any text as Markdown code, on one line; nothing in it means anything."""
  text = " ".join(text.split())
  longest = max(map(len, re.findall("`+", text)), default=0)
  fence = "`" * (longest + 1)
  pad = " " if text.startswith("`") or text.endswith("`") else ""
  return f"{fence}{pad}{text}{pad}{fence}" if text else "-"


def plain(text: str) -> str:
  """Any text as Markdown text, on one line; nothing in it means anything."""
  text = " ".join(text.split())
  # Within a word an underscore means nothing.
  return re.sub(r"[\\`*\[\]<>&#~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)
