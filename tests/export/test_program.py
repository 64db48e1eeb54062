"""The StableHLO program runs where this package is not."""

import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest

import dpc_jax as dpc
from dpc_jax import export
from dpc_jax.export import packing
from tests.export import small

# Whatever is not a part of JAX cannot be imported there.
PROGRAM = """
import sys
for name in ("dpc_jax", "flax", "optax", "orbax", "tensorflow"):
  sys.modules[name] = None
import numpy as np
from jax import export
with open("model.stablehlo", "rb") as file:
  run = export.deserialize(file.read()).call
for name in ("two", "five"):
  np.save(f"{name}_out.npy", run(np.load(f"{name}.npy")))
"""


def test_it_runs_without_the_package(tmp_path):
  model = small.tiny_model()
  variables = small.made_up(model, small.IMAGES)
  packed = export.freeze(model, variables, small.IMAGES)
  program = export.stablehlo(packed)
  assert program.batch is None
  export.save(packed, tmp_path / "out", program.data)
  inputs = {}
  for name, rows in (("two", 2), ("five", 5)):
    shape = jax.ShapeDtypeStruct((rows, 8, 8, 1), np.float32)
    inputs[name] = np.asarray(small.example(shape))
    np.save(tmp_path / "out" / f"{name}.npy", inputs[name])
  subprocess.run(
    [sys.executable, "-c", PROGRAM], cwd=tmp_path / "out", check=True
  )
  loaded = export.load(tmp_path / "out")
  run = export.run_program(export.read_program(tmp_path / "out"))
  for name, x in inputs.items():
    found = np.load(tmp_path / "out" / f"{name}_out.npy")
    want = np.asarray(loaded(x))
    assert found.shape == (len(x), 3)
    np.testing.assert_allclose(found, want, atol=1e-5)
  np.testing.assert_allclose(
    run(inputs["two"]), loaded(inputs["two"]), atol=1e-5
  )


def test_it_holds_packed_codes_and_no_float_kernels():
  model = small.tiny_model().clone(width=32)
  variables = small.made_up(model, small.IMAGES)
  variables = dpc.assign_bits(variables, 3)
  packed = export.freeze(model, variables, small.IMAGES)
  data = export.stablehlo(packed, platforms=("cpu",)).data
  for name, kernel in packed.kernels.items():
    codes = kernel.parts[0].codes
    assert packing.pack(codes, 3) in data, name
  assert len(data) < 4 * sum(
    kernel.parts[0].codes.size for kernel in packed.kernels.values()
  )


def test_a_batch_that_must_be_known_is_kept():
  packed, model = own()
  for batch, rows in ((None, 4), (2, 2)):
    program = export.stablehlo(packed, model, ("cpu",), batch)
    assert program.batch == rows
    x = np.ones((rows, 3), np.float32)
    np.testing.assert_allclose(
      export.run_program(program.data)(x), export.restore(packed, model)(x)
    )


def test_a_batch_that_is_asked_for_is_not_another():
  packed, _ = own()
  with pytest.raises(ValueError, match="four rows"):
    export.stablehlo(packed, Fussy(), ("cpu",), 2)


class Fussy(nn.Module):
  """Takes one row, and four."""

  @nn.compact
  def __call__(self, x):
    if x.shape[0] not in (1, 4):
      raise ValueError("use four rows")
    return dpc.QuantDense(2, name="layer")(x)


class Branches(nn.Module):
  """Python code that asks how large the batch is."""

  @nn.compact
  def __call__(self, x):
    x = dpc.QuantDense(2, name="layer")(x)
    return x if x.shape[0] > 3 else 2 * x


def own():
  model = Branches()
  inputs = jax.ShapeDtypeStruct((4, 3), np.float32)
  return export.freeze(model, small.made_up(model, inputs), inputs), model


def test_without_flatbuffers_it_says_what_to_install(monkeypatch):
  packed, model = own()
  monkeypatch.setitem(sys.modules, "flatbuffers", None)
  monkeypatch.delitem(sys.modules, "jax._src.export.serialization", False)
  with pytest.raises(export.ExportError, match="pip install flatbuffers"):
    export.stablehlo(packed, model)
