"""What devices send each other in a compiled program, read from its text.

    found = collectives.read(compiled.as_text(), variables)
    print(collectives.summary(found))

A compiler joins small collectives into one that has many operands; each
operand is read by itself, so that counts do not depend on what was joined. A
collective inside a loop is counted once, however often the loop runs.

Groups, of each operand, by the name of the operation that it comes from:

    ranges       of activations and gradients and, over `tensor`, of weights,
                 for quantization
    batch norm   statistics of a batch, and in the backward pass the sums that
                 give their gradients and those of its scale and bias
    gradients    of other parameters
    parameters   gathered for use where they are split over devices
    loss         and metrics
    other        whatever else: nothing, in data-parallel training
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from dpc_jax.quant import spans

GROUPS = ("ranges", "batch norm", "gradients", "parameters", "loss", "other")

_KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "collective-permute",
  "all-to-all",
)
_INSTRUCTION = re.compile(
  rf"^\s*(?:ROOT )?%?\S+ = (?P<type>.+?) (?P<kind>{'|'.join(_KINDS)})"
  r"(?P<start>-start)?\((?P<rest>.*)$"
)
_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_DEFINED = re.compile(r'^\s*(?:ROOT )?%?(\S+) = .*\bop_name="([^"]*)"')
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
# Starts of these hold their operands beside the results.
_HOLDS_OPERANDS = ("all-gather", "collective-permute")


class Operand(NamedTuple):
  """One array of a collective, as it arrives.

  Attributes:
    dtype: such as "f32".
    shape: on a device.
    source: name of the operation that it comes from: jit, transformations,
      modules, primitive; "" unknown.
    group: one of `GROUPS`.
  """

  dtype: str
  shape: tuple[int, ...]
  source: str
  group: str

  @property
  def elements(self) -> int:
    """Numbers in it."""
    return math.prod(self.shape)

  @property
  def bytes(self) -> int:
    """Size, bits of a boolean counted as bytes."""
    bits = re.search(r"\d+", self.dtype)
    return self.elements * max(1, int(bits.group()) // 8 if bits else 1)


class Collective(NamedTuple):
  """An instruction of a compiled program.

  Attributes:
    kind: all-reduce, all-gather, reduce-scatter, collective-permute or
      all-to-all; the start of an asynchronous one counts as it.
    operands: what it joins.
  """

  kind: str
  operands: tuple[Operand, ...]


def read(
  text: str, variables: Mapping[str, Any] | None = None
) -> list[Collective]:
  """The collectives of a program, in the order of its text.

  Args:
    text: of `compiled.as_text()`, where the partitioner was at work.
    variables: the model's `params` and `batch_stats`, arrays or their shapes:
      tells normalizations by their paths, and by shapes the gradients of
      parameters from sums of activations. None: no operand is of batch norm,
      and all of the backward pass are gradients.
  """
  variables = variables or {}
  norms = _norms(variables.get("batch_stats", {}))
  params = variables.get("params")
  shapes = None if params is None else _shapes(params)
  defined = dict(
    match.groups() for match in map(_DEFINED.match, text.splitlines()) if match
  )
  found = []
  for line in text.splitlines():
    match = _INSTRUCTION.match(line)
    if match is None:
      continue
    kind = match["kind"]
    arrays = [
      (dtype, tuple(int(n) for n in dims.split(",") if n))
      for dtype, dims in _SHAPE.findall(match["type"])
    ]
    if match["start"] and kind in _HOLDS_OPERANDS:
      arrays = arrays[1:2] if kind != "all-gather" else _second_half(arrays)
    operands = [
      Operand(dtype, shape, source, _group(kind, shape, source, norms, shapes))
      for (dtype, shape), source in zip(
        arrays, _sources(match["rest"], len(arrays), defined), strict=True
      )
    ]
    found.append(Collective(kind, tuple(operands)))
  return found


def operands(
  found: Iterable[Collective], group: str | None = None
) -> list[Operand]:
  """All operands, or those of a group."""
  return [
    operand
    for collective in found
    for operand in collective.operands
    if group in (None, operand.group)
  ]


def summary(found: Iterable[Collective]) -> dict[str, dict[str, int]]:
  """{group: operands, scalars among them, bytes}; and `all`, with instructions.

  A joined instruction has operands of several groups: only `all` counts them.
  """
  found = list(found)
  counts = {}
  for group in (*GROUPS, None):
    own = operands(found, group)
    counts[group or "all"] = {
      "operands": len(own),
      "scalars": sum(operand.shape == () for operand in own),
      "bytes": sum(operand.bytes for operand in own),
    }
  counts["all"]["instructions"] = len(found)
  return counts


def _second_half(arrays):
  return arrays[len(arrays) // 2 :]


def _sources(rest, count, defined) -> list[str]:
  """The source of each operand of an instruction."""
  match = _OP_NAME.search(rest)
  own = match[1] if match else ""
  parts = _split(own)
  if len(parts) == count:
    return parts
  names = re.findall(r"%([\w.\-]+)", rest.split(")", 1)[0])
  if len(names) == count and count > 1:
    return [defined.get(name, own) for name in names]
  return [own] * count


def _split(name: str) -> list[str]:
  """'a/(b:c)', of what was joined, as ['a/b', 'a/c']."""
  depth, ends, start = 0, [], None
  for i, character in enumerate(name):
    if character == "(":
      if depth == 0 and name[i - 1 : i] == "/":
        start, ends = i, [i]
      depth += 1
    elif character == ")":
      depth -= 1
    elif character == ":" and depth == 1 and start is not None:
      ends.append(i)
  if start is None or not name.endswith(")"):
    return [name]
  ends.append(len(name) - 1)
  return [name[:start] + name[a + 1 : b] for a, b in itertools.pairwise(ends)]


def _norms(stats: Mapping[str, Any]) -> set[str]:
  """Names of the modules that hold statistics of batches."""
  names = set()
  for name, child in stats.items():
    if isinstance(child, Mapping):
      is_leaf = not any(isinstance(c, Mapping) for c in child.values())
      names |= {name} if is_leaf else _norms(child)
  return names


def _shapes(params) -> set[tuple[int, ...]]:
  """Shapes of parameters, and of one layer of a stack."""
  shapes = {np.shape(leaf) for leaf in jax.tree.leaves(params)}
  shapes |= {shape[1:] for shape in shapes if shape}
  return shapes


def _fits(shape, shapes) -> bool:
  """Whether it is a parameter's, or a part of one, axes in any order."""
  if shapes is None:
    return True
  return any(
    len(whole) == len(shape)
    and all(n and m % n == 0 for n, m in zip(order, whole, strict=True))
    for whole in shapes
    for order in itertools.permutations(shape)
  )


def _group(kind, shape, source, norms, shapes) -> str:
  *scopes, primitive = source.split("/")
  if spans.SCOPE in scopes:
    return "ranges"
  if norms.intersection(scopes):
    return "batch norm"
  is_backward = "transpose(" in source
  if primitive == "sharding_constraint" and not is_backward:
    return "parameters"
  if "jvp()" in scopes and not shape:
    return "loss"
  return "gradients" if is_backward and _fits(shape, shapes) else "other"
