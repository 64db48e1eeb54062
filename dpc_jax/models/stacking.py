"""Blocks in a row, unrolled or scanned, and the way between the two layouts.

Unrolled, blocks are modules of their own: `block0`, `block1`, ... Scanned,
equal ones are one module `blocks`, whose every variable has a leading axis
over them: one block is compiled, however many there are. Each keeps its own
parameters, ranges and widths: widths have shape (blocks,).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# Fewer blocks than this in a row are left unrolled.
MIN_STACK = 2
_STACKED = "blocks"
_PREFIX = "block"


def run_blocks(
  make: Callable[[str], nn.Module],
  indices: range,
  x: Any,
  *args: Any,
  scan: bool = False,
) -> Any:
  """Applies equal blocks one after the other, inside a compact `__call__`.

  Args:
    make: name -> block; `block(x, *args)` must keep the shape and dtype of x.
    indices: which blocks: `block<i>` each, or `blocks` of all of them where
      `scan` is set and there are two or more.
    x: input of the first block, an array or a tree of them.
    *args: further arguments, the same for every block.
    scan: True compiles one block and loops over the stack.

  Returns:
    Output of the last block.
  """
  if not scan or len(indices) < MIN_STACK:
    for i in indices:
      x = make(f"{_PREFIX}{i}")(x, *args)
    return x
  loop = nn.scan(
    lambda block, carry, _: (block(carry, *args), None),
    variable_axes={
      "params": 0,
      "batch_stats": 0,
      "precision": 0,
      "quant_stats": 0,
      "quant_probe": 0,
      "intermediates": 0,
    },
    split_rngs={"params": True, "dropout": True, "quant": True},
    length=len(indices),
  )
  x, _ = loop(make(_STACKED), x, None)
  return x


def stack_blocks(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Variables of an unrolled model in the layout of the scanned one.

  Under every module the longest run of equal blocks that ends with the last
  one (same names, shapes and dtypes of the parameters; at least two) becomes
  `blocks`. It is the layout of the models that have `scan`; variables of any
  other model with such names are stacked too, and no model runs on those.

  Args:
    variables: all collections, as `init` returned them, or one tree in the
      form of `params`, such as gradients. Another collection alone will not
      do: its shapes need not tell unlike blocks apart. Leaves are arrays or
      `jax.ShapeDtypeStruct`s.

  Returns:
    A new dict; whatever is in no such run is returned as it is.
  """
  if "params" not in variables:
    return _stacked(variables, _run_lengths(variables))
  lengths = _run_lengths(variables["params"])
  return {name: _stacked(tree, lengths) for name, tree in variables.items()}


def unstack_blocks(variables: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `stack_blocks`: `blocks` become `block<i>` again.

  Args:
    variables: see `stack_blocks`.
  """
  if "params" not in variables:
    return _unstacked(variables, variables)
  params = variables["params"]
  return {name: _unstacked(tree, params) for name, tree in variables.items()}


def is_block(name: str) -> bool:
  """Whether a module of this name is one of the unrolled blocks."""
  return name.startswith(_PREFIX) and name[len(_PREFIX) :].isdigit()


def _blocks(tree: Mapping[str, Any]) -> list[str]:
  """Names of the blocks in a module, by their number."""
  return sorted(
    (name for name in tree if is_block(name)),
    key=lambda name: int(name[len(_PREFIX) :]),
  )


def _run_lengths(
  tree: Mapping[str, Any], path: tuple[str, ...] = ()
) -> dict[tuple[str, ...], int]:
  """{path of a module: how many of its last blocks are equal}."""
  names = _blocks(tree)
  length = 0
  if names:
    last = _form(tree[names[-1]])
    for name in reversed(names):
      if _form(tree[name]) != last:
        break
      length += 1
  found = {path: length} if length >= MIN_STACK else {}
  for name, child in tree.items():
    if isinstance(child, Mapping):
      found |= _run_lengths(child, (*path, name))
  return found


def _unstacked(tree, params):
  """`params` tells how many blocks come before a stack."""
  result = {}
  for name, child in tree.items():
    below = params.get(name, {})
    if not isinstance(child, Mapping):
      result[name] = child
    elif name != _STACKED:
      result[name] = _unstacked(child, below)
    else:
      first = len(_blocks(params))
      length = jax.tree.leaves(child)[0].shape[0]
      for i in range(length):
        row = jax.tree.map(functools.partial(_row, i=i), dict(child))
        result[f"{_PREFIX}{first + i}"] = _unstacked(row, below)
  return result


def _form(tree: Any) -> Any:
  leaves, treedef = jax.tree.flatten(tree)
  return treedef, [(np.shape(x), jnp.result_type(x)) for x in leaves]


def _stacked(tree, lengths, path=()):
  count = lengths.get(path, 0)
  names = _blocks(tree)
  run = names[len(names) - count :] if count else []
  result = {}
  for name, child in tree.items():
    if name not in run:
      is_tree = isinstance(child, Mapping)
      child = _stacked(child, lengths, (*path, name)) if is_tree else child
      result[name] = child
    elif _STACKED not in result:
      result[_STACKED] = jax.tree.map(
        _rows,
        *(_stacked(tree[n], lengths, (*path, n)) for n in run),
      )
  return result


def _rows(*leaves):
  if isinstance(leaves[0], jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(
      (len(leaves), *leaves[0].shape), leaves[0].dtype
    )
  return jnp.stack(leaves)


def _row(leaf, *, i):
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
  return leaf[i]
