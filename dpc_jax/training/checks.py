"""How a config's mistakes are said: one line of field, value, remedy."""

from typing import Any, NoReturn


class ConfigError(ValueError):
  """A user's mistake; the message is one line: field, value, remedy."""


def fail(name: str, value: Any, remedy: str) -> NoReturn:
  """Raises ConfigError for the field `name`."""
  raise ConfigError(f"config.{name} = {value!r}: {remedy}")


def check(config: Any, name: str, is_right: bool, remedy: str) -> None:
  """Raises ConfigError unless the field `name`, a dotted path, is right."""
  if not is_right:
    fail(name, _value(config, name), remedy)


def check_choice(config: Any, name: str, known: tuple[Any, ...]) -> None:
  """Raises ConfigError unless the field is one of `known`."""
  listed = ", ".join("none" if k is None else str(k) for k in known)
  check(config, name, _value(config, name) in known, f"use one of {listed}")


def _value(config, name):
  for part in name.split("."):
    config = config[part]
  return config
