"""Gradient statistics: the numbers, against float64 written out."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpc_jax.policy import sketch, statistics

# Of a sketch: sqrt(2 / 1024) of ||m||^2.
SKETCH_ERROR = 0.0442
TINY = 0.01


@functools.partial(jax.jit, static_argnums=0)
def _scan(update, state, gradients):
  def one(state, gradient):
    _, state = update(gradient, state)
    return state, statistics.gradient_statistics(state)

  return jax.lax.scan(one, state, gradients)


def track(tracker, kernels):
  """(last state, statistics after each step) of {path: (n, *shape)}."""
  gradients = {
    path: {"kernel": jnp.asarray(g, jnp.float32)} for path, g in kernels.items()
  }
  state = tracker.init(jax.tree.map(lambda g: g[0], gradients))
  return jax.device_get(_scan(tracker.update, state, gradients))


def moments(gradients, weights):
  """(E||g||^2, variance, signal^2, c) in float64, by the definition."""
  w = weights / np.sum(weights)
  m = np.tensordot(w, gradients, 1)
  c = np.sum(w**2)
  square = np.sum(w * np.sum(gradients**2, axis=1))
  variance = (square - np.sum(m**2)) / (1 - c) if len(w) > 1 else 0.0
  return np.array([square, variance, np.sum(m**2) - c * variance, c])


def moving_weights(decays):
  """Weights of a moving average after its last step; they do not sum to 1."""
  decays = np.asarray(decays, np.float64)
  later = np.cumprod(np.append(1.0, decays[:0:-1]))[::-1]
  return (1 - decays) * later


def written_out(gradients, decays, average=None):
  """(norm, variance, noise_to_signal, is_resolved) after the last step."""
  gradients = np.asarray(gradients, np.float64).reshape(len(gradients), -1)
  found = [
    moments(gradients[:n], moving_weights(decays[:n]))
    for n in range(1, len(gradients) + 1)
  ]
  square, variance, signal, c = found[-1]
  if average is not None and len(found) > 1:
    w = moving_weights([average] * (len(found) - 1))
    square, variance, signal, _ = w @ np.array(found[1:]) / np.sum(w)
  least = TINY * c * variance
  return (
    np.sqrt(square),
    variance,
    variance / max(signal, least),
    signal > least,
  )


def arbitrary(seed=0, steps=14):
  """Gradients that no rule made: drifts, jumps, and layers unlike others."""
  rng = np.random.default_rng(seed)
  drift = np.linspace(1, 3, steps)[:, None, None]
  jump = np.where(np.arange(steps) < 9, 1, -0.2)[:, None]
  return {
    "a/b": rng.normal(1, 1, (steps, 4, 5)) * drift,
    "c": 1e-3 * (jump + rng.normal(0, 0.3, (steps, 30))),
    "": 1e4 * rng.normal(1, 1, (steps, 7, 1, 2)),
  }


@pytest.mark.parametrize(
  ("decay", "memory", "average"),
  [
    (0.5, "full", None),
    (0.95, "full", 0.8),
    (0.8, "sketch", 0.95),
    ("schedule", "full", 0.8),
    ("schedule", "sketch", None),
  ],
)
def test_equals_a_written_out_average(decay, memory, average):
  kernels = arbitrary()
  steps = len(kernels["c"])
  decays = [decay] * steps
  make = statistics.track_gradient_statistics
  if decay == "schedule":
    make = optax.inject_hyperparams(make)
    decay = optax.linear_schedule(0.3, 0.9, 10)
    decays = [float(decay(i)) for i in range(steps)]
  tracker = make(decay, memory, average=average)
  _, found = track(tracker, kernels)
  assert found.keys() == kernels.keys()
  for path, g in kernels.items():
    assert found[path].count.tolist() == list(range(1, steps + 1))
    assert not np.any(found[path].skipped)
    assert found[path].within_variance is None
    for n in range(1, steps + 1):
      *expected, is_resolved = written_out(g[:n], decays[:n], average)
      assert n == 1 or found[path].is_resolved[n - 1] == is_resolved
      got = [x[n - 1] for x in found[path][:3]]
      np.testing.assert_allclose(
        got, expected, rtol=1e-5, err_msg=f"{path} {n}"
      )


def noise(ratios, steps=1000, size=(64, 64), seed=0):
  """{name: g} of g = mu + noise with variance 1 and ||mu||^2 = 1 / ratio."""
  rng = np.random.default_rng(seed)
  kernels = {}
  for ratio in ratios:
    mu = rng.standard_normal(size)
    mu /= np.linalg.norm(mu) * np.sqrt(ratio)
    g = rng.standard_normal((steps, *size), np.float32) / np.sqrt(mu.size)
    kernels[f"{ratio}"] = g + mu.astype(np.float32)
  return kernels


@pytest.mark.parametrize(
  ("memory", "decay", "average", "ratios"),
  [
    ("full", 0.99, None, (0.1, 2, 15)),
    ("full", 0.5, 0.99, (0.02, 0.25)),
    ("sketch", 0.99, None, (2, 15)),
    ("sketch", 0.5, 0.99, (0.25,)),
  ],
)
def test_a_known_noise_process(memory, decay, average, ratios):
  c = (1 - decay) / (1 + decay)
  kernels = noise(ratios)
  tracker = statistics.track_gradient_statistics(decay, memory, average=average)
  _, found = track(tracker, kernels)
  for ratio in ratios:
    assert c * ratio < 0.1
    norm, variance, got = (float(x[-1]) for x in found[f"{ratio}"][:3])
    # What a sketch does not know of ||m||^2, at 2.5 standard errors.
    off = 2.5 * SKETCH_ERROR * (1 / ratio + c) if memory == "sketch" else 0.0
    assert norm == pytest.approx(np.sqrt(1 + 1 / ratio), rel=0.02)
    assert variance == pytest.approx(1, rel=0.02 + off / (1 - c))
    if memory == "sketch":
      signal = variance / got
      assert signal == pytest.approx(1 / ratio, abs=0.1 / ratio + off / (1 - c))
      continue
    assert got == pytest.approx(ratio, rel=0.1)
    if average is None:
      # The same numbers in float64.
      g = kernels[f"{ratio}"].reshape(1000, -1).astype(np.float64)
      square, spread, signal, _ = moments(g, moving_weights([decay] * 1000))
      expected = np.sqrt(square), spread, spread / signal
      np.testing.assert_allclose([norm, variance, got], expected, rtol=1e-4)


def test_the_corrections_lift_the_ratio_above_its_saturation():
  # At decay 0.9, c = 1/19: without them a ratio of 40 and one of infinity
  # would be seen as 18 * 40 / 58 = 12 and 18.
  kernels = noise([40, 1e12], steps=200)
  tracker = statistics.track_gradient_statistics(0.9)
  _, found = track(tracker, kernels)
  last = {path: float(x.noise_to_signal[-1]) for path, x in found.items()}
  assert 30 < last["40"] < 55
  assert 19 * 10 < last[f"{1e12}"] < 19 * 101
  assert found["40"].is_resolved[-1]


def test_an_average_finds_a_signal_that_a_short_memory_loses():
  # c * ratio = 3.3: half of the moments of a single step have no signal.
  kernels = noise([10], steps=1500)
  short, long = (
    track(statistics.track_gradient_statistics(0.5, average=average), kernels)[
      1
    ]["10"].noise_to_signal[-500:]
    for average in (None, 0.998)
  )
  assert np.abs(np.log(short / 10)).max() > 0.2
  np.testing.assert_allclose(long, 10, rtol=0.1)


def test_a_constant_gradient_has_no_variance():
  g = np.tile(np.random.default_rng(1).normal(size=(9, 11)), (50, 1, 1))
  for memory in ("full", "sketch"):
    _, found = track(
      statistics.track_gradient_statistics(0.9, memory), {"a": g}
    )
    norm = np.linalg.norm(g[0])
    np.testing.assert_allclose(found["a"].norm, norm, rtol=1e-5)
    assert found["a"].variance.max() < 1e-5 * norm**2
    assert found["a"].noise_to_signal.max() < 1e-5
    assert np.all(found["a"].is_resolved)


@pytest.mark.parametrize(
  ("memory", "average"),
  [("full", None), ("full", 0.9), ("sketch", 0.9), ("norm", None)],
)
def test_nothing_known_yet_and_zero_gradients(memory, average):
  tracker = statistics.track_gradient_statistics(
    memory=memory, average=average, within_tensor=True
  )
  kernels = {"a": np.zeros((4, 3, 4))}
  _, after = track(tracker, kernels)
  before = tracker.init({"a": {"kernel": jnp.zeros((3, 4))}})
  for found, count in (
    (statistics.gradient_statistics(before)["a"], 0),
    (after["a"], [1, 2, 3, 4]),
  ):
    np.testing.assert_array_equal(found.count, count)
    zeros = [found.norm, found.within_variance, found.skipped]
    if memory != "norm":
      zeros += [found.variance, found.noise_to_signal, found.is_resolved]
    assert not np.any(zeros)


def test_one_step_has_a_norm_and_no_variance():
  for average in (None, 0.9):
    tracker = statistics.track_gradient_statistics(average=average)
    _, found = track(tracker, {"a": np.full((1, 3, 4), 2.0)})
    got = [float(x[0]) for x in found["a"][:3]]
    np.testing.assert_allclose(got, [np.sqrt(48), 0, 0], rtol=1e-6)


# Shapes stay the same, so that each tracker is compiled once.
_TRACKERS = {
  (memory, average, decay): statistics.track_gradient_statistics(
    decay, memory, average=average, within_tensor=True
  )
  for memory, average, decay in (
    ("full", None, 0.99),
    ("full", 0.9, 1e-9),
    ("sketch", 0.5, 0.3),
    ("norm", None, 0.5),
  )
}
_values = st.one_of(
  st.sampled_from([0.0, 1e-30, 1e-45, 1e17, 4e17, 1e18, -4e17, 3e38, np.nan]),
  st.floats(width=32),
  st.floats(-10, 10, width=32),
)


@pytest.mark.parametrize("key", _TRACKERS)
@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
  st.lists(_values, min_size=6, max_size=6), st.booleans(), st.booleans()
)
# Squared norms just below inf.
@hypothesis.example([4e17] * 6, False, True)
def test_never_negative_and_never_nan(key, values, is_constant, is_same):
  """`values` are the sizes of two kernels' gradients over three steps."""
  rng = np.random.default_rng(0)
  pattern = np.ones((3, 700)) if is_constant else rng.normal(size=(3, 700))
  sizes = [values[0]] * 6 if is_same else values
  with np.errstate(over="ignore", invalid="ignore"):
    kernels = {
      "a": np.float32([v * pattern for v in sizes[:3]]),
      "b": np.float32([np.full(5, v) for v in sizes[3:]]),
    }
  state, found = track(_TRACKERS[key], kernels)
  assert int(state.count) + int(state.skipped) == 3
  for path in kernels:
    known = [found[path].norm, found[path].within_variance]
    if key[0] != "norm":
      known += [found[path].variance, found[path].noise_to_signal]
    assert np.all(np.isfinite(known))
    assert np.min(known) >= 0
  for leaf in jax.tree.leaves(state._replace(mean={}, mean_square={})):
    assert np.all(np.isfinite(leaf))


