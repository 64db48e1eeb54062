"""Decreasing Precision with layer Capacity: bit-widths from counts (Eq. 1).

The formula circulates with the base of its logarithm lost, as
log(r * N_k / N~). The default, `log_form="base"` (our decision), reads it as a
logarithm to the base r: |log_r(N_k / N~)| <= 1 by construction of r, so B_k
lies in the bounds by itself, and the widths do not change when all counts are
multiplied by the same number. `log_form="product"` is the literal natural
logarithm of r * N_k / N~; it is not the default because it leaves the bounds
in most layers (on ResNet-38 with bounds 3 and 8), so that the clip and not the
formula decides there.

    >>> import dpc_jax as dpc
    >>> capacities = {"stem": 432, "conv": 9_216, "last": 36_864}
    >>> dpc.dpc_bit_widths(capacities, 3, 8)
    {'stem': 8, 'conv': 6, 'last': 5}
    >>> dpc.dpc_bit_widths(capacities, 3, 8, center="log_midpoint")
    {'stem': 8, 'conv': 5, 'last': 3}
"""

import numbers
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dpc_jax.quant import grids

CENTERS = ("median", "mean", "geometric_mean", "log_midpoint")
LOG_FORMS = ("base", "product")

# The argument of ceil is rounded first: a layer exactly at an end of the range
# must not gain a bit from the last digit of a logarithm.
_DECIMALS = 6
_MAX_COUNT = 2**63 - 1


def dpc_bit_widths(
  capacities: Any,
  b_min: int,
  b_max: int,
  *,
  delta: float = 1.0,
  center: str = "median",
  log_form: str = "base",
) -> Any:
  """Bit-width B_k of every layer from its number of weights N_k, Eq. 1.

  With N_max, N_min over all layers, a center N~, and
  r = max(N_max / N~, N~ / N_min):

    B_k = ceil((B_max + B_min)/2 - (delta/2) (B_max - B_min) log_r(N_k / N~))

  Layers with more weights get fewer bits. Computed in float64 on the host; the
  argument of ceil is rounded to 6 decimals first, and the result is clipped to
  [b_min, b_max] last. If all layers are equal (r = 1) the log term is 0. A
  layer without weights (N_k = 0: a product of two activations) gets b_max, and
  is left out of N_max, N_min and N~: our decision.

  Args:
    capacities: any pytree or mapping of counts N_k >= 0; a leaf is an int, or
      an integer array of the counts of stacked layers, each of which counts.
    b_min: smallest width, 2..16.
    b_max: largest width, b_min..16.
    delta: strength in [-1, 1] (the default 1 is our decision): 0 gives every
      layer the same width, below 0 larger layers get *more* bits (a control).
    center: N~ (our decision, the paper does not say): "median" | "mean" |
      "geometric_mean" | "log_midpoint", the last sqrt(N_max * N_min).
    log_form: "base", as above, or "product", the literal ln(r * N_k / N~); the
      module's docstring says why it is not the default.

  Returns:
    The same structure: an int for an int, an int64 array for an array.

  Raises:
    ValueError: naming the value, for bounds that are no ints in 2..16 or
      b_min > b_max; no count but 0; one that is no integer in 0..2^63 - 1; 0
      beside others in an array; delta outside [-1, 1]; an unknown center, form.
  """
  check_arguments(b_min, b_max, delta, center, log_form)
  leaves, treedef = _flatten(capacities)
  arrays = [_counts(name, leaf) for name, leaf in leaves]
  _check_any(leaves, arrays, capacities)
  counts = np.concatenate([array.ravel() for array in arrays])
  weighted = counts > 0
  log = log_term(counts[weighted], center, log_form)
  exact = (b_max + b_min) / 2 - float(delta) / 2 * (b_max - b_min) * log
  bits = np.full(counts.shape, b_max, np.int64)
  bits[weighted] = np.clip(np.ceil(np.round(exact, _DECIMALS)), b_min, b_max)
  ends = np.cumsum([array.size for array in arrays])[:-1]
  widths = [
    part.reshape(array.shape) if _is_array(leaf) else int(part[0])
    for part, array, (_, leaf) in zip(
      np.split(bits, ends), arrays, leaves, strict=True
    )
  ]
  return _in_order(jax.tree.unflatten(treedef, widths), capacities)


