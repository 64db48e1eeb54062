"""Flags: each mistake is one line on stderr and exit code 2, in no time."""

import io
import os
import sys

import jax
import pytest
from absl import flags

from dpc_jax.training import build, loop, peers, rendezvous, workdir
from experiments import cli, train

# ml_collections reads a recipe by a way that Python will drop one day.
pytestmark = pytest.mark.filterwarnings(
  "ignore:the load_module:DeprecationWarning"
)

DIGITS = "--config=configs/digits_resnet8.py:dpc"


@pytest.fixture
def command(monkeypatch, capsys):
  """Runs `python -m experiments.train ARGUMENTS` here: (code, out, err)."""

  def call(*arguments, main=train.main):
    argv = ["experiments/train.py", *arguments]
    monkeypatch.setattr(cli, "FLAGS", flags.FlagValues())
    monkeypatch.setattr(sys, "argv", argv)
    # A recipe is loaded into the module of the one before.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    cli.define_config()
    code = cli.run(main, argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err

  return call


@pytest.fixture(autouse=True)
def nothing_compiles(monkeypatch):
  monkeypatch.setattr(
    build, "compile_programs", lambda parts: pytest.fail("it compiles")
  )


def recipe(folder, text):
  path = folder / "recipe.py"
  path.write_text(text)
  return f"--config={path}"


MISTAKES = [
  # No or wrong arguments.
  ([], "--config is missing; see --help"),
  (["--workdir=W"], "--config is missing; see --help"),
  ([DIGITS], "--workdir is missing; see --help"),
  ([DIGITS, "--workdir="], "--workdir is missing; see --help"),
  ([DIGITS, "--workdir"], "workdir"),
  ([DIGITS, "--workdir=W", "stray"], "unexpected argument 'stray'"),
  (
    [DIGITS, "--workdir=W", "--epochs=2"],
    "--epochs: no such flag; did you mean --config.epochs?",
  ),
  (
    [DIGITS, "--workdir=W", "--learning_rate=2"],
    "did you mean --config.optimizer.learning_rate?",
  ),
  # Recipes.
  (
    ["--config=configs/digits.py:dpc", "--workdir=W"],
    "--config=configs/digits.py:dpc: there is no file configs/digits.py",
  ),
  (
    ["--config=configs/digits.py", "--workdir=W", "--config.steps=2"],
    "there is no file configs/digits.py",
  ),
  (["--config", "--workdir=W"], "there is no file --workdir=W"),
  (["--config=configs", "--workdir=W"], "there is no file configs"),
  (
    ["--config=configs/digits_resnet8.py:dcp", "--workdir=W"],
    "config.precision.method = 'dcp': use one of float, static<b>, dpc",
  ),
  (
    ["--config=configs/digits_resnet8.py:static99", "--workdir=W"],
    "config.precision.method = 'static99': the width must be in 2..16",
  ),
  # Fields.
  (
    [DIGITS, "--workdir=W", "--config.step=2"],
    "--config.step: no field step; did you mean steps?",
  ),
  (
    [DIGITS, "--workdir=W", "--config.optimizer.lr=2"],
    "--config.optimizer.lr: no field optimizer.lr; configs/default.py has",
  ),
  (
    [DIGITS, "--workdir=W", "--config.optimiser.name=sgd"],
    "no field optimiser; did you mean optimizer?",
  ),
  (
    [DIGITS, "--workdir=W", "--config.seed.x=2"],
    "--config.seed.x: no field seed.x",
  ),
  ([DIGITS, "--workdir=W", "--config.steps=many"], "--config.steps=many"),
  ([DIGITS, "--workdir=W", "--config.steps=1.5"], "--config.steps=1.5"),
  ([DIGITS, "--workdir=W", "--config.seed=none"], "--config.seed=none"),
  (
    [DIGITS, "--workdir=W", "--config.data.augment=maybe"],
    "--config.data.augment=maybe",
  ),
  (
    [DIGITS, "--workdir=W", "--config.precision=dpc"],
    "--config.precision: a group; set its fields, as precision.",
  ),
  (
    [DIGITS, "--workdir=W", "--config.optimizer.boundaries=half"],
    "config.optimizer.boundaries = ('half',): must be increasing",
  ),
  (
    [DIGITS, "--workdir=W", "--config.optimizer.learning_rate=nan"],
    "config.optimizer.learning_rate = nan: must be finite",
  ),
  (
    [DIGITS, "--workdir=W", "--config.batch_size=20"],
    "config.batch_size = 20: must be a multiple of the 8 devices",
  ),
  # Data.
  (
    ["--config=configs/cifar10_resnet8.py:dpc", "--workdir=W"],
    "(TFDS_DATA_DIR) does not exist; correct it, or prepare it once",
  ),
  (
    [DIGITS, "--workdir=W", "--config.data.name=svhn"],
    "data.name='svhn' is unknown",
  ),
]


@pytest.mark.parametrize(
  ("arguments", "message"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES]
)
def test_a_mistake_is_one_line(arguments, message, command, tmp_path):
  workdir = tmp_path / "run"
  arguments = [
    f"--workdir={workdir}" if a == "--workdir=W" else a for a in arguments
  ]
  code, out, err = command(*arguments)
  assert code == 2
  assert out == ""
  assert err.startswith("error: ") and err.count("\n") == 1, err
  assert message.replace("--workdir=W", f"--workdir={workdir}") in err
  assert "0x" not in err
  assert not workdir.exists()


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("def get_config(:\n", "SyntaxError: invalid syntax"),
    ("def get_config():\n  return {}['lr']\n", "KeyError: 'lr'"),
    ("def get_config():\n  return 1 / 0\n", "ZeroDivisionError: division"),
    ("def get_config():\n  raise ValueError('no')\n", "ValueError: no"),
    ("import no_such_module\n", "No module named 'no_such_module'"),
    ("config = 3\n", "has no attribute 'get_config'"),
    ("def get_config():\n  return 3\n", "must return a ConfigDict"),
  ],
)
def test_a_recipe_that_fails(text, message, command, tmp_path):
  code, _, err = command(recipe(tmp_path, text), f"--workdir={tmp_path}/run")
  assert code == 2
  assert err.startswith("error: --config=") and err.count("\n") == 1
  assert message in err


