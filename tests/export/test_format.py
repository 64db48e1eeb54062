"""The files follow their description, and damage is told in one line."""

import hashlib
import json
import shutil

import flax
import flax.linen as nn
import jax
import numpy as np
import pytest

import dpc_jax as dpc
from dpc_jax import export
from dpc_jax.export import format as format_lib
from tests.export import small
from tests.training import tiny


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
  """(variables, frozen, its folder), a program of no meaning beside it."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(dpc.models._CONSTRUCTORS, "tiny", tiny.Tiny)
    model = small.tiny_model(weights=dpc.Grid("symmetric", "channel"))
    variables = small.made_up(model, small.IMAGES)
    packed = export.freeze(
      model, variables, small.IMAGES, about={"epochs": 0.5}
    )
  folder = tmp_path_factory.mktemp("export") / "out"
  export.save(packed, folder, b"a program")
  return variables, packed, folder


@pytest.fixture
def copy(frozen, tmp_path):
  return shutil.copytree(frozen[2], tmp_path / "copy")


def test_another_reader_finds_the_same(frozen):
  """Written from the docstring, with json and NumPy alone."""
  manifest = json.loads((frozen[2] / "manifest.json").read_text())
  data = (frozen[2] / "weights.bin").read_bytes()

  def numbers(section, dtype="<f4"):
    start, size = section
    assert start % 4 == 0
    return np.frombuffer(data[start : start + size], dtype)

  found = {}
  for kernel in manifest["kernels"]:
    (part,) = kernel["parts"]
    shape, width = kernel["shape"], part["width"]
    bits = np.unpackbits(numbers(part["codes"], np.uint8), bitorder="little")
    count = int(np.prod(shape))
    rows = bits[: count * width].reshape(count, width).astype(int)
    codes = (rows << np.arange(width)).sum(1).reshape(shape)
    channels = [n if i in kernel["axes"] else 1 for i, n in enumerate(shape)]
    scale = numbers(part["scale"]).reshape(channels)
    assert (kernel["kind"], part["offset"]) == ("symmetric", None)
    found[kernel["name"]] = (codes - (2 ** (width - 1) - 1)) * scale
  for tensor in manifest["tensors"]:
    values = numbers(tensor["values"], np.dtype(tensor["dtype"]))
    found[tensor["name"]] = values.reshape(tensor["shape"])
  after = small.flat(export.load(frozen[2]).variables)
  assert found.keys() == {n for n in after if not n.startswith("precision/")}
  for name, value in found.items():
    np.testing.assert_allclose(value, after[name], rtol=1e-6, err_msg=name)
  layer = manifest["layers"]["second"]
  assert layer["bits"] == {"weights": 5, "activations": 5, "gradients": 8}
  assert layer["grids"]["activations"]["kind"] == "affine"
  assert manifest["model"]["sizes"] == {}
  assert manifest["inputs"] == [{"shape": [2, 8, 8, 1], "dtype": "float32"}]
  assert manifest["about"] == {"epochs": 0.5}
  rest = {k: v for k, v in manifest.items() if k != "checksum"}
  text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
  assert manifest["checksum"] == hashlib.sha256(text.encode()).hexdigest()
  for name, file in manifest["files"].items():
    content = (frozen[2] / name).read_bytes()
    assert file["bytes"] == len(content)
    assert file["sha256"] == hashlib.sha256(content).hexdigest()


def test_packed_codes_take_their_bits_and_no_more(frozen):
  folder = frozen[2]
  sizes = {"first": 36 * 8 // 8, "second": 288 * 5 // 8}
  manifest = json.loads((folder / "manifest.json").read_text())
  for kernel in manifest["kernels"]:
    layer = kernel["name"].split("/")[1]
    assert kernel["parts"][0]["codes"][1] == sizes[layer]


def test_stacks_and_other_types_come_back(tmp_path):
  model = dpc.models.create("resnet14", num_classes=3, width=2, scan=True)
  variables = small.made_up(model, small.IMAGES)
  bits = dict(dpc.layer_bits(variables))
  bits["stage3/block1/conv1"] = dpc.LayerBits(32, 4, 8)
  mixed = bits["stage1/blocks/conv2"]._replace(weights=np.array([3, 32]))
  variables = dpc.assign_bits(variables, bits | {"stage1/blocks/conv2": mixed})
  packed = export.freeze(model, variables, small.IMAGES)
  half = np.arange(3, dtype=jax.numpy.bfloat16)
  packed.tensors.update({"more/half": half, "more/flag": np.array([True])})
  export.save(packed, tmp_path / "out")
  again, _ = export.read(tmp_path / "out")
  assert jax.tree.structure(again) == jax.tree.structure(packed)
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(packed), strict=True):
    assert np.asarray(a).dtype == np.asarray(b).dtype
    np.testing.assert_array_equal(a, b)
  stacked = again.kernels["params/stage1/blocks/conv2/kernel"]
  assert [part.width for part in stacked.parts] == [3, 32]


def edit(change, checksum=True):
  """Changes the manifest, as another program would."""

  def apply(folder):
    path = folder / "manifest.json"
    found = json.loads(path.read_text())
    change(found)
    if checksum:
      found["checksum"] = format_lib._checksum(found)
    path.write_text(json.dumps(found))

  return apply


def flip(name):
  def apply(folder):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)

  return apply


def write(name, content):
  return lambda folder: (folder / name).write_bytes(content)


def truncate(name):
  return lambda folder: (folder / name).write_bytes(
    (folder / name).read_bytes()[:-2]
  )


def kernel(**fields):
  return edit(lambda found: found["kernels"][0].update(fields))


def part(**fields):
  return edit(lambda found: found["kernels"][0]["parts"][0].update(fields))


def widths(found):
  found["layers"]["first"]["bits"]["weights"] = 99


DAMAGE = {
  "folder": (shutil.rmtree, "copy: there is no such folder; give that of an"),
  "empty": (
    lambda folder: (folder / "manifest.json").unlink(),
    "copy: holds no export, which has a manifest.json; give that",
  ),
  "no JSON": (truncate("manifest.json"), "manifest.json: is damaged; export"),
  "no text": (write("manifest.json", b"\xff{}"), "manifest.json: is damaged"),
  "no object": (write("manifest.json", b"[1]"), "manifest.json: is damaged"),
  "NaN": (write("manifest.json", b'{"a": NaN}'), "manifest.json: is damaged"),
  "infinity": (
    write(
      "manifest.json",
      b'{"format": "dpc_jax packed model", "version": 1, "a": 1e999}',
    ),
    "manifest.json: is damaged",
  ),
  "depth": (write("manifest.json", b"[" * 10**6), "manifest.json: is damaged"),
  "other": (write("manifest.json", b"{}"), "manifest.json: is of another form"),
  "no version": (
    edit(lambda found: found.update(version=0)),
    "manifest.json: is damaged",
  ),
  "no scale": (part(scale=None), "manifest.json: does not follow the format"),
  "an offset": (
    part(offset=[0, 4 * 4]),
    "manifest.json: does not follow the format",
  ),
  "a stack": (
    kernel(stack=[0], parts=[]),
    "manifest.json: does not follow the format",
  ),
  "a name": (
    edit(lambda found: found["tensors"][0].update(name=5)),
    "manifest.json: does not follow the format",
  ),
  "newer": (
    edit(lambda found: found.update(version=2, layers="other"), False),
    "is of version 2, and this program reads up to 1; use a newer dpc_jax",
  ),
  "a word": (edit(widths, False), "manifest.json: is damaged; export the run"),
  "a width": (edit(widths), "manifest.json: does not follow the format; exp"),
  "no field": (
    edit(lambda found: found.pop("layers")),
    "manifest.json: does not follow the format",
  ),
  "a section": (
    edit(lambda found: found["tensors"][0].update(values=[0, 10**9])),
    "manifest.json: does not follow the format",
  ),
  "a file": (
    edit(lambda found: found["files"].update({"../x": {}})),
    "manifest.json: is damaged",
  ),
  "no file": (
    lambda folder: (folder / "weights.bin").unlink(),
    "weights.bin: is missing; export the run again",
  ),
  "truncated": (truncate("weights.bin"), "bytes in place of"),
  "a bit": (flip("weights.bin"), "weights.bin: is damaged; export the run"),
  "a program": (flip("model.stablehlo"), "model.stablehlo: is damaged"),
  "a model": (
    edit(lambda found: found["model"].update(name="resnet9")),
    "copy: its model cannot be built .* use the dpc_jax that wrote it",
  ),
  "its sizes": (
    edit(lambda found: found["model"].update(sizes={"width": 8})),
    "copy: model: does not fit the export",
  ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_told_in_one_line(case, copy):
  damage, words = DAMAGE[case]
  damage(copy)
  with pytest.raises(export.ExportError, match=words) as caught:
    export.load(copy)
  assert "\n" not in str(caught.value)
  assert str(copy) in str(caught.value)


def test_nothing_is_overwritten_and_nothing_is_left_half(
  frozen, copy, tmp_path, monkeypatch
):
  _, packed, _ = frozen
  with pytest.raises(export.ExportError, match="copy: is there already; not"):
    export.save(packed, copy)
  (tmp_path / "file").write_text("")
  with pytest.raises(export.ExportError, match="file: is there already"):
    export.save(packed, tmp_path / "file")
  with pytest.raises(export.ExportError, match="file is no folder that can be"):
    export.save(packed, tmp_path / "file" / "out")
  (tmp_path / "there").mkdir()
  export.save(packed, tmp_path / "there")
  before = sorted(tmp_path.iterdir())

  def full(descriptor):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(format_lib.os, "fsync", full)
  with pytest.raises(export.ExportError, match="No space left on device; use"):
    export.save(packed, tmp_path / "new")
  assert sorted(tmp_path.iterdir()) == before


def test_a_program_is_read_if_there_is_one(frozen, tmp_path):
  assert export.read_program(frozen[2]) == b"a program"
  export.save(frozen[1], tmp_path / "out")
  with pytest.raises(export.ExportError, match=r"has no model\.stablehlo; exp"):
    export.read_program(tmp_path / "out")


def test_a_program_is_no_other_than_the_manifest_says(copy):
  edit(lambda found: found["files"].update({"model.stablehlo": {}}))(copy)
  with pytest.raises(export.ExportError, match=r"manifest\.json: is damaged"):
    export.read_program(copy)


def test_what_cannot_be_read_is_not_called_damaged(copy, monkeypatch):
  def denied(path):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(format_lib.pathlib.Path, "read_bytes", denied)
  with pytest.raises(
    export.ExportError, match=r"manifest\.json: cannot be read: Permission den"
  ):
    export.load(copy)


def test_a_model_that_takes_no_such_inputs_is_told_in_one_line(frozen):
  class Other(nn.Module):
    error: type[Exception] = ValueError

    @nn.compact
    def __call__(self, x):
      raise self.error("of two\n lines")

  for error in (ValueError, IndexError):
    with pytest.raises(
      export.ExportError,
      match=r"model: cannot be called with inputs of .* of two lines",
    ):
      export.restore(frozen[1], Other(error))


def test_variables_are_not_changed(frozen):
  again = flax.traverse_util.flatten_dict(frozen[0], sep="/")
  assert int(again["precision/second/weights"]) == 5
