"""What devices send each other in a train step, and how it is read."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from configs import digits_resnet8, ptb_lstm_tiny
from dpc_jax import models
from dpc_jax.analysis import collectives
from dpc_jax.models import common
from dpc_jax.quant import grids
from dpc_jax.training import build, checkpoint, sharding
from dpc_jax.training import config as config_lib
from dpc_jax.training import step as step_lib
from experiments.bench import collectives as bench
from tests import compiling
from tests.training import tiny

WIDTH = 4
VIT = {"width": 16, "layers": 1, "heads": 4, "mlp_width": 32, "patch_size": 4}
# Axes of the norms' vectors in a step: two of statistics in the forward pass,
# and in the backward pass as many of their gradients and one of the scale's.
NORM_VECTORS = 5


class Deep(nn.Module):
  """`layers` times convolution - norm - relu; mean; float dense."""

  num_classes: int
  quantization: grids.Quantization | None = grids.Quantization()
  layers: int = 2

  @nn.compact
  def __call__(self, x, train=False):
    conv = common.convolution(self.quantization, use_bias=False)
    for i in range(self.layers):
      x = conv(WIDTH, (3, 3), name=f"conv{i}")(x)
      x = nn.relu(nn.BatchNorm(not train, name=f"norm{i}")(x))
    x = jnp.mean(x, axis=(1, 2))
    return nn.Dense(self.num_classes, name="classifier")(x)


@functools.cache
def read(layers, method, ranges):
  """The collectives of a data-parallel step on 8 devices."""
  with pytest.MonkeyPatch.context() as patch, compiling.fast():
    patch.setitem(models._CONSTRUCTORS, "deep", Deep)
    changes = {
      "model.name": "deep",
      "model.layers": layers,
      "precision.ranges": ranges,
      "batch_size": 16,
      "mesh.data": 8,
      "data.augment": True,
    }
    return collectives_of(tiny.make_config(method, **changes))


@functools.cache
def read_split(ranges):
  """Of a transformer of one block, whose columns are split over `tensor`."""
  changes = {
    "model.name": "vit_tiny",
    **{f"model.{name}": n for name, n in VIT.items()},
    "precision.ranges": ranges,
    "batch_size": 16,
    "mesh.data": 2,
    "mesh.tensor": 2,
  }
  with compiling.fast():
    return collectives_of(tiny.make_config("dpc", **changes))


def collectives_of(config):
  parts = build.build(config)
  shapes = jax.eval_shape(parts.init, jax.random.key(0))
  shardings = sharding.of_state(shapes, parts.mesh, parts.partition)
  batched = sharding.batch(parts.mesh)
  rows = parts.feed.train_batch
  gather = sharding.make_gather(parts.mesh, parts.partition)
  step = step_lib.make_train_step(
    parts.model, parts.optimizer, parts.schedule, parts.task, gather
  )
  text = (
    jax.jit(
      step,
      out_shardings=(shardings, sharding.replicated(parts.mesh)),
      donate_argnums=0,
    )
    .lower(
      checkpoint.abstract_state(shapes, shardings),
      checkpoint.abstract_state(rows, jax.tree.map(lambda _: batched, rows)),
    )
    .compile()
    .as_text()
  )
  variables = {"params": shapes.params, **shapes.model_state}
  return collectives.read(text, variables)


def forms(found, group):
  return sorted((x.dtype, *x.shape) for x in collectives.operands(found, group))


def without_ranges(found):
  counts = collectives.summary(found)
  del counts["ranges"], counts["all"]
  return counts


@pytest.mark.parametrize("layers", [2, 4])
def test_a_quantized_step_adds_four_scalars_per_layer(layers):
  plain, found = (read(layers, m, "batch") for m in ("float", "dpc"))
  assert {x.kind for x in plain + found} == {"all-reduce"}
  ranges = collectives.operands(found, "ranges")
  # Smallest and largest, of the activations and of the gradient.
  assert len(ranges) == 4 * layers
  assert {(x.dtype, x.shape) for x in ranges} == {("f32", ())}
  for end in ("reduce_min", "reduce_max"):
    assert sum(x.source.endswith(end) for x in ranges) == 2 * layers
  backward = sum("transpose(" in x.source for x in ranges)
  assert backward == 2 * layers
  assert not collectives.operands(plain, "ranges")
  assert without_ranges(found) == without_ranges(plain)


@pytest.mark.parametrize("method", ["float", "dpc"])
def test_gradients_and_norms_are_told_apart(method):
  found = read(2, method, "batch")
  conv = [("f32", 3, 3, 1, WIDTH), ("f32", 3, 3, WIDTH, WIDTH)]
  dense = [("f32", 10), ("f32", 10, WIDTH)]
  assert forms(found, "gradients") == sorted(conv + dense)
  assert forms(found, "batch norm") == [("f32", WIDTH)] * (2 * NORM_VECTORS)
  # Loss, and right answers.
  assert forms(found, "loss") == [("f32",)] * 2
  for group in ("parameters", "other"):
    assert not collectives.operands(found, group)


def test_delayed_ranges_add_one_collective_at_any_depth():
  for layers in (2, 4, 6):
    plain, found = (
      read(layers, "float", "batch"),
      read(layers, "dpc", "delayed"),
    )
    assert len(found) == len(plain) + 1
    (ranges,) = [
      x for x in found if any(o.group == "ranges" for o in x.operands)
    ]
    assert ranges.kind == "all-reduce"
    assert [o.shape for o in ranges.operands] == [(4 * layers,)]
    assert without_ranges(found) == without_ranges(plain)


def test_with_split_columns_there_is_more_than_one():
  """A row is split too: its range is joined over `tensor` in each layer."""
  batch, found = (
    collectives.operands(read_split(ranges), "ranges")
    for ranges in ("batch", "delayed")
  )
  assert (len(batch), len(found)) == (64, 29)
  (joined,) = [x for x in found if "jvp" not in x.source]
  assert joined.source == "jit(train_step)/range/reduce_max"
  split = [x for x in found if x is not joined]
  # Of the rows of a device, or of the columns of a kernel.
  assert {x.shape for x in split} == {(8,), (16,)}
  layers = {x.source.split("/range/")[0].rsplit("/")[-1] for x in split}
  assert layers == {
    *("query", "key", "value", "qk", "av", "out", "mlp1", "mlp2"),
  }


def test_the_forms_that_a_compiler_writes():
  text = """
  %a = (f32[4]{0}, bf16[2,3]{1,0}, /*index=5*/s8[7]{0:T(8)S(1)}) all-reduce(%x, %y, %z), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add, metadata={op_name="jit(f)/transpose(jvp(M))/(norm/sum:last/dot_general:last/sum)" id=3}
  %x = f32[4]{0} negate(%q), metadata={op_name="jit(f)/jvp(M)/norm/neg"}
  %z = pred[]{:T(128)} compare(%q), metadata={op_name="jit(f)/jvp()/eq"}
  %b = (f32[4]{0}, pred[]) all-reduce-start(%x, %z), replica_groups={{0,1},{2,3}}, to_apply=%add
  %b2 = (f32[4]{0}, pred[]) all-reduce-done(%b)
  %c = (f32[2,3]{1,0}, f32[16,3]{1,0}) all-gather-start(f32[2,3]{1,0} %k), dimensions={0}, metadata={op_name="jit(f)/jvp()/sharding_constraint"}
  %d = f32[2,3]{1,0} reduce-scatter(%k), dimensions={0}, metadata={op_name="jit(f)/transpose(jvp())/sharding_constraint"}
  %e = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%w), source_target_pairs={{0,1}}, metadata={op_name="jit(f)/jvp(M)/roll"}
  ROOT %g = f64[2,2]{1,0} all-to-all(%w), metadata={op_name="jit(f)/jvp(M)/layer/range/reduce_max"}
  """  # noqa: E501
  params = {"last": {"kernel": jnp.zeros((16, 3)), "bias": jnp.zeros(7)}}
  stats = {"block": {"norm": {"mean": jnp.zeros(4)}}}
  found = collectives.read(text, {"params": params, "batch_stats": stats})
  assert [x.kind for x in found] == [
    *("all-reduce", "all-reduce", "all-gather", "reduce-scatter"),
    *("collective-permute", "all-to-all"),
  ]
  got = [
    (o.dtype, o.shape, o.bytes, o.group) for x in found for o in x.operands
  ]
  assert got == [
    ("f32", (4,), 16, "batch norm"),
    ("bf16", (2, 3), 12, "gradients"),
    ("s8", (7,), 7, "gradients"),
    ("f32", (4,), 16, "batch norm"),
    ("pred", (), 1, "loss"),
    ("f32", (16, 3), 192, "parameters"),
    ("f32", (2, 3), 24, "gradients"),
    ("f32", (5,), 20, "other"),
    ("f64", (2, 2), 32, "ranges"),
  ]
  assert (
    found[0].operands[1].source == "jit(f)/transpose(jvp(M))/last/dot_general"
  )
  counts = collectives.summary(found)
  assert counts["batch norm"] == {"operands": 2, "scalars": 0, "bytes": 32}
  assert counts["all"] == {
    **{"operands": 9, "scalars": 1, "bytes": 320},
    "instructions": 6,
  }


def test_sums_of_activations_are_no_gradients():
  """Where the shape is no parameter's: what tensor parallelism sends."""
  line = (
    "%a = f32[4,16,9] all-reduce(%x), "
    'metadata={op_name="jit(f)/transpose(jvp(M))/layer/dot_general"}'
  )
  params = {"params": {"kernel": jnp.zeros((16, 9))}}
  for variables, group in ((None, "gradients"), (params, "other")):
    (found,) = collectives.read(line, variables)
    assert found.operands[0].group == group


