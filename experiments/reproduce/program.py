"""The command line of the tables, of one or of all."""

import argparse
import importlib
import json
import pathlib
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from dpc_jax.analysis import cells, html
from dpc_jax.training import checks, termination
from experiments import arguments, reporting
from experiments.reproduce import scales, tables, trials

TABLES = (
  "savings",
  "cifar10",
  "cifar100",
  "imagenet",
  "language",
  "embeddings",
)


def main(
  name: str | None, doc: str | None, argv: Sequence[str] | None = None
) -> int:
  """Reproduces a table, prints it and writes a report; returns the exit code.

  0: what the scale names was run, or SIGTERM came, and the same command goes
  on. 1: some of it failed, or could not be run for want of data; the tables of
  the rest are written. 2: a mistake in the flags, or a folder that cannot be
  written.

  Args:
    name: of `TABLES`; None is all.
    doc: of the module, for --help.
    argv: flags; None are those of the process.
  """
  program = ".".join(filter(None, ("experiments.reproduce", name)))
  flags = _parser(program, doc).parse_args(argv)
  words = sys.argv[1:] if argv is None else argv
  where = flags.workdir.expanduser() / flags.scale
  names = TABLES if name is None else (name,)
  start = time.monotonic()
  try:
    where.mkdir(parents=True, exist_ok=True)
    with termination.watch() as is_stopping:
      context = trials.Context(
        scale=flags.scale,
        where=where,
        data_dir=flags.data_dir,
        command=shlex.join(["python", "-m", program, *words]),
        is_stopping=is_stopping,
      )
      sections = _sections(names, context)
    stem = "report" if name is None else f"table_{name}"
    _write(sections, context, stem, time.monotonic() - start)
  except trials.Stopped:
    print("stopped; the same command goes on")
    return 0
  except checks.ConfigError as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  except OSError as error:
    place = error.filename or where
    print(f"error: {place}: {error.strerror}; use another", file=sys.stderr)
    return 2
  for suffix, what in (("html", "for a browser"), ("md", ""), ("json", "")):
    print(f"  {where / f'{stem}.{suffix}'}  {what}".rstrip())
  errors = [error for section in sections for error in section.errors]
  for error in errors:
    print(f"error: {error}", file=sys.stderr)
  return 1 if errors else 0


def _parser(program: str, doc: str | None) -> argparse.ArgumentParser:
  parser = arguments.Parser(program, doc)
  parser.add_argument(
    "--scale",
    choices=scales.SCALES,
    default="smoke",
    help="how much is run (default: smoke, minutes); see"
    " experiments/reproduce/scales.py",
  )
  parser.add_argument(
    "--workdir",
    type=pathlib.Path,
    default=pathlib.Path("runs/reproduce"),
    metavar="DIR",
    help="finished runs in DIR/SCALE are not made again (default: %(default)s)",
  )
  parser.add_argument(
    "--data_dir",
    metavar="DIR",
    help="where the data sets lie (default: TFDS_DATA_DIR, or tfds' own)",
  )
  return parser


def _sections(names, context) -> list[tables.Section]:
  sections = []
  for i, name in enumerate(names, 1):
    print(f"[{i}/{len(names)}] {name}", flush=True)
    sections.append(_module(name).reproduce(context))
  for section in sections:
    print(f"\n{tables.text(section)}")
  print()
  return sections


def _module(name: str) -> Any:
  return importlib.import_module(f"experiments.reproduce.{name}")


def _write(sections, context, stem, seconds) -> None:
  environment = next(filter(None, (s.environment for s in sections)), {})
  figures = {
    "command": context.command,
    "scale": context.scale,
    "seconds": round(seconds, 1),
    **environment,
    "tables": {section.name: section.figures for section in sections},
    "errors": [error for section in sections for error in section.errors],
  }
  text = _report(sections, context, environment, seconds)
  reporting.write_text(
    context.where / f"{stem}.json",
    json.dumps(figures, indent=2, allow_nan=False) + "\n",
  )
  reporting.write_text(context.where / f"{stem}.md", text)
  reporting.write_text(
    context.where / f"{stem}.html", html.page(text, context.where)
  )


def _report(sections, context, environment, seconds) -> str:
  """All of it in Markdown."""
  facts = [
    f"- command: {cells.code(context.command)}",
    f"- scale: {context.scale}. {scales.ABOUT[context.scale]}",
    f"- time of this command: {seconds / 60:.1f} min",
  ]
  if environment:
    versions = ", ".join(
      f"{name} {version}" for name, version in environment["versions"].items()
    )
    facts.append(f"- device: {cells.plain(environment['device'])}; {versions}")
  parts = [f"# The DPC paper's tables, scale {context.scale}", "\n".join(facts)]
  for section in sections:
    parts.append(tables.markdown(section, context.where))
  return "\n\n".join(parts) + "\n"
