"""Whether a checkpoint holds the state that a program expects.

orbax by itself fills what is missing with anything and casts dtypes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpc_jax.training import checks
from dpc_jax.training import state as state_lib

# Of the leaves that do not fit, how many the line names.
_SHOWN = 3


def check(
  abstract: Any, there: Any, where: str, origin: Callable[[], str]
) -> tuple[Any, tuple[str, ...]]:
  """Holds a checkpoint against the expected state.

  Args:
    abstract: a `TrainState`, or any tree, of shapes, dtypes and shardings.
    there: orbax's metadata of the saved tree.
    where: which checkpoint, to begin the error with.
    origin: says what wrote it, for the error.

  Returns:
    (what to restore, fields of `abstract` that are younger than the checkpoint
    and left out of it; see `complete`).

  Raises:
    ConfigError: a leaf is missing, unexpected, or of another shape or dtype.
  """
  here, saved = _leaves(abstract), _leaves(there)
  late = tuple(
    name
    for name in state_lib.ADDED
    if hasattr(abstract, name) and not _under(name, saved)
  )
  for name in late:
    abstract = abstract.replace(**{name: ()})
    for path in _under(name, here):
      del here[path]
  mistakes = [
    *(f"{path} is missing" for path in here if path not in saved),
    *(f"{path} is unexpected" for path in saved if path not in here),
    *(
      f"{path} is {saved[path]}, not {here[path]}"
      for path in here
      if path in saved and here[path] != saved[path]
    ),
  ]
  if mistakes:
    more = len(mistakes) - _SHOWN
    raise checks.ConfigError(
      f"{where} does not fit this program: {', '.join(mistakes[:_SHOWN])}"
      + (f" and {more} more" if more > 0 else "")
      + f" (written by {origin()}); use the program that wrote it, or another"
      " workdir"
    )
  return abstract, late


def complete(state: Any, abstract: Any, late: tuple[str, ...]) -> Any:
  """`state` with the fields `late`, which start as in a new run."""
  for name in late:
    shardings = jax.tree.map(lambda x: x.sharding, getattr(abstract, name))
    start = getattr(state_lib.TrainState, name)
    fresh = jax.jit(
      lambda start=start: jax.tree.map(jnp.asarray, start),
      out_shardings=shardings,
    )
    state = state.replace(**{name: fresh()})
  return state


def _under(name, leaves) -> list[str]:
  return [path for path in leaves if path.split("/")[0] == name]


def _leaves(tree: Any) -> dict[str, str]:
  """{path: "float32[3, 4]"}, keys of a PRNG as their words."""
  flat = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    # Of an empty node orbax keeps a mark, which has no shape.
    if getattr(leaf, "shape", None) is None:
      continue
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.eval_shape(jax.random.key_data, leaf)
    name = "/".join(map(_name, path))
    flat[name] = f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"
  return flat


def _name(entry) -> str:
  for attribute in ("key", "name", "idx"):
    if hasattr(entry, attribute):
      return str(getattr(entry, attribute))
  return str(entry)
