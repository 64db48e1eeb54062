"""BatchNorm folded into the convolution before it.

In evaluation a normalization is a factor and a shift for each channel:

    k = scale / sqrt(var + epsilon)      BN(y) = k y + (bias - k mean)

so with the kernel W of the convolution before it replaced by k W, what is left
of it is a bias. The module keeps its normalization, with mean 0, var + epsilon
and scale 1, and that bias.

It comes before quantization, which then sees k W: over ranges per output
channel the codes stay but for ties of rounding, and are mirrored where k < 0;
with one range per tensor they change.
"""

from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from dpc_jax.export import errors
from dpc_jax.models import mobilenet_v2, resnet, resnet_imagenet

# Of `nn.BatchNorm`, and of all models here.
EPSILON = 1e-5
_FAMILIES = (
  resnet.ResNet,
  resnet_imagenet.ResNetImageNet,
  mobilenet_v2.MobileNetV2,
)
# In these families a convolution is followed by its normalization alone, and
# their names are in one block: `conv1`, `norm1`; `stem`, `stem_norm`.
_NUMBERED = {f"norm{i}": f"conv{i}" for i in (1, 2, 3)}
_SUFFIX = "_norm"
_LEAVES = {"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}}


def fold_batch_norm(
  model: nn.Module,
  variables: Mapping[str, Any],
  pairs: Mapping[str, str] | None = None,
  epsilon: float = EPSILON,
) -> dict[str, Any]:
  """Folds every BatchNorm into the kernel of the convolution before it.

  Args:
    model: a ResNet or MobileNetV2 of this package; of another with `pairs`.
    variables: all collections, kernels in float; not changed.
    pairs: {path of a normalization: path of the convolution (or dense layer)
      that it, and nothing else, follows}; None: as the model's family says.
    epsilon: of the normalizations.

  Returns:
    Variables of the same model that evaluate to the same, but for rounding,
    with widths of 32, and whose kernels are to be quantized anew.

  Raises:
    ExportError: no BatchNorm; one whose convolution is not known, or that has
      no scale, no bias or other channels than that.
  """
  variables = flax.core.unfreeze(nn.meta.unbox(dict(variables)))
  flat = flax.traverse_util.flatten_dict(variables, sep="/")
  norms = sorted(
    name.removeprefix("batch_stats/").rpartition("/")[0]
    for name in flat
    if name.startswith("batch_stats/") and name.endswith("/mean")
  )
  if not norms:
    raise errors.ExportError(
      f"{type(model).__name__}: has no BatchNorm to fold; leave it out"
    )
  if pairs is None:
    pairs = _pairs(model, norms)
  if missing := [path for path in norms if path not in pairs]:
    raise errors.ExportError(
      f"{type(model).__name__}: {missing[0]!r}: which convolution this"
      " BatchNorm follows is not known; name it in pairs, or do not fold"
    )
  for norm in norms:
    _fold(flat, norm, pairs[norm], epsilon)
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def _pairs(model, norms) -> dict[str, str]:
  if not isinstance(model, _FAMILIES):
    return {}
  found = {}
  for path in norms:
    parent, _, name = path.rpartition("/")
    conv = _NUMBERED.get(name) or name.removesuffix(_SUFFIX)
    found[path] = f"{parent}/{conv}" if parent else conv
  return found


def _fold(flat, norm, conv, epsilon) -> None:
  """Changes the leaves of a normalization and its convolution in `flat`."""
  kernel_name = f"params/{conv}/kernel"
  names = {
    leaf: f"{collection}/{norm}/{leaf}"
    for collection, leaves in _LEAVES.items()
    for leaf in leaves
  }
  for name in (kernel_name, *names.values()):
    if name not in flat:
      raise errors.ExportError(f"{norm!r}: cannot be folded without {name}")
  scale, bias, mean, var = (
    np.asarray(flat[names[leaf]], np.float64)
    for leaf in ("scale", "bias", "mean", "var")
  )
  kernel = np.asarray(flat[kernel_name], np.float64)
  if kernel.shape[-1] != scale.shape[-1]:
    raise errors.ExportError(
      f"{norm!r}: has {scale.shape[-1]} channels, and {conv!r} gives"
      f" {kernel.shape[-1]}; name the layer before it in pairs"
    )
  k = scale / np.sqrt(var + epsilon)
  shift = bias - k * mean
  conv_bias = f"params/{conv}/bias"
  if conv_bias in flat:
    shift = shift + k * np.asarray(flat[conv_bias], np.float64)
    flat[conv_bias] = jnp.zeros_like(flat[conv_bias])
  # Stacked layers lead in both.
  axes = (1,) * (kernel.ndim - k.ndim)
  wide = k.reshape(*k.shape[:-1], *axes, k.shape[-1])
  for name, value in (
    (kernel_name, kernel * wide),
    (names["scale"], np.ones_like(scale)),
    (names["bias"], shift),
    (names["mean"], np.zeros_like(mean)),
    (names["var"], np.full_like(var, _unit_variance(epsilon))),
  ):
    flat[name] = jnp.asarray(value, flat[name].dtype)


def _unit_variance(epsilon: float) -> np.float32:
  """The float32 whose sum with epsilon is 1, or nearest to it."""
  epsilon = np.float32(epsilon)
  near = np.float32(1) - epsilon
  options = (near, np.nextafter(near, np.float32(2), dtype=np.float32))
  return min(options, key=lambda x: abs(x + epsilon - np.float32(1)))
