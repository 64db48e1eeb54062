"""Against numbers that CPT's own quantized convolution produced in PyTorch.

`tests/golden/cpt_qconv.npz` holds them, with the gradient's rounding noise
switched off. Its `y_eval` is not compared: CPT's running range starts at 0, so
after one batch it is a tenth of the batch's range, and its evaluation clips
nearly all inputs. Ours starts with the first batch.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpc_jax.quant import grids, layers, ops

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden/cpt_qconv.npz")
CASES = ("conv3x3", "conv3x3_stride2", "conv1x1", "depthwise3x3")
# What CPT does, without its noise.
NEAREST = grids.Quantization(gradients=grids.Grid())


def settings(case: str) -> list[tuple[int, int]]:
  """The (bits, gradient bits) of a case."""
  names = {key.split("/")[1] for key in GOLDEN.files if key.startswith(case)}
  names = {name for name in names if name.startswith("b")}
  return sorted(tuple(map(int, name[1:].split("g"))) for name in names)


def load(case: str, *names: str) -> list[np.ndarray]:
  return [GOLDEN[f"{case}/{name}"] for name in names]


def arguments(case: str) -> dict:
  w = GOLDEN[f"{case}/w_hwio"]
  channels = GOLDEN[f"{case}/x_nhwc"].shape[-1]
  stride = 2 if case.endswith("stride2") else 1
  pad = w.shape[0] // 2
  return {
    "window_strides": (stride, stride),
    "padding": ((pad, pad), (pad, pad)),
    "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    "feature_group_count": channels // w.shape[2],
  }


@functools.partial(jax.jit, static_argnums=(0, 1))
def step(case, storage_bits, bits, x, w, g):
  quantization = grids.Quantization(
    gradients=grids.Grid(), storage_bits=storage_bits
  )
  conv = functools.partial(
    ops.conv_general_dilated,
    bits=bits,
    quantization=quantization,
    **arguments(case),
  )
  y, vjp = jax.vjp(conv, x, w)
  return y, *vjp(g)


@jax.jit
def operands(bits, x, w):
  return (
    grids.fake_quantize(x, bits, NEAREST.activations),
    grids.fake_quantize(w, bits, NEAREST.weights),
  )


def assert_close(got, want, tolerance=1e-5):
  """Within `tolerance` of the largest value."""
  error = np.max(np.abs(np.asarray(got) - want)) / np.max(np.abs(want))
  assert error < tolerance, error


def test_the_file_holds_what_is_tested():
  assert {key.split("/")[0] for key in GOLDEN.files} == set(CASES)
  assert sum(len(settings(case)) for case in CASES) == 36


@pytest.mark.parametrize("case", CASES)
def test_quantized_operands(case):
  x, w = load(case, "x_nhwc", "w_hwio")
  ties = 0
  for bits, gradient_bits in settings(case):
    prefix = f"b{bits}g{gradient_bits}/"
    wanted = load(case, prefix + "qx_nhwc", prefix + "qw_hwio")
    for got, want in zip(operands(bits, x, w), wanted, strict=True):
      level = (np.max(want) - np.min(want)) / (2**bits - 1)
      error = np.abs(np.asarray(got) - want)
      is_tie = error > level / 2
      ties += np.sum(is_tie)
      assert np.all(error[is_tie] < level * 1.001)
      assert np.all(error[~is_tie] <= 4e-7 * np.max(np.abs(want)))
  # A value that sits on a tie may go to the other neighbor.
  assert ties <= 2


@pytest.mark.parametrize("storage_bits", [None, 8])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case, storage_bits):
  x, w, g = load(case, "x_nhwc", "w_hwio", "cotangent_nhwc")
  for bits, gradient_bits in settings(case):
    prefix = f"b{bits}g{gradient_bits}/"
    wanted = load(
      case, prefix + "y_nhwc", prefix + "dx_nhwc", prefix + "dw_hwio"
    )
    widths = grids.LayerBits(bits, bits, gradient_bits)
    widths = jax.tree.map(jnp.int32, widths)
    for got, want in zip(
      step(case, storage_bits, widths, x, w, g), wanted, strict=True
    ):
      assert_close(got, want)


@pytest.mark.parametrize("case", CASES)
def test_running_range_is_ten_times_theirs_after_one_batch(case):
  x, w = load(case, "x_nhwc", "w_hwio")
  conv = layers.QuantConv(
    w.shape[-1],
    w.shape[:2],
    use_bias=False,
    padding=arguments(case)["padding"],
    feature_group_count=x.shape[-1] // w.shape[2],
    quantization=NEAREST,
  )
  variables = jax.jit(conv.init)(jax.random.key(0), x)
  _, updates = jax.jit(functools.partial(conv.apply, mutable=["quant_stats"]))(
    variables, x
  )
  stats = updates["quant_stats"]
  span = stats["hi"] - stats["lo"]
  theirs, zero_point = load(
    case, "b8g8/running_range", "b8g8/running_zero_point"
  )
  np.testing.assert_allclose(span, 10 * theirs[0], rtol=1e-5)
  np.testing.assert_allclose(stats["lo"], 10 * zero_point[0], rtol=1e-5)
