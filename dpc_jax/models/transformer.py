"""Transformer language model: Baevski and Auli, 2018, for WikiText-103.

A decoder with adaptive input embeddings and an adaptive softmax that share
their weights (see `adaptive`), sinusoidal positions, and pre-norm blocks with
ReLU and causal attention; no norm after the last block. The four projections
of the attention, its two products and both layers of the MLP are quantized;
embeddings, their projections and the softmax stay in float: our decision, as
the classifier of the other models. Details follow fairseq's code, which has 8
heads where the paper says 16; kernels start after Xavier, biases at 0.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpc_jax.models import adaptive, attention, common, stacking
from dpc_jax.quant import grids, remat


class TransformerLM(nn.Module):
  """Decoder-only transformer language model.

  The defaults are the sizes of the paper's model for WikiText-103, which has
  246,933,504 parameters with 267,744 words, fairseq's padded dictionary (the
  count is the one that its documentation prints). That model was trained with
  dropouts 0.3, 0.1, 0.1 and 0.2, in the order of the attributes.

  Attributes:
    num_classes: words of the vocabulary; 0 is the most frequent.
    width: features of a token.
    layers: number of blocks.
    heads: of the attention; divides `width`.
    mlp_width: features between the two layers of an MLP.
    cutoffs: first word of each band of the vocabulary but the first; those
      beyond the vocabulary are left out.
    factor: by which each band has fewer features than the one before.
    dropout: share of the values dropped in training from the embedded tokens
      and from the output of each branch of a block.
    attention_dropout: likewise, from the attention's probabilities.
    activation_dropout: likewise, behind the ReLU.
    tail_dropout: likewise, before the logits of all bands but the first.
    quantization: the grids of every quantized layer; None is the plain float
      model with the same parameters.
    scan: True compiles one block and loops over them (see `stacking`).
    dtype: of the computation; None is float32. Softmaxes are float32.
  """

  num_classes: int
  width: int = 1024
  layers: int = 16
  heads: int = 8
  mlp_width: int = 4096
  cutoffs: tuple[int, ...] = (20_000, 60_000)
  factor: int = 4
  dropout: float = 0.0
  attention_dropout: float = 0.0
  activation_dropout: float = 0.0
  tail_dropout: float = 0.0
  quantization: grids.Quantization | None = grids.Quantization()
  scan: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    targets: jax.Array | None = None,
    train: bool = False,
  ) -> jax.Array:
    """Predicts each next word from the words so far.

    Args:
      tokens: (N, T) integers in [0, num_classes); one outside makes the output
        of its row NaN, and with quantized products that of the whole batch
        (of its row alone in a training step with delayed ranges).
      targets: (N, T) integers, the words to predict, one outside has a loss of
        NaN; None asks for the whole distribution.
      train: True drops values.

    Returns:
      Without targets, log-probabilities of the next word, float32 (N, T,
      num_classes); with them, their negative log-likelihoods in nats, float32
      (N, T).

    Raises:
      ValueError: tokens or targets of another form; a width that does not
        divide by the heads; a dropout outside [0, 1); cutoffs or a factor that
        `adaptive` refuses.
    """
    common.check_tokens(tokens, targets)
    common.check_rates(
      dropout=self.dropout,
      attention_dropout=self.attention_dropout,
      activation_dropout=self.activation_dropout,
      tail_dropout=self.tail_dropout,
    )
    embedding = adaptive.AdaptiveEmbedding(
      self.num_classes,
      self.width,
      tuple(self.cutoffs),
      self.factor,
      self.tail_dropout,
      self.dtype,
      name="embedding",
    )
    x = embedding.embed(tokens) * self.width**0.5
    positions = sinusoids(tokens.shape[1], self.width)
    x = x + jnp.asarray(positions, x.dtype)[None]
    x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
    x = self._blocks(x, train)
    if targets is None:
      return embedding.log_probabilities(x, train)
    return embedding.losses(x, targets, train)

  def _blocks(self, x: jax.Array, train: bool) -> jax.Array:
    block = functools.partial(
      attention.Block,
      self.heads,
      self.mlp_width,
      remat.relu,
      causal=True,
      dropout=self.dropout,
      attention_dropout=self.attention_dropout,
      activation_dropout=self.activation_dropout,
      epsilon=1e-5,
      quantization=self.quantization,
      dtype=self.dtype,
    )
    return stacking.run_blocks(
      lambda name: block(name=name),
      range(self.layers),
      x,
      train,
      scan=self.scan,
    )


def sinusoids(length: int, width: int) -> np.ndarray:
  """Positions 0 .. length - 1 in fairseq's form, float32 (length, width).

  With n = width // 2 and frequencies f_i = 10000^(-i / (n - 1)), i < n:
  [sin(p f_0), ..., sin(p f_(n-1)), cos(p f_0), ...], and a 0 at the end of an
  odd width. fairseq counts positions from 2, behind its padding; we from 0.
  """
  half = width // 2
  frequencies = 10_000 ** (-np.arange(half) / max(half - 1, 1))
  angles = np.arange(length)[:, None] * frequencies[None]
  table = np.zeros((length, width), np.float32)
  table[:, :half], table[:, half : 2 * half] = np.sin(angles), np.cos(angles)
  return table
