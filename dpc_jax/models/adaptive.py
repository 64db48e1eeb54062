"""Adaptive input embedding and adaptive softmax over shared weights.

Grave et al., 2017, for the softmax; Baevski and Auli, 2018, for the input. The
vocabulary, sorted by frequency, is cut into bands; a word of band i has
width / factor^i features, and a projection takes them to the model's width.
The softmax is one over the first band and a class for each further band, and
within such a band another one. Both ends share the embeddings, and the
projections of all bands but the first: its words need none at the output.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpc_jax.models import common

_XAVIER = nn.initializers.xavier_uniform()


def band_bounds(num_classes: int, cutoffs: Sequence[int]) -> tuple[int, ...]:
  """Bounds of the bands: 0, the cutoffs below `num_classes`, `num_classes`.

  Raises:
    ValueError: cutoffs that decrease, or below 1.
  """
  bounds = [0]
  for cutoff in cutoffs:
    if cutoff < max(bounds[-1], 1):
      raise ValueError(
        f"cutoffs = {tuple(cutoffs)}: must increase, from 1 on; give the first"
        " word of each further band"
      )
    if bounds[-1] < cutoff < num_classes:
      bounds.append(int(cutoff))
  return (*bounds, num_classes)


class Band(nn.Module):
  """The words `start` .. `stop` - 1: their embeddings and projection.

  Parameters: `embedding` (words, features), initially normal with variance
  1 / features, and `kernel` (features, width), uniform after Xavier.

  Attributes:
    start: first word.
    stop: end of the words.
    features: of a word.
    width: of the model.
    is_last: True counts every word from `start` on to the band, so that a word
      past the vocabulary gives NaN instead of nothing.
    is_projected: False has no `kernel`; features must be width.
    dtype: of the products; None is the promotion of the operands.
  """

  start: int
  stop: int
  features: int
  width: int
  is_last: bool = False
  is_projected: bool = True
  dtype: Any = None

  def setup(self):
    """Makes the parameters."""
    self.embedding = self.param(
      "embedding",
      nn.initializers.normal(self.features**-0.5),
      (self.stop - self.start, self.features),
    )
    if self.is_projected:
      self.kernel = self.param("kernel", _XAVIER, (self.features, self.width))

  def contains(self, words: jax.Array) -> jax.Array:
    """Which words are in this band, bool."""
    return (words >= self.start) & (self.is_last | (words < self.stop))

  def places(self, words: jax.Array) -> jax.Array:
    """Places of words in this band; 0 for those of other bands."""
    return jnp.where(self.contains(words), words - self.start, 0)

  def embed(self, words: jax.Array) -> jax.Array:
    """Maps integers (N, T) to (N, T, width), 0 for words of other bands."""
    (table,) = self._cast(self.embedding)
    x = jnp.take(table, self.places(words), axis=0)
    # Before the projection: 0 there is 0 behind it, with gradients of 0.
    x = jnp.where(self.contains(words)[..., None], x, 0)
    if not self.is_projected:
      return x
    x, kernel = self._cast(x, self.kernel)
    return jnp.einsum("ntf,fw->ntw", x, kernel)

  def unproject(self, h: jax.Array) -> jax.Array:
    """Maps (N, T, width) to (N, T, features) by the transposed projection."""
    h, kernel = self._cast(h, self.kernel)
    return jnp.einsum("ntw,fw->ntf", h, kernel)

  def logits(self, h: jax.Array, more: jax.Array | None = None) -> jax.Array:
    """Maps (N, T, features) to float32 (N, T, words), `more` at the end."""
    h, table = self._cast(h, self.embedding)
    return _logits(h, table, more)

  def losses(
    self, h: jax.Array, places: jax.Array, more: jax.Array | None = None
  ) -> jax.Array:
    """Negative log-likelihoods of `places` in `logits`, float32 (N, T).

    The logits are computed again in the backward pass, not kept for it.
    """
    h, table = self._cast(h, self.embedding)

    @jax.checkpoint
    def losses(h, table, more, places):
      logits = _logits(h, table, more)
      chosen = jnp.take_along_axis(logits, places[..., None], -1)
      return jax.nn.logsumexp(logits, -1) - chosen[..., 0]

    return losses(h, table, more, places)

  def _cast(self, *arrays):
    return nn.dtypes.promote_dtype(*arrays, dtype=self.dtype)


def _logits(h, table, more):
  words = jnp.einsum(
    "ntf,vf->ntv", h, table, preferred_element_type=jnp.float32
  )
  if more is None:
    return words
  return jnp.concatenate([words, more.astype(jnp.float32)], -1)


class AdaptiveEmbedding(nn.Module):
  """Both ends of a language model: words to features, features to words.

  Modules `band<i>`, and `clusters`, a dense layer without bias that gives the
  logits of the classes of all bands but the first. Without a cutoff below the
  vocabulary this is a plain softmax tied to a plain embedding. All products
  stay in float. A word outside [0, num_classes) has an embedding and a loss of
  NaN.

  Attributes:
    num_classes: words of the vocabulary; 0 is the most frequent.
    width: features of the model.
    cutoffs: first word of each band but the first; those beyond the vocabulary
      are left out.
    factor: by which each band has fewer features than the one before.
    dropout: share of the values dropped in training between the projection of
      a band (not the first) and its logits.
    dtype: of the products; None is the promotion of the operands. Logits are
      float32.

  Raises:
    ValueError: cutoffs that decrease, a factor that leaves a band without
      features.
  """

  num_classes: int
  width: int
  cutoffs: tuple[int, ...]
  factor: int = 4
  dropout: float = 0.0
  dtype: Any = None

  def setup(self):
    """Makes the bands and the layer of the clusters."""
    bounds = band_bounds(self.num_classes, self.cutoffs)
    count = len(bounds) - 1
    if self.width < self.factor ** (count - 1):
      raise ValueError(
        f"factor = {self.factor}: {count} bands of a width of {self.width} end"
        " with less than one feature; lower it, or give fewer cutoffs"
      )
    self.bands = [
      Band(
        bounds[i],
        bounds[i + 1],
        self.width // self.factor**i,
        self.width,
        is_last=i == count - 1,
        is_projected=count > 1,
        dtype=self.dtype,
        name=f"band{i}",
      )
      for i in range(count)
    ]
    if count > 1:
      self.clusters = nn.Dense(
        count - 1,
        use_bias=False,
        kernel_init=_XAVIER,
        dtype=self.dtype,
        name="clusters",
      )
    self.drop = nn.Dropout(self.dropout, name="dropout")

  def embed(self, tokens: jax.Array) -> jax.Array:
    """Maps integers (N, T) to (N, T, width), not scaled."""
    tokens = common.negatives_past_the_end(tokens, self.num_classes)
    return sum(band.embed(tokens) for band in self.bands)

  def log_probabilities(self, h: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, T, width) to log-probabilities, float32 (N, T, num_classes)."""
    head, *tail = self.bands
    log_p = jax.nn.log_softmax(head.logits(h, self._cluster_logits(h)))
    parts = [log_p[..., : head.stop]]
    for i, band in enumerate(tail):
      inner = jax.nn.log_softmax(band.logits(self._inner(band, h, train)))
      parts.append(log_p[..., head.stop + i, None] + inner)
    return jnp.concatenate(parts, -1)

  def losses(
    self, h: jax.Array, targets: jax.Array, train: bool = False
  ) -> jax.Array:
    """Negative log-likelihoods in nats, float32 (N, T), of `targets` (N, T).

    Every band's logits are computed for every token, since shapes are static,
    and the target's band is picked; those of one band at a time are in memory.
    """
    targets = common.negatives_past_the_end(targets, self.num_classes)
    head, *tail = self.bands
    places = head.places(targets)
    for i, band in enumerate(tail):
      places = jnp.where(band.contains(targets), head.stop + i, places)
    total = head.losses(h, places, self._cluster_logits(h))
    for band in tail:
      inner = band.losses(self._inner(band, h, train), band.places(targets))
      total = total + jnp.where(band.contains(targets), inner, 0)
    return total

  def _cluster_logits(self, h):
    return self.clusters(h) if len(self.bands) > 1 else None

  def _inner(self, band, h, train):
    return self.drop(band.unproject(h), deterministic=not train)
