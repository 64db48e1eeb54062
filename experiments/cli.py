"""Flags of the programs: a mistake is one line on stderr and exit code 2."""

import sys
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import config_flags

from dpc_jax.training import config as config_lib
from dpc_jax.training import loop

FLAGS = flags.FLAGS


def define_config() -> None:
  """Defines --config and --workdir."""
  config_flags.DEFINE_config_file(
    "config",
    None,
    "The recipe, such as configs/digits_resnet8.py:dpc; override its fields"
    " with --config.FIELD=VALUE.",
  )
  flags.DEFINE_string("workdir", None, "The run's folder; made if absent.")


def run(main: Callable[[], int | None], argv: Sequence[str]) -> int:
  """Parses the flags, calls `main`, and returns the exit code.

  0: done, or stopped by SIGTERM and saved. 1: the loss diverged. 2: a user's
  mistake, in one line.
  """
  try:
    rest = FLAGS(list(argv))
    if len(rest) > 1:
      return _mistake(f"unexpected argument {rest[1]!r}; flags start with --")
    missing = _missing_flag()
    if missing:
      return _mistake(missing)
  # What ml_collections raises for a wrong key, file, type or get_config.
  except (
    flags.Error,
    AttributeError,
    ImportError,
    KeyError,
    OSError,
    TypeError,
    ValueError,
  ) as error:
    return _mistake(f"{type(error).__name__}: {_one_line(error)}")
  try:
    return main() or 0
  except config_lib.ConfigError as error:
    return _mistake(_one_line(error))
  except loop.DivergedError as error:
    print(f"error: {_one_line(error)}", file=sys.stderr)
    return 1


def _missing_flag() -> str | None:
  """What is wrong with --config and --workdir, or None."""
  for name in ("config", "workdir"):
    if FLAGS[name].value is None:
      return f"--{name} is missing; see --help"
  # A config file that is not there shows when it is first read.
  FLAGS.config.to_dict()
  return None


def _one_line(error: BaseException) -> str:
  return " ".join(str(error).split())


def _mistake(text: str) -> int:
  print(f"error: {text}", file=sys.stderr)
  return 2
