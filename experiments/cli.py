"""Flags of the programs: a mistake is one line on stderr and exit code 2."""

import contextlib
import logging
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence

import jax
from absl import flags
from ml_collections import config_flags

from dpc_jax.data import prepared
from dpc_jax.training import (
  checks,
  compile_cache,
  distributed,
  loop,
  peers,
  rendezvous,
  saver,
)
from dpc_jax.training import config as config_lib
from experiments import mistakes

FLAGS = flags.FLAGS

# What a shell says of a program that SIGINT ended.
_INTERRUPTED = 130
_HELP = ("--help", "-help", "-h", "--helpfull", "--helpshort")
_CACHE_HELP = """\
Compiled programs of one process are kept in ~/.cache/dpc_jax/jax (or in
XDG_CACHE_HOME): JAX_COMPILATION_CACHE_DIR=DIR names another folder, and
JAX_ENABLE_COMPILATION_CACHE=0 keeps none."""
_DEBUG = re.compile(r"--?debug(=(1|t|true|y|yes))?", re.IGNORECASE)


def define_config() -> None:
  """Defines --config, --workdir and --debug."""
  # ml_collections warns of a recipe without a result, an error here.
  logging.getLogger("absl").addFilter(
    lambda record: "get_config() returned None" not in str(record.msg)
  )
  try:
    config_flags.DEFINE_config_file(
      "config",
      None,
      "The recipe, FILE or FILE:METHOD, such as configs/digits_resnet8.py:dpc."
      " Override its fields with --config.FIELD=VALUE, after it; configs/"
      "default.py explains them all.",
      flag_values=FLAGS,
    )
  except flags.Error as error:  # a --flagfile, which is read here already
    text = str(error).removeprefix("ERROR:: ")
    sys.exit(_fail(f"--flagfile: {text}; correct it, or leave it out", 2))
  flags.DEFINE_string(
    "workdir",
    None,
    "The run's folder, made if absent; a run goes on there.",
    flag_values=FLAGS,
  )
  flags.DEFINE_bool(
    "debug",
    False,
    "Shows the traceback of an error in place of its line.",
    flag_values=FLAGS,
  )


def define_distributed() -> None:
  """Defines the flags that join processes; their program joins in `run`."""
  flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, the same for all processes of the run, all of"
    " which are started with the same command but for --process. Or set"
    " JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID.",
    flag_values=FLAGS,
  )
  flags.DEFINE_integer(
    "processes", None, "How many processes there are.", flag_values=FLAGS
  )
  flags.DEFINE_integer(
    "process",
    None,
    "Which one this is, from 0; process 0 prints and writes.",
    flag_values=FLAGS,
  )
  flags.DEFINE_enum(
    "distributed",
    "auto",
    distributed.MODES,
    "auto: as the three flags say, else as SLURM, Open MPI, a TPU slice or"
    " Kubernetes say, else alone; on: a mistake if none of them says; off:"
    " alone.",
    flag_values=FLAGS,
  )
  flags.DEFINE_float(
    "join_timeout",
    distributed.JOIN_TIMEOUT_S,
    "Seconds that the processes wait for each other at the start.",
    lower_bound=1.0,
    flag_values=FLAGS,
  )


