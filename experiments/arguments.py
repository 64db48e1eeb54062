"""Flags of the programs without a recipe: a mistake is one line, code 2."""

import argparse
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from dpc_jax.data import prepared
from dpc_jax.export import errors
from dpc_jax.training import checks, compile_cache
from experiments import mistakes

# What ends a program in one line.
_MISTAKES = (checks.ConfigError, prepared.DataError, errors.ExportError)


class Parser(argparse.ArgumentParser):
  """Python's own, without abbreviated flags and the lines of usage."""

  def __init__(self, program: str, description: str | None):
    """`program` is the module, `description` its docstring."""
    super().__init__(
      prog=f"python -m {program}",
      description=description,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )

  def error(self, message: str) -> NoReturn:
    """Says what is wrong in one line, and exits with code 2."""
    print(
      f"error: {message.removeprefix('argument ')}; see --help", file=sys.stderr
    )
    sys.exit(2)


def folder(text: str) -> pathlib.Path:
  """The type of a flag that names a folder; `~` is the home."""
  if not text:
    raise argparse.ArgumentTypeError("is empty")
  return pathlib.Path(text).expanduser()


def run(
  parser: argparse.ArgumentParser,
  work: Callable[[argparse.Namespace, str], None],
  argv: Sequence[str] | None,
) -> int:
  """Parses the flags, calls `work(flags, command)`, returns the exit code.

  0, or after a mistake's one line 2. Compiled programs are kept for the next
  time (see `dpc_jax.training.compile_cache`).

  Args:
    parser: of the program.
    work: what it does; `command` is the command line, as a shell has it.
    argv: flags; None are those of the process.
  """
  flags = parser.parse_args(argv)
  words = sys.argv[1:] if argv is None else argv
  compile_cache.switch_on(os.environ)
  try:
    work(flags, shlex.join([*parser.prog.split(), *words]))
  except _MISTAKES as error:
    print(f"error: {mistakes.one_line(error)}", file=sys.stderr)
    return 2
  return 0
