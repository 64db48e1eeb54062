"""Signs that a run goes wrong: skipped steps, layers that died."""

import math
from collections.abc import Mapping

import flax
import jax
import jax.numpy as jnp
import numpy as np

from dpc_jax.policy import capacity
from dpc_jax.training import build, sharding
from dpc_jax.training import state as state_lib


class DivergedError(RuntimeError):
  """The loss or the state is not finite; the message says what is left."""


class Watch:
  """Looks at a run's state when the host looks at it anyway."""

  def __init__(self, parts: build.Parts, state: state_lib.TrainState):
    """Begins with the steps that `state` counts as skipped."""
    self._max_skipped = parts.config.max_skipped
    self._skipped = int(state.skips.total)
    self._is_finite = jax.jit(state_lib.is_finite)
    self._equal = jax.jit(
      equal_weights, out_shardings=sharding.replicated(parts.mesh)
    )
    # Layers whose weights were all equal at the last look, and those told.
    self._suspects, self._told = set(), set()

  def is_finite(self, state: state_lib.TrainState) -> bool:
    """Whether all floats in the state are finite."""
    return bool(self._is_finite(state))

  def skipped(
    self, state: state_lib.TrainState, step: int
  ) -> tuple[str | None, str | None]:
    """What there is to say about steps skipped since the last look.

    Returns:
      (why the run has to stop or None, a line to show or None). It stops where
      the last `max_skipped` steps were skipped; None: where any was.
    """
    skips = jax.device_get(state.skips)
    count, self._skipped = skips.total - self._skipped, int(skips.total)
    limit = self._max_skipped
    if count > 0 and limit is None:
      return f"{_culprit(state, skips.leaf)} is not finite", None
    if limit is not None and skips.in_row >= limit:
      what = _culprit(state, skips.leaf)
      return f"{what} is not finite, {skips.in_row} steps in a row", None
    if count == 0:
      return None, None
    steps = "1 step" if count == 1 else f"{count} steps"
    return None, (
      f"warning: {steps} skipped up to step {step},"
      f" {_culprit(state, skips.leaf)} was not finite; {skips.total} in all"
    )

  def dead(self, state: state_lib.TrainState) -> list[str]:
    """A line on each layer that is newly found dead, at two looks in a row.

    At one look alone a layer that starts at zero may not have moved yet.
    """
    found = {
      f"{path}[{i}]" if flags.ndim else path: _bits(state, path)
      for path, flags in jax.device_get(self._equal(state)).items()
      for i, is_equal in enumerate(np.atleast_1d(flags))
      if is_equal
    }
    new = [x for x in found if x in self._suspects and x not in self._told]
    self._suspects = set(found)
    self._told.update(new)
    return [
      f"warning: layer {name}{found[name]}: all its weights are equal, which"
      " is one code for all; it has died"
      for name in new
    ]


def equal_weights(state: state_lib.TrainState) -> dict[str, jax.Array]:
  """{path: whether all weights of the layer's kernel are equal}; jit-able.

  Of the quantized layers with more than one weight; bool (), or (layers,) of a
  layer that `nn.scan` stacks.
  """
  if "precision" not in state.model_state:
    return {}
  found = {}
  variables = {"params": state.params, **state.model_state}
  for path, layer in capacity.layers(variables).items():
    if not layer.parameters:
      continue
    kernel = flax.core.meta.unbox(layer.parameters["kernel"])
    kernel = kernel.reshape(*layer.stack, -1)
    if kernel.shape[-1] > 1:
      found[path] = jnp.max(kernel, axis=-1) == jnp.min(kernel, axis=-1)
  return found


def _culprit(state: state_lib.TrainState, leaf: int) -> str:
  """The loss, or the gradient of a leaf with its layer's widths."""
  if leaf == 0:
    return "the loss"
  paths = [
    "/".join(str(getattr(entry, "key", entry)) for entry in path)
    for path, _ in jax.tree_util.tree_leaves_with_path(state.params)
  ]
  path = paths[int(leaf) - 1]
  layer = path.rpartition("/")[0]
  return f"the gradient of {path}{_bits(state, layer)}"


def _bits(state: state_lib.TrainState, path: str) -> str:
  """A layer's widths in words, " (4/4/8 bits)"; "" without any."""
  layer = state_lib.layer_bits(state).get(path)
  if layer is None:
    return ""
  widths = "/".join(str(np.asarray(w).tolist()) for w in layer)
  return f" ({widths} bits)"


def not_finite(means: Mapping[str, float], split: str) -> str | None:
  """Which of the means is not finite, in words, or None."""
  for name, value in means.items():
    if not math.isfinite(value):
      return f"the {split}{name} is {value}"
  return None
