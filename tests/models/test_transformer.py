"""Transformer language model: size, adaptive ends, causality, steps, scan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax import models
from dpc_jax.cost import macs
from dpc_jax.models import adaptive, attention, transformer
from dpc_jax.policy import capacity
from dpc_jax.quant import precision
from tests.models import checks

WORDS, CUTOFFS = 40, (8, 20)
SIZES = {"width": 16, "layers": 2, "heads": 2, "mlp_width": 24}


def inputs(n):
  """Tokens and targets of (n, 10) that touch every band."""
  random = np.random.default_rng(n)
  words = random.integers(0, WORDS, (n, 11))
  words[:, :6] = [0, 30, 9, 39, 7, 12]
  return jnp.asarray(words[:, :-1]), jnp.asarray(words[:, 1:])


CASE = checks.Case(
  functools.partial(
    models.create,
    "transformer_lm",
    num_classes=WORDS,
    cutoffs=CUTOFFS,
    **SIZES,
  ),
  inputs,
  lambda losses, _: jnp.mean(losses),
  batch=2,
)
LAYERS = (
  *(f"attention/{n}" for n in ("av", "key", "out", "qk", "query", "value")),
  "mlp1",
  "mlp2",
)


@functools.cache
def trained(bits=4):
  """Model and variables after a few training steps at `bits`."""
  model = CASE.build()
  variables = precision.assign_bits(checks.initial(CASE, model), bits)
  for i in range(3):
    _, updates, grads = checks.step(
      CASE, model, variables, inputs(2), jax.random.key(i)
    )
    params = jax.tree.map(lambda p, g: p - g, variables["params"], grads)
    variables = {**variables, **updates, "params": params}
  return model, variables


def arbitrary(model, tokens):
  """Variables of a float model without the time of compiling its `init`."""
  random = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: random.normal(0, 0.5, leaf.shape).astype(np.float32),
    jax.eval_shape(model.init, jax.random.key(0), tokens),
  )


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables, tokens, targets=None):
  return model.apply(variables, tokens, targets)


def test_parameters_of_the_paper():
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  for scan in (False, True):
    # fairseq's examples/layerdrop/README.md prints this count.
    model = models.create("transformer_lm", num_classes=267_744, scan=scan)
    assert checks.parameters(model, tokens) == 246_933_504


def test_names_and_capacities():
  variables = checks.initial(CASE, CASE.build())
  paths = [f"block{i}/{name}" for i in range(2) for name in LAYERS]
  assert sorted(precision.layer_bits(variables)) == sorted(paths)
  shapes = jax.tree.map(jnp.shape, variables["params"]["embedding"])
  assert shapes == {
    "band0": {"embedding": (8, 16), "kernel": (16, 16)},
    "band1": {"embedding": (12, 4), "kernel": (4, 16)},
    "band2": {"embedding": (20, 1), "kernel": (1, 16)},
    "clusters": {"kernel": (16, 2)},
  }
  counts = capacity.layer_capacities(variables)
  assert counts["block0/attention/qk"] == counts["block1/attention/av"] == 0
  assert counts["block0/mlp1"] == 16 * 24
  stacked = jax.eval_shape(
    CASE.build(scan=True).init, jax.random.key(0), inputs(1)[0]
  )
  counts = capacity.layer_capacities(stacked)
  assert counts["blocks/attention/qk"].tolist() == [0, 0]
  assert counts["blocks/attention/out"].tolist() == [256, 256]


@pytest.mark.parametrize("scan", [False, True])
def test_multiply_accumulates(scan):
  steps, width, mlp = 10, 16, 24
  block = {
    f"attention/{name}": steps * width**2
    for name in ("query", "key", "value", "out")
  }
  block |= {f"attention/{name}": steps * steps * width for name in ("qk", "av")}
  block |= dict.fromkeys(("mlp1", "mlp2"), steps * width * mlp)
  bands = {  # in, and but for the first band out again, and the logits
    "embedding/band0": steps * (16 * width + 8 * 16),
    "embedding/band1": steps * (2 * 4 * width + 12 * 4),
    "embedding/band2": steps * (2 * 1 * width + 20 * 1),
    "embedding/clusters": steps * width * 2,
  }
  prefixes = ["blocks"] if scan else ["block0", "block1"]
  want = bands | {
    f"{p}/{name}": n for p in prefixes for name, n in block.items()
  }
  for arguments in (inputs(2), inputs(2)[:1]):
    costs = macs.layer_costs(CASE.build(scan=scan), *arguments)
    assert {path: cost.macs for path, cost in costs.items()} == want
    assert {cost.layers for path, cost in costs.items() if "block" in path} == {
      2 if scan else 1
    }


def softmax(logits):
  p = np.exp(logits - logits.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True)


def ends_written_out(params, tokens, through):
  """Probabilities of every word, float64; `through` applies the blocks."""
  bands = [params["embedding"][f"band{i}"] for i in range(3)]
  starts = (0, *CUTOFFS, WORDS)
  table = np.concatenate([b["embedding"] @ b["kernel"] for b in bands])
  half = 8
  frequency = np.exp(-np.log(10_000) / (half - 1) * np.arange(half))
  angles = np.arange(tokens.shape[1])[:, None] * frequency
  positions = np.concatenate([np.sin(angles), np.cos(angles)], 1)
  h = through(4.0 * table[tokens] + positions)  # sqrt(16)
  logits = [
    h @ bands[0]["embedding"].T,
    h @ params["embedding"]["clusters"]["kernel"],
  ]
  head = softmax(np.concatenate(logits, -1))
  parts = [head[..., :8]]
  for i in (1, 2):
    inner = softmax(h @ bands[i]["kernel"].T @ bands[i]["embedding"].T)
    assert inner.shape[-1] == starts[i + 1] - starts[i]
    parts.append(head[..., 7 + i, None] * inner)
  return np.concatenate(parts, -1)


def test_both_ends_against_ones_written_out():
  model = CASE.build(quantization=None)
  variables = checks.initial(CASE, model)
  block = attention.Block(
    2, 24, jax.nn.relu, causal=True, quantization=None, epsilon=1e-5
  )

  def through(x):
    x = jnp.asarray(x, jnp.float32)
    for i in range(2):
      x = block.apply({"params": variables["params"][f"block{i}"]}, x)
    return np.asarray(x, np.float64)

  tokens, targets = inputs(3)
  params = jax.tree.map(
    lambda leaf: np.asarray(leaf, np.float64), variables["params"]
  )
  want = ends_written_out(params, np.asarray(tokens), through)
  got = apply(model, variables, tokens)
  assert got.shape == (3, 10, WORDS) and got.dtype == jnp.float32
  np.testing.assert_allclose(np.exp(got), want, rtol=2e-4, atol=1e-6)
  chosen = np.take_along_axis(want, np.asarray(targets)[..., None], -1)[..., 0]
  losses = apply(model, variables, tokens, targets)
  np.testing.assert_allclose(losses, -np.log(chosen), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cutoffs", [CUTOFFS, (13,), ()])
def test_probabilities_sum_to_1_and_agree_with_the_losses(cutoffs):
  model = CASE.build(cutoffs=cutoffs, layers=1, quantization=None)
  # All targets at the same position, each word of the vocabulary once.
  tokens = jnp.tile(inputs(1)[0], (WORDS, 1))
  targets = jnp.tile(jnp.arange(WORDS)[:, None], (1, 10))
  variables = arbitrary(model, tokens)
  log_p = apply(model, variables, tokens)
  np.testing.assert_allclose(np.sum(np.exp(log_p), -1), 1, atol=1e-5)
  losses = apply(model, variables, tokens, targets)
  assert losses.shape == targets.shape and losses.dtype == jnp.float32
  np.testing.assert_allclose(
    losses, -np.swapaxes(log_p[0], 0, 1), rtol=1e-5, atol=1e-5
  )


def test_cutoffs_clip_to_the_vocabulary():
  bounds = adaptive.band_bounds
  assert bounds(100, (10, 50)) == (0, 10, 50, 100)
  assert bounds(50, (10, 50)) == (0, 10, 50)
  assert bounds(30, (10, 10, 50, 60)) == (0, 10, 30)
  assert bounds(10, (10, 50)) == bounds(10, ()) == (0, 10)
  for wrong in ((0,), (-3, 5), (20, 10)):
    with pytest.raises(ValueError, match=r"cutoffs = .* must increase, from 1"):
      bounds(100, wrong)
  # Nothing left: one table for both ends, and nothing else.
  variables = jax.eval_shape(
    CASE.build(cutoffs=(WORDS,)).init, jax.random.key(0), inputs(1)[0]
  )
  shapes = jax.tree.map(lambda leaf: leaf.shape, variables["params"])
  assert shapes["embedding"] == {"band0": {"embedding": (WORDS, 16)}}
  assert CASE.build(cutoffs=[8, 20]) == CASE.build(cutoffs=(8, 20))
  assert hash(CASE.build(cutoffs=[8, 20])) == hash(CASE.build())


def test_no_logits_are_kept_for_the_backward_pass():
  model = CASE.build(quantization=None)
  variables = checks.initial(CASE, model)
  tokens, targets = inputs(2)

  def kept(function):
    vjp = jax.vjp(function, variables["params"])[1]
    return {leaf.shape for leaf in jax.tree.leaves(vjp)}

  # Of the 8 words and 2 clusters of the first band, and of the other bands.
  logits = {(2, 10, n) for n in (8, 10, 12, 20)}
  assert not logits & kept(
    lambda params: model.apply({"params": params}, tokens, targets)
  )
  assert logits & kept(lambda params: model.apply({"params": params}, tokens))


@pytest.mark.parametrize("bits", [None, 4])
def test_it_is_causal(bits):
  model, variables = trained(4 if bits is None else bits)
  if bits is None:
    model = CASE.build(quantization=None)
    variables = {"params": variables["params"]}
  else:
    # The step must have counted, or the batch's own range would serve.
    stats = variables["quant_stats"]["block0"]["attention"]["av"]
    assert stats["count"] == 3 and stats["lo"] == 0
  tokens, _ = inputs(4)
  before = np.asarray(apply(model, variables, tokens))
  for t in (1, 5, 9):
    later = tokens.at[:, t:].set((tokens[:, t:] * 7 + 11) % WORDS)
    after = np.asarray(apply(model, variables, later))
    np.testing.assert_array_equal(before[:, :t], after[:, :t])
    assert np.any(before[:, t:] != after[:, t:])


def test_evaluation_is_row_by_row():
  model, variables = trained()
  tokens, targets = inputs(4)
  before = apply(model, variables, tokens, targets)
  after = apply(model, variables, tokens.at[2].set(tokens[2, ::-1]), targets)
  same = np.all(np.asarray(before) == np.asarray(after), axis=-1)
  assert same.tolist() == [True, True, False, True]


@pytest.mark.as_users
def test_float_is_plain():
  checks.check_float_is_plain(CASE)


@pytest.mark.as_users
@pytest.mark.parametrize("scan", [False, True])
def test_few_bits(scan):
  checks.check_few_bits(CASE, scan=scan)


def test_batch_of_one():
  checks.check_batch_of_one(CASE)


@pytest.mark.as_users
def test_scan_is_unroll():
  checks.check_scan_is_unroll(CASE)


@pytest.mark.as_users
@pytest.mark.parametrize("layer", ["attention/value", "attention/av"])
def test_stacked_widths(layer):
  checks.check_stacked_widths(CASE, f"blocks/{layer}")


@pytest.mark.parametrize(
  "field",
  ["dropout", "attention_dropout", "activation_dropout", "tail_dropout"],
)
def test_each_dropout_in_training_alone(field):
  quiet = CASE.build(quantization=None)
  model = CASE.build(quantization=None, **{field: 0.5})
  variables = checks.initial(CASE, quiet)
  tokens, targets = inputs(2)
  want = apply(quiet, variables, tokens, targets)
  np.testing.assert_array_equal(apply(model, variables, tokens, targets), want)
  got = model.apply(
    variables,
    tokens,
    targets,
    train=True,
    rngs={"dropout": jax.random.key(1)},
  )
  changed = np.abs(got - want) > 1e-4
  in_tail = np.asarray(targets) >= CUTOFFS[0]
  assert np.mean(changed[in_tail]) > 0.9
  assert np.any(changed[~in_tail]) == (field != "tail_dropout")
  with pytest.raises(ValueError, match=rf"{field} = 1\.5: must be in \[0, 1\)"):
    CASE.build(**{field: 1.5}).init(jax.random.key(0), tokens)


def test_bfloat16_gives_float32_losses():
  variables = checks.initial(CASE, CASE.build())
  tokens, targets = inputs(2)
  for scan in (False, True):
    model = CASE.build(dtype=jnp.bfloat16, scan=scan)
    found = jax.eval_shape(model.init, jax.random.key(0), tokens)
    assert {leaf.dtype for leaf in jax.tree.leaves(found["params"])} == {
      jnp.dtype(jnp.float32)
    }
  losses = apply(CASE.build(dtype=jnp.bfloat16), variables, tokens, targets)
  assert losses.dtype == jnp.float32
  want = apply(CASE.build(), variables, tokens, targets)
  np.testing.assert_allclose(losses, want, rtol=0.1)


@pytest.mark.parametrize("cutoffs", [CUTOFFS, ()])
@pytest.mark.parametrize("word", [-1, WORDS])
def test_words_outside_the_vocabulary_are_not_a_number(word, cutoffs):
  model = CASE.build(quantization=None, cutoffs=cutoffs)
  variables = checks.initial(CASE, model)
  tokens, targets = inputs(2)
  losses = apply(model, variables, tokens.at[0, 4].set(word), targets)
  assert np.all(np.isnan(losses[0])) and np.all(np.isfinite(losses[1]))
  losses = apply(model, variables, tokens, targets.at[1, 3].set(word))
  assert np.argwhere(np.isnan(losses)).tolist() == [[1, 3]]


def test_positions():
  table = transformer.sinusoids(5, 7)
  assert table.shape == (5, 7) and table.dtype == np.float32
  np.testing.assert_array_equal(table[0], [0, 0, 0, 1, 1, 1, 0])
  np.testing.assert_allclose(table[3, :3], np.sin([3, 3e-2, 3e-4]), rtol=1e-6)
  np.testing.assert_allclose(table[3, 3:6], np.cos([3, 3e-2, 3e-4]), rtol=1e-6)
  assert np.all(np.isfinite(transformer.sinusoids(3, 2)))


def test_mistakes():
  tokens, targets = inputs(1)
  key = jax.random.key(0)
  for sizes, arguments, message in (
    ({}, (tokens[0],), r"tokens: int32 of shape \(10,\)"),
    ({}, (tokens * 1.0,), r"tokens: float32 of shape \(1, 10\)"),
    ({}, (tokens, targets[:, 1:]), r"targets: shape \(1, 9\); must be \(1, 10"),
    ({"heads": 3}, (tokens,), "heads = 3: must divide the width, which is 16"),
    ({"factor": 5}, (tokens,), "factor = 5: 3 bands of a width of 16 end"),
  ):
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(CASE.build(**sizes).init, key, *arguments)
