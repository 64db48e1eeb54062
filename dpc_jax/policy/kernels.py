"""The kernels in a tree of parameters or gradients, by the path of a layer."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def find(
  tree: Any, capacities: Mapping[str, Any] | None
) -> dict[str, tuple[Any, int]]:
  """{path: (leaf, how many of its leading axes are stacked layers)}.

  Args:
    tree: of parameters, or of the same structure.
    capacities: {path: N_k} of the layers to find, with the shape of the stacked
      layers where there are any; None finds each leaf named `kernel`.

  Raises:
    ValueError: a kernel that does not have the stacked layers in front.
  """
  kernels = {}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
    path = layer_path(keys)
    if path is None or (capacities is not None and path not in capacities):
      continue
    stack = () if capacities is None else np.shape(capacities[path])
    if np.shape(leaf)[: len(stack)] != stack:
      raise ValueError(
        f"layer {path!r}: a kernel of shape {np.shape(leaf)} for N_k of shape"
        f" {stack}; stack parameters along their first axis"
      )
    kernels[path] = leaf, len(stack)
  return kernels


def layer_path(keys: tuple[Any, ...]) -> str | None:
  """The layer's path of a leaf named `kernel`, None of other leaves."""
  names = [str(getattr(k, "key", getattr(k, "idx", None))) for k in keys]
  while names and isinstance(keys[len(names) - 1], jax.tree_util.GetAttrKey):
    names.pop()  # a boxed parameter is a node around its leaf
  if not names or names[-1] != "kernel":
    return None
  return "/".join(names[:-1])
