"""What the programs that compile several variants of a recipe share."""

import copy
import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from dpc_jax.training import build, checks


def without_data(config: Any) -> Any:
  """The recipe on made-up data of its shapes, changed in place."""
  config.data.fake = True
  config.data.holdout = 0
  config.data.workers = None
  config.steps_per_call = 1
  return config


def build_all(variants: Mapping[str, Any]) -> dict[str, build.Parts]:
  """{label: parts} of {label: config}.

  All are built first: a mistake in the last must not cost the first's time.
  """
  return {label: build.build(config) for label, config in variants.items()}


def variant(config: Any, text: str, flag: str) -> Any:
  """A copy of a recipe with another method and other fields.

  Args:
    config: the recipe, not changed.
    text: METHOD, or METHOD,FIELD=VALUE,...; fields of `precision` need no
      prefix; a value is read as JSON has it, else as text.
    flag: where `text` comes from, for the error.

  Raises:
    ConfigError: no such field, or a value of another type.
  """
  method, *changes = text.split(",")
  found = copy.deepcopy(config)
  found.precision.method = method
  for change in changes:
    field, is_set, value = change.partition("=")
    name = f"precision.{field}" if field in found.precision else field
    if not is_set or not _has(found, name):
      known = [*found.precision, *found]
      close = difflib.get_close_matches(field, known, n=1)
      remedy = (
        f"did you mean {close[0]}?" if close else "see configs/default.py"
      )
      raise checks.ConfigError(
        f"--{flag}={text}: {field} is no field; {remedy}"
      )
    try:
      found.update_from_flattened_dict({name: _read(value)})
    except (TypeError, ValueError) as error:
      raise checks.ConfigError(f"--{flag}={text}: {error}") from None
  return found


def variants(config: Any, texts: Iterable[str], flag: str) -> dict[str, Any]:
  """{text: `variant`} of several."""
  return {text: variant(config, text, flag) for text in texts}


def _has(config, name) -> bool:
  node = config
  for part in name.split("."):
    if not hasattr(node, "to_dict") or part not in node:
      return False
    node = node[part]
  return True


def _read(value):
  if value == "None":
    return None
  try:
    return json.loads(value)
  except ValueError:
    return value
