"""The notebooks run, and their stored outputs are those of this code."""

import os
import pathlib

import pytest

from tests import test_architecture

# A well-kept library each; neither is needed for anything else.
nbclient = pytest.importorskip("nbclient", reason="needs nbclient, nbformat")
pytest.importorskip("ipykernel", reason="needs ipykernel")
nbformat = pytest.importorskip("nbformat", reason="needs nbclient, nbformat")
inputtransformer2 = pytest.importorskip("IPython.core.inputtransformer2")

ROOT = pathlib.Path(__file__).parent.parent.parent
FOLDER = ROOT / "experiments" / "notebooks"
NAMES = ("quickstart", "adaptive")


def read(name):
  notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
  nbformat.validate(notebook)
  return notebook


def code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
  return "".join(o.text for o in cell.outputs if o.output_type == "stream")


def pictures(notebook):
  return [
    output.data["image/png"]
    for cell in code_cells(notebook)
    for output in cell.outputs
    if "image/png" in output.get("data", {})
  ]


def execute(notebook, monkeypatch, folder):
  """Runs it in a kernel of its own, on one CPU device and this tree.

  As after `pip install .`: what trains and reads data sets is not there.
  """
  absent = set(test_architecture.OPTIONAL) - {"matplotlib", "sklearn"}
  (folder / "sitecustomize.py").write_text(
    f"import sys\nsys.modules.update(dict.fromkeys({sorted(absent)}))\n"
  )
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(folder), str(ROOT))))
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
  monkeypatch.delenv("MPLBACKEND", raising=False)
  nbclient.NotebookClient(
    notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}
  ).execute()
  return notebook


@pytest.mark.parametrize("name", NAMES)
def test_runs_and_stored_outputs_are_of_this_code(name, monkeypatch, tmp_path):
  stored = read(name)
  fresh = execute(read(name), monkeypatch, tmp_path)
  exact = 0
  for old, new in zip(code_cells(stored), code_cells(fresh), strict=True):
    # What does not depend on rounding, and so on no machine.
    if "exact" in old.metadata.get("tags", ()):
      assert printed(old) == printed(new) != ""
      exact += 1
    streams = [o for o in new.outputs if o.output_type == "stream"]
    assert all(o.name == "stdout" for o in streams), streams
  assert exact >= 1
  assert len(pictures(fresh)) == len(pictures(stored)) >= 1


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_stored_whole_and_small(name):
  path = FOLDER / f"{name}.ipynb"
  assert path.stat().st_size < 300_000
  assert str(ROOT) not in path.read_text()
  cells = code_cells(read(name))
  assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
  outputs = [output for cell in cells for output in cell.outputs]
  assert {o.output_type for o in outputs} <= {"stream", "display_data"}
  assert {o.get("name", "stdout") for o in outputs} == {"stdout"}


@pytest.mark.parametrize(
  "source, error",
  [("1 / 0", "ZeroDivisionError"), ("import grain", "ModuleNotFoundError")],
)
def test_a_cell_that_raises_fails(source, error, monkeypatch, tmp_path):
  cell = nbformat.v4.new_code_cell(source)
  notebook = nbformat.v4.new_notebook(cells=[cell])
  with pytest.raises(nbclient.exceptions.CellExecutionError, match=error):
    execute(notebook, monkeypatch, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_first_cell_installs_only_what_is_absent(name):
  source = code_cells(read(name))[0].source
  assert run_cell(source) == []
  absent = source.replace('find_spec("dpc_jax")', 'find_spec("dpc_jax_not")')
  with pytest.raises(ValueError, match="REPOSITORY is empty"):
    run_cell(absent)
  set_up = absent.replace('REPOSITORY = ""', 'REPOSITORY = "git+https://h/r"')
  ((magic, arguments),) = run_cell(set_up)
  assert magic == "pip" and arguments.startswith("install ")
  assert '"{REPOSITORY}"' in arguments


def run_cell(source):
  """Runs a cell; returns the magics that it called."""
  called = []

  class Shell:
    def run_line_magic(self, name, line, **_):
      called.append((name, line))

  manager = inputtransformer2.TransformerManager()
  code = manager.transform_cell(source)
  exec(compile(code, "cell", "exec"), {"get_ipython": Shell})
  return called
