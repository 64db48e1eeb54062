"""Convolutional networks written out in NumPy (float64), in evaluation.

`Network` looks its layers up by path in a model's variables. Weights of the
layers that have widths are quantized to them; activations are not.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dpc_jax.quant import precision
from tests.quant import reference

EPSILON = 1e-5


class Network:
  """Layers by path; `quantized` collects the paths that used a width."""

  def __init__(self, variables: Mapping[str, Any]):
    self._variables = variables
    self._bits = {}
    if "precision" in variables:
      self._bits = precision.layer_bits(variables)
    self.quantized: set[str] = set()

  def _leaf(self, collection, path, name):
    node = self._variables[collection]
    for part in path.split("/"):
      node = node[part]
    return np.asarray(node[name], np.float64)

  def _kernel(self, path):
    kernel = self._leaf("params", path, "kernel")
    if path not in self._bits:
      return kernel
    self.quantized.add(path)
    width = int(self._bits[path].weights)
    return reference.quantize(kernel, width, kept=(kernel.ndim - 1,))

  def conv(self, x, path, stride=1, groups=1):
    """Odd kernels, half a kernel of zeros around, no bias."""
    kernel = self._kernel(path)
    pad = kernel.shape[0] // 2
    return reference.convolution(
      x, kernel, None, stride=stride, padding=(pad, pad), groups=groups
    )

  def norm(self, x, path):
    """By the running statistics."""
    mean, var = (self._leaf("batch_stats", path, n) for n in ("mean", "var"))
    scale, bias = (self._leaf("params", path, n) for n in ("scale", "bias"))
    return (x - mean) / np.sqrt(var + EPSILON) * scale + bias

  def dense(self, x, path):
    """Of the average over the image."""
    return x.mean((1, 2)) @ self._kernel(path) + self._leaf(
      "params", path, "bias"
    )


def max_pool(x):
  """3x3, stride 2, one pixel around; x >= 0."""
  n, height, width, channels = x.shape
  padded = np.zeros((n, height + 2, width + 2, channels))
  padded[:, 1:-1, 1:-1] = x
  windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
  return windows[:, ::2, ::2].max((-2, -1))


def seasoned(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Statistics, scales and biases that a fresh network does not have."""
  leaves, tree = jax.tree.flatten(variables)
  random = np.random.default_rng(0)
  return jax.tree.unflatten(
    tree,
    [
      leaf + random.uniform(0, 0.3, leaf.shape).astype(np.float32)
      if leaf.ndim == 1
      else leaf
      for leaf in leaves
    ],
  )
