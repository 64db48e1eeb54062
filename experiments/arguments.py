"""Flags of the programs without a recipe: a mistake is one line, code 2."""

import argparse
import pathlib
import sys
from typing import NoReturn


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
