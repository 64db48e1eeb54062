"""Which widths a tool supports: found by trying each on a tiny layer.

The products are by an identity matrix, so that quantized values come out one
by one and can be counted: b bits have at most 2^b of them, and of so many
random numbers more than 2^(b-1) are hit.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpc_jax.quant import grids
from experiments.bench import peer_tools

YES = "yes"
# Of the layer's input and output: enough numbers to hit half of 256 levels.
_SIZE = 320
KINDS = {
  "dense": nn.Dense(_SIZE, use_bias=False),
  "convolution": nn.Conv(_SIZE, (1, 1), use_bias=False),
}
FLOAT = grids.FLOAT_WIDTH


class Widths(NamedTuple):
  """{width: "yes", or what is wrong} of one tool and kind of layer.

  Attributes:
    forward: of weights and activations; the gradient, in float, is not looked
      at.
    backward: of the gradient, weights and activations at 8.
    training: of weights and activations, the gradient at 8.
    stochastic: whether two keys give two gradients of this width.
    traced: "yes" if the widths may be data of a compiled program.
  """

  forward: dict[int, str]
  backward: dict[int, str]
  training: dict[int, str]
  stochastic: dict[int, str]
  traced: str


class _Values(NamedTuple):
  """What a layer gave: its weights, and its output's gradient, as it saw them.

  Attributes:
    weights: the output for an identity as the input.
    kernel: gradients of the kernel, by two keys, for identities as both.
    inputs: likewise, of the input.
  """

  weights: Any
  kernel: tuple[Any, Any]
  inputs: Any


def probe(tool: peer_tools.Tool, kind: str, widths: Sequence[int]) -> Widths:
  """Tries the widths one by one.

  Args:
    tool: installed.
    kind: of `KINDS`.
    widths: each in 2..8.
  """
  found = Widths({}, {}, {}, {}, YES)
  for b in widths:
    forward = grids.LayerBits(b, b, FLOAT)
    found.forward[b] = check(tool, kind, forward, trains=False)
    found.training[b] = check(tool, kind, forward._replace(gradients=8))
    backward = grids.LayerBits(8, 8, b)
    found.backward[b] = check(tool, kind, backward)
    found.stochastic[b] = check_noise(tool, kind, backward)
  return found._replace(traced=_check_traced(tool, kind))


def supported(results: Mapping[int, str]) -> list[int]:
  """The widths of one of the dictionaries that work."""
  return [width for width, result in results.items() if result == YES]


@functools.cache
def check(
  tool: peer_tools.Tool,
  kind: str,
  bits: grids.LayerBits,
  trains: bool = True,
) -> str:
  """What is wrong with these widths in a layer of that kind; "yes": nothing.

  Args:
    tool: installed.
    kind: of `KINDS`.
    bits: of the layer.
    trains: whether the gradients are looked at, too.
  """
  try:
    found = _run(tool, kind, bits)
  except peer_tools.ERRORS as error:
    return peer_tools.shortened(error)
  wrong = [_miscounted(found.weights, bits.weights, "weights")]
  if trains:
    for name, values in (("input", found.inputs), ("kernel", found.kernel[0])):
      wrong.append(_wrong_gradient(name, values, bits.gradients))
  return next(filter(None, wrong), YES)


def _wrong_gradient(name, values, width) -> str | None:
  if not np.all(np.isfinite(values)):
    return f"the gradient of the {name} is not finite"
  if not np.any(values):
    return f"the gradient of the {name} is zero everywhere"
  if width == FLOAT:
    return None
  return _miscounted(values, width, f"the gradient of the {name}")


@functools.cache
def check_noise(tool: peer_tools.Tool, kind: str, bits: grids.LayerBits) -> str:
  """What of two keys shows no noise in the gradient of the kernel, or "yes"."""
  try:
    first, second = _run(tool, kind, bits).kernel
  except peer_tools.ERRORS as error:
    return peer_tools.shortened(error)
  return "no noise" if np.array_equal(first, second) else YES


def _check_traced(tool, kind) -> str:
  layer, x = _layer(kind)

  def call(width):
    bits = {"": grids.LayerBits(width, width, 8)}
    variables = _variables(kind, jnp.eye(_SIZE))
    key = {"quant": jax.random.key(0)}
    return tool.wrap(layer, bits).apply(variables, x, rngs=key)

  try:
    jax.eval_shape(call, jax.ShapeDtypeStruct((), jnp.int32))
  except peer_tools.ERRORS as error:
    return peer_tools.shortened(error)
  return YES


def _miscounted(values, width, what) -> str | None:
  """What is wrong with the number of levels; a scale may be of rows or columns.

  Values of one level are equal but for rounding in the last bits.
  """
  table = np.asarray(values, np.float32).reshape(-1, _SIZE)
  if not np.all(np.isfinite(table)):
    return f"{what} are not finite"
  counts = [
    max(_levels(row) for row in part) for part in (table[:8], table.T[:8])
  ]
  most = 2**width
  if min(counts) > most:
    return f"{min(counts)} levels of {what} at {width} bits"
  # Two bits may have three levels, or two: symmetric about 0, or not.
  if max(counts) <= most // 2 and width > 2:
    return f"{max(counts)} levels of {what} at {width} bits"
  return None


def _levels(row) -> int:
  ordered = np.sort(row)
  least = 1e-5 * max(np.abs(ordered).max(), np.finfo(np.float32).tiny)
  return 1 + int(np.sum(np.diff(ordered) > least))


@functools.lru_cache(maxsize=1)
def _run(tool, kind, bits) -> _Values:
  """Asked for twice in a row by the checks above."""
  if tool.is_traced:
    run = functools.partial(_program(tool, kind), bits)
  else:
    run = jax.jit(functools.partial(_both, tool, kind, bits))
  random = np.random.default_rng(0)
  weights, g = random.uniform(-1, 1, (2, _SIZE, _SIZE)).astype(np.float32)
  keys = jax.random.split(jax.random.key(0))
  y, _, _ = run(weights, g, keys[0])
  eye = np.eye(_SIZE, dtype=np.float32)
  runs = [run(eye, g, key) for key in keys]
  return jax.device_get(_Values(y, (runs[0][1], runs[1][1]), runs[0][2]))


@functools.cache
def _program(tool, kind):
  return jax.jit(functools.partial(_both, tool, kind))


def _both(tool, kind, bits, kernel, g, key):
  """The output, and the gradients of kernel and input for that of it."""
  layer, x = _layer(kind)
  model = tool.wrap(layer, {"": bits})

  def call(kernel, x):
    return model.apply(_variables(kind, kernel), x, rngs={"quant": key})

  y, pull = jax.vjp(call, kernel, x)
  return y, *pull(g.reshape(y.shape))


def _layer(kind):
  """The module, and an identity as its input."""
  eye = jnp.eye(_SIZE, dtype=jnp.float32)
  is_image = isinstance(KINDS[kind], nn.Conv)
  # Not of the kernel's shape: qwix tells operands apart by that.
  return KINDS[kind], eye[:, None, None] if is_image else eye[:, None]


def _variables(kind, kernel):
  if isinstance(KINDS[kind], nn.Conv):
    kernel = kernel[None, None]
  return {"params": {"kernel": kernel}}
