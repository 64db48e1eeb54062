"""How a config's mistakes are said: one line of field, value, remedy."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class ConfigError(ValueError):
  """A user's mistake; the message is one line: field, value, remedy."""


class TransientError(ConfigError):
  """What may be over another time: the same command may succeed then."""


def fail(name: str, value: Any, remedy: str) -> NoReturn:
  """Raises ConfigError for the field `name`."""
  raise ConfigError(f"config.{name} = {value!r}: {remedy}")


def check(config: Any, name: str, is_right: bool, remedy: str) -> None:
  """Raises ConfigError unless the field `name`, a dotted path, is right."""
  if not is_right:
    fail(name, _value(config, name), remedy)


def check_each(
  config: Any,
  group: str,
  names: Sequence[str],
  is_right: Callable[[Any], bool],
  remedy: str,
) -> None:
  """Raises ConfigError unless each field of a group is right, or None."""
  for name in names:
    value = config[group][name]
    check(config, f"{group}.{name}", value is None or is_right(value), remedy)


def is_count(value: float) -> bool:
  """Whether a number is 1 or more."""
  return value >= 1


def is_rate(value: float) -> bool:
  """Whether a number is in [0, 1)."""
  return 0 <= value < 1


def is_positive(value: float) -> bool:
  """Whether a number is finite and above 0."""
  return math.isfinite(value) and value > 0


def check_choice(config: Any, name: str, known: tuple[Any, ...]) -> None:
  """Raises ConfigError unless the field is one of `known`."""
  named = [str(k) for k in known if k is not None]
  one_of = "one of " if len(named) > 1 else ""
  out = ", or leave it out" if None in known else ""
  remedy = f"use {one_of}{', '.join(named)}{out}"
  check(config, name, _value(config, name) in known, remedy)


def _value(config, name):
  for part in name.split("."):
    config = config[part]
  return config
