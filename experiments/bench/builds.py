"""What the programs that compile several variants of a recipe share."""

from collections.abc import Mapping
from typing import Any

from dpc_jax.training import build


def without_data(config: Any) -> Any:
  """The recipe on made-up data of its shapes, changed in place."""
  config.data.fake = True
  config.data.holdout = 0
  config.data.workers = None
  return config


def build_all(variants: Mapping[str, Any]) -> dict[str, build.Parts]:
  """{label: parts} of {label: config}.

  All are built first: a mistake in the last must not cost the first's time.
  """
  return {label: build.build(config) for label, config in variants.items()}
