"""The constants of adaptive DPC's rule; `adaptive` has the rule itself."""

import math
import numbers
from typing import NamedTuple

import numpy as np

DIRECTIONS = ("noisy_up", "noisy_down")
SIGNALS = ("noise_to_signal", "variance")


class Rule(NamedTuple):
  """When a layer moves; all of it is our decision.

  Attributes:
    warmup: epochs, at least 1, before the reference is taken.
    patience: epochs in a row, at least 1.
    threshold: half of the dead band, in nats, >= 0.
    freeze: fraction of the run in (0, 1] after which nothing moves; None never.
    rebase: whether a move sets the layer's reference to its present value.
    signal: R_k: "noise_to_signal", or "variance", which is measured better but
      changes with the scale of a layer's weights.
    direction: "noisy_up", or "noisy_down", the reverse: a control.
    budget: largest cost of a step relative to b_max everywhere, in (0, 1], of
      the quantized layers with weights; "start": that of static DPC, where the
      run starts; None: no limit. Where moves would exceed it, layers that did
      not ask for one pay with a bit each, the least noisy first (with
      "noisy_down" the noisiest); a gain that they cannot pay for is refused.
  """

  warmup: int
  patience: int
  threshold: float
  freeze: float | None
  rebase: bool
  signal: str
  direction: str
  budget: float | str | None


def check(rule: Rule) -> None:
  """Checks a rule.

  Raises:
    ValueError: naming the field that is out of its range.
  """
  for name in ("warmup", "patience"):
    check_count(name, getattr(rule, name))
  if not _is_real(rule.threshold) or not 0 <= rule.threshold < math.inf:
    raise ValueError(
      f"threshold = {rule.threshold!r} must be finite and not negative"
    )
  for name, known in (("direction", DIRECTIONS), ("signal", SIGNALS)):
    value = getattr(rule, name)
    if value not in known:
      raise ValueError(f"{name} = {value!r}: use one of {', '.join(known)}")
  if not isinstance(rule.rebase, bool | np.bool_):
    raise ValueError(f"rebase = {rule.rebase!r} must be True or False")
  for name, word in (("freeze", None), ("budget", "start")):
    value = getattr(rule, name)
    if value in (None, word):
      continue
    if not _is_real(value) or not 0 < value <= 1:
      words = "None" if word is None else f"{word!r}, or None"
      raise ValueError(f"{name} = {value!r} must be in (0, 1], or {words}")


def check_count(name: str, value: int) -> None:
  """Raises ValueError unless `value` is an int from 1 on."""
  is_int = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  if not is_int or value < 1:
    raise ValueError(f"{name} = {value!r} must be an int, at least 1")


def _is_real(value) -> bool:
  return isinstance(value, numbers.Real) and not isinstance(value, bool)
