"""What two recipes would take on TPU slices, on paper.

  python -m experiments.launch.scale

Prints a table in Markdown; it has no flags: `estimate` sizes other runs, in
Python. Nothing is trained, read or downloaded: models and
optimizers are evaluated abstractly, from the recipes as they are but for the
batch. README.md beside this file says what the rows mean and leave out.
"""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from configs import imagenet_resnet50, wikitext103_transformer
from dpc_jax.cost import macs
from dpc_jax.training import build, optimizer, state

GB = 1e9


class Chip(NamedTuple):
  """Figures of one accelerator; rates per second.

  Attributes:
    flops: at bfloat16 operands, float32 sums.
    memory: bytes.
    memory_rate: bytes/s between the memory and the chip.
    link_rate: bytes/s that a chip sends to its neighbors, over all its links.
    links: how many of these it has.
    per_host: chips of one host.
  """

  flops: float
  memory: float
  memory_rate: float
  link_rate: float
  links: int
  per_host: int


# Google Cloud documentation, "TPU v5e": 197 TFLOPs in bf16, 16 GB at 819 GBps,
# 1600 Gbps between chips, a torus of two dimensions. Slices of several hosts
# are of VMs with 4 chips (ct5lp-hightpu-4t).
V5E = Chip(197e12, 16e9, 819e9, 1600e9 / 8, 4, 4)
# Fractions of the peak that products may reach; our assumption.
UTILIZATION = (0.5, 0.2)
# How often a number that is kept for the backward pass moves in all, and its
# gradient, which is as large: each is written and read once at least; without
# fusion each is also read for its range, and read and written again to be
# rounded. Our assumption.
MOVES = (2 * 2, 2 * 5)
# Seconds of a collective that moves next to nothing; our assumption.
LATENCY_S = (10e-6, 50e-6)
# Images/s that a host's core decodes: README, "ImageNet's input".
DECODED = (670, 560)
# Float32 numbers per parameter that an update moves besides the gradients of
# the products: read gradient, momentum, parameter, write the last two.
_UPDATE = 5
# And the passes: the parameter read forward and backward, the gradient written.
_PASSES = 3


class Case(NamedTuple):
  """A recipe on a slice.

  Attributes:
    name: in words.
    config: the recipe.
    classes: of the real data set, or its vocabulary.
    shape: of one row of the input.
    dtype: likewise.
    batch: rows per step.
    chips: of the slice.
    unit: what is counted.
  """

  name: str
  config: ml_collections.ConfigDict
  classes: int
  shape: tuple[int, ...]
  dtype: Any
  batch: int
  chips: int
  unit: str

  @property
  def per_row(self) -> int:
    """Images, or tokens, of one row."""
    return 1 if self.unit == "images" else self.shape[0]


class Sizes(NamedTuple):
  """What follows from the recipe alone.

  Attributes:
    macs: of the forward pass of one row.
    parameters: how many.
    state: bytes of parameters, statistics and the optimizer's state.
    kept: bytes per row that the backward pass needs of the forward pass.
    quantized: layers whose ranges are measured, stacked ones counted singly.
    norms: BatchNorms, whose statistics are those of the whole batch.
  """

  macs: int
  parameters: int
  state: int
  kept: int
  quantized: int
  norms: int


class Estimate(NamedTuple):
  """Seconds, bytes and rates of one step; pairs are (best, worst).

  Attributes:
    compute_s: of the products of a chip.
    memory: bytes that a chip moves to and from its memory.
    memory_s: the same in time.
    reduced: bytes of gradients that a chip sends.
    reduce_s: the same in time.
    waits: small collectives, one after another, with ranges of the batch.
    delayed: likewise, with `precision.ranges` "delayed".
    waits_s: `waits` in time.
    delayed_s: `delayed` in time.
    step_s: best: the longest of products, memory and gradients, and the waits;
      worst: their sum.
    rate: units per second of the slice.
    cores: of each host for the input; None of text.
    held: bytes of a chip: state, gradients and what is kept.
    checkpoint: bytes of one save.
  """

  compute_s: tuple[float, float]
  memory: tuple[float, float]
  memory_s: tuple[float, float]
  reduced: float
  reduce_s: tuple[float, float]
  waits: tuple[int, int]
  waits_s: tuple[float, float]
  delayed: tuple[int, int]
  delayed_s: tuple[float, float]
  step_s: tuple[float, float]
  rate: tuple[float, float]
  cores: tuple[float, float] | None
  held: float
  checkpoint: float


