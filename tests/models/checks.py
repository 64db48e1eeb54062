"""Checks that every model passes, written once.

A test module describes its model by a `Case` and calls

    check_float_is_plain(case)        width 32 is `quantization=None`, each bit
    check_few_bits(case)              finite steps, no gradient leaf is zero
    check_batch_of_one(case)          a training step on one sample
    check_scan_is_unroll(case)        values, gradients, ranges; converters
    check_stacked_widths(case, path)  each row of a stack obeys its own width

Every check builds the model with `case.build(**sizes)`; sizes that a check
takes go there as well, so `check_few_bits(case, scan=True)` works. What is
compiled and initialized is kept: one case per module makes tests fast.
`check_scan_form` is for models too large to run: shapes alone.
`image_case` makes the case of an image classifier. `parameters` counts.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpc_jax.models import stacking
from dpc_jax.quant import grids, precision
from tests import compiling

# Updated by a training step, where a model has them.
STATISTICS = ("batch_stats", "quant_stats")
KEY = jax.random.key(1)
# Its gradient is 0 but for rounding: a term common to all keys moves every
# logit of a query alike, which the softmax does not see.
WITHOUT_GRADIENT = "['attention']['key']['bias']"


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
  """A model and how to call it.

  Attributes:
    build: `build(quantization=..., scan=..., ...)` -> model; only what a check
      sets is passed. Tiny sizes; dropout 0 for the scan checks (each layout
      draws masks of its own).
    inputs: number of samples -> positional arguments of `__call__`, arrays.
    loss: (output of the model, the arguments) -> scalar.
    options: keywords of `__call__` in training, static.
    batch: samples of a step.
  """

  build: Callable[..., nn.Module]
  inputs: Callable[[int], tuple[Any, ...]]
  loss: Callable[[Any, tuple[Any, ...]], jax.Array]
  options: Mapping[str, Any] = dataclasses.field(
    default_factory=lambda: {"train": True}
  )
  batch: int = 4


def image_case(
  build: Callable[..., nn.Module], *, size: int = 12, batch: int = 4
) -> Case:
  """Case of a classifier of three classes for square images."""

  def inputs(n):
    random = np.random.default_rng(n)
    return (jnp.asarray(random.normal(size=(n, size, size, 3)), jnp.float32),)

  def loss(logits, _):
    log_p = jax.nn.log_softmax(logits)
    labels = jnp.arange(logits.shape[0]) % 3
    return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], 1))

  return Case(
    functools.partial(build, num_classes=3), inputs, loss, batch=batch
  )


@functools.cache
def initial(case: Case, model: nn.Module) -> dict[str, Any]:
  """Initial variables; the same for equal models."""
  # Threefry's initial values would take longer to compile than all else.
  key = jax.random.key(0, impl="rbg")
  init = jax.jit(model.init, compiler_options=compiling.FAST)
  return init(key, *case.inputs(case.batch))


@functools.partial(jax.jit, static_argnums=(0, 1))
def step(
  case: Case,
  model: nn.Module,
  variables: Mapping[str, Any],
  inputs: tuple[Any, ...],
  key: jax.Array = KEY,
) -> tuple[jax.Array, dict[str, Any], Any]:
  """Loss, updated collections, gradients of one training step."""
  others = {c: v for c, v in variables.items() if c != "params"}

  def loss(params):
    output, updates = model.apply(
      {**others, "params": params},
      *inputs,
      **case.options,
      mutable=[c for c in STATISTICS if c in others],
      rngs={"quant": key, "dropout": jax.random.fold_in(key, 1)},
    )
    return case.loss(output, inputs), updates

  (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(
    variables["params"]
  )
  return value, dict(updates), grads


def check_float_is_plain(case: Case, **sizes: Any) -> None:
  """At width 32: same initial values, loss, statistics, gradients.

  Not for `scan=True`: a compiler may fuse the two loops' bodies differently.
  """
  quantized = case.build(**sizes)
  plain = case.build(quantization=None, **sizes)
  variables, plain_variables = initial(case, quantized), initial(case, plain)
  assert set(variables) - set(plain_variables) == {"precision", "quant_stats"}
  for collection in plain_variables:
    assert_same(variables[collection], plain_variables[collection])
  inputs = case.inputs(case.batch)
  value, updates, grads = step(
    case, quantized, precision.assign_bits(variables, 32), inputs
  )
  updates.pop("quant_stats")
  want = step(case, plain, plain_variables, inputs)
  assert_same((value, updates, grads), want)


def check_few_bits(
  case: Case, widths: tuple[int, ...] = (3, 4, 8), **sizes: Any
) -> None:
  """One step at each width: finite, no zero gradient, state keeps its form."""
  model = case.build(**sizes)
  variables = initial(case, model)
  losses = set()
  for bits in widths:
    value, updates, grads = step(
      case,
      model,
      precision.assign_bits(variables, bits),
      case.inputs(case.batch),
    )
    losses.add(float(value))
    assert_finite((value, updates, grads))
    # Unstacked: one row of a stack must not answer for all of them.
    grads = stacking.unstack_blocks(grads)
    for path, leaf in jax.tree.leaves_with_path(grads):
      name = jax.tree_util.keystr(path)
      assert name.endswith(WITHOUT_GRADIENT) or np.any(leaf != 0), (bits, name)
    for name, update in updates.items():
      assert form(update) == form(variables[name]), name
  assert len(losses) == len(widths)


def check_batch_of_one(case: Case, **sizes: Any) -> None:
  """A training step on a single sample is finite."""
  model = case.build(**sizes)
  lowered = step.lower(case, model, initial(case, model), case.inputs(1), KEY)
  compiled = lowered.compile(compiling.FAST)
  assert_finite(compiled(initial(case, model), case.inputs(1), KEY))


def check_scan_is_unroll(
  case: Case, tolerance: float = 1e-5, **sizes: Any
) -> None:
  """At width 32 the scanned model is the unrolled one, parameters stacked.

  Args:
    case: its model takes `scan`.
    tolerance: of loss and statistics (see `assert_close`); ten times as much
      is left to the gradients.
    **sizes: further arguments of `case.build`.
  """
  unrolled, scanned = case.build(**sizes), case.build(scan=True, **sizes)
  variables = precision.assign_bits(initial(case, unrolled), 32)
  stacked = stacking.stack_blocks(variables)
  # The scanned model's own variables have the converter's form, and back.
  assert form(initial(case, scanned)) == form(stacked)
  assert form(stacked) != form(variables)
  assert_same(stacking.unstack_blocks(stacked), variables)
  inputs = case.inputs(case.batch)
  value, updates, grads = step(case, scanned, stacked, inputs)
  want_value, want_updates, want_grads = step(case, unrolled, variables, inputs)
  assert_close(value, want_value, tolerance)
  for name, want in want_updates.items():
    assert_close(stacking.unstack_blocks(updates[name]), want, tolerance)
  # Sums over the batch in another order, where large terms may cancel.
  assert_close(stacking.unstack_blocks(grads), want_grads, 10 * tolerance)
  # And the other way, on what a step has changed.
  assert_close(grads, stacking.stack_blocks(want_grads), 10 * tolerance)


def check_scan_form(
  unrolled: nn.Module, scanned: nn.Module, *inputs: Any
) -> None:
  """The converter's shapes are those of the scanned model, and back."""
  variables = jax.eval_shape(unrolled.init, jax.random.key(0), *inputs)
  stacked = jax.eval_shape(scanned.init, jax.random.key(0), *inputs)
  assert form(stacking.stack_blocks(variables)) == form(stacked)
  assert form(stacking.unstack_blocks(stacked)) == form(variables)
  assert form(stacked) != form(variables)


