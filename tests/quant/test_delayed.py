"""Ranges of the step before: numerics, state, transforms."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpc_jax as dpc
from dpc_jax.models import stacking
from dpc_jax.quant import grids, layers, precision, products
from tests.quant import delayed_steps as steps
from tests.quant import running

pytestmark = pytest.mark.usefixtures("fast_compiler")


def assert_close(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for one, two in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


def on_grid(x, bits, kind, limits, *, floor=1e-8):
  """The values of `x` in float64; limits (lo, hi), wider where a row is."""
  x = np.asarray(x, np.float64)
  lo, hi = x.min(1, keepdims=True), x.max(1, keepdims=True)
  if limits:
    lo, hi = np.minimum(lo, limits[0]), np.maximum(hi, limits[1])
  if kind == "affine":
    bottom, top, offset, span = 0, 2**bits - 1, lo, hi - lo
  else:
    top = 2 ** (bits - 1) - 1
    bottom, offset, span = -top, 0.0, np.maximum(np.abs(lo), np.abs(hi))
  step = np.maximum(span / top, floor)
  return np.clip(np.rint((x - offset) / step), bottom, top) * step + offset


@pytest.mark.parametrize("storage", [None, 8])
@pytest.mark.parametrize("kind", ["affine", "symmetric"])
def test_three_steps_written_out(kind, storage):
  """The first by rows, the others over ranges fed by hand."""
  grid = grids.Grid(kind)
  quantization = grids.Quantization(
    weights=grids.Grid(kind, "channel"),
    activations=grid,
    gradients=grid,
    storage_bits=storage,
    ranges="delayed",
  )
  layer = layers.QuantDense(5, use_bias=False, quantization=quantization)
  bits = grids.LayerBits(4, 5, 3)
  variables = precision.assign_bits(
    running.init(layer, steps.normal(0, 4, 6)), {"": bits}
  )
  kernel = np.asarray(variables["params"]["kernel"], np.float64)
  w = on_grid(kernel.T, bits.weights, kind, None).T
  step = jax.jit(steps.make_step(layer))
  ranges, averages = None, None
  for i in range(3):
    # Later steps are larger: rows reach beyond the ranges before.
    x, g = (
      (1 + i) * steps.normal(2 * i, 4, 6),
      (1 + i) * steps.normal(2 * i + 1, 4, 5),
    )
    y, (grads, (dx,)), variables = step(variables, (x,), g)
    qx = on_grid(x, bits.activations, kind, ranges and ranges[0])
    qg = on_grid(g, bits.gradients, kind, ranges and ranges[1], floor=0)
    np.testing.assert_allclose(y, qx @ w, atol=2e-5)
    np.testing.assert_allclose(dx, qg @ w.T, atol=2e-5)
    np.testing.assert_allclose(grads["kernel"], qx.T @ qg, atol=5e-5)

    ranges = [(float(v.min()), float(v.max())) for v in (x, g)]
    own = np.array(ranges[0])
    averages = own if averages is None else 0.9 * averages + 0.1 * own
    stats = {k: float(v) for k, v in variables["quant_stats"].items()}
    assert (stats["previous_lo"], stats["previous_hi"]) == ranges[0]
    assert (stats["gradient_lo"], stats["gradient_hi"]) == ranges[1]
    assert stats["count"] == i + 1
    np.testing.assert_allclose((stats["lo"], stats["hi"]), averages, rtol=1e-6)


# Name: (quantization -> module, shapes of its inputs).
MODULES = {
  "dense": (lambda q: layers.QuantDense(5, quantization=q), [(4, 3, 6)]),
  "dense of a vector": (lambda q: layers.QuantDense(5, quantization=q), [(6,)]),
  "convolution": (
    lambda q: layers.QuantConv(6, (3, 3), (2, 1), quantization=q),
    [(2, 7, 6, 4)],
  ),
  "bfloat16": (
    lambda q: layers.QuantDense(5, dtype=jnp.bfloat16, quantization=q),
    [(4, 6)],
  ),
  "product": (
    lambda q: products.QuantProduct("bqd,bkd->bqk", q),
    [(2, 4, 8), (2, 5, 8)],
  ),
  "probabilities": (
    lambda q: products.QuantProduct("hqk,hkd->hqd", q, non_negative=True),
    [(2, 4, 5), (2, 5, 8)],
  ),
  "wrapped": (
    lambda q: dpc.quantize(nn.Einsum((6, 2, 3), "bi,ioj->boj"), q),
    [(4, 6)],
  ),
}


@pytest.mark.parametrize("name", MODULES)
def test_with_the_ranges_of_its_own_batch_it_is_the_batch_mode(name):
  """Every bit, noise included: once more the same batch."""
  make, shapes = MODULES[name]
  x = tuple(steps.normal(i, *shape) for i, shape in enumerate(shapes))
  if name == "probabilities":
    x = (nn.softmax(x[0]), x[1])
  key = jax.random.key(9)
  ours, theirs = make(steps.DELAYED), make(steps.BATCH)
  variables, other = running.init(ours, *x), running.init(theirs, *x)
  g = jax.eval_shape(theirs.apply, other, *x)
  g = steps.normal(5, *g.shape).astype(g.dtype)
  step, plain = (
    jax.jit(steps.make_step(ours, key)),
    jax.jit(steps.make_step(theirs, key)),
  )
  _, _, variables = step(variables, x, g)
  got, want = step(variables, x, g), plain(plain(other, x, g)[2], x, g)
  running.assert_same(got[:2], want[:2])
  for leaf, value in want[2]["quant_stats"].items():
    np.testing.assert_allclose(got[2]["quant_stats"][leaf], value, rtol=1e-6)
  # Evaluation does not look at the previous ranges.
  stats = {**got[2]["quant_stats"], **want[2]["quant_stats"]}
  kept = {**got[2], "quant_stats": stats}
  running.assert_same(ours.apply(kept, *x), theirs.apply(want[2], *x))


def test_the_state_has_a_fixed_form_and_eager_is_jit():
  layer, variables, x, g, compiled_step = steps.small()
  step = steps.make_step(layer)
  form = jax.tree.map(lambda v: (v.shape, v.dtype), variables)
  compiled = compiled_step(variables, (x,), g)[2]
  assert_close(step(variables, (x,), g)[2], compiled)
  for _ in range(2):
    assert jax.tree.map(lambda v: (v.shape, v.dtype), compiled) == form
    compiled = compiled_step(compiled, (2 * x,), g)[2]
  assert set(variables["quant_stats"]) == {
    *("lo", "hi", "count", "previous_lo", "previous_hi"),
    *("gradient_lo", "gradient_hi"),
  }


def test_scan_is_the_unrolled_blocks():
  model, variables, x, g = steps.net()
  scanned, stacked, _, _ = steps.net(scan=True)
  stacked = {**stacked, **stacking.stack_blocks(variables)}
  step, other = (
    jax.jit(steps.make_step(model)),
    jax.jit(steps.make_step(scanned)),
  )
  for _ in range(2):
    y, (grads, dx), variables = step(variables, (x,), g)
    z, (rows, dz), stacked = other(stacked, (x,), g)
    np.testing.assert_allclose(y, z, atol=1e-5)
    got = ((rows, dz), stacked["quant_stats"])
    want = (
      (stacking.stack_blocks(grads), dx),
      stacking.stack_blocks(variables)["quant_stats"],
    )
    assert_close(got, want)
  assert stacked["quant_stats"]["blocks"]["layer"]["gradient_hi"].shape == (2,)


@pytest.mark.parametrize("scan", [False, True])
def test_eight_devices_are_one(scan):
  model, variables, x, g = steps.net(scan)
  step = jax.jit(steps.make_step(model))
  many = variables
  for _ in range(2):
    y, grads, variables = step(variables, (x,), g)
    z, others, many = step(*steps.on_eight(many, x, g))
    assert len(z.sharding.device_set) == 8
    assert_close((z, others, many), (y, grads, variables))


def joins(model, variables, x, g):
  """How many numbers each collective of ranges joins, on 8 devices."""
  # Of the gradients there are none here: the output alone is asked for.
  step = steps.make_step(model)
  text = (
    jax.jit(lambda *a: step(*a)[2]["quant_stats"])
    .lower(*steps.on_eight(variables, x, g))
    .compile()
    .as_text()
  )
  assert " all-gather(" not in text
  lines = [line for line in text.splitlines() if " all-reduce(" in line]
  lines = [line for line in lines if "/range/" in line]
  shapes = [re.search(r" = f32\[(\d+)\]\S* all-reduce", x) for x in lines]
  return [int(shape[1]) for shape in shapes]


def test_one_collective_joins_all_ranges_of_any_depth():
  for depth in (2, 4, 6):
    # Two ends of the input and of the gradient, of each layer.
    assert joins(*steps.net(depth=depth)) == [4 * (depth + 2)]


def test_nothing_is_joined_that_nobody_keeps():
  quantization = dataclasses.replace(steps.NEAREST, activations=None)
  assert joins(*steps.net(quantization=quantization)) == [2 * 4]


class OddRows(nn.Module):
  """Beside the batch, a layer of one row and one of five."""

  @nn.compact
  def __call__(self, x):
    for rows in (1, 5):
      places = self.param(f"places{rows}", nn.initializers.normal(), (rows, 6))
      dense = layers.QuantDense(6, quantization=steps.NEAREST, name=f"by{rows}")
      x = x + jnp.mean(dense(places), axis=0, keepdims=True)
    for i in range(4):
      x = layers.QuantDense(6, quantization=steps.NEAREST, name=f"of{i}")(x)
    return x


def test_a_layer_of_other_rows_costs_the_others_nothing():
  """Its input is on every device, and its gradient there too."""
  x, g = steps.normal(0, 16, 6), steps.normal(1, 16, 6)
  model = OddRows()
  variables = running.init(model, x)
  assert joins(model, variables, x, g) == [4 * 4]
  step = jax.jit(steps.make_step(model))
  one = step(variables, (x,), g)
  assert_close(step(*steps.on_eight(variables, x, g)), one)
  for rows in (1, 5):
    places = variables["params"][f"places{rows}"]
    stats = one[2]["quant_stats"][f"by{rows}"]
    assert stats["previous_lo"] == jnp.min(places)
    assert stats["previous_hi"] == jnp.max(places)


def test_bits_trace_once():
  model, variables, x, g = steps.net()
  traces = []

  @jax.jit
  def step(variables):
    traces.append(None)
    return steps.make_step(model)(variables, (x,), g)

  seen = set()
  for bits in (8, 5, 3, 32):
    y, _, variables = step(precision.assign_bits(variables, bits))
    seen.add(float(y[0, 0]))
  assert len(traces) == 1 and len(seen) == 4


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row_and_in_its_step(bad):
  _, variables, x, g, step = steps.small()
  want = step(variables, (x,), g)[:2]
  _, _, variables = step(variables, (x,), g)
  broken, wrong = x.at[3, 2].set(bad), g.at[5, 1].set(bad)
  y, (grads, (dx,)), after = step(variables, (broken,), wrong)
  assert np.all(np.isnan(y[3])) and np.all(np.isfinite(np.delete(y, 3, 0)))
  assert np.all(np.isnan(dx[5])) and np.all(np.isfinite(np.delete(dx, 5, 0)))
  assert np.all(np.isnan(grads["kernel"]))
  # The next step has no previous range: it is as the first one.
  running.assert_same(step(after, (x,), g)[:2], want)
  # On many devices the row of one of them spoils the range of all.
  _, _, many = step(*steps.on_eight(variables, broken, wrong))
  for name in ("previous", "gradient"):
    lo, hi = (many["quant_stats"][f"{name}_{end}"] for end in ("lo", "hi"))
    assert not np.isfinite(hi), name
    assert np.isfinite(lo) == np.isinf(bad), name


def test_a_jump_of_scale_arrives_at_once_through_many_layers():
  """Nothing is clipped: the first layer's gradient is not of the old size."""
  model, variables, x, g = steps.net(depth=4)
  step = jax.jit(steps.make_step(model))
  norms = []
  for scale in (1.0, 100.0, 0.01, 1.0):
    _, (grads, _), variables = step(variables, (x,), scale * g)
    norms.append([np.linalg.norm(w) / scale for w in jax.tree.leaves(grads)])
  # The small one has few codes of the range before.
  for i in (1, 3):
    np.testing.assert_allclose(norms[i], norms[0], rtol=0.1)


