"""Bad input of every kind: one line, exit code 2, at once, nothing lost.

`pytest -s` prints the table of the README at the end.
"""

import collections
import copy
import importlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest
from absl import flags

from dpc_jax import models
from dpc_jax.training import build, metrics
from experiments import cli
from tests import compiling
from tests.experiments import bad_disk, bad_inputs
from tests.training import tiny

# ml_collections reads a recipe by a way that Python will drop one day.
pytestmark = pytest.mark.filterwarnings(
  "ignore:the load_module:DeprecationWarning"
)

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 10
compile_programs = build.compile_programs


class Compiles(Exception):
  pass


def compiles(parts):
  raise Compiles


def call(program, argv, monkeypatch, compile_programs=compiles):
  """Runs a program here, with flags of its own: the exit code."""
  module = importlib.import_module(f"experiments.{program}")
  monkeypatch.setattr(build, "compile_programs", compile_programs)
  monkeypatch.setattr(sys, "argv", argv)
  if program in bad_inputs.PLAIN:
    try:
      return module.main(argv[1:])
    except SystemExit as stopped:
      return stopped.code
  values = flags.FlagValues()
  monkeypatch.setattr(cli, "FLAGS", values)
  # A recipe is loaded into the module of the one before.
  monkeypatch.delitem(sys.modules, "config_config", raising=False)
  for name, holder in list(vars(module).items()):
    if isinstance(holder, flags.FlagHolder):
      values[holder.name] = copy.deepcopy(flags.FLAGS[holder.name])
      holder = flags.FlagHolder(values, values[holder.name])
      monkeypatch.setattr(module, name, holder)
  cli.define_config()
  if program == "train":
    cli.define_distributed()
  if program == "bounds":
    module.define_flags()
  return cli.run(module.main, argv)


@pytest.fixture(scope="module")
def disk(tmp_path_factory, trained):
  folder = tmp_path_factory.mktemp("bad")
  argv = ["", f"--config={bad_inputs.DIGITS}", f"--workdir={folder / 'run'}"]
  with pytest.MonkeyPatch.context() as patch, pytest.raises(Compiles):
    call("train", argv, patch)
  bad_disk.make(folder / "disk", folder / "run")
  bad_disk.add_saved(folder / "disk", trained[1])
  return folder / "disk"


@pytest.fixture(scope="module")
def table():
  """{group: its lines}, printed at the end."""
  lines = collections.defaultdict(list)
  yield lines
  print("\n\n| what is wrong | cases | one of the lines |\n|---|---|---|")
  for name, of_group in lines.items():
    shortest = min(of_group, key=len)
    print(f"| {name} | {len(of_group)} | `{shortest.strip()}` |")
  print(f"| all | {sum(map(len, lines.values()))} | |")


def check_unchanged(folder, before):
  """Nothing but the lock of a run that was refused is new."""
  after = bad_disk.snapshot(folder)
  new = {path: after.pop(path) for path in after.keys() - before.keys()}
  assert after == before
  assert all(
    pathlib.PurePath(path).name == "lock" and content == b""
    for path, content in new.items()
  ), new


def check_line(error, words):
  assert error.startswith("error: ") and error.count("\n") == 1, error
  check_words(error, words)


def check_words(error, words):
  assert "Traceback" not in error
  assert not re.search("0x[0-9a-f]{6}", error), error
  place = 0
  for part in words.split(" ... "):
    assert part in error[place:], error
    place = error.index(part, place) + len(part)


@pytest.mark.parametrize(
  ("group", "arguments", "words"),
  [
    pytest.param(
      *row,
      id=f"{row[0].program} {' '.join(row[1])}",
    )
    for row in bad_inputs.rows()
  ],
)
def test_it_is_one_line(
  group, arguments, words, disk, tmp_path, monkeypatch, capsys, table
):
  argv = bad_inputs.argv(group, arguments, tmp_path / "run", disk)
  before = bad_disk.snapshot(disk)
  if group.program in ("embeddings", "export"):
    monkeypatch.setitem(models._CONSTRUCTORS, "tiny", tiny.Tiny)
  # Of the processor: other programs on the machine do not count.
  start = time.process_time()
  code = call(group.program, argv, monkeypatch)
  seconds = time.process_time() - start
  error = capsys.readouterr().err
  check_line(error, words.replace("{disk}", str(disk)))
  assert code == 2
  assert seconds < SECONDS
  check_unchanged(disk, before)
  assert {path.name for path in tmp_path.iterdir()} <= {"run"}
  table[group.name].append(error.replace(str(disk), "DIR"))


