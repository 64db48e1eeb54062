"""QuantProduct: two activations, three ways; its state; evaluation by rows."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.cost import macs
from dpc_jax.policy import capacity
from dpc_jax.quant import grids, layers, precision, wrap
from dpc_jax.quant import products as quant_products
from tests.quant import products, reference, running

QK, AV = "nqhd,nkhd->nhqk", "nhqk,nkhd->nqhd"
SHAPES = {
  QK: ((2, 5, 3, 4), (2, 6, 3, 4)),
  AV: ((2, 3, 5, 6), (2, 6, 3, 4)),
}
GRIDS = {
  "affine": products.NEAREST,
  "symmetric": products.SYMMETRIC,
}


def make(subscripts=QK, quantization=products.NEAREST, **attributes):
  return quant_products.QuantProduct(
    subscripts, quantization=quantization, **attributes
  )


def arrays(subscripts=QK, dtype=np.float32, seed=0):
  random = np.random.default_rng(seed)
  left, right = SHAPES[subscripts]
  lhs, rhs = random.normal(0.3, 1, left), random.normal(-0.2, 0.5, right)
  g = random.normal(0, 0.1, np.einsum(subscripts, lhs, rhs).shape)
  return tuple(jnp.asarray(v, dtype) for v in (lhs, rhs, g))


def variables(module, bits=None, subscripts=QK):
  found = running.init(module, *arrays(subscripts)[:2])
  return found if bits is None else precision.assign_bits(found, bits)


@functools.partial(jax.jit, static_argnums=0)
def train(module, variables, lhs, rhs, g, key=None):
  """Output, both gradients, updates: over the batch's own range."""

  def product(lhs, rhs):
    return module.apply(
      variables,
      lhs,
      rhs,
      mutable=[c for c in variables if c == "quant_stats"],
      rngs=None if key is None else {"quant": key},
    )

  y, vjp, updates = jax.vjp(product, lhs, rhs, has_aux=True)
  return (y, *vjp(g)), updates


@functools.partial(jax.jit, static_argnums=0)
def evaluate(module, variables, lhs, rhs):
  return module.apply(variables, lhs, rhs)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("subscripts", [QK, AV])
