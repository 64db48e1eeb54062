"""The command line of the tables, of one or of all."""

import argparse
import json
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from dpc_jax.analysis import cells, html
from dpc_jax.training import compile_cache, termination
from experiments import arguments, cli, mistakes, reporting
from experiments.reproduce import scales, tables, trials


def main(
  made: Mapping[str, Callable[[trials.Context], tables.Section]],
  doc: str | None,
  argv: Sequence[str] | None = None,
) -> int:
  """Reproduces tables, prints them, writes a report; returns the exit code.

  0: what the scale names was run, or SIGTERM came, and the same command goes
  on. 1: some of it failed, or could not be run for want of data; the rest is
  in the tables. 2: a mistake in the flags, or a folder that cannot be written.
  130: Ctrl-C. What is done is written after each table.

  Args:
    made: {table: what reproduces it}, one or all.
    doc: of the module, for --help.
    argv: flags; None are those of the process.
  """
  (name,) = made if len(made) == 1 else (None,)
  program = ".".join(filter(None, ("experiments.reproduce", name)))
  flags = _parser(program, doc).parse_args(argv)
  compile_cache.switch_on(os.environ)
  words = sys.argv[1:] if argv is None else argv
  where = flags.workdir / flags.scale
  stem = "report" if name is None else f"table_{name}"
  command = shlex.join(["python", "-m", program, *words])
  try:
    where.mkdir(parents=True, exist_ok=True)
    with termination.watch() as is_stopping:
      context = trials.Context(
        flags.scale, where, flags.data_dir, command, is_stopping
      )
      sections = _reproduce(made, context, stem)
  except trials.Stopped:
    print("stopped; the same command goes on")
    return 0
  except KeyboardInterrupt:
    print("error: interrupted; the same command goes on", file=sys.stderr)
    return cli.leave_interrupted()
  except OSError as error:
    line = f"{error.filename or where}: {error.strerror or error}"
    print(f"error: {mistakes.one_line(line)}", file=sys.stderr)
    return 2
  print("written:")
  for suffix, what in (("html", "for a browser"), ("md", ""), ("json", "")):
    print(f"  {where / f'{stem}.{suffix}'}  {what}".rstrip())
  errors = [error for section in sections for error in section.errors]
  for error in tables.grouped(errors):
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
    type=arguments.folder,
    default=pathlib.Path("runs/reproduce"),
    metavar="DIR",
    help="finished runs in DIR/SCALE are not made again, but at smoke; their"
    " data must still be there (default: %(default)s)",
  )
  parser.add_argument(
    "--data_dir",
    type=lambda text: str(arguments.folder(text)),
    metavar="DIR",
    help="where the data sets lie (default: TFDS_DATA_DIR, or tfds' own)",
  )
  return parser


def _reproduce(made, context, stem) -> list[tables.Section]:
  """All tables, each printed, and the report written, as soon as it is done."""
  sections, start = [], time.monotonic()
  for i, name in enumerate(made, 1):
    print(f"[{i}/{len(made)}] {name}", flush=True)
    section = made[name](context)
    sections.append(section)
    print(f"\n{tables.text(section)}\n", flush=True)
    _write(sections, context, stem, time.monotonic() - start)
  return sections


def _write(sections, context, stem, seconds) -> None:
  environments = []
  for section in sections:
    for found in section.environments:
      if found not in environments:
        environments.append(found)
  figures = {
    "command": context.command,
    "scale": context.scale,
    "seconds": round(seconds, 1),
    "environments": environments,
    "tables": {section.name: section.figures for section in sections},
    "errors": [error for section in sections for error in section.errors],
  }
  text = _report(sections, context, environments, seconds)
  reporting.write_text(
    context.where / f"{stem}.json",
    json.dumps(figures, indent=2, allow_nan=False) + "\n",
  )
  reporting.write_text(context.where / f"{stem}.md", text)
  reporting.write_text(
    context.where / f"{stem}.html", html.page(text, context.where)
  )


def _report(sections, context, environments, seconds) -> str:
  """All of it in Markdown."""
  facts = [
    f"- command: {cells.code(context.command)}",
    f"- scale: {context.scale}",
    f"- time of this command: {seconds / 60:.1f} min, without runs that were"
    " finished before",
  ]
  for found in environments:
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    facts.append(f"- device: {cells.plain(found['device'])}; {versions}")
  if environments:
    facts.append(
      "- float32 products in JAX's default precision, TF32 on recent GPUs"
    )
  parts = [f"# The DPC paper's tables, scale {context.scale}", "\n".join(facts)]
  for section in sections:
    parts.append(tables.markdown(section, context.where))
  return "\n\n".join(parts) + "\n"
