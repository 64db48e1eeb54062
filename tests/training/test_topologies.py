"""One run on 1 device, 8 devices, 2 processes of 4 and 4 of 2.

Dropout, stochastic rounding and augmentation are on: their noise is a function
of an element's place in the global batch and of the step, not of the device.
Float agrees to 1e-5 over all steps. Quantized training is chaotic in the last
bit: a sum in another order moves a value over a rounding tie. There the first
step agrees, and what is left later must be less than what another seed of
stochastic rounding does.
"""

import functools
import itertools
import json
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest

import dpc_jax as dpc
from dpc_jax import models
from dpc_jax.data import pipeline
from dpc_jax.quant import grids
from dpc_jax.training import build, loop
from tests import compiling
from tests.training import processes, tiny, topologies

PROCESSES = (2, 4)
EXACT = ("'precision'", ".cost", ".schedule_state", ".step", ".rng")
ROUNDING_SEEDS = range(4)

pytestmark = pytest.mark.usefixtures("table")


@pytest.fixture(scope="module")
def table():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.metrics_lib, "_event_writer", lambda workdir: None)
    patch.setitem(models._CONSTRUCTORS, "tiny", tiny.Tiny)
    yield


@functools.cache
def here(case, mesh, again=0, rounding=None):
  """(last, first) of a run in this process."""
  del again
  sizes = topologies.MESHES.get(mesh, {"mesh.data": 1})
  config = topologies.make_config(case, sizes)
  return topologies.train(config, rounding)


def keep_first_save(workdir):
  """As a run that was stopped after its first save."""
  for path in (workdir / "checkpoints").iterdir():
    if path.is_dir() and path.name != str(topologies.SAVED):
      shutil.rmtree(path)
  for name in ("summary.json", "found_bounds.json"):
    (workdir / name).unlink()


@pytest.fixture(scope="module", params=PROCESSES, ids="{} processes".format)
def together(request, table, tmp_path_factory):
  """The workdir of several processes, which end with no error."""
  workdir = tmp_path_factory.mktemp("several")
  with compiling.fast():
    sizes = {"mesh.data": 1} | topologies.FOUND
    config = topologies.make_config("dpc", sizes)
    loop.train_and_evaluate(config, workdir / "resumed")
  shutil.copytree(workdir / "resumed", workdir / "one")
  keep_first_save(workdir / "resumed")
  processes.run("tests.training.topologies", request.param, workdir)
  return workdir, request.param


def load(together, name, index=0):
  return dict(np.load(together[0] / f"{name}-{index}.npz"))


def params(state):
  return np.concatenate(
    [state[name].ravel() for name in sorted(state) if ".params" in name]
  )


def parts_of(state, names):
  return {k: v for k, v in state.items() if any(n in k for n in names)}


def codes(state):
  """Codes of all kernels, and of all inputs for one batch of images."""
  config = topologies.make_config("dpc", {"mesh.data": 1})
  parts = build.build(config)
  shapes = jax.eval_shape(parts.init, jax.random.key(0))
  flat, tree = jax.tree_util.tree_flatten_with_path(shapes.replace(rng=None))
  restored = jax.tree.unflatten(
    tree, [state[jax.tree_util.keystr(path)] for path, _ in flat]
  )
  rows = pipeline.TrainBatches(
    parts.data.splits["train"], batch_size=32, seed=0
  ).batch(1)
  args, _ = parts.task.inputs(rows, (), None)
  found = {}

  def look(call, args, kwargs, context):
    layer = context.module
    # A call of the parent's call comes here once more.
    if isinstance(layer, dpc.QuantConv) and layer.path not in found:
      found[layer.path] = []
      widths = layer.variables["precision"]
      for x, grid, width in (
        (args[0], layer.quantization.activations, widths["activations"]),
        (
          layer.variables["params"]["kernel"],
          layer.quantization.weights,
          widths["weights"],
        ),
      ):
        limits = grids.value_range(x, grids.channel_axes(grid, (-1,)))
        quantized = grids.encode(x, width, grid, limits)
        found[layer.path].append(quantized.codes.ravel())
    return call(*args, **kwargs)

  with nn.intercept_methods(look):
    parts.model.apply(
      {"params": restored.params, **restored.model_state}, *args
    )
  assert [len(x) for x in found.values()] == [2, 2]
  return np.concatenate([x for pair in found.values() for x in pair])


