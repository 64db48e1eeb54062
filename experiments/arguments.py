"""Flags of the programs without a recipe: a mistake is one line, code 2."""

import argparse
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
