"""MobileNetV2: Sandler et al., 2018, for ImageNet and for CIFAR.

A 3x3 stem, seven stages of inverted residuals (1x1 expansion, 3x3 depthwise,
1x1 linear projection), a 1x1 convolution, global average pooling, one dense
layer. The two forms differ in more than the stem:

                        `mobilenet_v2_imagenet`        `mobilenet_v2`
    source              the paper; torchvision         CPT
    strides of 2        stem, stages 2, 3, 4, 6        stages 3, 4, 6
    activation          relu6                          relu
    stage 1             no expansion convolution       a 1x1 one, expansion 1
    shortcut            where the shape stays          and, at stride 1, a 1x1
                                                       convolution elsewhere
    dropout             0.2 before the classifier      none
    parameters          3,504,872 (1000 classes)       2,296,922 (10 classes)

What is quantized is our decision. The CIFAR form quantizes every convolution,
like the CIFAR ResNets; the ImageNet form all but the stem, like the ImageNet
ResNets. The classifier stays in float. `quantize_all` quantizes the rest.
Depthwise convolutions are layers like any other, with one grid per channel of
nine weights; CPT holds them at widths of their own, outside its schedule.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpc_jax.models import common, resnet
from dpc_jax.quant import grids, remat

# Expansion, channels, blocks and stride of each stage: the paper's table 2.
STAGES = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)
STEM, HEAD = 32, 1280
# Number of the stage whose stride is 1 on small images.
UNSTRIDED = 2
DROPOUT = 0.2


def scaled(channels: int, multiplier: float) -> int:
  """`channels * multiplier`, rounded to a multiple of 8 as in the paper's code.

  Halves go up, the least is 8, and what would fall below 90 % goes up.

  Raises:
    ValueError: a multiplier that is not above 0.
  """
  if not multiplier > 0:
    raise ValueError(f"width_multiplier = {multiplier}: must be above 0")
  exact = channels * multiplier
  rounded = max(8, int(exact + 4) // 8 * 8)
  return rounded if rounded >= 0.9 * exact else rounded + 8


class InvertedResidual(nn.Module):
  """1x1 expansion, 3x3 depthwise, 1x1 linear projection, and a shortcut.

  Attributes:
    features: channels of the output.
    expansion: channels of the depthwise convolution per channel of the input.
    stride: of the depthwise convolution; no shortcut where it is above 1.
    small_images: True expands even by 1, has relu in place of relu6, and a
      convolution as shortcut where the channels change.
    conv: constructor of a convolution without bias.
    norm: constructor of a batch normalization.
  """

  features: int
  expansion: int
  stride: int
  small_images: bool
  conv: Any
  norm: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (N, H, W, C) to (N, H / stride, W / stride, features)."""
    activation = _activation(self.small_images)
    inputs = x.shape[-1]
    inner = inputs * self.expansion
    y = x
    if self.expansion > 1 or self.small_images:
      y = self.conv(inner, (1, 1), padding="VALID", name="expand")(y)
      y = activation(self.norm(name="expand_norm")(y))
    y = self.conv(
      inner,
      (3, 3),
      strides=(self.stride, self.stride),
      padding=resnet.PADDING,
      feature_group_count=inner,
      name="depthwise",
    )(y)
    y = activation(self.norm(name="depthwise_norm")(y))
    y = self.conv(self.features, (1, 1), padding="VALID", name="project")(y)
    y = self.norm(name="project_norm")(y)
    if self.stride > 1:
      return y
    if inputs == self.features:
      return x + y
    if not self.small_images:
      return y
    x = self.conv(self.features, (1, 1), padding="VALID", name="shortcut")(x)
    return self.norm(name="shortcut_norm")(x) + y


