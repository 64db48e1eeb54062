"""ResNet-8 against its formula, written out in NumPy (float64)."""

import jax
import numpy as np
import pytest

from dpc_jax import models

MOMENTUM, EPSILON = 0.9, 1e-5


def conv(x, kernel, stride):
  """3x3 with one pixel of zeros around, or 1x1 without; no bias."""
  size = kernel.shape[0]
  pad = size // 2
  x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  out = (x.shape[1] - size) // stride + 1
  y = 0.0
  for i in range(size):
    for j in range(size):
      rows = slice(i, i + stride * (out - 1) + 1, stride)
      columns = slice(j, j + stride * (out - 1) + 1, stride)
      y = y + x[:, rows, columns] @ kernel[i, j]
  return y


class Reference:
  """The network; `stats` holds the running statistics after the call."""

  def __init__(self, variables, train):
    as_64 = jax.tree.map(lambda v: np.asarray(v, np.float64), variables)
    self.params, self.old = as_64["params"], as_64["batch_stats"]
    self.train = train
    self.stats = {}

  def norm(self, x, *path):
    params, old = self.params, self.old
    for name in path:
      params, old = params[name], old[name]
    mean, var = old["mean"], old["var"]
    if self.train:
      mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
      self.stats[path] = (
        MOMENTUM * old["mean"] + (1 - MOMENTUM) * mean,
        MOMENTUM * old["var"] + (1 - MOMENTUM) * var,
      )
    normal = (x - mean) / np.sqrt(var + EPSILON)
    return normal * params["scale"] + params["bias"]

  def block(self, x, stage, stride):
    path = (f"stage{stage}", "block0")
    p = self.params[path[0]][path[1]]
    y = conv(x, p["conv1"]["kernel"], stride)
    y = np.maximum(self.norm(y, *path, "norm1"), 0)
    y = self.norm(conv(y, p["conv2"]["kernel"], 1), *path, "norm2")
    if stride > 1:
      x = conv(x, p["shortcut"]["kernel"], stride)
      x = self.norm(x, *path, "shortcut_norm")
    return np.maximum(x + y, 0)

  def __call__(self, x):
    x = conv(np.asarray(x, np.float64), self.params["stem"]["kernel"], 1)
    x = np.maximum(self.norm(x, "stem_norm"), 0)
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
      x = self.block(x, stage, stride)
    head = self.params["classifier"]
    return x.mean((1, 2)) @ head["kernel"] + head["bias"]


@pytest.fixture(scope="module")
def case():
  model = models.create("resnet8", num_classes=10, quantization=None)
  x = jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
  key = jax.random.key(0, impl="rbg")
  variables = jax.jit(model.init)(key, x)
  # Statistics, scales and biases that a fresh network does not have.
  leaves, tree = jax.tree.flatten(variables)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  leaves = [
    leaf + 0.3 * jax.random.uniform(k, leaf.shape) if leaf.ndim == 1 else leaf
    for k, leaf in zip(keys, leaves, strict=True)
  ]
  return model, jax.tree.unflatten(tree, leaves), x


def test_evaluation(case):
  model, variables, x = case
  want = Reference(variables, train=False)(x)
  got = jax.jit(model.apply)(variables, x)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_training_and_running_statistics(case):
  model, variables, x = case
  reference = Reference(variables, train=True)
  want = reference(x)
  got, updates = jax.jit(
    lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])
  )(variables, x)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  assert len(reference.stats) == 9
  for path, (mean, var) in reference.stats.items():
    node = updates["batch_stats"]
    for name in path:
      node = node[name]
    np.testing.assert_allclose(node["mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(node["var"], var, rtol=1e-4, atol=1e-5)


def test_initial_kernels_are_hes_by_the_fan_out():
  model = models.create("resnet8", num_classes=10)
  shape = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32)
  key = jax.random.key(0, impl="rbg")
  params = jax.jit(lambda k: model.init(k, np.zeros(shape.shape, np.float32)))(
    key
  )["params"]
  kernel = np.asarray(params["stage3"]["block0"]["conv1"]["kernel"])
  assert kernel.shape == (3, 3, 32, 64)
  # 18,432 normal values: the deviation's own error is 0.5 %.
  assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.03)
  assert np.abs(kernel).max() > 3 * kernel.std()
