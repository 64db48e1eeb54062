"""Flax models whose products other libraries quantize, layer by layer.

Each of the tools gets the same float model as ours, unchanged, and the same
layers by path. What a tool does not offer is not worked around.
"""

import importlib.metadata
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import errors

from dpc_jax.quant import grids, precision, wrap
from experiments import mistakes

# What a library may raise that cannot do what it is asked.
ERRORS = (*mistakes.FOREIGN_ERRORS, errors.FlaxError)
INSTALL = "pip install -r experiments/bench/requirements.txt"
# Of an error's message.
_LONGEST = 120
Bits = Mapping[str, grids.LayerBits]


class Model(NamedTuple):
  """What a train step asks of a model.

  Attributes:
    apply: as that of a Flax module. Its stream `quant` feeds the tool's noise.
  """

  apply: Callable[..., Any]


class Tool(NamedTuple):
  """A library that quantizes the products of a Flax model.

  Attributes:
    name: as tables have it.
    package: on the package index.
    wrap: (model, bits) -> Model. A width of 32 leaves the operand in float; a
      gradient has stochastic rounding where the tool offers it.
    is_traced: whether widths may be arrays, so that one program serves all.
  """

  name: str
  package: str
  wrap: Callable[[nn.Module, Bits], Model]
  is_traced: bool = False


def version(tool: Tool) -> str | None:
  """The installed version; None without one."""
  try:
    return importlib.metadata.version(tool.package)
  except importlib.metadata.PackageNotFoundError:
    return None


def shortened(error: BaseException) -> str:
  """Type and message of an error in one line of a table."""
  words = " ".join(str(error).split())
  if len(words) > _LONGEST:
    words = f"{words[:_LONGEST].rstrip()}..."
  return f"{type(error).__name__}: {words}" if words else type(error).__name__


def uniform(paths: Iterable[str], layer: grids.LayerBits) -> Bits:
  """The same widths in all layers."""
  return dict.fromkeys(paths, layer)


def wrap_qwix(module: nn.Module, bits: Bits) -> Model:
  """Quantized training of qwix: a rule for each layer.

  Its own defaults: ranges max|x|, per output channel of weights and per row of
  activations, one noise number per row for stochastic gradients ("uniform").

  Raises:
    ImportError: it is not installed.
  """
  import qwix

  rules = []
  for path, layer in bits.items():
    is_backward = _is_quantized(layer.gradients)
    rules.append(
      qwix.QtRule(
        module_path=re.escape(path),
        weight_qtype=_qtype(layer.weights),
        act_qtype=_qtype(layer.activations),
        bwd_qtype=_qtype(layer.gradients),
        bwd_stochastic_rounding="uniform" if is_backward else None,
      )
    )
  quantized = qwix.quantize_model(module, qwix.QtProvider(rules))

  def apply(variables, *args, rngs=None, **kwargs):
    return quantized.apply(
      variables, *args, rngs=_named(rngs, "stochastic_rounding"), **kwargs
    )

  return Model(apply)


def wrap_aqt(module: nn.Module, bits: Bits) -> Model:
  """Quantized training of AQT: its products in the place of Flax's.

  Through the attributes `dot_general_cls` and `conv_general_dilated_cls`, and
  for a product of two activations in its place; its own defaults, but gradients
  with stochastic rounding and none for the other operand, as its `config_v4`.

  Raises:
    ImportError: it is not installed.
  """
  from aqt.jax.v2.flax import aqt_flax

  from experiments.bench import peer_aqt

  def intercept(call, args, kwargs, context):
    layer = bits.get("/".join(context.module.path))
    inner = context.module
    if layer is None or context.method_name != "__call__":
      return call(*args, **kwargs)
    if isinstance(inner, nn.Conv):
      name, product = "conv_general_dilated_cls", peer_aqt.convolution(layer)
    elif isinstance(inner, nn.Dense):
      name, product = "dot_general_cls", peer_aqt.dense(layer)
    else:
      einsum = aqt_flax.AqtEinsum(
        peer_aqt.config(layer), parent=inner.scope.push("aqt")
      )
      return einsum(inner.subscripts, *args)
    # Flax freezes a bound module's attributes; this one lives for the call.
    object.__setattr__(inner, name, product)
    return call(*args, **kwargs)

  def apply(variables, *args, rngs=None, **kwargs):
    with nn.intercept_methods(intercept):
      return module.apply(
        variables, *args, rngs=_named(rngs, "params"), **kwargs
      )

  return Model(apply)


def wrap_ours(module: nn.Module, bits: Bits) -> Model:
  """`dpc_jax.quantize`, for a call outside of training."""
  layers = "|".join(map(re.escape, bits))
  quantized = wrap.quantize(module, grids.Quantization(), include=layers)

  def apply(variables, *args, rngs=None, **kwargs):
    fresh = quantized.init(jax.random.key(0), *args)
    variables = precision.assign_bits({**fresh, **variables}, bits)
    return quantized.apply(variables, *args, rngs=rngs, **kwargs)

  return Model(apply)


OURS = Tool("dpc_jax", "dpc_jax", wrap_ours, is_traced=True)
TOOLS = (Tool("qwix", "qwix", wrap_qwix), Tool("AQT", "aqtp", wrap_aqt))


def _is_quantized(width) -> bool:
  return not isinstance(width, int) or width != grids.FLOAT_WIDTH


def _qtype(width):
  """qwix's name of a width; a traced one goes in as it is."""
  if not _is_quantized(width):
    return None
  return f"int{width}" if isinstance(width, int) else width


def _named(rngs, stream):
  """The streams, with that of the noise under the tool's name as well."""
  if not rngs or "quant" not in rngs:
    return rngs
  return {**rngs, stream: rngs["quant"]}
