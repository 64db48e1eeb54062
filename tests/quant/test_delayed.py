"""Ranges of the step before: numerics, state, transforms, refusals."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import dpc_jax as dpc
from dpc_jax.models import stacking
from dpc_jax.quant import delayed, grids, layers, precision, products
from tests.quant import running

DELAYED = grids.Quantization(ranges="delayed")
BATCH = grids.Quantization()
NEAREST = grids.Quantization(gradients=grids.Grid(), ranges="delayed")


pytestmark = pytest.mark.usefixtures("fast_compiler")


def make_step(model, key=None):
  """(variables, x, g) -> (y, gradients of params and x, new variables)."""
  rngs = {} if key is None else {"quant": key}

  def step(variables, x, g):
    probes = delayed.probes(model, variables, *x, rngs=rngs)

    def loss(params, x, probes):
      y, updates = model.apply(
        {**variables, **probes, "params": params},
        *x,
        mutable=["quant_stats", *probes],
        rngs=rngs,
      )
      return jnp.sum(y * g), (y, updates)

    params = variables.get("params", {})
    gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    (dw, dx, found), (y, updates) = gradient(params, x, probes)
    updates = delayed.settle(updates, found)
    return y, (dw, dx), {**variables, **updates}

  return step


def assert_close(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for one, two in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def on_grid(x, bits, kind, limits, *, floor=1e-8):
  """The values of `x` in float64; limits (lo, hi), or None: by row."""
  x = np.asarray(x, np.float64)
  lo, hi = limits or (x.min(1, keepdims=True), x.max(1, keepdims=True))
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
    running.init(layer, normal(0, 4, 6)), {"": bits}
  )
  kernel = np.asarray(variables["params"]["kernel"], np.float64)
  w = on_grid(kernel.T, bits.weights, kind, None).T
  step = jax.jit(make_step(layer))
  ranges, averages = None, None
  for i in range(3):
    # Later steps are larger: much is clipped.
    x, g = (1 + i) * normal(2 * i, 4, 6), (1 + i) * normal(2 * i + 1, 4, 5)
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
  x = tuple(normal(i, *shape) for i, shape in enumerate(shapes))
  if name == "probabilities":
    x = (nn.softmax(x[0]), x[1])
  key = jax.random.key(9)
  ours, theirs = make(DELAYED), make(BATCH)
  variables, other = running.init(ours, *x), running.init(theirs, *x)
  g = jax.eval_shape(theirs.apply, other, *x)
  g = normal(5, *g.shape).astype(g.dtype)
  step, plain = jax.jit(make_step(ours, key)), jax.jit(make_step(theirs, key))
  _, _, variables = step(variables, x, g)
  got, want = step(variables, x, g), plain(plain(other, x, g)[2], x, g)
  running.assert_same(got[:2], want[:2])
  for leaf, value in want[2]["quant_stats"].items():
    np.testing.assert_allclose(got[2]["quant_stats"][leaf], value, rtol=1e-6)
  # Evaluation does not look at the previous ranges.
  stats = {**got[2]["quant_stats"], **want[2]["quant_stats"]}
  kept = {**got[2], "quant_stats": stats}
  running.assert_same(ours.apply(kept, *x), theirs.apply(want[2], *x))


class Net(nn.Module):
  """`depth` equal blocks between two layers, unrolled or scanned."""

  quantization: grids.Quantization = NEAREST
  depth: int = 2
  scan: bool = False

  @nn.compact
  def __call__(self, x):
    dense = functools.partial(layers.QuantDense, quantization=self.quantization)
    x = dense(6, name="first")(x)
    x = stacking.run_blocks(
      lambda name: Block(self.quantization, name=name),
      range(self.depth),
      x,
      scan=self.scan,
    )
    # Other rows than the layers before: batch * positions.
    return dense(4, name="last")(x.reshape(-1, 6))


class Block(nn.Module):
  quantization: grids.Quantization

  @nn.compact
  def __call__(self, x):
    dense = layers.QuantDense(6, quantization=self.quantization, name="layer")
    return nn.tanh(dense(x)) + x


def net(scan=False, quantization=NEAREST, depth=2):
  model = Net(quantization, depth, scan)
  x, g = normal(0, 16, 2, 5), normal(1, 32, 4)
  return model, running.init(model, x), x, g


def test_the_state_has_a_fixed_form_and_eager_is_jit():
  layer, variables, x, g, compiled_step = small()
  step = make_step(layer)
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
  model, variables, x, g = net()
  scanned, stacked, _, _ = net(scan=True)
  stacked = {**stacked, **stacking.stack_blocks(variables)}
  step, other = jax.jit(make_step(model)), jax.jit(make_step(scanned))
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


def on_eight(variables, x, g):
  mesh = jax.make_mesh((8,), ("data",))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  copied = NamedSharding(mesh, PartitionSpec())
  return (
    jax.device_put(variables, copied),
    (jax.device_put(x, rows),),
    jax.device_put(g, rows),
  )


@pytest.mark.parametrize("scan", [False, True])
def test_eight_devices_are_one(scan):
  model, variables, x, g = net(scan)
  step = jax.jit(make_step(model))
  many = variables
  for _ in range(2):
    y, grads, variables = step(variables, (x,), g)
    z, others, many = step(*on_eight(many, x, g))
    assert len(z.sharding.device_set) == 8
    assert_close((z, others, many), (y, grads, variables))


def test_one_collective_joins_all_ranges_of_any_depth():
  counts = {}
  for depth in (2, 4, 6):
    model, variables, x, g = net(depth=depth)
    # Of the gradients there are none here: the output alone is asked for.
    step = make_step(model)
    text = (
      jax.jit(lambda *a, step=step: step(*a)[2]["quant_stats"])
      .lower(*on_eight(variables, x, g))
      .compile()
      .as_text()
    )
    counts[depth] = text.count(" all-reduce(") + text.count(" all-gather(")
  assert counts == {2: 1, 4: 1, 6: 1}


def test_bits_trace_once():
  model, variables, x, g = net()
  traces = []

  @jax.jit
  def step(variables):
    traces.append(None)
    return make_step(model)(variables, (x,), g)

  seen = set()
  for bits in (8, 5, 3, 32):
    y, _, variables = step(precision.assign_bits(variables, bits))
    seen.add(float(y[0, 0]))
  assert len(traces) == 1 and len(seen) == 4


def small():
  layer = layers.QuantDense(5, use_bias=False, quantization=NEAREST)
  x, g = normal(0, 8, 6), normal(1, 8, 5)
  return layer, running.init(layer, x), x, g, jax.jit(make_step(layer))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row_and_in_its_step(bad):
  _, variables, x, g, step = small()
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
  _, _, many = step(*on_eight(variables, broken, wrong))
  for name in ("previous", "gradient"):
    lo, hi = (many["quant_stats"][f"{name}_{end}"] for end in ("lo", "hi"))
    assert not np.isfinite(hi), name
    assert np.isfinite(lo) == np.isinf(bad), name


def test_a_step_without_gradient_does_not_spoil_the_next():
  _, variables, x, g, step = small()
  first = step(variables, (x,), g)[1]
  _, (grads, _), variables = step(variables, (0 * x,), 0 * g)
  assert not np.any(grads["kernel"])
  running.assert_same(step(variables, (x,), g)[1], first)


def test_a_frozen_layer_keeps_its_range():
  class Frozen(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = layers.QuantDense(6, quantization=NEAREST, name="frozen")(x)
      x = jax.lax.stop_gradient(x)
      return layers.QuantDense(5, quantization=NEAREST, name="last")(x)

  x, g = normal(0, 8, 6), normal(1, 8, 5)
  variables = running.init(Frozen(), x)
  _, _, variables = jax.jit(make_step(Frozen()))(variables, (x,), g)
  stats = variables["quant_stats"]["frozen"]
  assert stats["hi"] == stats["previous_hi"] == jnp.max(x)
  assert stats["gradient_lo"] == stats["gradient_hi"] == 0


def test_operands_in_float():
  for field, names in {
    "activations": {"gradient_lo", "gradient_hi"},
    "gradients": {"lo", "hi", "count", "previous_lo", "previous_hi"},
  }.items():
    quantization = dataclasses.replace(DELAYED, **{field: None})
    model, variables, x, g = net(quantization=quantization, depth=1)
    assert set(variables["quant_stats"]["first"]) == names
    _, _, after = jax.eval_shape(make_step(model), variables, (x,), g)
    assert jax.tree.structure(after) == jax.tree.structure(variables)


def test_without_delayed_ranges_both_functions_do_nothing():
  layer = layers.QuantDense(5)
  variables = running.init(layer, jnp.ones((2, 3)))
  assert delayed.probes(layer, variables, jnp.ones((2, 3))) == {}
  updates = {"quant_stats": variables["quant_stats"]}
  assert delayed.settle(updates, {}) == updates


class Shared(nn.Module):
  @nn.compact
  def __call__(self, x):
    layer = layers.QuantDense(6, quantization=DELAYED, name="twice")
    return layer(layer(x))


class Looped(nn.Module):
  @nn.compact
  def __call__(self, x):
    loop = nn.scan(
      lambda layer, carry, _: (layer(carry), None),
      variable_broadcast=("params", "precision"),
      variable_carry="quant_stats",
      split_rngs={"params": False},
      length=3,
    )
    layer = layers.QuantDense(6, quantization=DELAYED, name="loop")
    return loop(layer, layer(x), None)[0]


def test_refusals_are_one_line_with_the_remedy():
  x = jnp.ones((2, 6))
  remedy = r"needs ranges = 'batch'"
  with pytest.raises(ValueError, match=f"^twice: .*{remedy}"):
    delayed.probes(Shared(), running.init(Shared(), x), x)
  with pytest.raises(ValueError, match=f"^loop: .*{remedy}"):
    Looped().init(jax.random.key(0), x)
  cell = dpc.QuantLSTMCell(6, DELAYED)
  carry = cell.initialize_carry(None, x.shape)
  with pytest.raises(ValueError, match=f"^recurrent: .*{remedy}"):
    cell.init(jax.random.key(0), carry, x[:, None], method="unroll")
  layer = layers.QuantDense(6, quantization=DELAYED)
  with pytest.raises(ValueError, match=f"^QuantDense: .*{remedy}"):
    layer.apply(running.init(layer, x), x, mutable=["quant_stats"])
  with pytest.raises(ValueError, match=r"ranges = 'late': use one of"):
    grids.Quantization(ranges="late")
  for field in ("activations", "gradients"):
    grid = {field: grids.Grid(granularity="channel")}
    with pytest.raises(ValueError, match=rf"{field} = .*use granularity"):
      grids.Quantization(**grid, ranges="delayed")
