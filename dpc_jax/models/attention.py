"""Self-attention and the pre-norm transformer block, for images and text."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpc_jax.models import common
from dpc_jax.quant import grids, products


class SelfAttention(nn.Module):
  """Multi-head self-attention: four projections, two products, all quantized.

  With q, k, v the projections of the input in `heads` parts of d features:

      p = softmax(qk(q / sqrt(d), k))      out(av(dropout(p), v))

  Layers `query`, `key`, `value`, `out` with kernels (width, width) and biases,
  and the products `qk` and `av`, which have no weights. The softmax is in
  float32. A masked probability is an exact zero, and its quantized value too.
  The running range of `av` is that of dropout(p), which reaches up to
  1 / (1 - `dropout`): in evaluation, where p ends at 1, the levels above 1, a
  share `dropout` of them, go unused.

  Attributes:
    heads: number of heads; divides the width of the input.
    causal: True lets a position see itself and those before it.
    dropout: share of the probabilities dropped in training.
    quantization: the grids of all six layers; None is the plain float module
      with the same parameters.
    kernel_init: of the four kernels.
    dtype: of the computation but for the softmax; None is the promotion of
      input and parameters.
  """

  heads: int
  causal: bool = False
  dropout: float = 0.0
  quantization: grids.Quantization | None = grids.Quantization()
  kernel_init: Any = nn.initializers.xavier_uniform()
  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, T, width) to the same shape.

    Raises:
      ValueError: a width that does not divide by the heads.
    """
    width = x.shape[-1]
    if width % self.heads:
      raise ValueError(
        f"heads = {self.heads}: must divide the width, which is {width}"
      )
    project = functools.partial(
      common.dense(
        self.quantization, kernel_init=self.kernel_init, dtype=self.dtype
      ),
      width,
    )
    product = functools.partial(
      products.QuantProduct, quantization=self.quantization
    )
    parts = (*x.shape[:2], self.heads, width // self.heads)
    q, k, v = (
      project(name=name)(x).reshape(parts) for name in ("query", "key", "value")
    )
    q = q * parts[-1] ** -0.5
    logits = product("nqhd,nkhd->nhqk", name="qk")(q, k).astype(jnp.float32)
    if self.causal:
      allowed = jnp.tril(jnp.ones(logits.shape[-2:], bool))[None, None]
      logits = jnp.where(allowed, logits, jnp.finfo(jnp.float32).min)
    p = nn.softmax(logits).astype(v.dtype)
    p = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(p)
    y = product("nhqk,nkhd->nqhd", non_negative=True, name="av")(p, v)
    return project(name="out")(y.reshape(x.shape))


class Block(nn.Module):
  """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

  Layers `norm1`, `attention/...`, `norm2`, `mlp1` and `mlp2`. In training,
  values are dropped from the output of both branches, and from what the
  options below say.

  Attributes:
    heads: of the attention.
    mlp_width: features between the two layers of the MLP.
    activation: between them.
    causal: see `SelfAttention`.
    dropout: share of the values dropped from the output of both branches.
    attention_dropout: of the attention's probabilities.
    activation_dropout: of the values after `activation`.
    epsilon: of the layer normalization, whose statistics are in float32.
    quantization: the grids of all layers; None is the plain float block with
      the same parameters.
    kernel_init: of all kernels.
    dtype: of the computation; None is the promotion of input and parameters.
  """

  heads: int
  mlp_width: int
  activation: Callable[[jax.Array], jax.Array]
  causal: bool = False
  dropout: float = 0.0
  attention_dropout: float = 0.0
  activation_dropout: float = 0.0
  epsilon: float = 1e-6
  quantization: grids.Quantization | None = grids.Quantization()
  kernel_init: Any = nn.initializers.xavier_uniform()
  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, T, width) to the same shape."""
    norm = functools.partial(
      nn.LayerNorm, epsilon=self.epsilon, dtype=self.dtype
    )
    project = common.dense(
      self.quantization, kernel_init=self.kernel_init, dtype=self.dtype
    )

    def drop(y, rate, name):
      return nn.Dropout(rate, deterministic=not train, name=name)(y)

    y = SelfAttention(
      self.heads,
      self.causal,
      self.attention_dropout,
      self.quantization,
      self.kernel_init,
      self.dtype,
      name="attention",
    )(norm(name="norm1")(x), train)
    x = x + drop(y, self.dropout, "dropout1")
    y = project(self.mlp_width, name="mlp1")(norm(name="norm2")(x))
    y = drop(self.activation(y), self.activation_dropout, "activation_dropout")
    y = project(x.shape[-1], name="mlp2")(y)
    return x + drop(y, self.dropout, "dropout2")
