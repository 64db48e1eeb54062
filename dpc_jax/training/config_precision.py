"""The checks of `config.precision`."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from dpc_jax.policy import dpc
from dpc_jax.quant import grids
from dpc_jax.training import checks, methods

# Models with a layer that is called several times in a training step.
WITHOUT_DELAYED_RANGES = ("lstm_lm",)


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks `config.precision` as far as it goes without the data.

  Raises:
    ConfigError: naming the first field that is wrong.
  """
  precision = config.precision
  static = methods.static_width(precision.method)
  checks.check(
    config,
    "precision.method",
    methods.is_known(precision.method),
    f"use one of {', '.join(methods.names())}, with <b> as in static8",
  )
  if static is not None:
    checks.check(
      config,
      "precision.method",
      2 <= static <= 16,
      "the width must be in 2..16",
    )
  for name in ("b_min", "b_max"):
    checks.check(
      config,
      f"precision.{name}",
      2 <= precision[name] <= 16,
      "must be in 2..16",
    )
  # For every method: a recipe's mistake must show before another's run.
  try:
    dpc.check_arguments(
      precision.b_min,
      precision.b_max,
      precision.delta,
      precision.center,
      precision.log_form,
    )
  except ValueError as error:
    raise checks.ConfigError(f"config.precision: {error}") from None
  _validate_widths(config, static)
  _validate_bounds(config)
  _validate_adaptive(config)
  checks.check(
    config,
    "precision.pfq.stages",
    precision.pfq.stages >= 2,
    "must be at least 2",
  )
  try:
    methods.make_schedule(precision, methods.Run(1, 1, {}, ()))
  except ValueError as error:
    own = methods.group(precision.method)
    field = f"precision.{own}" if own else "precision"
    raise checks.ConfigError(f"config.{field}: {error}") from None


def _validate_widths(config, static) -> None:
  precision = config.precision
  for name in ("weights", "activations", "gradients"):
    width = precision[name]
    checks.check(
      config,
      f"precision.{name}",
      width is None or 2 <= width <= 16 or width == 32,
      "must be in 2..16, or 32 for float",
    )
  checks.check_choice(config, "precision.kind", ("affine", "symmetric"))
  checks.check_choice(config, "precision.storage_bits", (None, 8))
  checks.check_choice(config, "precision.ranges", grids.RANGES)
  _validate_codes(config)
  checks.check(
    config,
    "precision.ranges",
    precision.ranges == "batch"
    or config.model.name not in WITHOUT_DELAYED_RANGES,
    f"{config.model.name} loops over time, and all its steps are one layer's;"
    " use batch",
  )
  widest = static if static is not None else precision.b_max
  for name in ("weights", "activations"):
    width = widest if precision[name] is None else precision[name]
    checks.check(
      config,
      "precision.storage_bits",
      precision.storage_bits is None
      or precision.method == "float"
      or width <= precision.storage_bits,
      f"a width of {width} ({name}) does not fit; leave it out",
    )


def _validate_codes(config) -> None:
  """Checks what multiplies codes: the backend and the input gradient."""
  precision = config.precision
  for name, known, plain in (
    ("backend", grids.BACKENDS, "simulated"),
    ("input_gradient", grids.INPUT_GRADIENTS, "exact"),
  ):
    field = f"precision.{name}"
    checks.check_choice(config, field, known)
    uses_codes = precision[name] != plain
    checks.check(
      config,
      field,
      not uses_codes or precision.storage_bits == 8,
      "needs storage_bits = 8",
    )
    checks.check(
      config,
      field,
      not uses_codes or precision.ranges == "batch",
      "needs ranges = batch",
    )
  checks.check(
    config,
    "precision.input_gradient",
    precision.input_gradient == "exact" or precision.kind == "symmetric",
    "needs kind = symmetric",
  )
  checks.check(
    config,
    "precision.backend",
    precision.backend == "simulated" or (precision.gradients or 8) <= 8,
    f"a width of {precision.gradients} (gradients) does not fit; use 2..8",
  )


def unread(precision: Mapping[str, Any]) -> tuple[str, ...]:
  """Beginnings of the fields, by path, that such a run does not look at.

  Args:
    precision: `config.precision`, or what a config.json holds of it.
  """
  names = {f"precision.{name}." for name in ("adaptive", "pfq")}
  names.discard(f"precision.{methods.group(precision['method'])}.")
  if precision.get("bounds") is None or not methods.has_bounds(
    precision["method"]
  ):
    names |= {"precision.bounds_step", "precision.tau_"}
  return tuple(sorted(names))


def finds_bounds(config: ml_collections.ConfigDict) -> bool:
  """Whether the run measures its bounds on the way."""
  precision = config.precision
  return precision.bounds is not None and methods.has_bounds(precision.method)


def check_length(config: ml_collections.ConfigDict) -> None:
  """Checks what is to happen within `config.steps`, once it is known.

  Raises:
    ConfigError: the bounds would be measured after the end.
  """
  step = config.precision.bounds_step
  if finds_bounds(config) and step >= config.steps:
    checks.fail(
      "precision.bounds_step",
      step,
      f"must come before the end of the run, {config.steps} steps",
    )


def _validate_bounds(config) -> None:
  precision = config.precision
  checks.check_choice(config, "precision.bounds", (None, "auto"))
  checks.check(
    config,
    "precision.bounds_step",
    precision.bounds_step >= 0,
    "must not be negative",
  )
  for name in ("tau_min", "tau_max"):
    checks.check(
      config,
      f"precision.{name}",
      0 < precision[name] <= 1,
      "must be in (0, 1]",
    )
  checks.check(
    config,
    "precision.tau_min",
    precision.tau_min <= precision.tau_max,
    f"must not be above tau_max, {precision.tau_max}",
  )


def _validate_adaptive(config) -> None:
  adaptive = config.precision.adaptive
  checks.check(
    config,
    "precision.adaptive.memory",
    adaptive.memory in ("full", "sketch"),
    "use full or sketch; without the mean there is no noise-to-signal ratio",
  )
  for name in ("decay", "average"):
    value = adaptive[name]
    checks.check(
      config,
      f"precision.adaptive.{name}",
      value is None or 0 < value < 1,
      "must be in (0, 1)",
    )