@functools.cache
def _everything(average):
  return statistics.track_gradient_statistics(
    0.9, average=average, within_tensor=True
  )


@pytest.mark.parametrize(
  ("bad", "average"),
  [(np.nan, None), (np.nan, 0.9), (-np.inf, 0.9), (1e30, 0.9)],
)
def test_a_gradient_that_is_not_finite_changes_nothing_else(bad, average):
  kernels = arbitrary(steps=8)
  tracker = _everything(average)
  clean, _ = track(tracker, kernels)
  # Before the first step, twice in a row, and after the last one.
  dirty = {p: np.insert(g, [0, 4, 4, 8], 5.0, 0) for p, g in kernels.items()}
  for i in (0, 5, 6, 11):
    dirty["a/b"][i, 2, 3] = bad
  state, found = track(tracker, dirty)
  assert int(state.skipped) == 4
  assert found["c"].skipped.tolist() == [1, 1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 4]
  assert found["c"].count.tolist() == [0, 1, 2, 3, 4, 4, 4, 5, 6, 7, 8, 8]
  clean = clean._replace(skipped=state.skipped)
  jax.tree.map(np.testing.assert_array_equal, state, clean)


def test_a_sketch_that_overflows_is_forgotten():
  # The gradient whose entries all meet in one sum: 5 times its squared norm.
  sums = jax.jit(sketch.sketch)
  meet = jax.grad(lambda x: sums(x)[7])(jnp.zeros((5, 1024)))
  worst = 4e18 * np.asarray(meet)
  assert np.sum(np.square(worst)) < 1e38
  assert jnp.isinf(jnp.sum(sums(jnp.asarray(worst)) ** 2))
  g = np.concatenate([[worst] * 3, np.ones((3, 5, 1024))])
  tracker = statistics.track_gradient_statistics(0.5, "sketch", average=0.5)
  state, found = track(tracker, {"a": g})
  assert np.all(np.isfinite(found["a"][:3]))
  assert np.all(np.isfinite(state.averaged["a"]))


