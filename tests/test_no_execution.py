"""Nothing runs what it loads: no pickle, no eval, no unsafe loader."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(
  path
  for folder in ("dpc_jax", "experiments", "configs")
  for path in (ROOT / folder).rglob("*.py")
)
# A recipe is the exception, and the user's own: a program that --config names.
MODULES = {
  "cloudpickle",
  "code",
  "codeop",
  "dill",
  "joblib",
  "marshal",
  "pickle",
  "runpy",
  "shelve",
  "torch",
  "yaml",
}
BUILTINS = {"compile", "eval", "exec", "__import__"}
# Of any object, which is how NumPy, pandas and YAML are spelt.
METHODS = {
  "fromfile",
  "full_load",
  "popen",
  "read_pickle",
  "system",
  "unsafe_load",
}
# Taken out of their modules, they go by a name of their own.
TAKEN = {
  "builtins": BUILTINS,
  "importlib": {"__import__", "import_module"},
  "jax.numpy": {"fromfile", "load"},
  "numpy": {"fromfile", "load"},
  "os": {"popen", "system"},
  "posix": {"popen", "system"},
}
# Where a module's name is a parameter: it tells a missing package in a line.
IMPORTERS = {"dpc_jax/data/prepared.py": ["import_module"]}
ARRAY_LIBRARIES = {"jnp", "np", "numpy"}


def offences(text: str) -> list[str]:
  """What in a program could run what it loads: 'line: what'."""
  found = []
  for node in ast.walk(ast.parse(text)):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name.split(".")[0] for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      module = node.module or ""
      names = [module.split(".")[0]]
      found += [
        f"{node.lineno}: {alias.name}"
        for alias in node.names
        if alias.name in TAKEN.get(module, ())
      ]
    elif isinstance(node, ast.Call):
      found += [f"{node.lineno}: {what}" for what in _in_call(node)]
    elif isinstance(node, ast.Name) and node.id in BUILTINS:
      found.append(f"{node.lineno}: {node.id}")
    found += [f"{node.lineno}: {name}" for name in names if name in MODULES]
  return found


def _in_call(call: ast.Call) -> list[str]:
  found = [
    keyword.arg
    for keyword in call.keywords
    if keyword.arg in ("allow_pickle", "shell")
    and not (
      isinstance(keyword.value, ast.Constant) and keyword.value.value is False
    )
  ]
  function = call.func
  if isinstance(function, ast.Attribute):
    owner = function.value.id if isinstance(function.value, ast.Name) else ""
    if function.attr in METHODS:
      found.append(function.attr)
    # No data here is in NumPy's own files, which may hold pickles.
    if function.attr == "load" and owner in ARRAY_LIBRARIES:
      found.append(f"{owner}.load")
    # A module by a name that comes from elsewhere.
    if function.attr in ("import_module", "__import__") and not _is_plain(call):
      found.append(function.attr)
  return found


def _is_plain(call: ast.Call) -> bool:
  """Whether the name of an imported module is written down."""
  return bool(call.args) and isinstance(call.args[0], ast.Constant)


@pytest.mark.parametrize(
  "path", FILES, ids=lambda path: str(path.relative_to(ROOT))
)
def test_nothing_runs_what_it_loads(path):
  allowed = IMPORTERS.get(str(path.relative_to(ROOT)), [])
  found = [offence.split(": ")[1] for offence in offences(path.read_text())]
  assert found == allowed, offences(path.read_text())


@pytest.mark.parametrize(
  "text",
  [
    "import pickle",
    "from pickle import loads",
    "import torch.nn",
    "import yaml",
    "def f(x):\n  return eval(x)",
    "exec(text)",
    "run = eval",
    "np.load(path)",
    "numpy.load(path, allow_pickle=False)",
    "open_archive(path, allow_pickle=True)",
    "open_archive(path, allow_pickle=flag)",
    "pandas.read_pickle(path)",
    "subprocess.run(text, shell=True)",
    "os.system(text)",
    "os.popen(text)",
    "from os import system",
    "from os import path, popen as run",
    "from numpy import load",
    "from jax.numpy import load as read",
    "from builtins import eval as run",
    "importlib.import_module(name)",
    "from importlib import import_module\nimport_module(name)",
    "importlib.import_module(f'{folder}.{name}')",
  ],
)
def test_each_way_is_seen(text):
  assert len(offences(text)) == 1


def test_what_is_harmless_is_left_alone():
  text = """
import json, re
json.loads(text)
re.compile(pattern)
jax.eval_shape(f, x)
lowered.compile()
sources.load(name)
subprocess.run([a, b], shell=False)
importlib.import_module("PIL.Image")
"""
  assert offences(text) == []