def cases() -> list[Case]:
  """The two of the plan."""
  return [
    # 32 images per chip. The recipe's own 256 would leave one for each.
    Case(
      "ResNet-50, ImageNet",
      imagenet_resnet50.get_config("dpc"),
      1000,
      (224, 224, 3),
      jnp.float32,
      8192,
      256,
      "images",
    ),
    # The recipe's 144 rows do not divide by 64 chips.
    Case(
      "Transformer, WikiText-103",
      wikitext103_transformer.get_config("dpc"),
      267_735,
      (512,),
      jnp.int32,
      192,
      64,
      "tokens",
    ),
  ]


def sizes(case: Case) -> Sizes:
  """Evaluates the model and its optimizer abstractly."""
  model = build.make_model(case.config, case.classes)
  sample = jax.ShapeDtypeStruct((1, *case.shape), case.dtype)
  costs = macs.layer_costs(model, sample)
  variables = jax.eval_shape(model.init, jax.random.key(0), sample)
  params = variables["params"]
  moments = jax.eval_shape(optimizer.make_optimizer(case.config).init, params)
  # Ranges of all quantized layers, one per stacked layer.
  counts = [
    int(np.prod(np.shape(n)))
    for n in state.quantized_capacities(variables).values()
  ]
  norms = sum(
    path[-1].key == "mean"
    for path, _ in jax.tree_util.tree_leaves_with_path(
      variables.get("batch_stats", {})
    )
  )
  kept = [_kept(model, variables, case, rows) for rows in (1, 2)]
  return Sizes(
    macs=sum(cost.macs * cost.layers for cost in costs.values()),
    parameters=sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params)),
    state=_bytes((variables, moments)),
    kept=kept[1] - kept[0],
    quantized=sum(counts),
    norms=norms,
  )


def _kept(model: nn.Module, variables: Any, case: Case, rows: int) -> int:
  """Bytes between the passes, those that do not grow with the rows included."""
  inputs = jax.ShapeDtypeStruct((rows, *case.shape), case.dtype)
  model_state = {k: v for k, v in variables.items() if k != "params"}

  def backward(params, model_state, inputs, key):
    targets = () if case.unit == "images" else (inputs,)

    def loss(params):
      output, updates = model.apply(
        {"params": params, **model_state},
        inputs,
        *targets,
        train=True,
        mutable=[name for name in model_state if name != "precision"],
        rngs={"dropout": key, "quant": key},
      )
      return jnp.mean(output), updates

    return jax.vjp(loss, params, has_aux=True)[1]

  return _bytes(
    jax.eval_shape(
      backward, variables["params"], model_state, inputs, jax.random.key(0)
    )
  )