def test_variance_within_a_gradient():
  kernels = arbitrary()
  tracker = statistics.track_gradient_statistics(0.8, within_tensor=True)
  _, found = track(tracker, kernels)
  for path, g in kernels.items():
    g = g.reshape(len(g), -1)
    w = moving_weights([0.8] * len(g))
    expected = np.sum(w * np.var(g, axis=1)) / np.sum(w)
    got = found[path].within_variance[-1]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_memory_norm_knows_the_norm_alone():
  kernels = arbitrary()
  tracker = statistics.track_gradient_statistics(0.9, "norm")
  state, found = track(tracker, kernels)
  assert state.mean == state.mean_square == state.averaged == {}
  for path, g in kernels.items():
    expected = written_out(g, [0.9] * len(g))[0]
    np.testing.assert_allclose(found[path].norm[-1], expected, rtol=1e-5)
  last = statistics.gradient_statistics(state)["c"]
  # Constants, not tracers, under jit too: a schedule refuses them.
  for value in (last.variance, last.noise_to_signal):
    assert isinstance(value, np.ndarray)
    assert np.isnan(value)
  assert last.is_resolved is None


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"decay": 0.0}, "decay = 0.0 must be in"),
    ({"decay": 1}, "decay = 1 must be in"),
    ({"decay": np.float32(99)}, r"decay = np.float32\(99.0\) must be in"),
    ({"decay": float("nan")}, "decay = nan must be in"),
    ({"average": 1.0}, "average = 1.0 must be in"),
    ({"average": -0.5}, "average = -0.5 must be in"),
    ({"memory": "half"}, "memory = 'half': use one of full, sketch, norm"),
    ({"memory": None}, "memory = None: use one of"),
    ({"memory": "norm", "average": 0.9}, "average = 0.9: memory = 'norm' has"),
  ],
)
def test_parameters_are_checked(options, message):
  with pytest.raises(ValueError, match=message) as error:
    statistics.track_gradient_statistics(**options)
  assert "\n" not in str(error.value)