def run(main: Callable[[], int | None], argv: Sequence[str]) -> int:
  """Parses the flags, calls `main`, and returns the exit code.

  A single process keeps compiled programs in the user's cache directory: see
  `compile_cache.switch_on`.

  0: done, or stopped by SIGTERM and saved, or --help. 1: the loss diverged, in
  one line, or any fault of the program, which raises. 2: a user's mistake, or
  damaged data, in one line. 3: a process was lost or did not come in time,
  another run is at the workdir, or the disk is full: the same command may
  succeed, and goes on. 130: interrupted by Ctrl-C. With --debug a traceback
  takes the line's place; the codes stay.
  """
  if any(arg in _HELP for arg in argv[1:]):
    print(_help(main))
    return 0
  # Not of FLAGS: parsing them may be what fails.
  debug = any(map(_DEBUG.fullmatch, argv[1:]))
  try:
    mistake = _parse(argv)
  except (flags.Error, *mistakes.RECIPE_ERRORS) as error:
    return _fail(
      mistakes.explain(error, argv, list(FLAGS)), 2, error if debug else None
    )
  if mistake:
    return _fail(mistake, 2)
  # Of several processes, a line of error names its own.
  who = ""
  try:
    if (found := _others()) is not None:
      who = f"{distributed.name(found)}: "
      # Before anything asks JAX for devices.
      distributed.join(found, FLAGS.join_timeout)
    else:
      compile_cache.switch_on(os.environ)
    with peers.watch(who, is_quiet=not debug), saver.orderly_errors():
      return main() or 0
  except checks.TransientError as error:
    # The absent are not waited for; that a folder is busy, all hear.
    grace_s = 0 if isinstance(error, rendezvous.AbsentError) else peers.GRACE_S
    shown = error if debug else None
    return _fail(f"{who}{error}", peers.EXIT_CODE, shown, grace_s)
  except (config_lib.ConfigError, prepared.DataError) as error:
    return _fail(f"{who}{error}", 2, error if debug else None)
  except loop.DivergedError as error:
    return _fail(f"{who}{error}", 1, error if debug else None)
  except KeyboardInterrupt:
    text = "interrupted; the same command goes on from the last save, if any"
    print(f"error: {who}{text}", file=sys.stderr)
    return leave_interrupted()
  except Exception as error:
    found = peers.explain(error, FLAGS.workdir)
    if found is None:
      # The others wait for this one, and Python, on its way out, for them.
      peers.leave(1)
      raise
    # The lost are not waited for.
    grace_s = 0 if found.code == peers.EXIT_CODE else peers.GRACE_S
    shown = error if debug else None
    return _fail(f"{who}{found.line}", found.code, shown, grace_s)


def leave_interrupted() -> int:
  """Ends this process with exit code 130, that of Ctrl-C, at once.

  To be called last, when files are closed and the line is printed: threads of
  JAX may be in a step still, and Python, as it goes down under them, crashes
  with an exit code of its own. Child processes of `multiprocessing` are ended
  by whoever made them, or by the terminal, which interrupts them too.

  Returns:
    130, where this process is one of several, which wait for each other on
    their way out, no longer than `peers.leave` lets them.
  """
  if jax.distributed.is_initialized():
    peers.leave(_INTERRUPTED)
    return _INTERRUPTED
  for stream in (sys.stdout, sys.stderr):
    # In a pipe, what reads it was interrupted too.
    with contextlib.suppress(OSError):
      stream.flush()
  os._exit(_INTERRUPTED)


def _others() -> distributed.Plan | None:
  """How to join the other processes, if the program can and there are some."""
  if "distributed" not in FLAGS:
    return None
  return distributed.plan(
    os.environ,
    coordinator=FLAGS.coordinator,
    processes=FLAGS.processes,
    process=FLAGS.process,
    mode=FLAGS.distributed,
    count_tpu_hosts=distributed.count_tpu_hosts,
    has_kubernetes=distributed.has_kubernetes(),
  )


def make_workdir() -> pathlib.Path:
  """Returns the folder of --workdir, made if absent.

  Raises:
    ConfigError: it cannot be made.
  """
  workdir = pathlib.Path(FLAGS.workdir).expanduser()
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise config_lib.ConfigError(
      f"--workdir={workdir}: {error.strerror}; use another"
    ) from None
  return workdir


def _parse(argv: Sequence[str]) -> str | None:
  """Parses the flags; what is wrong with them, or None."""
  rest = FLAGS(list(argv))
  if len(rest) > 1:
    return f"unexpected argument {rest[1]!r}; flags start with --"
  if not FLAGS["config"].present:
    return "--config is missing; see --help"
  # A recipe that could not be read raises here, at its first use.
  FLAGS.config.to_dict()
  mistake = mistakes.of_recipe(FLAGS.config, argv)
  if mistake:
    return mistake
  if not FLAGS.workdir:
    return "--workdir is missing; see --help"
  if "://" in FLAGS.workdir:
    return (
      f"--workdir={FLAGS.workdir}: must be a folder, not an address; mount the"
      " bucket, or use a disk that all hosts share"
    )
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
  return "\n".join([*lines, "", _CACHE_HELP])


def _fail(
  text: str,
  code: int,
  shown: BaseException | None = None,
  grace_s: float = peers.GRACE_S,
) -> int:
  """Prints the line, or the traceback of `shown`; returns the code.

  The other processes have `grace_s` seconds to end alike.
  """
  if shown is not None:
    traceback.print_exception(shown)
  else:
    print(f"error: {mistakes.one_line(text)}", file=sys.stderr)
  peers.leave(code, grace_s)
  return code