def test_every_width_three_ways(subscripts, kind):
  module = make(subscripts, GRIDS[kind])
  lhs, rhs, g = arrays(subscripts)
  as_float = reference.dot(subscripts, *map(np.float64, (lhs, rhs, g)))
  errors = []
  for bits in (2, 3, 4, 5, 6, 7, 8, 16):
    # Three widths that differ tell the operands apart.
    a, b = max(bits - 1, 2), min(bits + 1, 16)
    got, _ = train(
      module,
      variables(module, grids.LayerBits(bits, a, b), subscripts),
      lhs,
      rhs,
      g,
    )
    want = reference.dot(
      subscripts,
      reference.quantize(lhs, a, kind),
      reference.quantize(rhs, bits, kind),
      reference.quantize(g, b, kind, floor=None),
    )
    for ours, theirs in zip(got, want, strict=True):
      # At 15 and 16 bits a tie moves one operand by a step of its range.
      assert products.relative_error(ours, theirs) < (
        2e-6 if bits < 9 else 6e-5
      )
    errors.append(
      [
        products.relative_error(o, f)
        for o, f in zip(got, as_float, strict=True)
      ]
    )
  errors = np.array(errors)
  assert np.all(errors[-1] < 3e-4)
  assert np.all(errors[0] > 0.05)
  assert np.all(errors[4] < errors[1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_width_32_and_no_quantization_are_einsum_bit_for_bit(dtype):
  lhs, rhs, g = arrays(AV, dtype)
  plain = make(AV, None)
  assert running.init(plain, lhs, rhs) == {}

  @jax.jit
  def einsum(lhs, rhs, g):
    y, vjp = jax.vjp(functools.partial(jnp.einsum, AV), lhs, rhs)
    return y, *vjp(g)

  want = einsum(lhs, rhs, g)
  running.assert_same(train(plain, {}, lhs, rhs, g)[0], want)
  module = make(AV, grids.Quantization())
  got, _ = train(
    module, variables(module, 32, AV), lhs, rhs, g, jax.random.key(0)
  )
  running.assert_same(got, want)
  # Without a grid the width does not matter.
  module = make(AV, grids.Quantization(activations=None, gradients=None))
  bits = grids.LayerBits(3, 3, 3)
  got, _ = train(module, variables(module, bits, AV), lhs, rhs, g)
  running.assert_same(got, want)


def test_initial_widths_and_state():
  start = variables(make())
  assert set(start) == {"precision", "quant_stats"}
  assert precision.layer_bits(start)[""] == (8, 8, 8)
  assert all(leaf.dtype == jnp.int32 for leaf in start["precision"].values())
  stats = start["quant_stats"]
  assert set(stats) == {"lo", "hi", "rhs_lo", "rhs_hi", "count"}
  assert all(leaf.shape == () and leaf == 0 for leaf in stats.values())
  # The second operand is an activation too.
  weights_only = variables(make(quantization=grids.Quantization(None)))
  assert precision.layer_bits(weights_only)[""] == (8, 8, 8)
  off = variables(make(quantization=grids.Quantization(activations=None)))
  assert precision.layer_bits(off)[""] == (32, 32, 8)
  assert set(off) == {"precision"}


def test_running_ranges_of_both_operands():
  module = make()
  state = variables(module, 4)
  want = {}
  for seed in range(3):
    lhs, rhs, g = arrays(seed=seed)
    _, updates = train(module, state, lhs, rhs, g)
    state = {**state, **updates}
    for name, value in (
      ("lo", lhs.min()),
      ("hi", lhs.max()),
      ("rhs_lo", rhs.min()),
      ("rhs_hi", rhs.max()),
    ):
      old = want.get(name, value)
      want[name] = 0.9 * old + 0.1 * value
    assert state["quant_stats"]["count"] == seed + 1
    for name, value in want.items():
      np.testing.assert_allclose(
        state["quant_stats"][name], value, rtol=1e-6, err_msg=name
      )
  lhs, rhs, _ = arrays(seed=9)
  want_y = np.einsum(
    QK,
    on_grid(lhs, want["lo"], want["hi"], 4),
    on_grid(rhs, want["rhs_lo"], want["rhs_hi"], 4),
  )
  got = evaluate(module, state, lhs, rhs)
  assert products.relative_error(got, want_y) < 2e-6
  # While nothing was counted, the batch's own.
  (own, *_), _ = train(module, variables(module, 4), lhs, rhs, got)
  np.testing.assert_array_equal(
    evaluate(module, variables(module, 4), lhs, rhs), own
  )
  assert products.relative_error(got, own) > 1e-3


def on_grid(x, lo, hi, bits):
  step = (hi - lo) / (2**bits - 1)
  x = np.clip(np.asarray(x, np.float64), lo, hi)
  return np.rint((x - lo) / step) * step + lo


@pytest.mark.parametrize(
  "quantization", [grids.Quantization(), products.ALL_CHANNELS]
)
def test_evaluation_rounds_no_row_by_another(quantization):
  module = make(quantization=quantization)
  state = variables(module, 3)
  # One range per tensor, whatever the granularity.
  assert all(leaf.shape == () for leaf in state["quant_stats"].values())
  lhs, rhs, g = arrays()
  state |= train(module, state, lhs, rhs, g)[1]
  before = evaluate(module, state, lhs, rhs)
  after = evaluate(
    module, state, lhs.at[1].multiply(9.0), rhs.at[1].multiply(-5.0)
  )
  np.testing.assert_array_equal(before[0], after[0])
  assert not np.array_equal(before[1], after[1])
  # In training they share the batch's range.
  (mixed, *_), _ = train(
    module, state, lhs.at[1].multiply(9.0), rhs.at[1].multiply(-5.0), g
  )
  assert not np.array_equal(before[0], mixed[0])
  # What is not finite is NaN, not a clipped number.
  assert np.all(np.isnan(evaluate(module, state, lhs, rhs.at[0].set(np.inf))))


def test_the_gradient_is_rounded_once_by_the_stream():
  eye = jnp.eye(32)[None, :, None]
  g = jax.random.normal(jax.random.key(3), (1, 1, 32, 32))
  module = make(quantization=grids.Quantization())
  state = running.init(module, eye, eye)
  state = precision.assign_bits(state, grids.LayerBits(32, 32, 3))
  seen = []
  for key in (jax.random.key(0), jax.random.key(1), None):
    (_, dlhs, drhs), _ = train(module, state, eye, eye, g, key)
    rounded = dlhs[0, :, 0]
    np.testing.assert_array_equal(rounded, drhs[0, :, 0].T)
    assert np.sum(np.diff(np.unique(rounded)) > 1e-5) + 1 <= 8
    seen.append(rounded)
  nearest = reference.quantize(g, 3, floor=None)[0, 0]
  np.testing.assert_allclose(seen[2], nearest, atol=1e-6)
  for a, b in ((0, 1), (0, 2), (1, 2)):
    assert 0.1 < np.mean(np.abs(seen[a] - seen[b]) > 0.1) < 0.7


def test_zeros_stay_zeros_where_nothing_is_negative():
  lhs, rhs, g = arrays(AV)
  ones = jnp.ones_like(lhs)
  assert_zeros = functools.partial(np.testing.assert_array_equal, 0)
  for bits in (2, 3, 8):
    module = make(AV, non_negative=True)
    state = variables(module, bits, AV)
    # A batch without a zero: the range starts at 0 all the same.
    state |= train(module, state, ones, rhs, g)[1]
    assert state["quant_stats"]["lo"] == 0
    assert state["quant_stats"]["hi"] == 1
    assert_zeros(evaluate(module, state, ones.at[:, :, 2].set(0), rhs)[:, 2])
    p = jax.nn.softmax(lhs).at[:, :, 2].set(0)
    y = train(module, state, p, rhs, g)[0][0]
    assert_zeros(y[:, 2])
    # 1 is the other end of the grid.
    (y, *_), _ = train(module, state, ones, rhs, g)
    want = np.einsum(AV, ones, reference.quantize(rhs, bits))
    assert products.relative_error(y, want) < 2e-6


@pytest.mark.parametrize("bits", [2, 8, 32])
@pytest.mark.parametrize("kind", GRIDS)
def test_a_masked_place_passes_no_gradient_on(kind, bits):
  """Exact zeros of the gradient stay: query 0, behind a mask, gets none."""
  stochastic = grids.Quantization(
    activations=grids.Grid(kind),
    gradients=grids.Grid(kind, "channel", "stochastic"),
  )
  lhs, rhs, g = arrays()
  g = g.at[:, :, 0].set(0.0)
  for quantization in (GRIDS[kind], stochastic):
    module = make(quantization=quantization)
    at = variables(module, grids.LayerBits(8, 8, bits))
    (_, dq, _), _ = train(module, at, lhs, rhs, g, jax.random.key(0))
    assert not np.any(dq[:, 0]) and np.any(dq[:, 1])
    # The keys' gradient has nothing of query 0, whose values are in float.
    at = variables(module, grids.LayerBits(8, 32, bits))
    dks = [
      train(module, at, x, rhs, g, jax.random.key(0))[0][2]
      for x in (lhs, lhs.at[:, 0].multiply(0.5))
    ]
    assert np.any(dks[0])
    np.testing.assert_array_equal(*dks)


def test_integer_residuals():
  lhs, rhs, g = arrays()
  plain = make(quantization=grids.Quantization())
  stored = make(quantization=grids.Quantization(storage_bits=8))
  for bits in (2, 8):
    key = jax.random.key(0)
    want, _ = train(plain, variables(plain, bits), lhs, rhs, g, key)
    got, _ = train(stored, variables(stored, bits), lhs, rhs, g, key)
    for a, b in zip(got, want, strict=True):
      assert products.relative_error(a, b) < 1e-6
  kept = jax.vjp(lambda x, y: stored.apply(variables(stored), x, y), lhs, rhs)[
    1
  ]
  dtypes = {
    leaf.shape: leaf.dtype for leaf in jax.tree.leaves(kept) if leaf.size > 1
  }
  assert dtypes == {lhs.shape: jnp.uint8, rhs.shape: jnp.uint8}
  with pytest.raises(ValueError, match="weights = 9 does not fit storage_bits"):
    stored.apply(
      precision.assign_bits(
        variables(stored), grids.LayerBits(np.int32(9), 8, 8)
      ),
      lhs,
      rhs,
    )


def test_state_is_required():
  lhs, rhs, _ = arrays()
  with pytest.raises(ValueError, match="no collection 'quant_stats'"):
    make().apply({"precision": variables(make())["precision"]}, lhs, rhs)


class Mixer(nn.Module):
  """Dense layers around a product; what it has is a block of a model."""

  quantization: grids.Quantization | None = grids.Quantization()

  @nn.compact
  def __call__(self, x):
    y = nn.Dense(x.shape[-1], name="dense")(x)
    p = make("nqd,nkd->nqk", self.quantization, name="qk")(x, y)
    return x + make("nqk,nkd->nqd", self.quantization, name="av")(p, y)


class Scanned(nn.Module):
  quantization: grids.Quantization | None = grids.Quantization()

  @nn.compact
  def __call__(self, x):
    block = nn.scan(
      lambda block, x, _: (block(x), None),
      variable_axes={"params": 0, "precision": 0, "quant_stats": 0},
      split_rngs={"params": True, "quant": True},
      length=3,
    )
    return block(Mixer(self.quantization, name="blocks"), x, None)[0]


TOKENS = jnp.sin(jnp.arange(2 * 5 * 4, dtype=jnp.float32)).reshape(2, 5, 4)


@pytest.mark.parametrize("quantization", [grids.Quantization(), None])
def test_costs_and_capacities(quantization):
  costs = macs.layer_costs(Mixer(quantization), TOKENS)
  assert costs == {
    "dense": (5 * 4 * 4, 16, 1),
    "qk": (5 * 5 * 4, 0, 1),
    "av": (5 * 5 * 4, 0, 1),
  }
  stacked = macs.layer_costs(Scanned(quantization), TOKENS)
  assert stacked == {
    f"blocks/{path}": cost._replace(layers=3) for path, cost in costs.items()
  }
  found = jax.eval_shape(Scanned(quantization).init, jax.random.key(0), TOKENS)
  counts = capacity.layer_capacities(found)
  if quantization is None:
    assert counts == {"blocks/dense": 48}
  else:
    # Not quantized, the dense layer is none of the layers in `precision`.
    assert {path: n.tolist() for path, n in counts.items()} == {
      "blocks/qk": [0] * 3,
      "blocks/av": [0] * 3,
    }


@pytest.mark.parametrize("model", [Mixer(), Scanned()])
def test_in_a_model_that_is_quantized_by_one_call(model):
  quantized = wrap.quantize(model)
  state = running.init(quantized, TOKENS)
  prefix = "blocks/" if isinstance(model, Scanned) else ""
  assert set(precision.layer_bits(state)) == {
    prefix + name for name in ("dense", "qk", "av")
  }
  y, updates = quantized.apply(
    precision.assign_bits(state, 4),
    TOKENS,
    mutable=["quant_stats"],
    rngs={"quant": jax.random.key(0)},
  )
  assert np.all(np.isfinite(y))
  assert all(
    np.all(node["count"] == 1)
    for node in jax.tree.leaves(
      updates, is_leaf=lambda node: isinstance(node, dict) and "count" in node
    )
  )
  counts = capacity.layer_capacities(state)
  np.testing.assert_array_equal(
    counts[prefix + "qk"], 0 * counts[prefix + "qk"]
  )
  np.testing.assert_array_equal(counts[prefix + "dense"], 16)
  costs = macs.layer_costs(quantized, TOKENS)
  assert {f"{prefix}qk", f"{prefix}av"} <= set(costs)


def test_layers_share_the_helpers():
  # A dense layer's state is what it was: no second range.
  state = running.init(layers.QuantDense(3), TOKENS)
  assert set(state["quant_stats"]) == {"lo", "hi", "count"}