def test_an_argument_that_a_recipe_does_not_take(command, tmp_path):
  flag = recipe(tmp_path, "def get_config():\n  return 3\n")
  code, _, err = command(f"{flag}:dpc", f"--workdir={tmp_path}/run")
  assert code == 2
  assert "takes 0 positional arguments but 1 was given" in err


def test_a_workdir_of_another_config(command, tmp_path, monkeypatch):
  monkeypatch.setattr(
    build, "compile_programs", lambda parts: (_ for _ in ()).throw(Compiles)
  )
  flag = f"--workdir={tmp_path}"
  with pytest.raises(Compiles):
    command(DIGITS, flag)
  code, _, err = command(DIGITS, flag, "--config.seed=1")
  assert code == 2
  assert err.count("\n") == 1
  assert f"{tmp_path}: holds another run; seed: there 0, here 1; use" in err
  (tmp_path / "config.json").write_text("{")
  code, _, err = command(DIGITS, flag)
  assert code == 2
  assert "config.json is damaged" in err


class Compiles(Exception):
  pass


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull"])
def test_help(command, flag):
  code, out, err = command(flag)
  assert (code, err) == (0, "")
  assert "python -m experiments.train --config=configs/" in out
  assert "--workdir: " in out
  assert "--config.FIELD=VALUE" in out
  assert len(out) < 2000
  assert all(len(line) <= 80 for line in out.splitlines())


@pytest.mark.parametrize("flag", ["--debug", "-debug=TRUE"])
def test_debug_shows_where_it_comes_from(command, tmp_path, flag):
  arguments = (DIGITS, f"--workdir={tmp_path}/run", "--config.steps=0")
  code, out, err = command(*arguments, flag)
  assert (code, out) == (2, "")
  assert err.startswith("Traceback (most recent call last):\n")
  assert "config.py" in err
  assert "ConfigError: config.steps = 0: must be positive" in err
  code, _, err = command(*arguments, "--nodebug")
  assert (code, err.count("\n")) == (2, 1)
  text = "def get_config():\n  return {}['lr']\n"
  arguments = (recipe(tmp_path, text), f"--workdir={tmp_path}/run")
  code, _, err = command(*arguments, flag)
  assert code == 2
  assert "line 2, in get_config" in err
  arguments = (DIGITS, "--workdir=x", flag)
  error = loop.DivergedError("the loss is nan")
  code, _, err = command(*arguments, main=raises(error))
  assert code == 1
  assert "in main" in err and "DivergedError: the loss is nan" in err


def raises(error):
  def main():
    raise error

  return main


def test_exit_codes(command):
  arguments = (DIGITS, "--workdir=x")
  error = loop.DivergedError("the loss\nis nan")
  code, _, err = command(*arguments, main=raises(error))
  assert (code, err) == (1, "error: the loss is nan\n")
  error = rendezvous.AbsentError("process 1 did not come")
  code, _, err = command(*arguments, main=raises(error))
  assert (code, err) == (3, "error: process 1 did not come\n")
  error = workdir.BusyError("workdir = x: another process trains this run")
  code, _, err = command(*arguments, main=raises(error))
  assert (code, err) == (3, f"error: {error}\n")
  error = PermissionError(13, "Permission denied", "/data/x")
  code, _, err = command(*arguments, main=raises(error))
  assert (code, err.count("\n")) == (2, 1)
  assert err.startswith("error: /data/x: Permission denied; change its")
  error = PermissionError(13, "Permission denied", "x/metrics.jsonl")
  code, _, err = command(*arguments, main=raises(error))
  assert (code, err.count("\n")) == (3, 1)


def test_ctrl_c_leaves_no_time_to_crash(command, monkeypatch, capsys):
  """Python is not taken down under threads that are in a step still."""
  left = []

  def leave(code):
    assert capsys.readouterr().err.startswith("error: interrupted; the same")
    left.append(code)

  monkeypatch.setattr(os, "_exit", leave)
  command(DIGITS, "--workdir=x", main=raises(KeyboardInterrupt()))
  assert left == [130]


def test_ctrl_c_where_what_reads_the_output_is_gone(monkeypatch):
  """As in `| tee log`, which the terminal interrupts too."""

  class Gone(io.StringIO):
    def flush(self):
      raise BrokenPipeError

  left = []
  monkeypatch.setattr(os, "_exit", left.append)
  monkeypatch.setattr(sys, "stdout", Gone())
  cli.leave_interrupted()
  assert left == [130]


def test_ctrl_c_of_one_of_several_waits_for_the_others(command, monkeypatch):
  """No longer than `peers.leave` lets it."""
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("at once"))
  left = []
  monkeypatch.setattr(peers, "leave", left.append)
  assert cli.leave_interrupted() == 130
  assert left == [130]


@pytest.mark.parametrize("error", [ValueError, KeyError, TypeError])
def test_a_fault_of_the_program_keeps_its_traceback(
  error, command, monkeypatch
):
  """And the others, of several processes, are not held by it."""
  left = []
  monkeypatch.setattr(peers, "leave", left.append)
  with pytest.raises(error, match="ours"):
    command(DIGITS, "--workdir=x", main=raises(error("ours")))
  assert left == [1]
