"""Configs: validated and resolved before anything is built or compiled."""

import hashlib
import json
import math
import os
import pathlib
from typing import Any

import ml_collections

from dpc_jax.quant import remat
from dpc_jax.training import checks, config_precision, partition
from dpc_jax.training.checks import ConfigError

OPTIMIZERS = ("sgd", "adamw")
LEARNING_RATE_SCHEDULES = ("constant", "cosine", "steps")
MATMUL_PRECISIONS = (None, "default", "high", "highest")
# Where the data lies, who decodes it, how the run is spread over devices, what
# is kept of it and when it gives up: none of this changes a number of the run.
_NOT_COMPARED = (
  "checkpoint_every",
  "keep_checkpoints",
  "keep_best",
  "max_skipped",
  "steps_per_call",
  "data.dir",
  "data.on_device",
  "data.workers",
  "mesh.data",
  "mesh.fsdp",
  "mesh.tensor",
  "mesh.sharding",
  "mesh.rules",
)
# Of these, what may be of each process its own.
_OF_A_HOST = ("data.dir", "data.workers")
# Differences between two runs that one line names.
_SHOWN = 5
_MOST_STEPS_PER_CALL = 1024
_MAX_SEED = 2**32 - 1
_MAX_STEPS = 2**31 - 1  # the step is an int32


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks what can be checked without the data.

  Raises:
    ConfigError: naming the first field that is wrong.
  """
  if config.steps is None and config.epochs is None:
    checks.fail("steps", None, "set steps or epochs")
  for name in (
    "batch_size",
    "eval_batch_size",
    "eval_every",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
  ):
    checks.check(config, name, config[name] >= 1, "must be at least 1")
  checks.check(
    config,
    "steps_per_call",
    1 <= config.steps_per_call <= _MOST_STEPS_PER_CALL,
    f"must be in 1..{_MOST_STEPS_PER_CALL}: a call's batches lie on the devices"
    " together",
  )
  checks.check(
    config,
    "max_skipped",
    config.max_skipped is None or config.max_skipped >= 1,
    "must be at least 1, or None to stop at the first",
  )
  checks.check(
    config, "seed", 0 <= config.seed <= _MAX_SEED, "must be in 0..2^32-1"
  )
  for name in ("steps", "epochs"):
    length = config[name]
    checks.check(
      config,
      name,
      length is None or (math.isfinite(length) and length > 0),
      "must be positive",
    )
  _validate_data(config)
  _validate_model(config)
  checks.check_choice(config, "matmul_precision", MATMUL_PRECISIONS)
  checks.check_choice(config, "remat", (None, *remat.POLICIES))
  config_precision.validate(config)
  _validate_optimizer(config)
  checks.check_choice(config, "mesh.sharding", (None, *partition.PRESETS))


def _validate_data(config) -> None:
  checks.check_each(
    config,
    "data",
    ("unroll", "image_size", "workers"),
    checks.is_count,
    "must be at least 1, or left out",
  )


def _validate_model(config) -> None:
  sizes = ("width", "widening", "layers", "heads", "mlp_width", "patch_size")
  checks.check_each(
    config, "model", sizes, checks.is_count, "must be at least 1, or left out"
  )
  checks.check_each(
    config,
    "model",
    ("width_multiplier",),
    checks.is_positive,
    "must be finite and positive, or left out",
  )
  rates = ("dropout", "attention_dropout", "activation_dropout", "tail_dropout")
  checks.check_each(
    config, "model", rates, checks.is_rate, "must be in [0, 1), or left out"
  )
  cutoffs = config.model.cutoffs
  checks.check(
    config,
    "model.cutoffs",
    cutoffs is None
    or (
      all(isinstance(c, int) and c >= 1 for c in cutoffs)
      and list(cutoffs) == sorted(set(cutoffs))
    ),
    "must be increasing numbers of words",
  )


def _validate_optimizer(config) -> None:
  optimizer = config.optimizer
  checks.check_choice(config, "optimizer.name", OPTIMIZERS)
  checks.check_choice(config, "optimizer.schedule", LEARNING_RATE_SCHEDULES)
  checks.check_each(
    config,
    "optimizer",
    ("learning_rate", "weight_decay"),
    lambda value: math.isfinite(value) and value >= 0,
    "must be finite and not negative",
  )
  checks.check_each(
    config,
    "optimizer",
    ("clip",),
    checks.is_positive,
    "must be positive, or left out",
  )
  checks.check_each(
    config,
    "optimizer",
    ("momentum", "warmup"),
    checks.is_rate,
    "must be in [0, 1)",
  )
  checks.check(
    config,
    "optimizer.boundaries",
    all(isinstance(b, float) and 0 < b < 1 for b in optimizer.boundaries)
    and list(optimizer.boundaries) == sorted(set(optimizer.boundaries)),
    "must be increasing fractions of the run, in (0, 1)",
  )
  checks.check(
    config,
    "optimizer.boundaries",
    optimizer.schedule != "steps"
    or all(b > optimizer.warmup for b in optimizer.boundaries),
    f"must come after the warm-up, {optimizer.warmup} of the run",
  )


def resolve(
  config: ml_collections.ConfigDict, train_size: int, devices: int
) -> ml_collections.FrozenConfigDict:
  """Fills in what depends on the data and the devices.

  Args:
    config: a validated config.
    train_size: batch rows that make up one pass over the training split.
    devices: devices on the mesh's axes data and fsdp, over which the rows of a
      batch are split.

  Returns:
    The config with `steps` set; nothing in it depends on the devices.

  Raises:
    ConfigError: a batch that does not divide over the devices; a run of less
      than one step, or of 2^31.
  """
  config = ml_collections.ConfigDict(config.to_dict())
  if config.batch_size % devices:
    checks.fail(
      "batch_size",
      config.batch_size,
      f"must be a multiple of the {devices} devices of mesh.data x mesh.fsdp",
    )
  if config.epochs is not None:
    # Whole steps; the summand is for 0.29 * 100 = 28.999999999999996.
    config.steps = math.floor(
      config.epochs * train_size / config.batch_size + 1e-6
    )
    if config.steps < 1:
      checks.fail(
        "epochs",
        config.epochs,
        f"{train_size} rows in batches of {config.batch_size} give no step",
      )
  config_precision.check_length(config)
  steps = [round(b * config.steps) for b in config.optimizer.boundaries]
  if config.optimizer.schedule == "steps" and len(set(steps)) < len(steps):
    checks.fail(
      "optimizer.boundaries",
      config.optimizer.boundaries,
      f"two of them fall on one of the {config.steps} steps",
    )
  if config.steps > _MAX_STEPS:
    name = "steps" if config.epochs is None else "epochs"
    checks.fail(name, config[name], f"must give at most {_MAX_STEPS} steps")
  return ml_collections.FrozenConfigDict(config)


def config_hash(config: Any) -> str:
  """First 12 hex digits of the SHA-256 of what makes the run."""
  text = json.dumps(_compared(config), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def claim_workdir(config: Any, workdir: pathlib.Path) -> None:
  """Writes `config.json`, or checks that the one there is the same.

  One process at a time may do so; of several, one does it for all.

  Raises:
    ConfigError: the workdir holds a run of another config, or one without
      `config.json`, or is new and cannot be written.
    TransientError: it holds this run, not finished, and cannot be written now.
  """
  path = workdir / "config.json"
  try:
    is_locked = workdir.is_dir() and not os.access(workdir, os.W_OK)
    if path.exists():
      _check_claim(config, workdir, path.read_bytes())
      if is_locked and not (workdir / "summary.json").exists():
        raise checks.TransientError(
          f"workdir = {workdir}: holds this run, and cannot be written; mend"
          " that, and the same command goes on from the last save"
        )
    elif is_locked:
      raise ConfigError(
        f"workdir = {workdir}: cannot be written; use another workdir"
      )
    elif (workdir / "checkpoints").exists():
      raise ConfigError(
        f"workdir = {workdir}: holds checkpoints, but config.json is missing;"
        " use another workdir"
      )
    else:
      workdir.mkdir(parents=True, exist_ok=True)
      temporary = path.with_suffix(".tmp")
      temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
      temporary.replace(path)
  except OSError as error:
    raise ConfigError(
      f"workdir = {workdir}: {error.strerror}; use another workdir"
    ) from None


# Fields that older programs did not have, and the value that they had.
_ADDED = {
  "precision.ranges": "batch",
  "precision.backend": "simulated",
  "precision.input_gradient": "exact",
  "remat": None,
}


def _check_claim(config, workdir, text) -> None:
  try:
    there = _flat(json.loads(text))
  except (ValueError, AttributeError):
    raise ConfigError(
      f"workdir = {workdir}: config.json is damaged; use another workdir"
    ) from None
  here = _compared(config)
  unread = config_precision.unread(config.precision)
  names = {
    name
    for name in {*here, *there} - set(_NOT_COMPARED)
    if not name.startswith(unread)
    and here.get(name, _ADDED.get(name)) != there.get(name, _ADDED.get(name))
  }
  if names:
    raise ConfigError(
      f"workdir = {workdir}: holds another run; {_listed(names, here, there)};"
      " use another workdir, or delete it"
    )


def difference(
  config: Any, other: dict[str, Any], words: tuple[str, str]
) -> str:
  """Where a config differs from that of another process; "" for nowhere.

  Args:
    config: resolved.
    other: `shared` of the other process.
    words: before a value of the other, and of this one.
  """
  here = shared(config)
  names = {*here, *other}
  return _listed(
    {n for n in names if _shown(here, n) != _shown(other, n)},
    here,
    other,
    words,
  )


def shared(config: Any) -> dict[str, Any]:
  """{path: value} of what all processes of a run must have alike, as in JSON.

  All but where the data lies and who decodes it: what does not change a number
  of the run, such as `checkpoint_every` or the mesh, says when processes meet.
  """
  flat = _flat(json.loads(json.dumps(config.to_dict())))
  return {name: x for name, x in flat.items() if name not in _OF_A_HOST}


def _listed(names, here, there, words=("there", "here")) -> str:
  listed = [
    f"{name}: {words[0]} {_shown(there, name)}, {words[1]} {_shown(here, name)}"
    for name in sorted(names)
  ]
  more = len(listed) - _SHOWN
  return "; ".join(listed[:_SHOWN] + [f"and {more} more"] * (more > 0))


def _shown(fields: dict[str, Any], name: str) -> str:
  return repr(fields[name]) if name in fields else "no such field"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= _flat(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = value
  return flat


def _compared(config) -> dict[str, Any]:
  """{path: value} of the fields that make the run."""
  flat = _flat(json.loads(json.dumps(config.to_dict())))
  unread = config_precision.unread(config.precision)
  return {
    name: value
    for name, value in flat.items()
    if name not in _NOT_COMPARED and not name.startswith(unread)
  }
