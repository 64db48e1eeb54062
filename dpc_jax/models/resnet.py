"""CIFAR ResNets: He et al., 2016, section 4.2, with CPT's shortcuts.

ResNet-(6n + 2): a 3x3 stem, three stages of n post-activation basic blocks
with widths 16, 32, 64, global average pooling, one dense layer. The two blocks
that halve the image take a 1x1 convolution with batch normalization as their
shortcut ("option B"), so 20 layers have 272,474 parameters at 10 classes.
All convolutions are quantized; the classifier stays in float.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpc_jax.quant import grids, layers

# He et al., 2015, by the fan-out, as in the reference's code.
KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# Explicit: "SAME" pads a stride-2 convolution differently from the reference.
PADDING = ((1, 1), (1, 1))


class BasicBlock(nn.Module):
  """conv - norm - relu - conv - norm, plus the shortcut, then relu.

  Attributes:
    features: channels of the output.
    stride: of the first convolution and of the shortcut.
    conv: constructor of a convolution without bias.
    norm: constructor of a batch normalization.
  """

  features: int
  stride: int
  conv: Any
  norm: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (N, H, W, C) to (N, H / stride, W / stride, features)."""
    strides = (self.stride, self.stride)
    y = self.conv(
      self.features, (3, 3), strides=strides, padding=PADDING, name="conv1"
    )(x)
    y = nn.relu(self.norm(name="norm1")(y))
    y = self.conv(self.features, (3, 3), padding=PADDING, name="conv2")(y)
    y = self.norm(name="norm2")(y)
    if y.shape != x.shape:
      x = self.conv(
        self.features, (1, 1), strides=strides, padding="VALID", name="shortcut"
      )(x)
      x = self.norm(name="shortcut_norm")(x)
    return nn.relu(x + y)


class Stage(nn.Module):
  """`blocks` basic blocks, the first one with `stride`.

  Attributes:
    blocks: number of blocks, n.
    features: channels of every block.
    stride: of the first block.
    conv: see `BasicBlock`.
    norm: see `BasicBlock`.
  """

  blocks: int
  features: int
  stride: int
  conv: Any
  norm: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (N, H, W, C) to (N, H / stride, W / stride, features)."""
    for i in range(self.blocks):
      x = BasicBlock(
        self.features,
        self.stride if i == 0 else 1,
        self.conv,
        self.norm,
        name=f"block{i}",
      )(x)
    return x


class ResNet(nn.Module):
  """ResNet-(6 * blocks + 2) for small images.

  Attributes:
    num_classes: width of the classifier.
    blocks: blocks per stage, n.
    width: channels of the first stage; they double at each stage.
    quantization: the grids of every convolution; None is the plain float
      model with the same parameters.
    dtype: of the computation; None is the promotion of input and parameters.
      Batch statistics and parameters are float32.
  """

  num_classes: int
  blocks: int
  width: int = 16
  quantization: grids.Quantization | None = grids.Quantization()
  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits (N, num_classes) of images (N, H, W, C).

    Args:
      x: floating-point images, normalized.
      train: True normalizes by the batch and updates `batch_stats`.
    """
    options = {
      "use_bias": False,
      "dtype": self.dtype,
      "kernel_init": KERNEL_INIT,
    }
    if self.quantization is None:
      conv = functools.partial(nn.Conv, **options)
    else:
      conv = functools.partial(
        layers.QuantConv, quantization=self.quantization, **options
      )
    # PyTorch's momentum 0.1 and epsilon, which the reference figures used.
    norm = functools.partial(
      nn.BatchNorm,
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-5,
      dtype=self.dtype,
    )
    x = conv(self.width, (3, 3), padding=PADDING, name="stem")(x)
    x = nn.relu(norm(name="stem_norm")(x))
    for i in range(3):
      x = Stage(
        self.blocks,
        self.width * 2**i,
        1 if i == 0 else 2,
        conv,
        norm,
        name=f"stage{i + 1}",
      )(x)
    x = jnp.mean(x, axis=(1, 2))
    return nn.Dense(self.num_classes, dtype=self.dtype, name="classifier")(x)