def test_a_step_without_gradient_does_not_spoil_the_next():
  _, variables, x, g, step = steps.small()
  first = step(variables, (x,), g)[1]
  _, (grads, _), variables = step(variables, (0 * x,), 0 * g)
  assert not np.any(grads["kernel"])
  running.assert_same(step(variables, (x,), g)[1], first)


@pytest.mark.parametrize("name", ["previous", "gradient"])
def test_a_range_wider_than_float32_does_not_serve(name):
  """Though its ends are finite."""
  _, variables, x, g, step = steps.small()
  first = step(variables, (x,), g)
  wide = {f"{name}_lo": jnp.float32(-3e38), f"{name}_hi": jnp.float32(3e38)}
  stats = variables["quant_stats"] | wide
  running.assert_same(step({**variables, "quant_stats": stats}, (x,), g), first)


def test_without_a_previous_range_a_row_of_one_number_is_itself():
  _, variables, _, g, step = steps.small()
  x = jnp.tile(steps.normal(0, 8, 1), 6)
  two = precision.assign_bits(variables, grids.LayerBits(32, 2, 32))
  y = step(two, (x,), g)[0]
  np.testing.assert_allclose(y, x @ two["params"]["kernel"], rtol=1e-5)


def test_a_frozen_layer_keeps_its_range():
  class Frozen(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = layers.QuantDense(6, quantization=steps.NEAREST, name="frozen")(x)
      x = jax.lax.stop_gradient(x)
      return layers.QuantDense(5, quantization=steps.NEAREST, name="last")(x)

  x, g = steps.normal(0, 8, 6), steps.normal(1, 8, 5)
  variables = running.init(Frozen(), x)
  _, _, variables = jax.jit(steps.make_step(Frozen()))(variables, (x,), g)
  stats = variables["quant_stats"]["frozen"]
  assert stats["hi"] == stats["previous_hi"] == jnp.max(x)
  assert stats["gradient_lo"] == stats["gradient_hi"] == 0


def test_operands_in_float():
  for field, names in {
    "activations": {"gradient_lo", "gradient_hi"},
    "gradients": {"lo", "hi", "count", "previous_lo", "previous_hi"},
  }.items():
    quantization = dataclasses.replace(steps.DELAYED, **{field: None})
    model, variables, x, g = steps.net(quantization=quantization, depth=1)
    assert set(variables["quant_stats"]["first"]) == names
    _, _, after = jax.eval_shape(steps.make_step(model), variables, (x,), g)
    assert jax.tree.structure(after) == jax.tree.structure(variables)
