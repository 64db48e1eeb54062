"""LSTM: equations, time, state, ranges, sizes, float against quantized."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpc_jax as dpc
from dpc_jax import models
from dpc_jax.cost import macs
from dpc_jax.models import lstm
from dpc_jax.quant import grids, precision
from tests.models import checks

PATHS = ["lstm0/input", "lstm0/recurrent", "lstm1/input", "lstm1/recurrent"]
STEPS = 5
VOCABULARY = 11


def build(**sizes):
  sizes = {"width": 6, "dropout": 0.0} | sizes
  return models.create("lstm_lm", num_classes=VOCABULARY, **sizes)


def texts(rows):
  """Tokens and targets (rows, STEPS)."""
  words = np.random.default_rng(rows).integers(VOCABULARY, size=(rows, 6))
  return jnp.asarray(words[:, :-1]), jnp.asarray(words[:, 1:])


CASE = checks.Case(build, texts, lambda output, _: jnp.mean(output[0]))
TIED = checks.Case(
  functools.partial(build, tied=True, dropout=0.2),
  texts,
  lambda output, _: jnp.mean(output[0]),
)


@functools.partial(jax.jit, static_argnums=0)
def evaluate(model, variables, tokens, carry=None):
  return model.apply(variables, tokens, carry=carry)


@pytest.fixture(scope="module")
def trained():
  """A quantized model and its variables after three steps, at 4 bits."""
  model = CASE.build()
  variables = precision.assign_bits(checks.initial(CASE, model), 4)
  for _ in range(3):
    _, updates, _ = checks.step(CASE, model, variables, texts(4))
    variables = variables | updates
  return model, variables


# The cell.


def random_cell(features_in=3, features=4, **options):
  """A float cell and random parameters, biases too."""
  cell = lstm.QuantLSTMCell(features, quantization=None, **options)
  random = np.random.default_rng(0)
  shapes = jax.eval_shape(
    cell.init,
    jax.random.key(0),
    cell.initialize_carry(None, (2, features_in)),
    jnp.zeros((2, features_in)),
  )
  return cell, jax.tree.map(
    lambda v: jnp.asarray(random.normal(size=v.shape), v.dtype), shapes
  )


def sequence(rows=2, steps=7, features=3):
  random = np.random.default_rng(1)
  return jnp.asarray(random.normal(size=(rows, steps, features)), jnp.float32)


def reference(params, carry, xs):
  """The equations of the docstring, in float64, one unit after another."""
  w, b, u = (
    np.asarray(v, np.float64)
    for v in (
      params["input"]["kernel"],
      params["input"]["bias"],
      params["recurrent"]["kernel"],
    )
  )
  c, h = (np.asarray(v, np.float64) for v in carry)
  n, outputs = c.shape[-1], []
  for t in range(xs.shape[1]):
    x, new_c = np.asarray(xs[:, t], np.float64), np.empty_like(c)
    new_h = np.empty_like(h)
    for k in range(n):
      i, f, g, o = (
        x @ w[:, j * n + k] + h @ u[:, j * n + k] + b[j * n + k]
        for j in range(4)
      )
      new_c[:, k] = c[:, k] / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
      new_h[:, k] = np.tanh(new_c[:, k]) / (1 + np.exp(-o))
    c, h = new_c, new_h
    outputs.append(h)
  return (c, h), np.stack(outputs, 1)


def test_the_cell_follows_its_equations():
  cell, variables = random_cell()
  xs, carry = sequence(), (jnp.ones((2, 4)), -0.5 * jnp.ones((2, 4)))
  want_carry, want = reference(variables["params"], carry, xs)
  got_carry, got = cell.apply(variables, carry, xs, method="unroll")
  np.testing.assert_allclose(got, want, atol=2e-6)
  np.testing.assert_allclose(got_carry, want_carry, atol=2e-6)
  for t in range(xs.shape[1]):
    carry, y = cell.apply(variables, carry, xs[:, t])
    np.testing.assert_array_equal(y, carry[1])
    np.testing.assert_allclose(y, want[:, t], atol=2e-6)
  np.testing.assert_allclose(carry, want_carry, atol=2e-6)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.OptimizedLSTMCell])
def test_the_float_cell_is_flax_s(kind):
  cell, variables = random_cell()
  params = {}
  for i, gate in enumerate("ifgo"):
    part = np.s_[..., 4 * i : 4 * i + 4]
    params[f"i{gate}"] = {
      "kernel": variables["params"]["input"]["kernel"][part]
    }
    params[f"h{gate}"] = {
      "kernel": variables["params"]["recurrent"]["kernel"][part],
      "bias": variables["params"]["input"]["bias"][part],
    }
  xs = sequence()
  rnn = nn.RNN(kind(4, name="cell"), return_carry=True)
  want = rnn.apply({"params": {"cell": params}}, xs)
  zero = cell.initialize_carry(None, xs[:, 0].shape)
  got = cell.apply(variables, zero, xs, method="unroll")
  checks.assert_close(got, want, 1e-5)
  # In float, ours runs in Flax's loop too.
  rnn = nn.RNN(cell.clone(name="cell"), return_carry=True)
  again = rnn.apply({"params": {"cell": variables["params"]}}, xs)
  checks.assert_close(again, want, 1e-5)


def test_the_cell_alone_is_quantized():
  cell = dpc.QuantLSTMCell(4)
  x = sequence()[:, 0]
  carry = cell.initialize_carry(jax.random.key(0), x.shape)
  variables = jax.jit(cell.init)(jax.random.key(0, impl="rbg"), carry, x)
  assert list(precision.layer_bits(variables)) == ["input", "recurrent"]
  assert variables["params"]["input"]["kernel"].shape == (3, 16)
  assert variables["params"]["recurrent"]["kernel"].shape == (4, 16)
  np.testing.assert_array_equal(
    variables["params"]["input"]["bias"], [0] * 4 + [1] * 4 + [0] * 8
  )
  bound = np.max(np.abs(variables["params"]["input"]["kernel"]))
  assert 0.3 < bound <= 0.5
  variables = precision.assign_bits(variables, 3)
  _, updates = cell.apply(variables, carry, x, mutable=["quant_stats"])
  for name in ("input", "recurrent"):
    assert updates["quant_stats"][name]["count"] == 1
  # Steps and an unroll are one function of the same variables.
  variables |= updates
  last, whole = cell.apply(variables, carry, sequence(), method="unroll")
  for t in range(whole.shape[1]):
    carry, y = cell.apply(variables, carry, sequence()[:, t])
    np.testing.assert_allclose(y, whole[:, t], atol=1e-6)
  np.testing.assert_allclose(carry, last, atol=1e-6)


def test_noise_differs_from_step_to_step():
  # With the input gate and output gate open and no memory, h is a fixed point
  # of h -> tanh(tanh(b + U h)) after some steps, unless U is rounded anew.
  quantization = grids.Quantization(
    grids.Grid(granularity="channel", rounding="stochastic"), None, None
  )
  cell = lstm.QuantLSTMCell(4, quantization)
  xs = jnp.zeros((1, 40, 3))
  carry = cell.initialize_carry(None, (1, 3))
  variables = jax.jit(functools.partial(cell.init, method="unroll"))(
    jax.random.key(0, impl="rbg"), carry, xs
  )
  variables = precision.assign_bits(variables, grids.LayerBits(3, 32, 32))
  bias = jnp.repeat(jnp.asarray([50.0, -50.0, 0.5, 50.0]), 4)
  variables["params"]["input"]["bias"] = bias
  apply = functools.partial(cell.apply, variables, carry, xs, method="unroll")
  _, still = apply()
  np.testing.assert_allclose(still[:, -1], still[:, -2], atol=1e-6)
  _, moving = apply(rngs={"quant": jax.random.key(1)})
  assert np.max(np.abs(moving[:, -1] - moving[:, -2])) > 1e-3


# Nearest rounding throughout: a loop of cells draws noise of its own.
NEAREST = grids.Quantization(gradients=grids.Grid())


@functools.partial(jax.jit, static_argnums=0)
def one_step(cell, variables, carry, x):
  """(carry, output) and updates of a training step of the cell."""
  return cell.apply(variables, carry, x, mutable=["quant_stats"])


def unrolled_and_looped(gradient_width):
  """[(loss, outputs, ranges), gradients] by `unroll` and by a Python loop."""
  cell, xs = lstm.QuantLSTMCell(4, NEAREST), sequence()
  carry = (jnp.full((2, 4), 0.3), jnp.full((2, 4), -0.7))
  _, variables = random_cell()
  stats = jax.tree.map(jnp.zeros_like, cell.init(checks.KEY, carry, xs[:, 0]))
  widths = grids.LayerBits(4, 4, gradient_width)
  variables = precision.assign_bits(
    stats | variables, {"input": 32, "recurrent": widths}
  )

  def unroll(variables, carry, xs):
    return cell.apply(
      variables, carry, xs, method="unroll", mutable=["quant_stats"]
    )

  def loop(variables, carry, xs):
    ys = []
    for t in range(xs.shape[1]):
      (carry, y), updates = one_step(cell, variables, carry, xs[:, t])
      variables = variables | updates
      ys.append(y)
    return (carry, jnp.stack(ys, 1)), updates

  def both(run):
    def loss(params, carry, xs):
      (last, ys), updates = run(variables | {"params": params}, carry, xs)
      # Unlike from step to step, and both parts of the carry count.
      weights = jnp.cos(jnp.arange(ys.size, dtype=jnp.float32))
      value = jnp.sum(ys * weights.reshape(ys.shape)) + jnp.sum(last[0] ** 2)
      return value, (last, ys, updates["quant_stats"]["recurrent"])

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    return jax.jit(gradient)(variables["params"], carry, xs)

  return both(unroll), both(loop)


def test_a_quantized_unroll_is_a_loop_of_quantized_cells():
  ((_, got), got_grads), ((_, want), want_grads) = unrolled_and_looped(4)
  checks.assert_close(got[:2], want[:2], 2e-7)
  checks.assert_close(got_grads, want_grads, 5e-7)
  stats, want_stats = got[2], want[2]
  assert stats["count"] == want_stats["count"] == sequence().shape[1]
  for end in ("lo", "hi"):
    np.testing.assert_array_max_ulp(
      np.asarray(stats[end]), np.asarray(want_stats[end]), maxulp=4
    )
  # The width of the gradients is in effect within the loop, and nowhere else.
  ((_, float_got), float_grads), _ = unrolled_and_looped(32)
  checks.assert_same(float_got, got)
  change, _ = checks.distance(
    got_grads[0]["recurrent"], float_grads[0]["recurrent"]
  )
  assert change > 1e-2


# Float, few bits, one row.


@pytest.mark.as_users
@pytest.mark.parametrize("case", [CASE, TIED], ids=["untied", "tied"])
def test_at_width_32_it_is_the_float_model_bit_for_bit(case):
  checks.check_float_is_plain(case)


@pytest.mark.as_users
@pytest.mark.parametrize("case", [CASE, TIED], ids=["untied", "tied"])
def test_a_step_at_few_bits_reaches_every_parameter(case):
  checks.check_few_bits(case)


def test_a_batch_of_one():
  checks.check_batch_of_one(CASE)


def test_every_layer_has_a_width_of_its_own():
  model = CASE.build()
  variables = checks.initial(CASE, model)
  losses = []
  for path in [None, *PATHS]:
    bits = {p: 32 if p != path else 2 for p in PATHS}
    narrow = precision.assign_bits(variables, bits)
    losses.append(float(checks.step(CASE, model, narrow, texts(4))[0]))
  assert len(set(losses)) == 5, losses


def test_one_trace_and_a_state_of_one_form():
  model = CASE.build(dropout=0.5)
  variables = checks.initial(CASE, model)
  tokens, targets = texts(4)
  traces = []

  @jax.jit
  def step(variables, carry, bits, key):
    traces.append(1)
    variables = precision.assign_bits(variables, bits)
    (loss, carry), updates = model.apply(
      variables,
      tokens,
      targets,
      train=True,
      carry=carry,
      mutable=["quant_stats"],
      rngs={"quant": key, "dropout": key},
    )
    return {**variables, **updates}, carry, jnp.mean(loss)

  state = variables, model.initial_carry(4)
  form = checks.form(state)
  losses = set()
  for i, bits in enumerate((8, 3, 32)):
    *state, loss = step(*state, jnp.int32(bits), jax.random.key(i))
    assert checks.form(tuple(state)) == form
    losses.add(float(loss))
  assert len(traces) == 1 and len(losses) == 3


# Time and rows.


def test_two_unrolls_are_one_of_twice_the_length():
  model = CASE.build(quantization=None)
  variables = checks.initial(CASE, model)
  tokens = jnp.concatenate(texts(4), 1)
  want, want_carry = evaluate(model, variables, tokens)
  first, carry = evaluate(model, variables, tokens[:, :STEPS])
  second, carry = evaluate(model, variables, tokens[:, STEPS:], carry)
  got = jnp.concatenate([first, second], 1)
  np.testing.assert_allclose(got, want, atol=1e-6)
  checks.assert_close(carry, want_carry, 1e-6)
  # A row of zeros in the carry starts anew, and no other row does.
  row = jnp.asarray([True, False, False, False])[:, None]
  reset = jax.tree.map(lambda v: jnp.where(row, 0, v), carry)
  fresh, _ = evaluate(model, variables, tokens)
  after, _ = evaluate(model, variables, tokens, reset)
  going_on, _ = evaluate(model, variables, tokens, carry)
  np.testing.assert_allclose(after[0], fresh[0], atol=1e-6)
  np.testing.assert_allclose(after[1:], going_on[1:], atol=1e-6)
  assert np.max(np.abs(going_on[0] - fresh[0])) > 1e-4


def test_evaluation_sees_the_past_of_its_own_row_only(trained):
  model, variables = trained
  tokens, _ = texts(4)
  base, _ = evaluate(model, variables, tokens)
  for t in range(STEPS):
    changed = tokens.at[1, t].set((tokens[1, t] + 1) % VOCABULARY)
    output, _ = evaluate(model, variables, changed)
    differs = np.any(np.asarray(output != base), axis=-1)
    assert not np.any(differs[[0, 2, 3]]) and not np.any(differs[1, :t])
    assert differs[1, t]


def test_evaluation_changes_nothing(trained):
  model, variables = trained
  tokens, targets = texts(3)
  output, updates = model.apply(
    variables, tokens, targets, mutable=["batch_stats"]
  )
  assert not updates and output[0].shape == (3, STEPS)


@pytest.mark.parametrize("tied", [False, True])
def test_likelihoods_are_those_of_a_distribution(tied):
  model = CASE.build(tied=tied, quantization=None)
  variables = checks.initial(CASE, model)
  # Far from uniform: logits of some tens.
  variables = jax.tree.map(lambda v: 20 * v, variables)
  tokens, targets = texts(4)
  log_p, carry = model.apply(variables, tokens)
  loss, same_carry = model.apply(variables, tokens, targets)
  assert log_p.shape == (4, STEPS, VOCABULARY) and loss.shape == (4, STEPS)
  assert log_p.dtype == loss.dtype == jnp.float32
  assert np.max(np.exp(log_p)) > 0.9
  np.testing.assert_allclose(np.sum(np.exp(log_p), -1), 1, atol=1e-5)
  want = -np.take_along_axis(np.asarray(log_p), targets[..., None], -1)[..., 0]
  np.testing.assert_allclose(loss, want, atol=1e-5)
  checks.assert_same(carry, same_carry)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("word", [-1, VOCABULARY])
def test_words_outside_the_vocabulary_are_not_a_number(word, tied):
  model = CASE.build(quantization=None, tied=tied)
  variables = checks.initial(CASE, model)
  tokens, targets = texts(2)
  apply = jax.jit(model.apply)
  losses, _ = apply(variables, tokens.at[0, 2].set(word), targets)
  where = np.argwhere(np.isnan(losses)).tolist()
  assert where == [[0, t] for t in range(2, STEPS)]
  losses, _ = apply(variables, tokens, targets.at[1, 3].set(word))
  assert np.argwhere(np.isnan(losses)).tolist() == [[1, 3]]


# Dropout.


def test_dropout_acts_in_training_and_by_the_key():
  model = CASE.build(dropout=0.5, quantization=None)
  variables = checks.initial(CASE, model)
  run = jax.jit(functools.partial(model.apply, train=True))

  def loss(seed):
    return run(variables, *texts(4), rngs={"dropout": jax.random.key(seed)})[0]

  np.testing.assert_array_equal(loss(1), loss(1))
  assert np.any(loss(1) != loss(2))
  evaluated = model.apply(variables, *texts(4))[0]
  plain = CASE.build(quantization=None).apply(variables, *texts(4), train=True)[
    0
  ]
  np.testing.assert_array_equal(evaluated, plain)
  assert np.any(loss(1) != evaluated)


def test_dropout_leaves_the_recurrent_connections_alone():
  model = CASE.build(width=32, dropout=0.5, quantization=None)
  variables = model.init(jax.random.key(0, impl="rbg"), *texts(4))
  inputs, outputs = [], []

  def spy(next_fun, args, kwargs, context):
    result = next_fun(*args, **kwargs)
    if context.method_name == "unroll":
      inputs.append(args[1])
      outputs.append(result[1])
    elif context.method_name != "__call__":
      pass
    elif context.module.name == "softmax":
      inputs.append(args[0])
    elif context.module.name == "embedding":
      outputs.append(result)
    return result

  carry = jax.tree.map(lambda v: v + 0.5, model.initial_carry(4))
  with nn.intercept_methods(spy):
    _, last = model.apply(
      variables,
      *texts(4),
      train=True,
      carry=carry,
      rngs={"dropout": jax.random.key(1)},
    )
  # Embedding -> drop -> lstm0 -> drop -> lstm1 -> drop -> softmax.
  masks = []
  for whole, dropped in zip(outputs, inputs, strict=True):
    masks.append(np.asarray(dropped != 0))
    assert 0.4 < np.mean(masks[-1]) < 0.6
    np.testing.assert_array_equal(dropped, 2 * masks[-1] * whole)
  assert np.any(masks[0] != masks[1]) and np.any(masks[1] != masks[2])
  assert np.any(masks[0][:, 0] != masks[0][:, 1])
  # Given its input, a layer is the plain cell.
  for i in range(2):
    want_last, want = lstm.QuantLSTMCell(32, quantization=None).apply(
      {"params": variables["params"][f"lstm{i}"]},
      carry[i],
      inputs[i],
      method="unroll",
    )
    np.testing.assert_array_equal(outputs[i + 1], want)
    checks.assert_same(last[i], want_last)


# Running ranges.


def test_one_unroll_counts_one_batch_of_inputs_and_each_step():
  model = CASE.build(layers=1)
  variables = precision.assign_bits(checks.initial(CASE, model), 32)
  for path in ("input", "recurrent"):
    assert variables["quant_stats"]["lstm0"][path]["count"] == 0
  _, updates, _ = checks.step(CASE, model, variables, texts(4))
  stats = updates["quant_stats"]["lstm0"]
  embedding = np.asarray(variables["params"]["embedding"]["embedding"])
  x = embedding[np.asarray(texts(4)[0])]
  assert stats["input"]["count"] == 1
  np.testing.assert_allclose(stats["input"]["lo"], x.min(), rtol=1e-6)
  np.testing.assert_allclose(stats["input"]["hi"], x.max(), rtol=1e-6)
  # The first range is that of the initial state, zero; then the average.
  zero = model.initial_carry(4)[0]
  _, h = reference(variables["params"]["lstm0"], zero, x)
  lo = hi = 0.0
  for t in range(STEPS - 1):
    lo, hi = 0.9 * lo + 0.1 * h[:, t].min(), 0.9 * hi + 0.1 * h[:, t].max()
  assert stats["recurrent"]["count"] == STEPS
  np.testing.assert_allclose(stats["recurrent"]["lo"], lo, rtol=1e-4)
  np.testing.assert_allclose(stats["recurrent"]["hi"], hi, rtol=1e-4)


# Sizes.

TOKENS = jax.ShapeDtypeStruct((20, 35), jnp.int32)


@pytest.mark.parametrize(
  ("width", "tied", "count"),
  [
    # Zaremba et al., 2014, small, medium, large, with one bias per gate;
    # Merity et al., 2018, table 1, rounds the two latter to 20M and 66M.
    (200, False, 4_651_600),
    (650, False, 19_775_200),
    (1500, False, 66_022_000),
    (650, True, 13_275_200),
  ],
)
def test_parameters_on_ptb(width, tied, count):
  model = models.create("lstm_lm", num_classes=10_000, width=width, tied=tied)
  assert checks.parameters(model, TOKENS) == count
  n, vocabulary = width, 10_000
  kernels = vocabulary * n * (1 if tied else 2)
  assert count == kernels + vocabulary + 2 * 4 * n * (2 * n + 1)


def test_the_default_is_the_medium_model():
  model = models.create("lstm_lm", num_classes=10_000)
  assert (model.width, model.layers, model.dropout) == (650, 2, 0.5)
  variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
  assert list(precision.layer_bits(variables)) == PATHS
  assert set(variables) == {"params", "precision", "quant_stats"}
  assert dpc.layer_capacities(variables) == dict.fromkeys(PATHS, 1_690_000)


@pytest.mark.parametrize("tied", [False, True])
def test_macs_count_every_step(tied):
  model = models.create("lstm_lm", num_classes=10_000, tied=tied)
  costs = macs.layer_costs(model, TOKENS)
  softmax = "embedding" if tied else "softmax"
  want = dict.fromkeys(PATHS, 35 * 4 * 650 * 650)
  want[softmax] = 35 * 650 * 10_000
  assert {path: cost.macs for path, cost in costs.items()} == want
  assert all(costs[path].weights == 4 * 650 * 650 for path in PATHS)
  assert {cost.layers for cost in costs.values()} == {1}


def test_bfloat16_is_for_the_products_alone():
  model = CASE.build(dtype=jnp.bfloat16)
  variables = checks.initial(CASE, model)
  assert {v.dtype for v in jax.tree.leaves(variables["params"])} == {
    jnp.dtype(jnp.float32)
  }
  output, carry = model.apply(variables, *texts(4))
  want, _ = CASE.build().apply(variables, *texts(4))
  assert {v.dtype for v in jax.tree.leaves((output, carry))} == {
    jnp.dtype(jnp.float32)
  }
  assert np.any(output != want)
  np.testing.assert_allclose(output, want, atol=0.05)


def test_gates_and_state_are_float32_beside_bfloat16_products():
  cell, variables = random_cell(dtype=jnp.bfloat16)
  x = sequence()[:, 0].astype(jnp.bfloat16)
  carry = (jnp.full((2, 4), 0.3), jnp.full((2, 4), -0.7))
  products = [
    nn.Dense(16, use_bias=bias, dtype=jnp.bfloat16).apply(
      {"params": variables["params"][name]}, value
    )
    for name, bias, value in (
      ("input", True, x),
      ("recurrent", False, carry[1]),
    )
  ]
  gates = sum(np.asarray(p, np.float64) for p in products)
  i, f, g, o = np.split(gates, 4, -1)
  want_c = 0.3 / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
  got_c, got_h = cell.apply(variables, carry, x)[0]
  assert got_c.dtype == got_h.dtype == jnp.float32
  np.testing.assert_allclose(got_c, want_c, atol=1e-6)
  np.testing.assert_allclose(
    got_h, np.tanh(want_c) / (1 + np.exp(-o)), atol=1e-6
  )


def test_the_initial_carry_is_zeros_that_can_be_donated():
  carry = CASE.build(layers=3).initial_carry(4)
  leaves = jax.tree.leaves(carry)
  assert len(leaves) == 6 and len({id(v) for v in leaves}) == 6
  for leaf in leaves:
    assert leaf.shape == (4, 6) and leaf.dtype == jnp.float32
    np.testing.assert_array_equal(leaf, 0)


def test_mistakes_are_named():
  tokens, targets = texts(2)
  model, key = CASE.build(), jax.random.key(0)

  def refused(message, *args, model=model, **kwargs):
    with pytest.raises(ValueError, match=message) as error:
      jax.eval_shape(functools.partial(model.init, **kwargs), key, *args)
    assert "\n" not in str(error.value)

  refused(r"tokens: int32 of shape \(5,\); pass integers", tokens[0])
  refused("tokens: float32 of shape", tokens.astype(jnp.float32))
  refused(r"targets: shape \(2, 4\); must be \(2, 5\)", tokens, targets[:, 1:])
  refused(
    "carry: 1 layers, but layers = 2", tokens, carry=model.initial_carry(2)[:1]
  )
  refused(
    r"carry: c has shape \(3, 6\), but these inputs .* need \(2, 6\)",
    tokens,
    carry=model.initial_carry(3),
  )
  refused("dropout = 1.0: must be in", tokens, model=CASE.build(dropout=1.0))


@pytest.mark.parametrize("bits", [5, 32])
def test_the_softmax_is_quantized_on_request(bits):
  """At 32 bits it is the float model, at fewer its widths are in effect."""
  create = functools.partial(models.create, "lstm_lm", num_classes=11, width=4)
  tokens = jnp.arange(12).reshape(3, 4) % 11
  model = create(quantize_all=True)
  plain = create(quantization=None, quantize_all=True)
  variables = jax.jit(model.init)(jax.random.key(0, impl="rbg"), tokens)
  assert set(precision.layer_bits(variables)) == {
    "lstm0/input",
    "lstm0/recurrent",
    "lstm1/input",
    "lstm1/recurrent",
    "softmax",
  }
  all_32 = dict.fromkeys(precision.layer_bits(variables), 32)
  variables = precision.assign_bits(variables, all_32 | {"softmax": bits})
  got, _ = jax.jit(model.apply)(variables, tokens)
  want, _ = jax.jit(plain.apply)({"params": variables["params"]}, tokens)
  assert np.array_equal(got, want) == (bits == 32)


def test_a_tied_softmax_stays_in_float():
  model = models.create(
    "lstm_lm", num_classes=11, width=4, tied=True, quantize_all=True
  )
  with pytest.raises(ValueError, match="quantize_all = True: a tied softmax"):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
