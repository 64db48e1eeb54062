"""Quantize an existing Flax Linen model in one call."""

import inspect
import re
import warnings
from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn

from dpc_jax.quant import grids, layers, ops

Patterns = str | Collection[str]
DEFAULT_QUANTIZATION = grids.Quantization()
# Flax's own calls, as an interceptor sees them.
_CALLS = frozenset(
  inspect.unwrap(layer.__call__)
  for layer in (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv)
)


def quantize(
  module: nn.Module,
  quantization: grids.Quantization = DEFAULT_QUANTIZATION,
  include: Patterns = ".*",
  exclude: Patterns | None = None,
) -> nn.Module:
  """Returns a module that computes `module` with quantized products.

  Every `nn.Dense`, `nn.DenseGeneral`, `nn.Einsum` and `nn.Conv` whose layer
  path matches is quantized as `QuantDense` is; parameters, their paths and
  initial values stay. Call `init` of the result once for the collections
  `precision` and `quant_stats`, and `apply` with all of its variables.
  Attention products, which have no kernel, stay in float.

  Args:
    module: an unbound Flax Linen module.
    quantization: the grids of weights, activations and gradients.
    include: pattern or patterns; a layer is quantized if `re.fullmatch` of one
      of them matches its path, counted from `module` ('' is `module` itself).
    exclude: pattern or patterns that take layers out again; None takes none.

  Returns:
    A module whose `__call__` is that of `module`. Another method is called by
    name: `apply(variables, "encode", x, method="run")`.

  Raises:
    ValueError: at once, what is no Linen module or was returned by this
      function, no `Quantization`, or no regular expression; in `init`, a
      pattern that matches no layer, or a `nn.scan` / `nn.vmap` in the model
      that does not carry the two collections; in `apply`, one that does not
      name the RNG stream `quant` in `split_rngs`. One that names it False
      cannot be told from a split one, and gives all of its layers the same
      noise.

  Warns:
    UserWarning: in `init`, once, listing layers with a kernel of a kind that
      it cannot quantize (`nn.ConvTranspose`, for instance).

  Example:
    >>> import jax
    >>> model = quantize(nn.Dense(2))
    >>> sorted(model.init(jax.random.key(0), jax.numpy.ones((1, 3))))
    ['params', 'precision', 'quant_stats']
  """
  if not isinstance(module, nn.Module):
    raise ValueError(
      f"module = {module!r}: pass an instance of a Flax Linen module"
    )
  if isinstance(module, Quantized):
    raise ValueError(
      "module is quantized already: pass its own `module`, and patterns for all"
      " of its layers"
    )
  if not isinstance(quantization, grids.Quantization):
    raise ValueError(
      f"quantization = {quantization!r}: pass a dpc.Quantization"
    )
  patterns = (_patterns("include", include), _patterns("exclude", exclude))
  return Quantized(module, quantization, *patterns)


def _patterns(name: str, value: Patterns | None) -> tuple[str, ...]:
  """The patterns of an argument, each a regular expression."""
  if value is None:
    return ()
  if isinstance(value, str) or not isinstance(value, Collection):
    value = (value,)
  for pattern in value:
    if not isinstance(pattern, str):
      raise ValueError(f"{name} = {pattern!r}: pass a pattern, or several")
    try:
      re.compile(pattern)
    except re.error as error:
      raise ValueError(
        f"{name} = {pattern!r} is not a regular expression: {error}"
      ) from None
  return tuple(value)


