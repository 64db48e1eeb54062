"""The worked examples of CONTRIBUTING.md run, on a copy with its diffs."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"```(python|diff)\n(.*?)```", TEXT, re.S)
_SAID = re.compile(r"^print\(.*\)  # (.+)$", re.M)


def run(command: list[str], **options) -> str:
  done = subprocess.run(
    command, capture_output=True, text=True, timeout=120, **options
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> pathlib.Path:
  """The package in a folder of its own, with the files and diffs applied."""
  folder = tmp_path_factory.mktemp("contributing")
  shutil.copytree(
    ROOT / "dpc_jax",
    folder / "dpc_jax",
    ignore=shutil.ignore_patterns("__pycache__"),
  )
  for language, block in BLOCKS:
    path = re.match(r"# (dpc_jax/\S+\.py)\n", block)
    if language == "diff":
      # Not in a repository: else git takes paths from its root.
      ceiling = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
      run(["git", "apply", "-"], cwd=folder, input=block, env=ceiling)
    elif path:
      file = folder / path[1]
      assert not file.exists()
      file.write_text(block[path.end() :])
  return folder


def test_each_of_the_four_has_its_lines_and_its_example():
  sections = re.split(r"^### ", TEXT, flags=re.M)[1:]
  assert [section.splitlines()[0] for section in sections] == [
    "A schedule",
    "A model",
    "A data set",
    "A quantization grid",
  ]
  for section in sections:
    assert "```diff\n" in section and _SAID.search(section)
  for _, block in BLOCKS:
    assert len(block.splitlines()) < 30


def test_examples_run_and_print_what_they_say(copy):
  code = "\n".join(
    block
    for language, block in BLOCKS
    if language == "python" and not block.startswith("# dpc_jax/")
  )
  said = _SAID.findall(code)
  assert len(said) == code.count("print(") == 8
  code += "\nprint(dpc.__file__)\n"
  path = os.pathsep.join((str(copy), str(ROOT)))
  out = run(
    [sys.executable, "-c", code],
    cwd=copy,
    env=os.environ | {"PYTHONPATH": path},
  )
  assert out.splitlines() == [*said, str(copy / "dpc_jax" / "__init__.py")]


def test_the_comparison_knows_the_new_method(copy):
  (command,) = re.findall(r"^ +(python -m .+\\\n.+)$", TEXT, re.M)
  words = shlex.split(command.replace("\\\n", " "))
  assert words[1:3] == ["-m", "experiments.compare"]
  assert (ROOT / words[3].removeprefix("--config=")).is_file()
  compared = words[4].removeprefix("--methods=").split(",")
  code = "from dpc_jax.training import methods; print(*methods.names())"
  known = run([sys.executable, "-c", code], cwd=copy).split()
  assert set(compared) <= set(known) and compared[1] == "late_dpc"


def test_files_keep_the_style_with_their_lines(copy):
  names = re.findall(r"^(?:\+\+\+ b/|# )(dpc_jax/\S+\.py)$", TEXT, re.M)
  assert len(names) == 8
  files = ["--no-cache", "--config", str(ROOT / "pyproject.toml"), *names]
  run([sys.executable, "-m", "ruff", "check", *files], cwd=copy)
  run([sys.executable, "-m", "ruff", "format", "--check", *files], cwd=copy)


def test_files_that_are_named_are_there(copy):
  names = re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", TEXT)
  assert len(names) > 10
  for name in names:
    assert (ROOT / name).exists() or (copy / name).exists(), name