def check_stacked_widths(
  case: Case, path: str, tolerance: float = 1e-4, **sizes: Any
) -> None:
  """A stacked layer's row obeys its own width, and no other row does.

  All else in float, the weights of one row go to 2 bits: statistics and
  gradients become those of the unrolled model with that one layer at 2 bits,
  and the ranges that the earlier blocks see do not change by a bit.

  Args:
    case: its model takes `scan`.
    path: a stacked layer of the scanned model, as '.../blocks/...'.
    tolerance: of `assert_close`; the width must change a gradient by ten
      times as much.
    **sizes: further arguments of `case.build`.
  """
  unrolled, scanned = case.build(**sizes), case.build(scan=True, **sizes)
  variables = precision.assign_bits(initial(case, unrolled), 32)
  stacked = stacking.stack_blocks(variables)
  inputs = case.inputs(case.batch)
  base = step(case, scanned, stacked, inputs)
  rows = precision.layer_bits(stacked)[path].weights.shape[0]
  for row in range(rows):
    changed = _narrow(stacked, path, np.arange(rows) == row)
    got = step(case, scanned, changed, inputs)
    name = _unstacked_name(path, row, variables, rows)
    _, *want = step(case, unrolled, _narrow(variables, name, True), inputs)
    for one, two in zip(got[1:], want, strict=True):
      assert_close(stacking.unstack_blocks(one), two, tolerance)
    change, where = distance(got[2], base[2])
    assert change > 10 * tolerance, (row, where, change)
    assert_same(_before(got[1], path, row), _before(base[1], path, row))