@pytest.mark.parametrize(
  ("program", "arguments", "words"),
  [
    ("train", "{digits}:dpc --config.steps=0", "config.steps = 0: must be"),
    ("train", "{disk}/none.py", "none.py: get_config() must return a Config"),
    ("train", "{digits}:dpc --flagfile=/no", "--flagfile: ... '/no'; correct"),
    ("compare", "{digits} --methods=dcp", "method = 'dcp': use one of float"),
  ],
)
def test_the_program_itself(program, arguments, words, disk, tmp_path):
  places = {"digits": "configs/digits_resnet8.py", "disk": disk}
  recipe, *rest = arguments.format(**places).split()
  done = subprocess.run(
    [
      *(sys.executable, "-m", f"experiments.{program}"),
      *(f"--config={recipe}", f"--workdir={tmp_path / 'run'}", *rest),
    ],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 2
  check_line(done.stderr, words)
  assert not list(tmp_path.iterdir())


RECIPE = """
from tests.training import tiny


def get_config():
  return tiny.make_config(steps=2, checkpoint_every=2)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(recipe, workdir but for its summary, programs) of a run of two steps."""
  folder = tmp_path_factory.mktemp("trained")
  (folder / "recipe.py").write_text(RECIPE)
  kept = []

  def compile_once(parts):
    kept.append(compile_programs(parts))
    return kept[0]

  with pytest.MonkeyPatch.context() as patch, compiling.fast():
    patch.setitem(models._CONSTRUCTORS, "tiny", tiny.Tiny)
    patch.setattr(metrics, "_event_writer", lambda workdir: None)
    argv = [
      "",
      f"--config={folder / 'recipe.py'}",
      f"--workdir={folder / 'run'}",
    ]
    assert call("train", argv, patch, compile_once) == 0
  (folder / "run" / "summary.json").unlink()
  return folder / "recipe.py", folder / "run", kept[0]


def largest(run):
  files = [p for p in (run / "checkpoints" / "2").rglob("*") if p.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def flip(run):
  content = bytearray(largest(run).read_bytes())
  content[len(content) // 2] ^= 1
  largest(run).write_bytes(content)


def remove_state(run):
  shutil.rmtree(run / "checkpoints" / "2" / "state")


def write_metrics(content):
  return lambda run: (run / "metrics.jsonl").write_bytes(content)


DAMAGE = [
  ("train", flip, "checkpoints are damaged ... checkpoints/2"),
  (
    "train",
    lambda run: os.truncate(largest(run), 9),
    "checkpoints are damaged",
  ),
  ("train", lambda run: largest(run).unlink(), "checkpoints are damaged"),
  ("train", remove_state, "checkpoints are damaged ... use another workdir"),
  ("train", write_metrics(b"\xff\n{}\n"), "line 1 of metrics.jsonl"),
  ("train", write_metrics(b"[1]\n{}\n"), "line 1 of metrics.jsonl"),
  ("bounds", flip, "checkpoints/2 is damaged"),
  ("bounds", remove_state, "checkpoints/2 is damaged"),
  ("embeddings", flip, "checkpoints/2 is damaged"),
  ("embeddings", remove_state, "checkpoints/2 is damaged"),
  ("export", flip, "checkpoints/2 is damaged"),
]


@pytest.mark.parametrize(("program", "damage", "words"), DAMAGE)
def test_a_damaged_run(
  program, damage, words, trained, tmp_path, monkeypatch, capsys, table
):
  recipe, run, programs = trained
  monkeypatch.setitem(models._CONSTRUCTORS, "tiny", tiny.Tiny)
  monkeypatch.setattr(metrics, "_event_writer", lambda workdir: None)
  shutil.copytree(run, tmp_path / "run")
  damage(tmp_path / "run")
  before = bad_disk.snapshot(tmp_path / "run")
  run, new = tmp_path / "run", tmp_path / "new"
  argv = {
    "train": ["", f"--config={recipe}", f"--workdir={run}"],
    "bounds": [
      *("", f"--config={recipe}"),
      *(f"--workdir={new}", f"--checkpoint={run}"),
    ],
    "embeddings": ["", f"--workdirs={run}", f"--workdir={new}"],
    "export": ["", f"--workdir={run}", f"--out={new}"],
  }[program]
  start = time.process_time()
  assert call(program, argv, monkeypatch, lambda parts: programs) == 2
  assert time.process_time() - start < SECONDS
  error = capsys.readouterr().err
  check_line(error, words)
  check_unchanged(tmp_path / "run", before)
  table["damaged runs"].append(error.replace(str(tmp_path), "DIR"))
