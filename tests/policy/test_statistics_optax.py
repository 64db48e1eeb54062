"""Gradient statistics in a training step: any optimizer, tree and mesh."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dpc_jax.policy import statistics

SHAPES = {"a": (4, 6), "b": (3, 3, 2, 5), "c": (7,)}
track = statistics.track_gradient_statistics


def tree(seed, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  return {
    path: {
      "kernel": jnp.asarray(0.3 + rng.normal(size=shape), dtype),
      "bias": jnp.asarray(rng.normal(size=2), dtype),
    }
    for path, shape in SHAPES.items()
  }


def follow(optimizer, gradients):
  """The state after the gradients, under jit and donated; traced once."""
  traces = []

  @functools.partial(jax.jit, donate_argnums=1)
  def update(gradient, state):
    traces.append(1)
    return optimizer.update(gradient, state, gradient)

  state = optimizer.init(gradients[0])
  for gradient in gradients:
    _, state = update(gradient, state)
  assert len(traces) == 1
  return state


@functools.cache
def plain(steps=4):
  state = follow(track(0.7), [tree(i) for i in range(steps)])
  return statistics.gradient_statistics(state)


def _same(found, expected):
  assert found.keys() == expected.keys()
  for path, one in found.items():
    for name, value in one._asdict().items():
      other = getattr(expected[path], name)
      if value is not None or other is not None:
        np.testing.assert_allclose(value, other, rtol=1e-5, err_msg=name)


def _halves(params):
  return {
    path: dict.fromkeys(layer, path in "ab") for path, layer in params.items()
  }


def _labels(params):
  return jax.tree.map(lambda first: "12"[not first], _halves(params))


_WRAPPED = {
  "chain": lambda: optax.chain(track(0.7), optax.adam(1e-3)),
  "nested chain": lambda: optax.chain(
    optax.chain(optax.identity(), track(0.7)),
    optax.trace(0.9),
  ),
  "two halves": lambda: optax.multi_transform(
    {"1": optax.chain(track(0.7), optax.sgd(0.1)), "2": track(0.7)}, _labels
  ),
  "one half": lambda: optax.masked(track(0.7), _halves),
  "injected": lambda: optax.inject_hyperparams(track)(decay=0.7),
  "scheduled": lambda: optax.inject_hyperparams(track)(decay=lambda _: 0.7),
  "if finite": lambda: optax.apply_if_finite(
    optax.chain(track(0.7), optax.sgd(0.1)), 3
  ),
}


@pytest.mark.parametrize("name", _WRAPPED)
def test_found_in_any_optimizer(name):
  state = follow(_WRAPPED[name](), [tree(i) for i in range(4)])
  expected = plain()
  if name == "one half":
    expected = {path: expected[path] for path in "ab"}
  _same(statistics.gradient_statistics(state), expected)
  # Reading is jit-able.
  _same(jax.jit(statistics.gradient_statistics)(state), expected)


def test_multi_steps_shows_the_mean_gradient():
  optimizer = optax.MultiSteps(optax.chain(track(0.7), optax.sgd(0.1)), 2)
  mean = [tree(i) for i in range(4)]
  shift = tree(9)
  halves = [
    jax.tree.map(lambda m, s, sign=sign: m + sign * s, m, shift)
    for m in mean
    for sign in (1, -1)
  ]
  found = statistics.gradient_statistics(follow(optimizer, halves))
  assert int(found["a"].count) == 4
  _same(found, plain())


@pytest.mark.parametrize(
  ("memory", "dtype"),
  [("full", "float32"), ("sketch", "bfloat16"), ("norm", "float16")],
)
def test_updates_pass_through_untouched(memory, dtype):
  tracker = track(memory=memory, within_tensor=True)
  gradient = tree(0, dtype)
  gradient["a"]["kernel"] = gradient["a"]["kernel"].at[1].set(jnp.nan)
  state = tracker.init(gradient)
  updates, _ = jax.jit(tracker.update)(gradient, state)
  assert jax.tree.structure(updates) == jax.tree.structure(gradient)
  for new, old in zip(
    jax.tree.leaves(updates), jax.tree.leaves(gradient), strict=True
  ):
    assert new.dtype == old.dtype
    assert np.asarray(new).tobytes() == np.asarray(old).tobytes()


def _signature(tree):
  leaves, treedef = jax.tree.flatten(tree)
  return treedef, [(x.shape, x.dtype, x.weak_type) for x in leaves]


@pytest.mark.parametrize(
  ("memory", "average", "dtype"),
  [
    ("full", 0.9, jnp.bfloat16),
    ("full", None, jnp.float32),
    ("sketch", 0.9, jnp.float32),
    ("norm", None, jnp.float16),
  ],
)
def test_the_state_keeps_structure_shapes_and_types(memory, average, dtype):
  tracker = track(memory=memory, average=average, within_tensor=True)
  gradient = tree(0, dtype)
  state = tracker.init(gradient)
  signature = _signature(state)
  assert {s[1] for s in signature[1]} == {jnp.dtype("i4"), jnp.dtype("f4")}
  _, eager = tracker.update(gradient, state)
  assert _signature(eager) == signature
  after = follow(tracker, [gradient] * 3)
  assert _signature(after) == signature
  abstract = jax.eval_shape(tracker.init, gradient)
  assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(
    lambda x: x.shape, abstract
  )
  assert int(after.count) == 3


def test_bfloat16_gradients_are_summed_in_float32():
  # 1/128 of 1: a sum in bfloat16 would stay where it is.
  gradient = {"a": {"kernel": jnp.full((5,), 1 / 128, jnp.bfloat16)}}
  start = {"a": {"kernel": jnp.ones((5,), jnp.bfloat16)}}
  tracker = track(0.999, within_tensor=True)
  update = jax.jit(tracker.update)
  _, state = update(start, tracker.init(start))
  for _ in range(4):
    _, state = update(gradient, state)
  w = 0.001 * 0.999 ** np.arange(5)[::-1]
  expected = w @ [1, *[1 / 128] * 4]
  np.testing.assert_allclose(state.mean["a"], expected, rtol=1e-5)


def test_injected_decays_of_bfloat16_parameters_are_used_in_float32():
  optimizer = optax.inject_hyperparams(track)(decay=0.99, average=0.9)
  gradients = [
    {"a": {"kernel": jnp.full(3, value, jnp.bfloat16)}} for value in (1, 2, 4)
  ]
  state = optimizer.init(gradients[0])
  assert state.hyperparams["decay"].dtype == jnp.bfloat16
  exact = track(**{k: float(v) for k, v in state.hyperparams.items()})
  expected = exact.init(gradients[0])
  # Not under jit, where XLA may round to bfloat16 or not.
  for gradient in gradients:
    _, state = optimizer.update(gradient, state, gradient)
    _, expected = exact.update(gradient, expected)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
    state.inner_state,
    expected,
  )


@pytest.mark.parametrize("memory", ["full", "sketch"])
def test_sharded_gradients_give_the_statistics_of_the_whole(memory):
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((8,), ("x",), axis_types=auto)
  rng = np.random.default_rng(0)
  shapes = {"rows": (32, 50), "columns": (3, 3, 20, 64)}
  shardings = {
    "rows": {"kernel": NamedSharding(mesh, PartitionSpec("x"))},
    "columns": {"kernel": NamedSharding(mesh, PartitionSpec(*[None] * 3, "x"))},
  }
  tracker = track(0.8, memory, within_tensor=memory == "full")

  @jax.jit
  def step(gradient, state):
    updates, state = tracker.update(gradient, state)
    return updates, state, statistics.gradient_statistics(state)

  single = several = None
  for _ in range(3):
    gradient = {
      path: {"kernel": 0.5 + rng.standard_normal(shape, np.float32)}
      for path, shape in shapes.items()
    }
    spread = jax.device_put(gradient, shardings)
    single = single or tracker.init(gradient)
    several = several or tracker.init(spread)
    _, single, expected = step(gradient, single)
    updates, several, found = step(spread, several)
  _same(found, expected)
  for leaf in jax.tree.leaves(found):
    assert len(leaf.sharding.device_set) == 8
    assert leaf.sharding.is_fully_replicated
  kept = updates if memory == "sketch" else updates | several.mean
  for path, sharding in shardings.items():
    leaf = jax.tree.leaves(kept[path])[0]
    assert leaf.sharding.is_equivalent_to(sharding["kernel"], leaf.ndim)


@pytest.mark.parametrize("memory", ["full", "sketch"])
def test_stacked_layers_have_statistics_of_their_own(memory):
  rng = np.random.default_rng(0)
  kernels = rng.normal(0.5, 1, (4, 3, 40, 60)) * [[[[1.0]], [[9.0]], [[0.1]]]]
  kernels = jnp.asarray(kernels, jnp.float32)
  capacities = {"blocks": np.full(3, 2400), "": np.full((2, 3), 5)}
  options = {"decay": 0.8, "memory": memory, "within_tensor": True}
  options["average"] = 0.9
  grid = kernels[:, :, :2, :5].swapaxes(1, 2)
  found, alone = (
    statistics.gradient_statistics(follow(tracker, gradients))
    for tracker, gradients in (
      (
        track(capacities=capacities, **options),
        [
          tree(i) | {"blocks": {"kernel": k}, "kernel": g}
          for i, (k, g) in enumerate(zip(kernels, grid, strict=True))
        ],
      ),
      (
        track(**options),
        [
          {str(i): {"kernel": one} for i, one in enumerate(k)}
          | {f"{i}": {"kernel": g[i - 3, 1]} for i in (3, 4)}
          for k, g in zip(kernels, grid, strict=True)
        ],
      ),
    )
  )
  assert found.keys() == capacities.keys()
  assert found["blocks"].count.shape == ()
  for name in ("norm", "variance", "noise_to_signal", "within_variance"):
    single = [getattr(alone[str(i)], name) for i in range(5)]
    got = getattr(found["blocks"], name)
    np.testing.assert_allclose(got, single[:3], rtol=1e-5)
    got = getattr(found[""], name)
    assert got.shape == (2, 3)
    np.testing.assert_allclose(got[:, 1], single[3:], rtol=1e-5)


def test_capacities_restrict_and_say_what_is_stacked():
  params = tree(0)
  state = track(capacities={"a": 24, "elsewhere": 5}).init(params)
  assert list(state.square) == ["a"]
  state = track(capacities={"b": np.full(3, 30)}).init(params)
  assert state.square["b"].shape == (3,)
  for capacities, message in (
    ({"a": np.full(3, 8)}, r"layer 'a': a kernel of shape \(4, 6\) for N_k of"),
    ({"a": np.full(6, 4)}, "stack parameters along their first axis"),
    ({"c": np.full((7, 1), 1)}, r"shape \(7,\) for N_k of shape \(7, 1\)"),
    ({"d": 3}, "no leaf named 'kernel' to track, at the paths of `capa"),
    ({}, "no leaf named 'kernel'"),
  ):
    with pytest.raises(ValueError, match=message) as error:
      track(capacities=capacities).init(params)
    assert "\n" not in str(error.value)


def test_other_gradients_than_at_init_are_refused():
  tracker = track()
  state = tracker.init(tree(0))
  gradient = tree(1)
  del gradient["b"]
  with pytest.raises(ValueError, match="pass gradients of the same") as error:
    tracker.update(gradient, state)
  assert "\n" not in str(error.value)
  with pytest.raises(ValueError, match="no leaf named 'kernel'"):
    tracker.init({"a": {"bias": jnp.ones(3)}})


def test_two_trackers_and_none_are_refused():
  params = tree(0)
  state = optax.chain(track(), optax.sgd(0.1), track()).init(params)
  with pytest.raises(ValueError, match="two trackers for layer 'a'") as error:
    statistics.gradient_statistics(state)
  assert "\n" not in str(error.value)
  for state in (optax.adam(1e-3).init(params), (), None):
    with pytest.raises(ValueError, match="no gradient statistics") as error:
      statistics.gradient_statistics(state)
    assert "\n" not in str(error.value)


class _Rest(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(3, name="dense")(x)
    return nn.DenseGeneral((2, 2), name="general")(nn.LayerNorm()(x))


class _Net(nn.Module):
  """Plain Flax layers, one of them with a boxed kernel."""

  @nn.compact
  def __call__(self, x):
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "x"))
    return _Rest(name="rest")(nn.Dense(6, kernel_init=boxed, name="first")(x))


def test_plain_flax_parameters_and_boxed_ones():
  model = _Net()
  x = np.random.default_rng(0).normal(size=(3, 5, 4, 4))
  params = jax.jit(model.init)(jax.random.key(0), x[0])["params"]
  assert isinstance(params["first"]["kernel"], nn.Partitioned)

  @jax.jit
  @jax.grad
  def gradient(params, x):
    return jnp.sum(model.apply({"params": params}, x) ** 2)

  gradients = [gradient(params, one) for one in x]
  found = statistics.gradient_statistics(follow(track(0.7), gradients))
  assert set(found) == {"first", "rest/dense", "rest/general"}
  plain = follow(track(0.7), [nn.meta.unbox(g) for g in gradients])
  _same(found, statistics.gradient_statistics(plain))
  state = track().init(params["first"])
  assert set(statistics.gradient_statistics(state)) == {""}


def test_bytes_of_each_memory():
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree(0))
  weights = 24 + 90 + 7
  for memory, expected in (
    ("full", 4 * weights),
    ("sketch", 3 * 4096),
    ("norm", 0),
  ):
    state = track(memory=memory).init(params)
    assert sum(x.nbytes for x in jax.tree.leaves(state.mean)) == expected
    rest = jax.tree.leaves(state._replace(mean={}))
    assert sum(x.nbytes for x in rest) < 100
  stacked = track(memory="sketch", capacities={"b": np.full(3, 30)})
  assert stacked.init(params).mean["b"].shape == (3, 1024)


def test_first_in_the_chain_sees_scales_that_adam_takes_away():
  # Noise ratio 4 in both layers, scales a million apart.
  rng = np.random.default_rng(0)
  mu = rng.choice([-0.5, 0.5], 900)
  scales = {"large": 1e2, "small": 1e-4}
  gradients = [
    {
      path: {"kernel": jnp.asarray(s * (mu + rng.normal(size=900)), "f4")}
      for path, s in scales.items()
    }
    for _ in range(300)
  ]
  seen = {}
  for name, optimizer in (
    ("before", optax.chain(track(0.98), optax.scale_by_adam(eps=1e-12))),
    ("after", optax.chain(optax.scale_by_adam(eps=1e-12), track(0.98))),
  ):
    seen[name] = statistics.gradient_statistics(follow(optimizer, gradients))
  before, after = seen["before"], seen["after"]
  for path, s in scales.items():
    norm = s * np.sqrt(900 * 1.25)
    assert float(before[path].norm) == pytest.approx(norm, rel=0.02)
    assert float(before[path].noise_to_signal) == pytest.approx(4, rel=0.1)
    # Momentum of 0.9 keeps a noise of 1/19: ||g||^2 = 900 (0.25 + 1/19) / 1.25.
    norm = np.sqrt(900 * (0.25 + 1 / 19) / 1.25)
    assert float(after[path].norm) == pytest.approx(norm, rel=0.05)
    assert float(after[path].noise_to_signal) < 0.4
  assert float(before["large"].norm / before["small"].norm) > 9e5
  assert float(after["large"].norm / after["small"].norm) == pytest.approx(
    1, rel=0.02
  )
