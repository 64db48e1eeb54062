"""How parameters are split over the mesh: rules, presets, and what follows.

A rule is (pattern, spec): `re.fullmatch` of the pattern on the '/'-joined path
of a parameter, such as `stage1/block0/conv1/kernel`, and a PartitionSpec over
the mesh's axes `fsdp` and `tensor`. The first rule that matches decides. What
no rule of the user's names is up to the preset:

    replicated     a copy on every device
    fsdp           a leaf of at least 4,096 numbers is split over `fsdp`, along
                   the larger of its last two axes that divides (of two equal
                   ones the last); others are replicated
    fsdp+tensor    in transformers as Megatron-LM does (Shoeybi et al., 2019):
                   query, key, value and mlp1 by their outputs, out and mlp2 by
                   their inputs, over `tensor`, the other axis over `fsdp`; all
                   else as `fsdp`

The batch is split over `data` and `fsdp` together. The sizes and the choice of
axes are our decision.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dpc_jax.training import checks

PRESETS = ("replicated", "fsdp", "fsdp+tensor")
PARAMETER_AXES = ("fsdp", "tensor")
# Leaves with fewer numbers are not worth a collective of their own.
MIN_SIZE = 4096

_BY_OUTPUTS = re.compile(r"(.*/)?(attention/(query|key|value)|mlp1)/\w+")
_BY_INPUTS = re.compile(r"(.*/)?(attention/out|mlp2)/kernel")

Specs = dict[str, PartitionSpec]


def preset_of(sizes: Mapping[str, int]) -> str:
  """The preset that uses all axes of a mesh with these sizes."""
  if sizes["tensor"] > 1:
    return "fsdp+tensor"
  return "fsdp" if sizes["fsdp"] > 1 else "replicated"


def partition(
  params: Any,
  mesh: Mesh,
  *,
  preset: str | None = None,
  rules: Sequence[tuple[str, Sequence[str | None]]] = (),
) -> Specs:
  """The PartitionSpec of every parameter, {path: spec}, no leaf left out.

  Args:
    params: the tree, or its shapes.
    mesh: with the axes data, fsdp and tensor.
    preset: of `PRESETS`; None takes `preset_of` the mesh.
    rules: go before the preset: (pattern, one entry per axis of the leaf).

  Raises:
    ConfigError: a rule that is none, that no leaf meets first, or that does not
      fit its leaf; an axis `tensor` that splits nothing.
  """
  sizes = dict(mesh.shape)
  if preset is None:
    preset = preset_of(sizes)
  if preset not in PRESETS:
    checks.fail("mesh.sharding", preset, f"use {', '.join(PRESETS)}")
  rules = [_parsed(rule) for rule in rules]
  unused = list(rules)
  specs = {}
  for path, leaf in leaf_paths(params).items():
    found = next((r for r in rules if r[0].fullmatch(path)), None)
    if found is None:
      specs[path] = _by_preset(preset, path, leaf.shape, sizes)
    else:
      unused = [rule for rule in unused if rule is not found]
      specs[path] = PartitionSpec(*found[1])
      _check_fit(found[0].pattern, path, leaf.shape, specs[path], sizes)
  for pattern, _ in unused:
    checks.fail(
      "mesh.rules",
      pattern.pattern,
      "no parameter meets this rule first; correct or remove it",
    )
  _check_used(preset, specs, sizes)
  return specs


def leaf_paths(tree: Any) -> dict[str, Any]:
  """{'/'-joined path: leaf}; the nodes around boxed parameters have no name."""
  return {
    "/".join(_names(path)): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def follow(tree: Any, params: Any, specs: Specs) -> Any:
  """PartitionSpecs of a tree that holds copies of the parameters' tree.

  A leaf goes with the parameter whose path ends its own, if it has that one's
  shape (an optimizer's moments), or with the kernel of the layer that its path
  ends in (gradient statistics); else it is replicated.

  Args:
    tree: an optimizer's state, for instance, or its shapes.
    params: the parameters, or their shapes.
    specs: of the parameters.

  Returns:
    A tree of the structure of `tree`.
  """
  shapes = {path: leaf.shape for path, leaf in leaf_paths(params).items()}

  def spec_of(path, leaf):
    names = "/".join(_names(path)).split("/")
    for start in range(len(names)):
      tail = "/".join(names[start:])
      for candidate in (tail, f"{tail}/kernel"):
        if shapes.get(candidate) == leaf.shape:
          return specs[candidate]
    return PartitionSpec()

  return jax.tree_util.tree_map_with_path(spec_of, tree)


def gathered(spec: PartitionSpec) -> PartitionSpec:
  """`spec` without the axis `fsdp`: as the products take a parameter."""
  if not any("fsdp" in _axes_of(entry) for entry in spec):
    return spec
  return PartitionSpec(
    *(
      tuple(name for name in _axes_of(entry) if name != "fsdp") or None
      for entry in spec
    )
  )


def table(params: Any, specs: Specs, mesh: Mesh) -> str:
  """One line per parameter: path, shape, spec, what a device holds of it."""
  rows = [("parameter", "shape", "split over", "per device")]
  total = held = 0
  for path, leaf in leaf_paths(params).items():
    parts = _parts(specs[path], mesh.shape)
    size = int(np.prod(leaf.shape, dtype=np.int64))
    total, held = total + size, held + size // parts
    shape = " x ".join(map(str, leaf.shape)) or "scalar"
    rows.append((path, shape, _spec_text(specs[path]), f"{size // parts:,}"))
  rows.append(("total", f"{total:,}", "", f"{held:,}"))
  widths = [max(len(row[i]) for row in rows) for i in range(4)]
  return "\n".join(
    f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}"
    for a, b, c, d in rows
  )


def _names(path) -> list[str]:
  return [
    str(name)
    for name in (getattr(k, "key", getattr(k, "idx", None)) for k in path)
    if name is not None
  ]


def _axes_of(entry) -> tuple[str, ...]:
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)


def _parsed(rule) -> tuple[re.Pattern, tuple[Any, ...]]:
  remedy = "a rule is (pattern, (an axis or None, ...))"
  if not (isinstance(rule, list | tuple) and len(rule) == 2):
    checks.fail("mesh.rules", rule, remedy)
  pattern, entries = rule
  if not (
    isinstance(pattern, str)
    and isinstance(entries, list | tuple)
    and all(_is_entry(entry) for entry in entries)
  ):
    checks.fail("mesh.rules", rule, remedy)
  names = [name for entry in entries for name in _axes_of(entry)]
  if len(set(names)) < len(names):
    checks.fail("mesh.rules", rule, "an axis of the mesh splits one axis only")
  for name in names:
    if name not in PARAMETER_AXES:
      checks.fail(
        "mesh.rules",
        rule,
        f"no axis {name!r}; use {' or '.join(PARAMETER_AXES)}",
      )
  try:
    return re.compile(pattern), tuple(entries)
  except re.error as error:
    checks.fail("mesh.rules", pattern, f"no regular expression: {error}")


def _is_entry(entry) -> bool:
  if isinstance(entry, list | tuple):
    return all(isinstance(name, str) for name in entry)
  return entry is None or isinstance(entry, str)


def _check_fit(pattern, path, shape, spec, sizes) -> None:
  if len(spec) > len(shape):
    checks.fail(
      "mesh.rules",
      pattern,
      f"{len(spec)} entries for {path} of shape {shape}; use {len(shape)}, or"
      " fewer",
    )
  for size, entry in zip(shape, spec, strict=False):
    parts = int(np.prod([sizes[name] for name in _axes_of(entry)]))
    if size % parts:
      checks.fail(
        "mesh.rules",
        pattern,
        f"{path} has shape {shape}, and {size} is no multiple of {parts}; split"
        " another axis, or none",
      )


def _check_used(preset, specs, sizes) -> None:
  used = {n for spec in specs.values() for e in spec for n in _axes_of(e)}
  # A mesh axis without a leaf would compute the same rows many times over.
  if sizes["tensor"] > 1 and "tensor" not in used:
    checks.fail(
      "mesh.tensor",
      sizes["tensor"],
      f"splits no parameter of this model with sharding {preset!r}; use 1, or"
      " rules",
    )


def _by_preset(preset, path, shape, sizes) -> PartitionSpec:
  last, second = len(shape) - 1, len(shape) - 2
  is_large = np.prod(shape, dtype=np.int64) >= MIN_SIZE
  names = {}
  if preset == "fsdp+tensor" and _BY_OUTPUTS.fullmatch(path):
    names = {last: "tensor"}
    if path.endswith("kernel"):
      names[second] = "fsdp"
  elif preset == "fsdp+tensor" and _BY_INPUTS.fullmatch(path):
    names = {second: "tensor", last: "fsdp"}
  elif preset != "replicated":
    axes = range(len(shape))[-2:]
    fits = [(shape[a], a) for a in axes if shape[a] % sizes["fsdp"] == 0]
    names = {max(fits)[1]: "fsdp"} if fits else {}
  entries = [None] * len(shape)
  for axis, name in names.items():
    splits = sizes[name] > 1 and shape[axis] % sizes[name] == 0
    if splits and (is_large or name == "tensor"):
      entries[axis] = name
  while entries and entries[-1] is None:
    entries.pop()
  return PartitionSpec(*entries)


def _parts(spec, sizes) -> int:
  names = [name for entry in spec for name in _axes_of(entry)]
  return int(np.prod([sizes[name] for name in names]))


def _spec_text(spec) -> str:
  if not spec:
    return "-"
  return ", ".join("+".join(_axes_of(entry)) or "-" for entry in spec)
