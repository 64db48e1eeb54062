r"""Times the products of our networks, number format by number format.

  python -m experiments.bench.matmul --workdir=runs/matmul

Dense products of a Transformer and convolutions of the CIFAR ResNets, each as a
layer alone: forward, and forward with both gradients. Formats: float32 at
"highest" precision, float32 at "default" (TF32 on recent GPUs), bfloat16, and
ours on symmetric grids with 8-bit storage: simulated, that is float32 products
of quantized values, and the two backends that multiply codes. Timed in turns;
a ratio is to float32 at "highest" in the same round. What a format does besides
multiplying, such as quantizing, is in its time. Operations are 2 for each
multiply-accumulate, three products in forward and backward.
"""

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpc_jax.analysis import report
from dpc_jax.quant import grids, layers
from dpc_jax.training import sharding, summary
from experiments import arguments
from experiments.bench import turns

BASE = "float32, highest"
BACKENDS = ("simulated", "int8", "bf16_codes")
_PADDING = ((1, 1), (1, 1))


class Product(NamedTuple):
  """A layer of a network.

  Attributes:
    shape: of its input.
    features: of its output.
    window: of a 3x3 convolution of stride 1; None is a dense layer.
  """

  shape: tuple[int, ...]
  features: int
  window: tuple[int, int] | None = None

  @property
  def macs(self) -> int:
    """Multiply-accumulates of the forward product."""
    return math.prod(self.shape) * self.features * math.prod(self.window or ())


def products(batch: int, tokens: int, width: int) -> dict[str, Product]:
  """{name: product} of the two kinds of networks.

  Args:
    batch: images of a ResNet.
    tokens: of a Transformer's batch, all rows together.
    width: of the Transformer; its MLP is four times as wide.
  """
  found = {
    f"ResNet 3x3, {c} channels at {n}x{n}": Product((batch, n, n, c), c, (3, 3))
    for c, n in ((16, 32), (32, 16), (64, 8))
  }
  dense = {"projection": (width, width), "mlp1": (width, 4 * width)}
  dense["mlp2"] = (4 * width, width)
  return found | {
    f"Transformer {name}, {a} x {b}": Product((tokens, a), b)
    for name, (a, b) in dense.items()
  }


def layer(product: Product, quantization: grids.Quantization | None) -> Any:
  """The Flax layer; None is the float one."""
  options = {"use_bias": False}
  if product.window is None:
    if quantization is None:
      return nn.Dense(product.features, **options)
    return layers.QuantDense(
      product.features, quantization=quantization, **options
    )
  options |= {"padding": _PADDING}
  if quantization is None:
    return nn.Conv(product.features, product.window, **options)
  return layers.QuantConv(
    product.features, product.window, quantization=quantization, **options
  )


def formats() -> dict[str, tuple[Any, str | None, grids.Quantization | None]]:
  """{name: (dtype, matmul precision or None, quantization or None)}."""
  grid = functools.partial(grids.Grid, "symmetric")
  ours = {
    f"ours, {backend}": grids.Quantization(
      weights=grid("channel"),
      activations=grid(),
      gradients=grid(rounding="stochastic"),
      storage_bits=8,
      backend=backend,
      input_gradient="exact" if backend == "simulated" else "scaled",
    )
    for backend in BACKENDS
  }
  return {
    BASE: (jnp.float32, "highest", None),
    "float32, default": (jnp.float32, "default", None),
    "bfloat16": (jnp.bfloat16, None, None),
  } | {name: (jnp.float32, None, found) for name, found in ours.items()}


def compile_format(
  product: Product,
  dtype: Any,
  precision: str | None,
  quantization: grids.Quantization | None,
  backward: bool,
) -> turns.Variant:
  """Compiles a layer; its `state` is (variables, key), its `batch` the input.

  Args:
    product: the layer.
    dtype: of input, kernel and result.
    precision: of float32 products; None leaves JAX's own.
    quantization: None is float.
    backward: whether both gradients are computed, too, for the output itself as
      the gradient.
  """
  module = layer(product, quantization)

  def init(key):
    variables = module.init(key, jnp.zeros((1, *product.shape[1:]), dtype))
    kernel = variables["params"]["kernel"].astype(dtype)
    return {**variables, "params": {"kernel": kernel}}, key

  def step(state, x):
    variables, key = state

    def run(params, x):
      # Mutable, as in training: the range of the batch.
      y, _ = module.apply(
        {**variables, "params": params},
        x,
        rngs={"quant": key},
        mutable=["quant_stats"],
      )
      return y

    if not backward:
      return state, run(variables["params"], x)
    y, pull = jax.vjp(run, variables["params"], x)
    return state, (y, pull(y))

  key = jax.random.key(0)
  state = jax.jit(init)(key)
  start = time.perf_counter()
  with jax.default_matmul_precision(precision):
    x = jax.ShapeDtypeStruct(product.shape, dtype)
    compiled = jax.jit(step).lower(state, x).compile()
  seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  temporary = memory.temp_size_in_bytes
  return turns.Variant(compiled, state, seconds, temporary, temporary)