def assert_close(case, last, first, name, reference="one"):
  """The tolerances of the module's docstring, against one device.

  Prints a row: case, topology, difference of the first loss, the largest of
  all; of quantized runs also the share of equal codes after one step, and the
  distances, beside the largest of runs with other seeds of rounding.
  """
  one, one_first = here(case, reference)
  assert len(set(one["losses"])) == topologies.STEPS
  tiny.assert_same(parts_of(one, EXACT), parts_of(last, EXACT))
  difference = np.abs(last["losses"] - one["losses"])
  row = f"{case} | {name} | {difference[0]:.1e} | {difference.max():.1e}"
  if case != "dpc":
    print(f"\n{row}")
    np.testing.assert_array_less(difference, 1e-5, err_msg=name)
    return
  equal = np.mean(codes(first) == codes(one_first))
  apart = distances(last, one)
  spread = spread_of_seeds()
  print(f"\n{row} | {equal:.4%} | {apart.round(4)} | {spread.round(4)}")
  assert difference[0] < 1e-3
  assert equal >= 0.999
  assert np.all(apart < spread)


def distances(a, b):
  """Of the last parameters, and of the losses on average over the steps."""
  losses = np.abs(a["losses"] - b["losses"])
  return np.array([np.linalg.norm(params(a) - params(b)), losses.mean()])


@functools.cache
def spread_of_seeds():
  """The largest distances of two runs with other seeds of rounding."""
  runs = [here("dpc", "one", 0, seed)[0] for seed in (None, *ROUNDING_SEEDS)]
  return np.max(
    [distances(a, b) for a, b in itertools.combinations(runs, 2)], axis=0
  )


@pytest.mark.parametrize("mesh", ["data", "fsdp", "data and fsdp", "tensor"])
@pytest.mark.parametrize("case", topologies.CASES)
def test_eight_devices_as_one(case, mesh):
  assert_close(case, *here(case, mesh), mesh)


@pytest.mark.parametrize("case", topologies.CASES)
def test_split_parameters_as_copies(case):
  assert_close(case, *here(case, "fsdp"), "fsdp", reference="data")


def test_a_rerun_is_the_same_run():
  tiny.assert_same(here("dpc", "data")[0], here("dpc", "data", again=1)[0])


@pytest.mark.parametrize("case", topologies.CASES)
def test_several_processes_as_one_device(case, together):
  last, first = (
    load(together, f"{case}-data"),
    load(together, f"{case}-data-0", "first"),
  )
  assert_close(case, last, first, f"{together[1]} processes")


def test_several_processes_rerun_and_split(together):
  """On one topology bit for bit; split over fsdp as nearly as in one process.

  Every process has the same state, bits and ranges in it.
  """
  last = load(together, "dpc-data")
  tiny.assert_same(last, load(together, "dpc-again"))
  assert_close(
    "dpc",
    load(together, "dpc-fsdp"),
    load(together, "dpc-data-0", "first"),
    "fsdp",
  )
  assert_close("float", load(together, "float-tensor"), None, "tensor")
  for index in range(1, together[1]):
    for name in ("dpc-data", "dpc-fsdp", "float-tensor"):
      tiny.assert_same(load(together, name), load(together, name, index))


def lines(workdir, *keys):
  return [
    tuple(line[key] for key in keys)
    for line in tiny.read_lines(workdir / "metrics.jsonl")
    if line["split"] == "train"
  ]


def assert_went_on(workdir, origin):
  """The same steps and bits; the next loss is of the same batch and state."""
  keys = ("step", "epoch", "relative_cost", "mean_bits")
  assert lines(workdir, *keys) == lines(origin, *keys)
  assert (workdir / "bits.jsonl").read_text() == (
    origin / "bits.jsonl"
  ).read_text()
  # The bounds were found after the restart, from weights as near as the losses.
  found = [
    json.loads((x / "found_bounds.json").read_text()) for x in (workdir, origin)
  ]
  assert found[0]["b_min"] == found[1]["b_min"]
  assert found[0]["step"] > topologies.SAVED
  after, before = (np.array(lines(x, "loss")) for x in (workdir, origin))
  saved = topologies.SAVED
  np.testing.assert_array_equal(after[:saved], before[:saved])
  # One batch apart, losses differ by a hundred times as much.
  assert abs(after[saved] - before[saved]) < 1e-4
  assert np.abs(np.diff(before[:, 0])).mean() > 1e-2
  np.testing.assert_allclose(after, before, rtol=0, atol=0.05)


def test_processes_go_on_from_one_device(together):
  assert_went_on(together[0] / "resumed", together[0] / "one")


@pytest.mark.parametrize("mesh", ["one", "data and fsdp"])
def test_one_process_goes_on_from_several(together, mesh, tmp_path):
  origin = together[0] / "run"
  shutil.copytree(origin, tmp_path / "here")
  keep_first_save(tmp_path / "here")
  with compiling.fast():
    sizes = topologies.MESHES.get(mesh, {"mesh.data": 1})
    loop.train_and_evaluate(
      topologies.make_config("dpc", sizes | topologies.FOUND),
      tmp_path / "here",
    )
  assert_went_on(tmp_path / "here", origin)
