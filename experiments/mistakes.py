"""What a command line or a recipe has wrong, in one line with the remedy."""

import difflib
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from configs import default

# What code that is not ours may raise.
FOREIGN_ERRORS = (
  ArithmeticError,
  AssertionError,
  AttributeError,
  ImportError,
  LookupError,
  NameError,
  RuntimeError,
  TypeError,
  ValueError,
)
# A recipe is a person's program, and a file.
RECIPE_ERRORS = (*FOREIGN_ERRORS, OSError, SyntaxError)
# What absl and Python say of a value of the wrong type, and what to say.
_TYPES = {
  "invalid literal for int": "must be an integer",
  "could not convert string to float": "must be a number",
  "('Non-boolean": "must be true or false",
}


def explain(error: Exception, argv: Sequence[str], known: Sequence[str]) -> str:
  """One line that names the flag and the remedy.

  Args:
    error: of parsing the flags.
    argv: the command line.
    known: names of the flags that the program has.
  """
  recipe = _recipe(argv)
  if recipe is None:
    return _of_flag(error, known)
  path = pathlib.Path(recipe.split(":", 1)[0])
  if not path.name:
    return f"--config={recipe}: names no file; configs/ has the recipes"
  if not path.is_file():
    return f"--config={recipe}: there is no file {path}; {_similar(path)}"
  if path.suffix != ".py":
    return f"--config={recipe}: no Python file; configs/ has the recipes"
  try:
    config = _read_recipe(recipe)
  except (flags.Error, *RECIPE_ERRORS) as failure:
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
  return _of_flag(error, known, config)


def of_recipe(config: Any, argv: Sequence[str]) -> str | None:
  """What is wrong with the fields of a recipe, or None.

  A field that nobody knows would be a setting that does nothing.
  """
  known, there = set(_fields(default.get_config())), set(_fields(config))
  for field in sorted(there - known):
    close = difflib.get_close_matches(field, known, n=1)
    remedy = f"did you mean {close[0]}?" if close else "remove it"
    return f"--config={_recipe(argv)}: {field} is no field; {remedy}"
  for field in sorted(known - there):
    return (
      f"--config={_recipe(argv)}: has no field {field}; start from"
      " configs/default.py, as the recipes beside it do"
    )
  return None


def _of_flag(error: Exception, known: Sequence[str], config: Any = None) -> str:
  """What absl's error says, with the remedy that it lacks."""
  text = one_line(error)
  if isinstance(error, flags.UnrecognizedFlagError):
    name = error.flagname
    fields = [f"config.{field}" for field in _fields(config)]
    # A flag that is spelt alike, the field itself of whichever group, a field.
    found = (
      difflib.get_close_matches(name, known, n=1, cutoff=0.8)
      or [field for field in fields if field.split(".")[-1] == name]
      or difflib.get_close_matches(name, fields, n=1)
    )
    remedy = f"did you mean --{found[0]}?" if found else "see --help"
    return f"--{name}: no such flag; {remedy}"
  for reason, remedy in _TYPES.items():
    flag, is_it, _ = text.removeprefix("flag ").partition(f": {reason}")
    if is_it:
      return f"{flag}: {remedy}"
  outside = re.fullmatch(r"flag (--\S+?=.*): \S+ is not (?:an? )?(.*)", text)
  if outside:
    article = "an" if outside[2][0] in "aeiou" else "a"
    return f"{outside[1]}: must be {article} {outside[2]}"
  missing = re.fullmatch(r"Missing value for flag (--\S+)", text)
  return (
    f"{missing[1]}: no value; write {missing[1]}=VALUE" if missing else text
  )


def _fields(config: Any, prefix: str = "") -> Iterator[str]:
  """The dotted names of a config's fields."""
  for name in config or ():
    if isinstance(config[name], ml_collections.ConfigDict):
      yield from _fields(config[name], f"{prefix}{name}.")
    else:
      yield prefix + name


def _similar(path: pathlib.Path) -> str:
  """Where a recipe may be that is not at `path`."""
  recipes = {
    other.stem: other
    for folder in (pathlib.Path("configs"), path.parent)
    if folder.is_dir()
    for other in sorted(folder.glob("[a-z]*_*.py"))
  }
  close = difflib.get_close_matches(path.stem, recipes, n=1)
  return (
    f"did you mean {recipes[close[0]]}?"
    if close
    else "configs/ has the recipes"
  )


def _recipe(argv: Sequence[str]) -> str | None:
  """The value of --config, the last one if there are several."""
  recipe = None
  for i, arg in enumerate(argv):
    match = re.fullmatch(r"--?config(?:=(.*))?", arg)
    if match:
      value = "".join(argv[i + 1 : i + 2]) if match[1] is None else match[1]
      recipe = value
  return recipe


def _read_recipe(recipe: str) -> Any:
  """The config of a recipe, without overrides."""
  values = flags.FlagValues()
  argv = ["", f"--config={recipe}"]
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
  values(argv)
  return values.config


def _overrides(argv: Sequence[str]) -> Iterator[str]:
  for arg in argv:
    match = re.match(r"--?(?:no)?config\.([^=]*)", arg)
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
      name = f"{prefix}{part}" if part else "without a name"
      return f"--config.{field}: no field {name}; {remedy}"
    node, prefix = node[part], f"{prefix}{part}."
  if isinstance(node, ml_collections.ConfigDict):
    example = next(iter(node))
    return f"--config.{field}: a group; set its fields, as {prefix}{example}"
  return None


def one_line(text: Any) -> str:
  """`text` without line breaks."""
  return " ".join(str(text).split())
