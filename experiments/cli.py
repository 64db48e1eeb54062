"""Flags of the programs: a mistake is one line on stderr and exit code 2."""

import difflib
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from dpc_jax.data import prepared
from dpc_jax.training import config as config_lib
from dpc_jax.training import loop

FLAGS = flags.FLAGS

_HELP = ("--help", "-help", "-h", "--helpfull", "--helpshort")
# A recipe is a person's program: what it may raise.
_RECIPE_ERRORS = (
  ArithmeticError,
  AttributeError,
  ImportError,
  LookupError,
  NameError,
  OSError,
  RuntimeError,
  SyntaxError,
  TypeError,
  ValueError,
)


def define_config() -> None:
  """Defines --config and --workdir."""
  config_flags.DEFINE_config_file(
    "config",
    None,
    "The recipe, FILE or FILE:METHOD, such as configs/digits_resnet8.py:dpc."
    " Override its fields with --config.FIELD=VALUE, after it; configs/"
    "default.py explains them all.",
    flag_values=FLAGS,
  )
  flags.DEFINE_string(
    "workdir",
    None,
    "The run's folder, made if absent; a run goes on there.",
    flag_values=FLAGS,
  )


def run(main: Callable[[], int | None], argv: Sequence[str]) -> int:
  """Parses the flags, calls `main`, and returns the exit code.

  0: done, or stopped by SIGTERM and saved, or --help. 1: the loss diverged. 2:
  a user's mistake, or damaged data, in one line. 130: interrupted by Ctrl-C.
  """
  if any(arg in _HELP for arg in argv[1:]):
    print(_help(main))
    return 0
  try:
    mistake = _parse(argv)
  except (flags.Error, *_RECIPE_ERRORS) as error:
    mistake = _explain(error, argv)
  if mistake:
    return _fail(mistake, 2)
  try:
    return main() or 0
  except (config_lib.ConfigError, prepared.DataError) as error:
    return _fail(str(error), 2)
  except loop.DivergedError as error:
    return _fail(str(error), 1)
  except KeyboardInterrupt:
    return _fail(
      "interrupted; the same command goes on from the last save, if any", 130
    )


def _parse(argv: Sequence[str]) -> str | None:
  """Parses the flags; what is wrong with them, or None."""
  rest = FLAGS(list(argv))
  if len(rest) > 1:
    return f"unexpected argument {rest[1]!r}; flags start with --"
  if not FLAGS["config"].present:
    return "--config is missing; see --help"
  # A recipe that could not be read raises here, at its first use.
  FLAGS.config.to_dict()
  if not FLAGS.workdir:
    return "--workdir is missing; see --help"
  return None


def _explain(error: Exception, argv: Sequence[str]) -> str:
  """One line that names the flag and the remedy."""
  recipe = _recipe(argv)
  if recipe is None:
    return _one_line(error)
  path = recipe.split(":", 1)[0]
  if not pathlib.Path(path).is_file():
    return f"--config={recipe}: there is no file {path}"
  try:
    config = _read_recipe(recipe)
  except (flags.Error, *_RECIPE_ERRORS) as failure:
    # Of a traceback, which ml_collections makes the message, the last line.
    lines = str(failure).strip().splitlines()
    reason = (
      lines[-1] if len(lines) > 1 else f"{type(failure).__name__}: {failure}"
    )
    return f"--config={recipe}: {reason}"
  if not isinstance(config, ml_collections.ConfigDict):
    return f"--config={recipe}: get_config() must return a ConfigDict"
  for field in _overrides(argv):
    mistake = _wrong_field(config, field)
    if mistake:
      return mistake
  return _one_line(error)


def _recipe(argv: Sequence[str]) -> str | None:
  """The value of --config."""
  for i, arg in enumerate(argv):
    match = re.fullmatch(r"--?config(?:=(.*))?", arg)
    if match:
      return match[1] if match[1] is not None else "".join(argv[i + 1 : i + 2])
  return None


def _read_recipe(recipe: str) -> Any:
  """The config of a recipe, without overrides."""
  values = flags.FlagValues()
  argv = ["", f"--config={recipe}"]
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
  values(argv)
  return values.config


def _overrides(argv: Sequence[str]) -> Iterator[str]:
  for arg in argv:
    match = re.match(r"--?(?:no)?config\.([^=]+)", arg)
    if match:
      yield match[1]


def _wrong_field(config: Any, field: str) -> str | None:
  """What is wrong with the name of a field, or None."""
  node, prefix = config, ""
  for part in field.split("."):
    known = list(node) if isinstance(node, ml_collections.ConfigDict) else []
    if part not in known:
      close = difflib.get_close_matches(part, known, n=1)
      remedy = (
        f"did you mean {prefix}{close[0]}?"
        if close
        else "configs/default.py has the fields"
      )
      return f"--config.{field}: no field {prefix}{part}; {remedy}"
    node, prefix = node[part], f"{prefix}{part}."
  if isinstance(node, ml_collections.ConfigDict):
    example = next(iter(node))
    return f"--config.{field}: a group; set its fields, as {prefix}{example}"
  return None


def _help(main: Callable[[], int | None]) -> str:
  """The program's docstring and its flags."""
  module = sys.modules[main.__module__]
  modules = [module.__name__, sys.argv[0], __name__]
  names = {
    flag.name
    for key in modules
    for flag in FLAGS.flags_by_module_dict().get(key, [])
  }
  lines = [(module.__doc__ or "").strip(), "", "Flags:"]
  for name in sorted(names):
    lines.append(
      flags.text_wrap(f"--{name}: {FLAGS[name].help}", 78, "    ", "  ")
    )
  return "\n".join(lines)


def _one_line(text: Any) -> str:
  return " ".join(str(text).split())


def _fail(text: str, code: int) -> int:
  print(f"error: {_one_line(text)}", file=sys.stderr)
  return code
