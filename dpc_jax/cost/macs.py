"""Multiply-accumulates of a Flax model, found without running it.

The model is traced abstractly, and every dot product and convolution in the
trace counts, quantized or float, inside a layer or not:

*   a dot product: output elements * contracted elements;
*   a convolution: output elements * kernel positions * input channels of one
    group. Zeros of the padding, or put between the elements of a dilated
    input, count like any other element.

Products inside `nn.scan` or `jax.lax.scan` count once for every iteration,
those in a branch of `jax.lax.cond` as in its most expensive branch. Left out:
biases, normalization, activation functions, pooling, embedding look-ups and
everything else that is no product, and what an integer backend multiplies for
the offsets of affine grids (`dpc_jax.quant.integer`).

The path of a product is that of the module which computes it, '' at the root:

*   a module that owns a `kernel`, or an `embedding` (`nn.Embed.attend`), or
    widths in the collection `precision`, or a `QuantProduct`, is a layer: its
    own path. Calls of one layer with the same weights are summed;
*   the two products of a module without these, of a class with "attention" in
    its name: '<path>/qk' and '<path>/av';
*   other products of a module without these: '<path>/product0', ... in the
    order of its call, weights 0.

`nn.jit` keeps traces from one call to the next, and with them a foreign path:
where a quantized layer gets no product for that reason, counting is refused.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.extend.core as jex_core

from dpc_jax.cost import bitops
from dpc_jax.quant import grids

# Every call of a module tags the operations it traces with its path and the
# number of the call; the last tag in a name stack is the innermost module.
_TAG = re.compile(r"layer<([^>|]*)\|(\d+)>")
_OWN_PARAMETERS = ("kernel", "embedding")
# Primitives whose products cannot be counted from the shapes in the trace.
_UNCOUNTABLE = ("while", "pallas_call", "shard_map", "ragged_dot_general")


def layer_costs(
  model: nn.Module, *inputs: Any, **kwargs: Any
) -> dict[str, bitops.LayerCost]:
  """Multiply-accumulates and weights of every layer of a model.

  The module's docstring says what counts and how it is named. `init` and
  `apply` are evaluated abstractly: nothing is allocated and nothing computed.

  Args:
    model: a Flax Linen module, not bound.
    *inputs: what `model.__call__` takes, arrays or `jax.ShapeDtypeStruct`s or
      trees of them; anything else (None, a bool) is passed as it is. If the
      first array has two axes or more, its leading axis is the batch.
    **kwargs: likewise. Models of this project evaluate without `train=True`.

  Returns:
    {path: LayerCost}, in the order of the forward pass, for *one sample*. A
    layer stacked by `nn.scan` gives the cost of one layer and how many there
    are.

  Raises:
    ValueError: no array among the inputs; the products of a layer do not
      divide by the batch; a product sits in a loop whose length is not known,
      in a Pallas kernel or in a `shard_map`; a layer has widths but no product.

  Example:
    >>> image = jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")
    >>> layer_costs(nn.Conv(16, (3, 3)), image)
    {'': LayerCost(macs=27648, weights=432, layers=1)}
  """
  arrays, arguments = _abstract((inputs, kwargs))
  if not arrays:
    raise ValueError("inputs: no array among them; pass the model's input")

  def init(arrays: Sequence[Any]) -> Any:
    args, kwargs = arguments(arrays)
    return model.init(jax.random.key(0), *args, **kwargs)

  def apply(variables: Any, arrays: Sequence[Any]) -> Any:
    args, kwargs = arguments(arrays)
    return model.apply(variables, *args, **kwargs, mutable=False)

  variables = jax.eval_shape(init, arrays)
  tags = _Tags()
  with nn.intercept_methods(tags):
    jaxpr = jax.make_jaxpr(apply)(variables, arrays)
  products = _products(jaxpr.jaxpr, "", (), itertools.count())
  batch = arrays[0].shape[0] if len(arrays[0].shape) > 1 else 1
  return _collect(products, variables, tags.modules, batch)


def _abstract(
  tree: Any,
) -> tuple[list[jax.ShapeDtypeStruct], Callable[[Sequence[Any]], Any]]:
  """The arrays in a tree as shapes, and the way back from such a list."""
  leaves, treedef = jax.tree.flatten(tree)
  is_array = [hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves]
  arrays = [
    jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    for leaf, flag in zip(leaves, is_array, strict=True)
    if flag
  ]

  def rebuild(arrays: Sequence[Any]) -> Any:
    rest = iter(arrays)
    return treedef.unflatten(
      next(rest) if flag else leaf
      for leaf, flag in zip(leaves, is_array, strict=True)
    )

  return arrays, rebuild


class _Product(NamedTuple):
  """One product in the trace: MACs of one execution, and the loops around."""

  path: str
  call: int
  macs: int
  scans: tuple[tuple[int, int], ...]  # (number, length), the outermost first


class _Module(NamedTuple):
  """What a module is from the inside of the loops that stack it."""

  kind: str
  weights: int  # size of its kernel or embedding, else 0
  widths: int  # size of its width in `precision`, else 0


class _Tags:
  """An interceptor that names the module in every operation it traces."""

  def __init__(self):
    self.modules: dict[str, _Module] = {}
    self._active: list[str] = []
    self._calls: dict[str, int] = {}

  def __call__(
    self,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
  ) -> Any:
    module = context.module
    if module.scope is None:
      return call(*args, **kwargs)
    path = "/".join(module.path)
    self.modules[path] = _Module(
      type(module).__name__,
      next(
        (
          _size(module.get_variable("params", name))
          for name in _OWN_PARAMETERS
          if module.has_variable("params", name)
        ),
        0,
      ),
      _size(module.get_variable("precision", "weights", ())),
    )
    # A method that its own module calls belongs to the same call.
    if path not in self._active:
      self._calls[path] = self._calls.get(path, -1) + 1
    self._active.append(path)
    try:
      with jax.named_scope(f"layer<{path}|{self._calls[path]}>"):
        return call(*args, **kwargs)
    finally:
      self._active.pop()


def _products(
  jaxpr: jex_core.Jaxpr,
  names: str,
  scans: tuple[tuple[int, int], ...],
  numbers: itertools.count,
) -> list[_Product]:
  """All products of a trace in order; names in a sub-trace are relative."""
  found = []
  for eqn in jaxpr.eqns:
    primitive = eqn.primitive.name
    stack = f"{names}/{eqn.source_info.name_stack}"
    if grids.OFFSET_SCOPE in stack:
      continue
    macs = _macs(eqn)
    if macs is not None:
      path, call = (_TAG.findall(stack) or [("", "0")])[-1]
      found.append(_Product(path, int(call), macs, scans))
      continue
    inside = scans
    if primitive == "scan":
      inside = (*scans, (next(numbers), eqn.params["length"]))
    parts = [
      _products(sub, stack, inside, numbers) for sub in _sub_jaxprs(eqn.params)
    ]
    if primitive in _UNCOUNTABLE and (any(parts) or not parts):
      path = (_TAG.findall(stack) or [("", "0")])[-1][0]
      raise ValueError(
        f"module {path!r}: cannot count the products in a {primitive!r}; "
        "use a scan, or a plain product, for the cost"
      )
    if primitive == "cond":
      parts = [max(parts, key=lambda part: sum(map(_total, part)))]
    found.extend(itertools.chain.from_iterable(parts))
  return found


def _sub_jaxprs(params: Mapping[str, Any]) -> list[jex_core.Jaxpr]:
  found = []
  for value in params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if isinstance(item, jex_core.ClosedJaxpr):
        found.append(item.jaxpr)
      elif isinstance(item, jex_core.Jaxpr):
        found.append(item)
  return found


def _macs(eqn: jex_core.JaxprEqn) -> int | None:
  """Multiply-accumulates of one operation; None if it is no product."""
  if eqn.primitive.name == "dot_general":
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return eqn.outvars[0].aval.size * math.prod(lhs[i] for i in contracted)
  if eqn.primitive.name == "conv_general_dilated":
    _, inputs, *spatial = eqn.params["dimension_numbers"].rhs_spec
    kernel = eqn.invars[1].aval.shape
    positions = math.prod(kernel[i] for i in spatial)
    return eqn.outvars[0].aval.size * positions * kernel[inputs]
  return None


def _total(product: _Product) -> int:
  return product.macs * math.prod(length for _, length in product.scans)


def _collect(
  products: list[_Product],
  variables: Mapping[str, Any],
  modules: Mapping[str, _Module],
  batch: int,
) -> dict[str, bitops.LayerCost]:
  """Sums products by layer, and divides by the batch and by the stack."""
  stacked = {path: _layers(path, m, variables) for path, m in modules.items()}
  stacks = set()
  for product in products:
    stacks |= _stack_scans(product.scans, stacked[product.path])
  macs: dict[str, int] = {}
  entries: dict[str, tuple[int, int]] = {}
  for name, product in zip(_names(products, modules), products, strict=True):
    weights, layers = 0, stacked[product.path]
    if layers:
      weights = modules[product.path].weights
    else:
      layers = math.prod(n for scan, n in product.scans if scan in stacks)
    macs[name] = macs.get(name, 0) + _total(product)
    entries[name] = (weights, layers)
  for path in _paths(variables.get("precision", {})):
    if path not in macs:
      raise ValueError(
        f"layer {path!r} has widths but no product was found in it; "
        "count a model without nn.jit around its layers"
      )
  costs = {}
  for name, (weights, layers) in entries.items():
    if macs[name] % (batch * layers):
      raise ValueError(
        f"layer {name!r}: {macs[name]} MACs do not divide by the batch "
        f"{batch} * {layers} layers; pass an input with a batch of 1"
      )
    costs[name] = bitops.LayerCost(
      macs[name] // (batch * layers), weights, layers
    )
  return costs


def _names(
  products: list[_Product], modules: Mapping[str, _Module]
) -> list[str]:
  """The path under which each product is reported."""
  calls: dict[tuple[str, int], int] = {}
  positions = []
  for product in products:
    key = product.path, product.call
    positions.append(calls.get(key, 0))
    calls[key] = positions[-1] + 1
  names = []
  for product, position in zip(products, positions, strict=True):
    module = modules[product.path]
    # In a float model it has no widths, but the name that it has elsewhere.
    if module.weights or module.widths or module.kind == "QuantProduct":
      names.append(product.path)
      continue
    name = f"product{position}"
    if (
      "attention" in module.kind.lower()
      and calls[product.path, product.call] == 2
    ):
      name = ("qk", "av")[position]
    names.append(f"{product.path}/{name}" if product.path else name)
  return names


def _paths(tree: Mapping[str, Any], path: str = "") -> Iterator[str]:
  """The layers in the collection `precision`."""
  if "weights" in tree and not isinstance(tree["weights"], Mapping):
    yield path
  for name, child in tree.items():
    if isinstance(child, Mapping):
      yield from _paths(child, f"{path}/{name}" if path else name)


def _layers(path: str, module: _Module, variables: Mapping[str, Any]) -> int:
  """How many layers share a path; 0 for a module without weights or widths."""
  for size, collection, names in (
    (module.weights, "params", _OWN_PARAMETERS),
    (module.widths, "precision", ("weights",)),
  ):
    if size:
      node = variables[collection]
      for name in path.split("/") if path else ():
        node = node[name]
      leaf = next(node[name] for name in names if name in node)
      return _size(leaf) // size
  return 0


def _stack_scans(scans: tuple[tuple[int, int], ...], layers: int) -> set[int]:
  """Which of the loops around a layer run over its `layers` stacked copies."""
  found = set()
  for number, length in scans:
    if layers > 1 and length > 1 and layers % length == 0:
      found.add(number)
      layers //= length
  return found


def _size(variable: Any) -> int:
  """Size of a variable, boxed or not; 0 for an empty tree."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variable))