def parameters(model: nn.Module, *inputs: Any) -> int:
  """Number of parameters; nothing is allocated."""
  variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  return sum(math.prod(v.shape) for v in jax.tree.leaves(variables["params"]))


def assert_same(a: Any, b: Any) -> None:
  """Equal trees, bit for bit."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for one, two in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(one, two)


def assert_close(got: Any, want: Any, tolerance: float) -> None:
  """Equal trees, each leaf within `tolerance` of its largest value."""
  error, where = distance(got, want)
  assert error < tolerance, (where, error)


def assert_near(got: Any, want: Any, tolerance: float) -> None:
  """`assert_close` for a tree of another dtype, such as float64."""
  want = jax.tree.map(lambda w, g: np.asarray(w, g.dtype), want, got)
  assert_close(got, want, tolerance)


def distance(got: Any, want: Any) -> tuple[float, str]:
  """Largest error of a leaf relative to its largest value, and which leaf."""
  assert form(got) == form(want)
  worst = 0.0, ""
  for (path, one), two in zip(
    jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    one, two = np.asarray(one, np.float64), np.asarray(two, np.float64)
    error = np.max(np.abs(one - two)) / max(np.max(np.abs(two)), 1e-6)
    if np.isnan(error) or error > worst[0]:
      worst = error, jax.tree_util.keystr(path)
  return worst


def assert_finite(tree: Any) -> None:
  """No NaN and no infinity in any leaf."""
  for path, leaf in jax.tree.leaves_with_path(tree):
    assert np.all(np.isfinite(leaf)), jax.tree_util.keystr(path)


def form(tree: Any) -> dict[str, tuple[Any, Any]]:
  """{path: (shape, dtype)}."""
  return {
    jax.tree_util.keystr(path): (np.shape(leaf), jnp.result_type(leaf))
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


def _unstacked_name(path, row, variables, rows):
  """Path of a stacked layer's row in the unrolled model."""
  parent, _, rest = path.partition("blocks/")
  node = _subtree(variables["params"], parent.rstrip("/"))
  first = sum(stacking.is_block(name) for name in node) - rows
  return f"{parent}block{first + row}/{rest}"


def _before(updates, path, row):
  """Ranges of a stack's blocks before one row."""
  stack = path.partition("blocks/")[0] + "blocks"
  return jax.tree.map(
    lambda leaf: leaf[:row], _subtree(updates["quant_stats"], stack)
  )


def _narrow(variables, path, where):
  bits = precision.layer_bits(variables)
  old = bits[path]
  weights = jnp.where(jnp.asarray(where), 2, old.weights)
  bits[path] = grids.LayerBits(weights, old.activations, old.gradients)
  return precision.assign_bits(variables, bits)


def _subtree(tree, path):
  for name in path.split("/") if path else ():
    tree = tree[name]
  return tree
