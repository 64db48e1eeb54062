"""Does low precision constrain variance? The weights' part of that claim."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util


def weight_variances(params: Mapping[str, Any]) -> dict[str, float]:
  """{layer path: variance of the kernel's entries}, population, float64.

  Of the master weights, not of their quantized copies. Ahead of a normalization
  a kernel's scale changes nothing of what the network computes, so its variance
  tells of weight decay and step size as much as of precision.

  Args:
    params: the collection; a layer is what has a leaf `kernel`, '' the root.
      Layers stacked by `nn.scan` count as one.
  """
  flat = traverse_util.flatten_dict(dict(params))
  return {
    "/".join(path[:-1]): float(np.var(np.asarray(leaf, np.float64)))
    for path, leaf in flat.items()
    if path[-1] == "kernel"
  }


def geometric_mean_ratio(
  variances: Mapping[str, float], reference: Mapping[str, float]
) -> float | None:
  """Geometric mean over layers of variance / reference; None without any.

  Layers that only one of the two has, or whose variance is 0, are left out.
  """
  logs = [
    math.log(value / reference[path])
    for path, value in variances.items()
    if value > 0 and reference.get(path, 0) > 0
  ]
  return math.exp(sum(logs) / len(logs)) if logs else None