@pytest.mark.usefixtures("fast_compiler")
def test_the_bench_writes_what_it_prints(tmp_path, monkeypatch, capsys):
  config = tiny.make_config(**{"mesh.data": 8})
  flags = {"config": config, "workdir": str(tmp_path)}
  monkeypatch.setattr(bench.cli, "FLAGS", type("Flags", (), flags))
  bench.main()
  results = json.loads((tmp_path / "collectives_tiny_8x1x1.json").read_text())
  counts = {
    label: variant["ranges"]["operands"]
    for label, variant in results["variants"].items()
  }
  assert counts == {"float": 0, "quantized": 8, "delayed ranges": 1}
  printed = capsys.readouterr().out
  cells = next(x for x in printed.splitlines() if x.startswith("ranges"))
  assert " ".join(cells.split()) == "ranges 0 (0 B) 8 (32 B) 1 (32 B)"


def test_a_loop_over_time_is_refused():
  config = ptb_lstm_tiny.get_config()
  config.precision.ranges = "delayed"
  with pytest.raises(
    config_lib.ConfigError,
    match=r"^config\.precision\.ranges = 'delayed': lstm_lm .*use batch$",
  ):
    config_lib.validate(config)


def test_each_variant_is_what_its_label_says():
  config = digits_resnet8.get_config()
  assert {
    label: (c.precision.method, c.precision.ranges)
    for label, c in bench.variants(config).items()
  } == {
    "float": ("float", "batch"),
    "quantized": ("dpc", "batch"),
    "delayed ranges": ("dpc", "delayed"),
  }
  assert list(bench.variants(ptb_lstm_tiny.get_config())) == [
    *("float", "quantized"),
  ]


@pytest.mark.parametrize(
  ("environment", "devices"),
  [
    ({}, [8]),
    ({"JAX_NUM_CPU_DEVICES": "4"}, []),
    ({"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, []),
  ],
)
def test_the_bench_poses_as_many_only_unasked(
  monkeypatch, environment, devices
):
  for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  asked = []
  monkeypatch.setattr(bench.jax.config, "update", lambda *x: asked.append(x))
  bench.pose_as_devices()
  assert asked == [("jax_num_cpu_devices", n) for n in devices]