class Stage(nn.Module):
  """`blocks` inverted residuals, the first one with `stride`.

  Attributes:
    blocks: number of blocks.
    features: see `InvertedResidual`.
    expansion: see `InvertedResidual`.
    stride: of the first block.
    small_images: see `InvertedResidual`.
    conv: see `InvertedResidual`.
    norm: see `InvertedResidual`.
  """

  blocks: int
  features: int
  expansion: int
  stride: int
  small_images: bool
  conv: Any
  norm: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (N, H, W, C) to (N, H / stride, W / stride, features)."""
    for i in range(self.blocks):
      x = InvertedResidual(
        self.features,
        self.expansion,
        self.stride if i == 0 else 1,
        self.small_images,
        self.conv,
        self.norm,
        name=f"block{i}",
      )(x)
    return x


class MobileNetV2(nn.Module):
  """MobileNetV2; the module's docstring tells its two forms apart.

  Attributes:
    num_classes: width of the classifier.
    small_images: True for the CIFAR form, False for the ImageNet form.
    width_multiplier: scales the channels of every convolution (see `scaled`);
      below 1 the last one keeps its 1280, as in the paper.
    stages: expansion, channels, blocks and stride of each stage.
    dropout: rate before the classifier, in [0, 1); above 0 training needs the
      RNG stream `dropout`.
    quantization: the grids; None is the plain float model with the same
      parameters.
    quantize_all: True quantizes the classifier and the ImageNet form's stem as
      well.
    dtype: of the computation; None is the promotion of input and parameters.
      Batch statistics and parameters are float32.
  """

  num_classes: int
  small_images: bool
  width_multiplier: float = 1.0
  stages: tuple[tuple[int, int, int, int], ...] = STAGES
  dropout: float = 0.0
  quantization: grids.Quantization | None = grids.Quantization()
  quantize_all: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits (N, num_classes) of images (N, H, W, C).

    Args:
      x: floating-point images, normalized; 224x224 or 32x32 in the literature.
      train: True normalizes by the batch, updates `batch_stats` and drops out.

    Raises:
      ValueError: a dropout outside [0, 1), a multiplier that is not above 0.
    """
    common.check_rates(dropout=self.dropout)
    conv = resnet.convolution(self.quantization, self.dtype)
    norm = resnet.batch_norm(train, self.dtype)
    activation = _activation(self.small_images)
    outer = self.quantization if self.quantize_all else None
    stem = conv
    if not self.small_images:
      stem = resnet.convolution(outer, self.dtype)
    multiplier = self.width_multiplier
    x = stem(
      scaled(STEM, multiplier),
      (3, 3),
      strides=(1, 1) if self.small_images else (2, 2),
      padding=resnet.PADDING,
      name="stem",
    )(x)
    x = activation(norm(name="stem_norm")(x))
    for i, (expansion, channels, blocks, stride) in enumerate(self.stages, 1):
      x = Stage(
        blocks,
        scaled(channels, multiplier),
        expansion,
        1 if self.small_images and i == UNSTRIDED else stride,
        self.small_images,
        conv,
        norm,
        name=f"stage{i}",
      )(x)
    head = scaled(HEAD, max(1.0, multiplier))
    x = conv(head, (1, 1), padding="VALID", name="head")(x)
    x = activation(norm(name="head_norm")(x))
    x = jnp.mean(x, axis=(1, 2))
    x = nn.Dropout(
      self.dropout, deterministic=not train, name="classifier_dropout"
    )(x)
    dense = common.dense(outer, dtype=self.dtype)
    return dense(self.num_classes, name="classifier")(x)


def mobilenet_v2(**sizes: Any) -> MobileNetV2:
  """The CIFAR form.

  Args:
    **sizes: attributes of `MobileNetV2` but `small_images`.
  """
  return MobileNetV2(small_images=True, **sizes)


def mobilenet_v2_imagenet(
  *, dropout: float = DROPOUT, **sizes: Any
) -> MobileNetV2:
  """The ImageNet form.

  Args:
    dropout: rate before the classifier.
    **sizes: attributes of `MobileNetV2` but `small_images`.
  """
  return MobileNetV2(small_images=False, dropout=dropout, **sizes)


def _activation(small_images):
  if not small_images:
    return nn.relu6
  return functools.partial(remat.relu, of_norm=True)
