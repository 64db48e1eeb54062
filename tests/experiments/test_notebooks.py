"""The notebooks run, and their stored outputs could be of this code.

What is compared with a fresh run, cell by cell: of cells tagged "exact", whose
outputs depend on no rounding, the text itself; of all others the text with
every number masked, as another machine trains to other ones; of those tagged
"moves" the kinds of lines alone, numbers and layers masked, as it moves other
bits, and not as many. Of pictures, how many there are in each cell.
"""

import os
import pathlib
import re

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
# With the sign that a number may have and its padding.
_NUMBER = re.compile(r" *[-+]?\d[\d,]*(\.\d+)?")
_LAYER = re.compile(r"stem|stage\S+")


def read(name):
  notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
  nbformat.validate(notebook)
  return notebook


def code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
  return "".join(o.text for o in cell.outputs if o.output_type == "stream")


def masked(text):
  """The text, a # for every number."""
  return re.sub(r" +", " ", _NUMBER.sub(" #", text))


def compared(cell):
  """What a stored and a fresh output must have in common."""
  tags = cell.metadata.get("tags", ())
  text = printed(cell)
  if "exact" in tags:
    return text
  if "moves" in tags:
    return set(masked(_LAYER.sub("LAYER", text)).splitlines())
  return masked(text)


def pictures(cell):
  return sum("image/png" in output.get("data", {}) for output in cell.outputs)


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


@pytest.mark.as_users
@pytest.mark.parametrize("name", NAMES)
def test_runs_and_prints_and_draws_what_is_stored(name, monkeypatch, tmp_path):
  stored = read(name)
  fresh = execute(read(name), monkeypatch, tmp_path)
  for old, new in zip(code_cells(stored), code_cells(fresh), strict=True):
    assert compared(old) == compared(new)
    assert pictures(old) == pictures(new)
    streams = [o for o in new.outputs if o.output_type == "stream"]
    assert all(o.name == "stdout" for o in streams), streams


@pytest.mark.parametrize("name", NAMES)
def test_something_is_compared(name):
  cells = code_cells(read(name))
  assert sum(map(pictures, cells)) >= 1
  tagged = [cell for cell in cells if cell.metadata.get("tags")]
  assert {tag for cell in tagged for tag in cell.metadata.tags} <= {
    "exact",
    "moves",
  }
  assert tagged and all(map(printed, tagged))
  assert any(printed(cell) for cell in cells if cell not in tagged)


def test_what_a_mask_leaves():
  def cell(text, *tags):
    output = nbformat.v4.new_output("stream", name="stdout", text=text)
    return nbformat.v4.new_code_cell(
      "", outputs=[output], metadata={"tags": list(tags)}
    )

  a = "loss 0.03  of 1,437 [-0.1, +7]\n"
  b = "loss 12.5  of 9 [+0.125, -70]\n"
  assert compared(cell(a)) == compared(cell(b)) == "loss # of # [ #, #]\n"
  assert compared(cell(a, "exact")) != compared(cell(b, "exact"))
  assert compared(cell(a)) != compared(cell(a.replace("loss", "cost")))
  assert compared(cell(a)) != compared(cell(a + a))
  moves = [
    "epoch  4  stem  8 -> 7 bits\n",
    "epoch 12  stage1/b0  3 -> 4 bits\n",
  ]
  forms = [compared(cell(m, "moves")) for m in (*moves, "".join(moves))]
  assert forms[0] == forms[1] == forms[2] != compared(cell("7 bits", "moves"))


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