def check_arguments(
  b_min: int,
  b_max: int,
  delta: float = 1.0,
  center: str = "median",
  log_form: str = "base",
) -> None:
  """Checks all arguments of `dpc_bit_widths` but the counts.

  Raises:
    ValueError: as there.
  """
  for name, value in (("b_min", b_min), ("b_max", b_max)):
    if not _is_integer(value) or not (
      grids.MIN_WIDTH <= value <= grids.MAX_WIDTH
    ):
      raise ValueError(
        f"{name}={value!r} is not a width; "
        f"use an int in {grids.MIN_WIDTH}..{grids.MAX_WIDTH}"
      )
  if b_min > b_max:
    raise ValueError(
      f"b_min={b_min} is above b_max={b_max}; swap or equal them"
    )
  is_real = isinstance(delta, numbers.Real) and not isinstance(delta, bool)
  if not is_real or not -1 <= delta <= 1:
    raise ValueError(f"delta={delta!r} is out of range; use a value in [-1, 1]")
  for name, value, known in (
    ("center", center, CENTERS),
    ("log_form", log_form, LOG_FORMS),
  ):
    if value not in known:
      raise ValueError(
        f"{name}={value!r} is unknown; use one of {', '.join(known)}"
      )


def log_term(counts: np.ndarray, center: str, log_form: str) -> np.ndarray:
  """log_r(N_k / N~), or ln(r * N_k / N~), of float64 counts."""
  if counts.min() == counts.max():
    return np.zeros_like(counts)
  middle = _center(counts, center)
  # log1p keeps the digits where counts are large and close to each other.
  excess = (counts - middle) / middle
  close = np.log1p(np.clip(excess, -0.5, 0.5))
  log = np.where(np.abs(excess) < 0.5, close, np.log(counts / middle))
  log_r = np.abs(log).max()
  return log / log_r if log_form == "base" else log + log_r


def _center(counts: np.ndarray, center: str) -> float:
  """N~ of Eq. 1."""
  if center == "median":
    return np.median(counts)
  if center == "mean":
    return np.mean(counts)
  if center == "geometric_mean":
    return np.exp(np.mean(np.log(counts)))
  return np.sqrt(counts.max()) * np.sqrt(counts.min())


def _flatten(capacities: Any) -> tuple[list[tuple[str, Any]], Any]:
  """The leaves of a tree with their names, None included, and its structure."""
  if isinstance(capacities, Mapping) and jax.tree_util.all_leaves([capacities]):
    capacities = dict(capacities)  # a mapping that jax does not look into
  leaves, treedef = jax.tree_util.tree_flatten_with_path(
    capacities, is_leaf=lambda leaf: leaf is None
  )
  return [(jax.tree_util.keystr(key), leaf) for key, leaf in leaves], treedef


def _counts(name: str, leaf: Any) -> np.ndarray:
  """The checked counts of one leaf as float64, shape of the leaf."""
  if _is_array(leaf) and np.issubdtype(leaf.dtype, np.integer):
    values = np.asarray(leaf)
  elif _is_integer(leaf):
    values = np.asarray(int(leaf), object)
  else:
    raise ValueError(
      f"capacities{name}={leaf!r} is not a count; use an integer >= 0"
    )
  # Stacked layers are equal: a 0 among weights is a mistake.
  least = 1 if np.any(values != 0) else 0
  wrong = [v for v in values.ravel().tolist() if not least <= v <= _MAX_COUNT]
  if wrong:
    raise ValueError(
      f"capacities{name}={wrong[0]} is not a count; use {least}..2^63 - 1 "
      "weights"
    )
  return values.astype(np.float64)


def _check_any(
  leaves: list[tuple[str, Any]], arrays: list[np.ndarray], capacities: Any
) -> None:
  """Raises ValueError where no layer has weights."""
  if any(array.any() for array in arrays):
    return
  for (name, _), array in zip(leaves, arrays, strict=True):
    if array.size:
      raise ValueError(
        f"capacities{name}=0, and no other layer has weights; pass at least"
        " one count >= 1"
      )
  raise ValueError(
    f"capacities: no layer in {capacities!r}; pass at least one count"
  )


def _is_integer(value: Any) -> bool:
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_array(leaf: Any) -> bool:
  return isinstance(leaf, np.ndarray | jax.Array)


def _in_order(result: Any, like: Any) -> Any:
  """`result` with its dicts in the order of `like`: jax sorts the keys."""
  if type(like) is dict:
    return {key: _in_order(result[key], child) for key, child in like.items()}
  return result
