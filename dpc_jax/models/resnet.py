"""CIFAR ResNets: He et al., 2016, section 4.2, with CPT's shortcuts.

ResNet-(6n + 2): a 3x3 stem, three stages of n post-activation basic blocks
with widths 16, 32, 64, global average pooling, one dense layer. The two blocks
that halve the image take a 1x1 convolution with batch normalization as their
shortcut ("option B"), so 20 layers have 272,474 parameters at 10 classes.
All convolutions are quantized; the classifier stays in float.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpc_jax.models import common, stacking
from dpc_jax.quant import grids, remat

# He et al., 2015, by the fan-out, as in the reference's code.
KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# Explicit: "SAME" pads a stride-2 convolution differently from the reference.
PADDING = ((1, 1), (1, 1))


def convolution(
  quantization: grids.Quantization | None, dtype: Any
) -> Callable[..., nn.Module]:
  """Constructor of a ResNet's convolution: no bias, `KERNEL_INIT`."""
  return common.convolution(
    quantization, use_bias=False, kernel_init=KERNEL_INIT, dtype=dtype
  )


def batch_norm(train: bool, dtype: Any) -> Callable[..., nn.Module]:
  """Constructor of a batch normalization with the reference's constants."""
  # PyTorch's momentum 0.1 and epsilon, which the reference figures used.
  return functools.partial(
    nn.BatchNorm,
    use_running_average=not train,
    momentum=0.9,
    epsilon=1e-5,
    dtype=dtype,
  )


class BasicBlock(nn.Module):
  """conv - norm - relu - conv - norm, plus the shortcut, then relu.

  Attributes:
    features: channels of the output.
    stride: of the first convolution and of the shortcut.
    conv: constructor of a convolution without bias.
    norm: constructor of a batch normalization.
    shortcut_conv: constructor of the shortcut's convolution.
  """

  features: int
  stride: int
  conv: Any
  norm: Any
  shortcut_conv: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (N, H, W, C) to (N, H / stride, W / stride, features)."""
    strides = (self.stride, self.stride)
    y = self.conv(
      self.features, (3, 3), strides=strides, padding=PADDING, name="conv1"
    )(x)
    y = remat.relu(self.norm(name="norm1")(y), of_norm=True)
    y = self.conv(self.features, (3, 3), padding=PADDING, name="conv2")(y)
    y = self.norm(name="norm2")(y)
    return add_shortcut(self, x, y)


def add_shortcut(block: nn.Module, x: jax.Array, y: jax.Array) -> jax.Array:
  """relu(shortcut(x) + y), inside a block's compact `__call__`.

  The shortcut is the identity where the shapes agree, else a 1x1 convolution
  and a normalization, `shortcut` and `shortcut_norm`.
  """
  if y.shape != x.shape:
    x = block.shortcut_conv(
      block.features,
      (1, 1),
      strides=(block.stride, block.stride),
      padding="VALID",
      name="shortcut",
    )(x)
    x = block.norm(name="shortcut_norm")(x)
  return remat.relu(x + y, of_norm=True)


class Stage(nn.Module):
  """`blocks` residual blocks, the first one with `stride`.

  Attributes:
    block: class of the blocks, such as `BasicBlock`.
    blocks: number of blocks, n.
    features: channels of every block's output.
    stride: of the first block.
    conv: see `BasicBlock`.
    norm: see `BasicBlock`.
    shortcut_conv: see `BasicBlock`.
    scan: True stacks the equal blocks, all but a first one that changes the
      shape, into one scanned module, `blocks`.
  """

  block: Any
  blocks: int
  features: int
  stride: int
  conv: Any
  norm: Any
  shortcut_conv: Any
  scan: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (N, H, W, C) to (N, H / stride, W / stride, features)."""

    def make(name, stride=1):
      return self.block(
        self.features,
        stride,
        self.conv,
        self.norm,
        self.shortcut_conv,
        name=name,
      )

    first = 0
    if self.stride > 1 or x.shape[-1] != self.features:
      x = make("block0", self.stride)(x)
      first = 1
    return stacking.run_blocks(
      make, range(first, self.blocks), x, scan=self.scan
    )


class ResNet(nn.Module):
  """ResNet-(6 * blocks + 2) for small images.

  Attributes:
    num_classes: width of the classifier.
    blocks: blocks per stage, n.
    width: channels of the stem, and of the first stage at `widening` 1.
    widening: the stages have `width * widening` channels, doubled at each
      stage. Above 1 the first stage starts with a shortcut convolution.
    quantization: the grids of every convolution; None is the plain float
      model with the same parameters.
    dtype: of the computation; None is the promotion of input and parameters.
      Batch statistics and parameters are float32.
    scan: True compiles one block per stage instead of all (see
      `dpc_jax.models.stacking` for the layout). Slow on a CPU.
  """

  num_classes: int
  blocks: int
  width: int = 16
  widening: int = 1
  quantization: grids.Quantization | None = grids.Quantization()
  dtype: Any = None
  scan: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits (N, num_classes) of images (N, H, W, C).

    Args:
      x: floating-point images, normalized.
      train: True normalizes by the batch and updates `batch_stats`.
    """
    conv = convolution(self.quantization, self.dtype)
    norm = batch_norm(train, self.dtype)
    x = conv(self.width, (3, 3), padding=PADDING, name="stem")(x)
    x = remat.relu(norm(name="stem_norm")(x), of_norm=True)
    for i in range(3):
      x = Stage(
        BasicBlock,
        self.blocks,
        self.width * self.widening * 2**i,
        1 if i == 0 else 2,
        conv,
        norm,
        shortcut_conv=conv,
        scan=self.scan,
        name=f"stage{i + 1}",
      )(x)
    x = jnp.mean(x, axis=(1, 2))
    dense = common.dense(None, dtype=self.dtype)
    return dense(self.num_classes, name="classifier")(x)
