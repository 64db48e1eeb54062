"""ImageNet ResNets: He et al., 2016, in the form known as v1.5.

A 7x7 stem of stride 2, a 3x3 max-pooling of stride 2, four stages whose width
doubles, global average pooling, one dense layer. Blocks are post-activation:
basic ones in ResNet-18 and ResNet-34, bottlenecks in ResNet-50, which stride
in their 3x3 convolution (v1 strides in the first 1x1). Where a block changes
the shape its shortcut is a 1x1 convolution with batch normalization. Sizes,
padding and parameter counts are torchvision's: 11,689,512, 21,797,672 and
25,557,032 at 1000 classes. Scales of all normalizations start at one.

As in CPT the stem, the shortcuts' convolutions and the classifier stay in
float; `quantize_all` quantizes them too.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpc_jax.models import common, resnet
from dpc_jax.quant import grids, remat

# Channels of a bottleneck's output per channel of its 3x3 convolution.
EXPANSION = 4


class Bottleneck(nn.Module):
  """1x1 - 3x3 - 1x1 convolution, each normalized, plus the shortcut.

  relu follows the first two normalizations and the sum.

  Attributes:
    features: channels of the output; the 3x3 convolution has a fourth.
    stride: of the 3x3 convolution and of the shortcut.
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
    inner = self.features // EXPANSION
    y = self.conv(inner, (1, 1), padding="VALID", name="conv1")(x)
    y = remat.relu(self.norm(name="norm1")(y), of_norm=True)
    y = self.conv(
      inner,
      (3, 3),
      strides=(self.stride, self.stride),
      padding=resnet.PADDING,
      name="conv2",
    )(y)
    y = remat.relu(self.norm(name="norm2")(y), of_norm=True)
    y = self.conv(self.features, (1, 1), padding="VALID", name="conv3")(y)
    y = self.norm(name="norm3")(y)
    return resnet.add_shortcut(self, x, y)


class ResNetImageNet(nn.Module):
  """ResNet for large images.

  Attributes:
    num_classes: width of the classifier.
    blocks: blocks of each stage.
    bottleneck: True for bottlenecks, else basic blocks.
    width: channels of the stem and of the first stage's 3x3 convolutions.
    quantization: the grids; None is the plain float model with the same
      parameters.
    quantize_all: True quantizes stem, shortcuts and classifier as well.
    dtype: of the computation; None is the promotion of input and parameters.
      Batch statistics and parameters are float32.
    scan: True compiles one block per stage instead of all (see
      `dpc_jax.models.stacking` for the layout). Slow on a CPU.
  """

  num_classes: int
  blocks: tuple[int, ...]
  bottleneck: bool
  width: int = 64
  quantization: grids.Quantization | None = grids.Quantization()
  quantize_all: bool = False
  dtype: Any = None
  scan: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits (N, num_classes) of images (N, H, W, C).

    Args:
      x: floating-point images, normalized; 224x224 in the literature.
      train: True normalizes by the batch and updates `batch_stats`.
    """
    outer = self.quantization if self.quantize_all else None
    conv = resnet.convolution(self.quantization, self.dtype)
    outer_conv = resnet.convolution(outer, self.dtype)
    norm = resnet.batch_norm(train, self.dtype)
    x = outer_conv(
      self.width,
      (7, 7),
      strides=(2, 2),
      padding=((3, 3), (3, 3)),
      name="stem",
    )(x)
    x = remat.relu(norm(name="stem_norm")(x), of_norm=True)
    x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=resnet.PADDING)
    block = Bottleneck if self.bottleneck else resnet.BasicBlock
    expansion = EXPANSION if self.bottleneck else 1
    for i, blocks in enumerate(self.blocks):
      x = resnet.Stage(
        block,
        blocks,
        self.width * expansion * 2**i,
        1 if i == 0 else 2,
        conv,
        norm,
        shortcut_conv=outer_conv,
        scan=self.scan,
        name=f"stage{i + 1}",
      )(x)
    x = jnp.mean(x, axis=(1, 2))
    dense = common.dense(outer, dtype=self.dtype)
    return dense(self.num_classes, name="classifier")(x)
