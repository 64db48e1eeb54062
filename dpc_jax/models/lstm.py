"""LSTM language model: Zaremba, Sutskever and Vinyals, 2014, and its cell.

Embedding, `layers` LSTM layers, softmax; dropout between them, never on the
recurrent connections. The two products of each layer are quantized, `input`
and `recurrent`, with widths of their own. Gates and state are computed in
float32; embedding and softmax stay in float, as the classifier of the other
models does: our decision, and `quantize_all` quantizes the softmax, by far the
largest layer where the vocabulary is.

All products of LSTM layers as wide as their input have equally many weights,
and equal bits by Eq. 1 of DPC: its widths differ with `quantize_all` alone.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpc_jax.models import common
from dpc_jax.quant import grids

Carry = tuple[jax.Array, jax.Array]


class QuantLSTMCell(nn.RNNCellBase):
  """LSTM cell whose two products are quantized, forward and backward.

  With n = `features`, input x and state (c, h), all rows of a batch alike:

      [i, f, g, o] = input(x) + recurrent(h)          4 n features, this order
      c' = sigmoid(f) * c + sigmoid(i) * tanh(g)
      h' = sigmoid(o) * tanh(c')

  without peepholes: the equations of `nn.LSTMCell`, whose carry is (c, h) too.
  `input` and `recurrent` are layers `QuantDense` with kernels (features in,
  4 n) and (n, 4 n). The products are summed, so a second bias would add
  parameters and no function: the one there is belongs to `input`, where it is
  added outside the loop over time. That makes 4 n (m + n + 1) parameters for
  m input features. Kernels start uniform in +-1 / sqrt(n), as PyTorch's
  `nn.LSTM`; biases at 0, but those of f at `forget_bias`.

  `cell(carry, x)` is one step, `unroll` many; they share the parameters. In
  training one step counts one batch in the running ranges of both layers. An
  unroll of T steps counts one batch for `input`, whose product is a single
  one over all steps, and T for `recurrent`, whose range follows h from step
  to step (the first one is that of the zero state; its weight is 0.9^(T - 1)
  after the first unroll). Gradients are quantized over the same parts. If
  *weights* are rounded stochastically, every step of an unroll has noise of
  its own, and the backward pass keeps T quantized copies of the recurrent
  kernel.

  `nn.RNN` runs it in float only: it cannot start a running range that its loop
  carries, nor hold it still in evaluation. Use `unroll`.

  Attributes:
    features: n, the width of the state.
    quantization: the grids of both layers; None is the plain float cell with
      the same parameters.
    forget_bias: initial bias of f. 1 keeps the memory at first (Jozefowicz et
      al., 2015; our decision, Zaremba et al. start at 0).
    dtype: of the products; None is the promotion of input and parameters.
      Gates, state and parameters are float32.
  """

  features: int
  quantization: grids.Quantization | None = grids.Quantization()
  forget_bias: float = 1.0
  dtype: Any = None

  def setup(self):
    """Makes the layers `input` and `recurrent`."""
    dense = functools.partial(
      common.dense(
        self.quantization, kernel_init=uniform(self.features), dtype=self.dtype
      ),
      4 * self.features,
    )
    self.input = dense(bias_init=self._initial_bias)
    self.recurrent = dense(use_bias=False)

  def __call__(self, carry: Carry, inputs: jax.Array) -> tuple[Carry, Any]:
    """One step.

    Args:
      carry: (c, h), float32 (..., features) each.
      inputs: (..., features in), floating point.

    Returns:
      The new carry, and its h again as the output.

    Raises:
      ValueError: a carry that does not fit `features` and the inputs.
    """
    self._check(carry, inputs.shape[:-1])
    return _step(self.recurrent, carry, self.input(inputs))

  def unroll(self, carry: Carry, inputs: jax.Array) -> tuple[Carry, jax.Array]:
    """As many steps as `inputs` has, with a single input product for all.

    Args:
      carry: (c, h) before the first step, float32 (batch, features) each.
      inputs: (batch, steps, features in), floating point.

    Returns:
      The carry after the last step, and h of all steps, float32
      (batch, steps, features).

    Raises:
      ValueError: a carry that does not fit `features` and the inputs.
    """
    self._check(carry, inputs.shape[:1])
    gates = self.input(inputs)
    if self.is_initializing():
      # What a loop carries must be there before it starts.
      self.recurrent(carry[1])
    # A loop cannot carry what it may not change.
    is_training = self.is_mutable_collection("quant_stats")
    fixed = () if is_training else ("quant_stats",)
    loop = nn.scan(
      _step,
      variable_broadcast=("params", "precision", *fixed),
      variable_carry="quant_stats" if is_training else False,
      split_rngs={"params": False, "quant": True},
      in_axes=1,
      out_axes=1,
    )
    return loop(self.recurrent, carry, gates)

  @nn.nowrap
  def initialize_carry(
    self, rng: jax.Array | None, input_shape: tuple[int, ...]
  ) -> Carry:
    """The zero carry for inputs of a shape; `rng` is not used."""
    del rng
    return zero_carry((*input_shape[:-1], self.features))

  @property
  def num_feature_axes(self) -> int:
    """Number of trailing axes of an input that are features: 1."""
    return 1

  def _initial_bias(self, key, shape, dtype):
    del key
    gate = jnp.arange(shape[0]) // self.features
    return jnp.where(gate == 1, self.forget_bias, 0.0).astype(dtype)

  def _check(self, carry, batch):
    shape = (*batch, self.features)
    for name, state in zip("ch", carry, strict=True):
      if state.shape != shape:
        raise ValueError(
          f"carry: {name} has shape {state.shape}, but these inputs and"
          f" features = {self.features} need {shape}"
        )


class LSTMLM(nn.Module):
  """Language model of `layers` LSTM layers, all as wide as the embedding.

  Of V = `num_classes` words and n = `width`, it has
  V n + layers * 4 n (2 n + 1) + (V n + V) parameters; the n V of the softmax
  go if it is tied. All kernels and the embedding start uniform in
  +-1 / sqrt(n), our decision: Zaremba et al. take 0.1, 0.05, 0.04 at n = 200,
  650, 1500, which is nearly proportional. Training draws on the RNG streams
  `dropout` and `quant`.

  The state is the caller's: pass what the last call returned, and set rows to
  zero where a text starts anew. In evaluation, with running ranges, an output
  depends on its own row's tokens up to its place and on nothing else.

  Attributes:
    num_classes: words of the vocabulary.
    width: of the embedding and of every layer's state.
    layers: LSTM layers; each has the widths `lstm<i>/input` and
      `lstm<i>/recurrent`.
    dropout: share of the values dropped from the input of every layer and of
      the softmax, in training.
    tied: True takes the embedding as the softmax's kernel, with a bias of its
      own. Zaremba et al. have two matrices.
    quantization: the grids of every LSTM layer; None is the plain float model
      with the same parameters.
    quantize_all: True quantizes the softmax too, as the layer `softmax`; not
      where it is tied.
    dtype: of the products; None is float32. Gates, state, outputs and
      parameters are float32.
  """

  num_classes: int
  width: int = 650
  layers: int = 2
  dropout: float = 0.5
  tied: bool = False
  quantization: grids.Quantization | None = grids.Quantization()
  quantize_all: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    targets: jax.Array | None = None,
    train: bool = False,
    carry: tuple[Carry, ...] | None = None,
  ) -> tuple[jax.Array, tuple[Carry, ...]]:
    """Predicts each next word from the words so far.

    Args:
      tokens: (batch, steps) integers in [0, num_classes); one outside makes
        the output of its row NaN from there on, quantized that of the batch.
      targets: (batch, steps) integers, the words to predict, one outside has a
        loss of NaN; None asks for the whole distribution.
      train: True drops values.
      carry: the state before the first step; None is `initial_carry`.

    Returns:
      Without targets, log-probabilities of the next word, float32 (batch,
      steps, num_classes); with them, their negative log-likelihoods in nats,
      float32 (batch, steps). And the carry after the last step.

    Raises:
      ValueError: tokens, targets or a carry of another form; a dropout outside
        [0, 1); `quantize_all` of a tied softmax.
    """
    self._check(tokens, targets, carry)
    if carry is None:
      carry = self.initial_carry(tokens.shape[0])
    options = {"dtype": self.dtype}
    init = uniform(self.width)
    embedding = nn.Embed(
      self.num_classes,
      self.width,
      embedding_init=init,
      name="embedding",
      **options,
    )
    drop = nn.Dropout(self.dropout, deterministic=not train, name="dropout")
    x = embedding(common.negatives_past_the_end(tokens, self.num_classes))
    states = []
    for i in range(self.layers):
      cell = QuantLSTMCell(
        self.width, self.quantization, name=f"lstm{i}", **options
      )
      state, x = cell.unroll(carry[i], drop(x))
      states.append(state)
    x = drop(x)
    if self.tied:
      shape = (self.num_classes,)
      bias = self.param("softmax_bias", nn.initializers.zeros, shape)
      logits = embedding.attend(x).astype(jnp.float32) + bias[None, None]
    else:
      outer = self.quantization if self.quantize_all else None
      dense = common.dense(outer, kernel_init=init, **options)
      logits = dense(self.num_classes, name="softmax")(x).astype(jnp.float32)
    return _log_softmax(logits, targets), tuple(states)

  @nn.nowrap
  def initial_carry(self, batch_size: int) -> tuple[Carry, ...]:
    """The zero state: per layer (c, h), float32 (batch_size, width) each."""
    shape = (batch_size, self.width)
    return tuple(zero_carry(shape) for _ in range(self.layers))

  def _check(self, tokens, targets, carry):
    common.check_rates(dropout=self.dropout)
    common.check_tokens(tokens, targets)
    if self.tied and self.quantize_all:
      raise ValueError(
        "quantize_all = True: a tied softmax stays in float; set tied = False"
      )
    if carry is not None and len(carry) != self.layers:
      raise ValueError(
        f"carry: {len(carry)} layers, but layers = {self.layers}; start from"
        " initial_carry(batch_size)"
      )


def zero_carry(shape: tuple[int, ...]) -> Carry:
  """(c, h) of zeros, float32; two buffers, so that both can be donated."""
  return jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)


def uniform(width: int) -> nn.initializers.Initializer:
  """Initializer: uniform in +-1 / sqrt(width)."""
  bound = width**-0.5

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def _log_softmax(logits, targets):
  """Log-probabilities, or without them the targets' negative ones."""
  total = jax.nn.logsumexp(logits, -1, keepdims=True)
  if targets is None:
    return logits - total
  targets = common.negatives_past_the_end(targets, logits.shape[-1])
  chosen = jnp.take_along_axis(logits, targets[..., None], -1)
  return (total - chosen)[..., 0]


def _step(recurrent, carry, gates):
  """Scan's body: (layer, (c, h), input product) -> ((c', h'), h')."""
  c, h = carry
  gates = gates.astype(jnp.float32) + recurrent(h).astype(jnp.float32)
  i, f, g, o = jnp.split(gates, 4, axis=-1)
  c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
  h = nn.sigmoid(o) * jnp.tanh(c)
  return (c, h), h
