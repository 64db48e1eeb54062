"""The rooms keep their arrows, and the library its few dependencies."""

import ast
import operator
import pathlib
import subprocess
import sys

import pytest

import dpc_jax as dpc

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "dpc_jax"

# What a room may import of the others. A dotted name allows that module alone.
ALLOWED = {
  "quant": set(),
  "policy": {"quant.grids"},
  # LayerBits and the rule "b means (b, b, 8)" have one home.
  "cost": {"quant.grids"},
  "models": {"quant"},
  "data": set(),
  "training": {"quant", "policy", "cost", "models", "data"},
  "analysis": {"quant", "policy", "cost", "models", "data"},
  # Writes and reads files too, with the core packages alone.
  "export": {"quant", "policy", "cost", "models", "data"},
}
# Third-party packages of `pip install .`; all others belong to rooms that do
# input and output.
CORE = {"jax", "flax", "optax", "numpy", "dpc_jax"}
IO_ROOMS = {"training", "data", "analysis"}
OPTIONAL = (
  "tensorflow",
  "tensorflow_datasets",
  "clu",
  "matplotlib",
  "orbax",
  "ml_collections",
  "sklearn",
  "grain",
)


def imports(path: pathlib.Path) -> set[str]:
  """Dotted names of the modules that a file imports, anywhere in it."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      whole = {alias.name for alias in node.names}
      # `import dpc_jax` would reach every room past the checks below.
      assert not any(n.startswith("dpc_jax") for n in whole), path
      names |= whole
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def files(room: str) -> list[pathlib.Path]:
  return sorted((PACKAGE / room).rglob("*.py"))


def test_every_room_is_named_here():
  rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir()} - {"__pycache__"}
  assert rooms == set(ALLOWED)


@pytest.mark.parametrize("room", ALLOWED)
def test_arrows_point_one_way(room):
  allowed = ALLOWED[room] | {room}
  for path in files(room):
    for name in imports(path):
      if not name.startswith("dpc_jax."):
        assert not name.startswith(("experiments", "configs")), path
        continue
      parts = name.removeprefix("dpc_jax.").split(".")
      assert parts[0] in allowed or ".".join(parts[:2]) in allowed, (
        f"{path.relative_to(ROOT)} imports {name}"
      )


@pytest.mark.parametrize("room", sorted(set(ALLOWED) - IO_ROOMS))
def test_core_rooms_import_core_packages_only(room):
  for path in files(room):
    for name in imports(path):
      top = name.split(".")[0]
      assert top in CORE or top in sys.stdlib_module_names, (
        f"{path.relative_to(ROOT)} imports {name}"
      )


def test_of_policy_and_cost_only_macs_imports_flax():
  importers = {
    path.name
    for room in ("policy", "cost")
    for path in files(room)
    if any(name.split(".")[0] == "flax" for name in imports(path))
  }
  assert importers == {"macs.py"}


def test_only_some_rooms_read_configs():
  for room in set(ALLOWED) - {"training", "data"}:
    for path in files(room):
      assert not any(n.startswith("ml_collections") for n in imports(path)), (
        path
      )


def test_import_dpc_jax_is_light():
  code = (
    f"import sys, dpc_jax\nprint([m for m in {OPTIONAL!r} if m in sys.modules])"
  )
  out = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    check=True,
    cwd=ROOT,
  )
  assert out.stdout.strip() == "[]"


# What others import; a name may be added, none may go.
PUBLIC = (
  "GradientStatistics Grid LayerBits PrecisionBounds QuantConv QuantDense"
  " QuantLSTMCell QuantProduct Quantization assign_bits bitops dpc_bit_widths"
  " export.freeze export.load export.quantize_trained export.save"
  " fake_quantize gradient_statistics layer_bits layer_capacities layer_costs"
  " models.create precision_bounds quantize remat.norms"
  " schedules.adaptive"
  " schedules.constant schedules.cyclic schedules.cyclic_dpc schedules.dpc"
  " schedules.progressive schedules.random_layerwise schedules.reversed_dpc"
  " schedules.uniform track_gradient_statistics"
)


@pytest.mark.parametrize("name", PUBLIC.split())
def test_public_names_are_there(name):
  assert callable(operator.attrgetter(name)(dpc))
  assert name.split(".")[0] in dpc.__all__


@pytest.mark.parametrize(
  "path",
  sorted(
    p
    for folder in ("dpc_jax", "experiments", "configs")
    for p in (ROOT / folder).rglob("*.py")
  ),
  ids=lambda p: str(p.relative_to(ROOT)),
)
def test_files_and_functions_stay_small(path):
  text = path.read_text()
  assert text.count("\n") < 400
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef):
      lines = node.end_lineno - node.lineno + 1
      assert lines <= 60, f"{node.name} has {lines} lines"
