"""Vision transformer: Dosovitskiy et al., 2021.

Patches, a class token, learned positions, pre-norm blocks with the exact GELU,
a last norm, and a dense layer on the class token. The sizes "tiny" and "small"
are those of DeiT (Touvron et al., 2021). The projections, both attention
products and the MLPs are quantized; the embedding of the patches and the
classifier, first and last layer, stay in float: our decision, as in CPT's
ImageNet models.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpc_jax.models import attention, common, stacking
from dpc_jax.quant import grids

# As in DeiT's code.
KERNEL_INIT = nn.initializers.truncated_normal(0.02)


class ViT(nn.Module):
  """Vision transformer for images of one size.

  At 224 x 224 pixels, patches of 16 and 1000 classes it has 5,717,416
  parameters (tiny) or 22,050,664 (small), as DeiT's have.

  Attributes:
    num_classes: width of the classifier.
    patch_size: height and width of a patch, in pixels; divides those of the
      image.
    width: features of a token: 192 (tiny) or 384 (small).
    layers: number of blocks.
    heads: of the attention; divides `width`.
    mlp_width: features between the two layers of an MLP.
    dropout: share of the values dropped in training from the embedded tokens
      and from the output of each branch of a block.
    quantization: the grids of every quantized layer; None is the plain float
      model with the same parameters.
    quantize_all: True quantizes `patches` and `classifier` too.
    scan: True compiles one block and loops over them (see `stacking`).
    dtype: of the computation; None is the promotion of input and parameters.
  """

  num_classes: int
  patch_size: int = 4
  width: int = 192
  layers: int = 12
  heads: int = 3
  mlp_width: int = 768
  dropout: float = 0.0
  quantization: grids.Quantization | None = grids.Quantization()
  quantize_all: bool = False
  scan: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Returns logits (N, num_classes) of images (N, H, W, C).

    Args:
      x: floating-point images, normalized; of the size that `init` saw.
      train: True drops values.

    Raises:
      ValueError: an image that does not divide into patches, a width that does
        not divide by the heads, a dropout outside [0, 1).
    """
    common.check_rates(dropout=self.dropout)
    x = self._tokens(x)
    x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
    block = functools.partial(
      attention.Block,
      self.heads,
      self.mlp_width,
      functools.partial(nn.gelu, approximate=False),
      dropout=self.dropout,
      quantization=self.quantization,
      kernel_init=KERNEL_INIT,
      dtype=self.dtype,
    )
    x = stacking.run_blocks(
      lambda name: block(name=name),
      range(self.layers),
      x,
      train,
      scan=self.scan,
    )
    x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
    dense = common.dense(
      self._outer_quantization(), kernel_init=KERNEL_INIT, dtype=self.dtype
    )
    return dense(self.num_classes, name="classifier")(x[:, 0])

  def _outer_quantization(self) -> grids.Quantization | None:
    """Of the first and the last layer."""
    return self.quantization if self.quantize_all else None

  def _tokens(self, x: jax.Array) -> jax.Array:
    """Class token and embedded patches, positions added, (N, T, width)."""
    size = (self.patch_size, self.patch_size)
    if any(n % self.patch_size for n in x.shape[1:3]):
      raise ValueError(
        f"patch_size = {self.patch_size}: must divide the image, which has"
        f" {x.shape[1]} x {x.shape[2]} pixels"
      )
    conv = common.convolution(
      self._outer_quantization(), strides=size, padding="VALID"
    )
    x = conv(self.width, size, dtype=self.dtype, name="patches")(x)
    x = x.reshape(x.shape[0], -1, self.width)
    token = self.param(
      "class_token", nn.initializers.normal(1e-6), (1, 1, self.width)
    )
    positions = self.param(
      "positions", KERNEL_INIT, (1, 1 + x.shape[1], self.width)
    )
    token = jnp.broadcast_to(token, (x.shape[0], 1, self.width))
    x = jnp.concatenate([token.astype(x.dtype), x], axis=1)
    return x + jnp.broadcast_to(positions, x.shape).astype(x.dtype)


def vit_tiny(**sizes: Any) -> ViT:
  """DeiT's tiny size, with patches of 4 pixels for CIFAR.

  Args:
    **sizes: attributes of `ViT`; those given come before the name's.
  """
  return ViT(**sizes)


def vit_small(**sizes: Any) -> ViT:
  """DeiT's small size, with patches of 4 pixels for CIFAR; else `vit_tiny`."""
  return ViT(**{"width": 384, "heads": 6, "mlp_width": 1536} | sizes)


def vit_tiny_imagenet(**sizes: Any) -> ViT:
  """`vit_tiny` with patches of 16 pixels."""
  return vit_tiny(**{"patch_size": 16} | sizes)


def vit_small_imagenet(**sizes: Any) -> ViT:
  """`vit_small` with patches of 16 pixels."""
  return vit_small(**{"patch_size": 16} | sizes)
