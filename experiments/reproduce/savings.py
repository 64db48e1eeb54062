"""The paper's savings of training cost, for networks that it names.

  python -m experiments.reproduce.savings

To reach: -16.21 % to -44.37 % over the paper's networks (the DPC paper); which
one saves how much, and against what, is not public. Nothing is trained: the
cost of static bits follows from the network alone, at full size at every scale.
"""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpc_jax.cost import bitops, macs
from dpc_jax.training import build, methods, state
from experiments.reproduce import (
  cifar10,
  cifar100,
  imagenet,
  language,
  program,
  recipes,
  tables,
  trials,
)

NAME = "savings"
# Fractions; the DPC paper's abstract.
PUBLISHED = (0.1621, 0.4437)
METHODS = ("dpc", "dpc_log_midpoint")
_HEADER = (
  "network",
  "bounds",
  "quantized: median",
  "quantized: log. midpoint",
  "all: median",
  "all: log. midpoint",
  "float layers",
)


class Input(NamedTuple):
  """A data set.

  Attributes:
    data: in words.
    classes: how many, or the vocabulary.
  """

  data: str
  classes: int


_INPUTS = {
  "cifar10": Input("CIFAR-10", 10),
  "cifar100": Input("CIFAR-100", 100),
  "imagenet2012": Input("ImageNet", 1000),
  "ptb": Input("PTB", 10_000),
  "wikitext103": Input("WikiText-103", 267_735),
}
_CIFAR_SIZE = 32  # pixels; of other images the recipe says


class Saving(NamedTuple):
  """Of one method, against static B_max with 8-bit gradients; fractions.

  Attributes:
    quantized: over the layers that have widths.
    total: over all layers, those in float included.
    in_float: share of the layers in float in the cost of the static training.
  """

  quantized: float
  total: float
  in_float: float


def saving(config: Any, classes: int) -> Saving:
  """The saving of a method whose widths do not change, by abstract evaluation.

  BitOPs per sample and layer as in `dpc.bitops`; nothing is computed.

  Args:
    config: of a recipe with such a method.
    classes: of its data set, or the vocabulary.
  """
  model = build.make_model(config, classes)
  if config.data.unroll is None:
    size = config.data.image_size or _CIFAR_SIZE
    sample = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  else:
    sample = jax.ShapeDtypeStruct((1, config.data.unroll), jnp.int32)
  costs = macs.layer_costs(model, sample)
  capacities = state.quantized_capacities(
    jax.eval_shape(model.init, jax.random.key(0), sample)
  )
  run = methods.Run(
    steps=1,
    steps_per_epoch=1,
    macs={path: cost.macs for path, cost in costs.items()},
    jumps=(),
    seed=0,
  )
  schedule = build.make_schedule(config, run)
  bits, _ = schedule.update(schedule.init(capacities), step=np.int32(0))
  static = dict.fromkeys(capacities, config.precision.b_max)
  ours, theirs = bitops.bitops(costs, bits), bitops.bitops(costs, static)
  outside = sum(theirs.layers[path].total for path in theirs.float_layers)
  return Saving(
    quantized=1 - (ours.total - outside) / (theirs.total - outside),
    total=1 - ours.total / theirs.total,
    in_float=outside / theirs.total,
  )


def reproduce(context: trials.Context) -> tables.Section:
  """The table; the scale makes no difference."""
  del context
  lines = [
    _line(row)
    for table in (cifar10, cifar100, imagenet, language)
    for row in table.ROWS
    if "full" in row.trials
  ]
  low, high = PUBLISHED
  inside = {
    (method, of): sum(low <= line[method][of] <= high for line in lines)
    for method in METHODS
    for of in ("quantized", "total")
  }
  return tables.Section(
    name=NAME,
    title="Savings of training cost",
    header=_HEADER,
    table=[_cells(line) for line in lines],
    notes=[
      f"Published: {low:.2%} to {high:.2%} over the paper's networks; which"
      " one saves how much, against what, and whether layers in float count, is"
      f" not public. In that range lie, of our {len(lines)} networks, counting"
      f" the quantized layers, {inside['dpc', 'quantized']} with the median as"
      f" center and {inside['dpc_log_midpoint', 'quantized']} with the"
      " logarithmic midpoint; counting all layers,"
      f" {inside['dpc', 'total']} and {inside['dpc_log_midpoint', 'total']}.",
      "Savings are of BitOPs, forward and backward, against static 8/8 with"
      " 8-bit gradients, at full size and by abstract evaluation: nothing was"
      " trained, at any scale. Columns: over the quantized layers and over all"
      " layers, with each center of Eq. 1; layers in float count as 32 bits,"
      " and the last column is their share of what static 8/8 costs.",
      f"DPC: {tables.SOURCES['DPC']}.",
    ],
    figures=lines,
    errors=[],
    environments=[],
  )


def _line(row: tables.Row) -> dict[str, Any]:
  config = recipes.get_config(row.recipe)
  seen = _INPUTS[config.data.name]
  name = row.network
  if seen.data not in name:
    name = f"{name}, {seen.data}"
  return {
    "network": name,
    "recipe": row.recipe,
    "b_min": config.precision.b_min,
    "b_max": config.precision.b_max,
    **{
      method: saving(
        recipes.get_config(row.recipe, method), seen.classes
      )._asdict()
      for method in METHODS
    },
  }


def _cells(line: Mapping[str, Any]) -> list[str]:
  median, midpoint = (line[method] for method in METHODS)
  return [
    line["network"],
    f"{line['b_min']}..{line['b_max']}",
    f"{median['quantized']:.1%}",
    f"{midpoint['quantized']:.1%}",
    f"{median['total']:.1%}",
    f"{midpoint['total']:.1%}",
    f"{median['in_float']:.1%}",
  ]


if __name__ == "__main__":
  sys.exit(program.main({NAME: reproduce}, __doc__))