def _bytes(tree: Any) -> int:
  """Of all arrays; keys are not worth counting."""
  return sum(
    int(np.prod(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
    if not jnp.issubdtype(x.dtype, jax.dtypes.extended)
  )


def estimate(case: Case, found: Sizes, chip: Chip = V5E) -> Estimate:
  """The formulas of README.md, with parameters on every chip."""
  rows = case.batch / case.chips
  # A multiply-accumulate is two operations, and so are both gradients.
  flops = 6 * found.macs * rows
  compute = [flops / (chip.flops * part) for part in UTILIZATION]
  weights = 4 * found.parameters * (_PASSES + _UPDATE)
  memory = [weights + found.kept * rows * moves for moves in MOVES]
  reduced = 2 * (case.chips - 1) / case.chips * 4 * found.parameters
  # Over all links, or in one ring that uses a single one.
  reduce = [reduced / rate for rate in _rates(chip)]
  # Ranges of inputs forward and of gradients backward, each a minimum and a
  # maximum; statistics and their gradients, each two sums. One collective
  # where the compiler joins the two.
  norms = [2 * found.norms * n for n in (1, 2)]
  waits = [n + 2 * found.quantized * k for k, n in enumerate(norms, 1)]
  # All ranges together, once.
  delayed = [n + 1 for n in norms]
  waits_s, delayed_s = (
    tuple(n * s for n, s in zip(counts, LATENCY_S, strict=True))
    for counts in (waits, delayed)
  )
  memory_s = [x / chip.memory_rate for x in memory]
  step = (
    max(compute[0], memory_s[0], reduce[0]) + waits_s[0],
    compute[1] + memory_s[1] + reduce[1] + waits_s[1],
  )
  rate = tuple(case.batch * case.per_row / s for s in step)
  hosts = case.chips / chip.per_host
  cores = None
  if case.unit == "images":
    cores = tuple(
      r / hosts / d for r, d in zip(rate, reversed(DECODED), strict=True)
    )
  return Estimate(
    compute_s=tuple(compute),
    memory=tuple(memory),
    memory_s=tuple(memory_s),
    reduced=reduced,
    reduce_s=tuple(reduce),
    waits=tuple(waits),
    waits_s=waits_s,
    delayed=tuple(delayed),
    delayed_s=delayed_s,
    step_s=step,
    rate=rate,
    cores=cores,
    held=found.state + 4 * found.parameters + found.kept * rows,
    checkpoint=found.state,
  )


def _rates(chip: Chip) -> tuple[float, float]:
  return chip.link_rate, chip.link_rate / chip.links


def table(given: list[Case]) -> str:
  """All cases side by side, in Markdown."""
  found = [sizes(case) for case in given]
  lines = [
    "| " + " | ".join(("", *(case.name for case in given))) + " |",
    "| --- |" + " ---: |" * len(given),
  ]
  columns = map(_column, given, found)
  for label, *row in zip(_LABELS, *columns, strict=True):
    lines.append("| " + " | ".join((label, *row)) + " |")
  return "\n".join(lines)


_LABELS = (
  "chips, hosts",
  "rows per step, per chip",
  "parameters",
  "forward GMAC per row",
  "TFLOP per step and chip",
  "products, ms",
  "kept for the backward pass, MB per row",
  "memory traffic, GB per step and chip",
  "memory traffic, ms",
  "gradients all-reduced, MB sent per chip",
  "gradients all-reduced, ms",
  "small collectives per step",
  "small collectives, ms",
  "with delayed ranges",
  "with delayed ranges, ms",
  "step, ms",
  "images or tokens per second",
  "cores per host for the input",
  "held per chip, GB",
  "checkpoint, GB",
)


def _column(case: Case, found: Sizes) -> list[str]:
  """The cells of a case, in the order of `_LABELS`."""
  result = estimate(case, found)
  rows = case.batch / case.chips
  return [
    f"{case.chips}, {case.chips // V5E.per_host}",
    f"{case.batch:,}, {rows:g}",
    f"{found.parameters:,}",
    f"{found.macs / 1e9:.1f}",
    f"{6 * found.macs * rows / 1e12:.2f}",
    _range(result.compute_s, 1e3),
    f"{found.kept / 1e6:,.0f}",
    _range(result.memory, 1 / GB),
    _range(result.memory_s, 1e3),
    f"{result.reduced / 1e6:,.0f}",
    _range(result.reduce_s, 1e3),
    _range(result.waits, 1),
    _range(result.waits_s, 1e3),
    _range(result.delayed, 1),
    _range(result.delayed_s, 1e3),
    _range(result.step_s, 1e3),
    _range(result.rate, 1),
    "-" if result.cores is None else _range(result.cores, 1),
    f"{result.held / GB:.1f}",
    f"{result.checkpoint / GB:.2f}",
  ]


def _range(pair: tuple[float, float], scale: float) -> str:
  """Both ends, best first, to three digits."""
  rounded = (float(f"{x * scale:.3g}") for x in pair)
  return " to ".join(f"{x:,.0f}" if x >= 100 else f"{x:g}" for x in rounded)


def main(arguments: Sequence[str]) -> int:
  """Prints the table; the exit code, 2 of any flag but --help."""
  if arguments in (["--help"], ["-h"]):
    print(__doc__)
    return 0
  if arguments:
    print(
      f"error: {arguments[0]}: there are no flags; see --help", file=sys.stderr
    )
    return 2
  print(table(cases()))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