class Quantized(nn.Module):
  """What `quantize` returns: `module` in its own scope, products replaced.

  Attributes:
    module: the model; its parameters keep their paths.
    quantization: the grids.
    include: patterns of layer paths to quantize.
    exclude: patterns of layer paths to leave in float.
  """

  module: nn.Module
  quantization: grids.Quantization
  include: tuple[str, ...]
  exclude: tuple[str, ...]

  def setup(self):
    """Gives the model this module's scope, so that paths stay."""
    nn.share_scope(self, self.module)

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """Calls the model with its products quantized."""
    return self.run("__call__", *args, **kwargs)

  def run(self, method_name: str, /, *args: Any, **kwargs: Any) -> Any:
    """Calls a method of the model, by name, with its products quantized."""
    seen = _Seen()
    with nn.intercept_methods(self._interceptor(seen)):
      result = getattr(self.module, method_name)(*args, **kwargs)
    if self.is_initializing():
      self._check(seen)
    return result

  def _matches(self, path: str) -> bool:
    return any(re.fullmatch(p, path) for p in self.include) and not any(
      re.fullmatch(p, path) for p in self.exclude
    )

  def _path(self, module: nn.Module) -> str:
    """Path from the wrapped model, or from the root for a module outside."""
    depth = len(self.path)
    inside = module.path[:depth] == self.path
    return "/".join(module.path[depth:] if inside else module.path)

  def _interceptor(self, seen: "_Seen") -> Callable[..., Any]:
    has_noise = self.quantization.is_stochastic and self.has_rng("quant")

    def interceptor(next_fun, args, kwargs, context):
      module = context.module
      if context.method_name != "__call__":
        return next_fun(*args, **kwargs)
      path = self._path(module)
      if not _is_product(context):
        result = next_fun(*args, **kwargs)
        if (
          _owns_float_kernel(module)
          and path not in seen.quantizable
          and self._matches(path)
        ):
          seen.other[path] = type(module).__name__
        return result
      seen.quantizable[path] = None
      if not self._matches(path):
        return next_fun(*args, **kwargs)
      _check_lifted(module, path, has_noise)
      if isinstance(module, nn.Einsum):
        return _call_einsum(next_fun, module, self.quantization, args, kwargs)
      with layers.quantized_products(module, self.quantization):
        return next_fun(*args, **kwargs)

    return interceptor

  def _check(self, seen: "_Seen") -> None:
    for name in ("include", "exclude"):
      for pattern in getattr(self, name):
        if not any(re.fullmatch(pattern, path) for path in seen.quantizable):
          raise ValueError(
            f"{name} = {pattern!r} matches no layer; the layers are"
            f" {', '.join(map(repr, seen.quantizable)) or '(none)'}"
          )
    if seen.other:
      listed = ", ".join(f"{p!r} ({k})" for p, k in seen.other.items())
      warnings.warn(
        f"dpc.quantize leaves in float what it cannot quantize: {listed}",
        stacklevel=2,
      )


class _Seen:
  """Layers met during one call, by path, in order."""

  def __init__(self):
    self.quantizable: dict[str, None] = {}
    self.other: dict[str, str] = {}


def _is_product(context: nn.module.InterceptorContext) -> bool:
  """Whether the call is that of a Flax layer that can be quantized.

  A subclass with a `__call__` of its own comes by twice if it calls Flax's,
  which is then the one that counts, and once if it computes its own product.
  """
  module = context.module
  return (
    context.orig_method.func in _CALLS
    and isinstance(module, nn.Dense | nn.DenseGeneral | nn.Einsum | nn.Conv)
    and not isinstance(module, layers.QuantDense | layers.QuantConv)
  )


def _owns_float_kernel(module: nn.Module) -> bool:
  return module.has_variable("params", "kernel") and not isinstance(
    module, layers.QuantDense | layers.QuantConv
  )


def _check_lifted(module: nn.Module, path: str, has_noise: bool) -> None:
  """Refuses a lifted transform that would lose bits, ranges or noise."""
  lost = module.is_initializing() and not all(
    module.is_mutable_collection(name) for name in ("precision", "quant_stats")
  )
  if lost or (has_noise and not module.has_rng("quant")):
    raise ValueError(
      f"layer {path!r} is inside an nn.scan or nn.vmap that does not carry the"
      " quantizer's state: give it variable_axes={..., 'precision': 0,"
      " 'quant_stats': 0} and split_rngs={..., 'quant': True}, or, where its"
      " parameters are shared and not stacked (nn.RNN), exclude it"
    )


def _call_einsum(next_fun, module, quantization, args, kwargs):
  """`nn.Einsum` calls jnp.einsum itself: its product is swapped by hand."""
  (inputs,) = args[:1] or (kwargs["inputs"],)
  subscripts = args[1] if len(args) > 1 else kwargs.get("einsum_str")
  subscripts = nn.merge_param("einsum_str", module.einsum_str, subscripts)
  subscripts = subscripts.replace(" ", "")
  if "->" not in subscripts or subscripts.count(",") != 1:
    return next_fun(*args, **kwargs)  # Flax's own error.
  kernel = module.param(
    "kernel", module.kernel_init, module.shape, module.param_dtype
  )
  bias = None
  if module.use_bias:
    shape, broadcast = module._get_bias_shape(subscripts, inputs, kernel)
    bias = module.param("bias", module.bias_init, shape, module.param_dtype)
  inputs, kernel, bias = module.promote_dtype(
    inputs, kernel, bias, dtype=module.dtype
  )

  def product(x, w, subscripts, **options):
    return ops.einsum(subscripts, x, w, **options)

  y = layers.call_product(
    product,
    module,
    quantization,
    inputs,
    kernel,
    (subscripts,),
    {
      "precision": module.precision,
      "preferred_element_type": module.preferred_element_type,
    },
  )
  return y if bias is None else y + bias.reshape(broadcast)