def measure(
  chosen: dict[str, Product], rounds: int, steps: int
) -> dict[str, Any]:
  """The measurements, as they go into the JSON file.

  Args:
    chosen: of `products`.
    rounds: of one timing each.
    steps: per timing.

  Returns:
    `products`: {name: {"forward" or "forward + backward": {format: `ratio`,
    `ratio_quartiles`, `milliseconds`, `gops`, 10^9 operations a second, and
    `compile_seconds`, or `cannot`, the reason}}}.
  """
  results = {}
  for name, product in chosen.items():
    results[name] = {"macs": product.macs}
    for passes, backward in (("forward", False), ("forward + backward", True)):
      print(f"{name}, {passes}", flush=True)
      results[name][passes] = _measure(product, backward, rounds, steps)
    jax.clear_caches()
  return summary.environment(sharding.make_mesh(1, 1, 1)) | {
    "rounds": rounds,
    "steps_per_round": steps,
    "products": results,
  }


def _measure(product, backward, rounds, steps) -> dict[str, Any]:
  compiled, found = {}, {}
  for name, options in formats().items():
    try:
      compiled[name] = compile_format(product, *options, backward)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
      found[name] = {"cannot": " ".join(str(error).split())[:160]}
  x = jax.random.normal(jax.random.key(1), product.shape)
  inputs = {jnp.float32: x, jnp.bfloat16: x.astype(jnp.bfloat16)}
  running = {
    name: variant._replace(step=_fed(variant.step, inputs[formats()[name][0]]))
    for name, variant in compiled.items()
  }
  seconds = turns.time_in_turns(running, None, rounds, steps)
  operations = 2 * product.macs * (3 if backward else 1)
  for name, variant in compiled.items():
    median = statistics.median(seconds[name])
    found[name] = turns.spread(seconds[name], seconds[BASE]) | {
      "milliseconds": 1e3 * median,
      "gops": operations / median / 1e9,
      "compile_seconds": variant.compile_seconds,
    }
  return {name: found[name] for name in formats()}


def _fed(step: Callable[..., Any], x: jax.Array) -> Callable[..., Any]:
  """Gives a step the input in its own format."""
  return lambda state, _: step(state, x)


def table(results: dict[str, Any]) -> str:
  """A text table, a line for each product and pass: ms (10^9 operations/s)."""
  lines, remarks = [], []
  for name, product in results["products"].items():
    for passes in ("forward", "forward + backward"):
      cells = []
      for label, own in product[passes].items():
        if "cannot" in own:
          remarks.append(f"{name}, {passes}, {label}: {own['cannot']}")
          cells.append("")
        else:
          cells.append(f"{own['milliseconds']:.3g} ({own['gops']:.3g})")
      lines.append((name, passes, *cells))
  text = report.text_table(lines, ("product", "passes", *formats()))
  return "\n".join([text, *remarks])


def main(argv: Sequence[str] | None = None) -> int:
  """Measures, prints a table, writes the JSON file."""
  argv = sys.argv[1:] if argv is None else list(argv)
  given = _parser().parse_args(argv)
  start = time.perf_counter()
  try:
    given.workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    print(
      f"error: --workdir={given.workdir}: {error.strerror}; use another",
      file=sys.stderr,
    )
    return 2
  chosen = products(given.batch_size, given.tokens, given.width)
  with turns.no_cache():
    results = measure(chosen, given.rounds, given.steps)
  path = turns.write(results, given.workdir, "matmul", argv, start)
  print(f"\n{results['device']}: ms (10^9 operations a second)\n")
  print(table(results))
  print(f"written: {path}")
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = arguments.Parser("experiments.bench.matmul", __doc__)
  add = parser.add_argument
  add("--workdir", required=True, type=arguments.folder, metavar="DIR")
  for name, default, least, text in (
    ("batch_size", 128, 1, "images of a ResNet's batch"),
    ("tokens", 1024, 1, "of a Transformer's batch, all rows together"),
    ("width", 128, 1, "of the Transformer; its MLP is four times as wide"),
    ("rounds", 15, 2, "of one timing each"),
    ("steps", 10, 1, "per timing"),
  ):
    add(
      f"--{name}",
      type=turns.count(least),
      default=default,
      help=f"{text}; default: %(default)s",
    )
  return parser


if __name__ == "__main__":
  sys.exit(main())
