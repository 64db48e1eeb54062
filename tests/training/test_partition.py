"""How parameters are split, what goes with them, and that nothing changes."""

import json
import math

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import digits_vit_tiny
from dpc_jax.analysis import collectives
from dpc_jax.training import build, checks, loop, partition, sharding
from tests.training import tiny

pytestmark = pytest.mark.usefixtures("fast_compiler")
P = PartitionSpec


def shaped(**shapes):
  tree = {}
  for path, shape in shapes.items():
    node = tree
    *parents, name = path.split("/")
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = jax.ShapeDtypeStruct(shape, np.float32)
  return tree


PARAMS = shaped(
  **{
    "conv/kernel": (3, 3, 32, 64),
    "narrow/kernel": (64, 64),
    "tall/kernel": (512, 30),
    "odd/kernel": (101, 103),
    "small/kernel": (16, 16),
    "small/bias": (16,),
    "step": (),
  }
)
BLOCKS = shaped(
  **{
    "blocks/attention/query/kernel": (2, 64, 64),
    "blocks/attention/query/bias": (2, 64),
    "blocks/attention/out/kernel": (2, 64, 64),
    "blocks/attention/out/bias": (2, 64),
    "block0/mlp1/kernel": (64, 128),
    "block0/mlp1/bias": (128,),
    "block0/mlp2/kernel": (128, 64),
    "embedding/table": (1000, 64),
  }
)


def test_replicated_is_what_a_mesh_of_data_alone_has():
  specs = partition.partition(PARAMS, sharding.make_mesh())
  assert specs == dict.fromkeys(partition.leaf_paths(PARAMS), P())
  assert len(specs) == 7


def test_fsdp_splits_large_leaves_along_what_divides():
  specs = partition.partition(PARAMS, sharding.make_mesh(2, 4))
  assert specs == {
    "conv/kernel": P(None, None, None, "fsdp"),
    "narrow/kernel": P(None, "fsdp"),
    "tall/kernel": P("fsdp"),
    "odd/kernel": P(),
    "small/kernel": P(),
    "small/bias": P(),
    "step": P(),
  }


def test_fsdp_and_tensor_split_a_transformer():
  mesh = sharding.make_mesh(2, 2, 2)
  assert partition.partition(BLOCKS, mesh) == {
    "blocks/attention/query/kernel": P(None, "fsdp", "tensor"),
    "blocks/attention/query/bias": P(None, "tensor"),
    "blocks/attention/out/kernel": P(None, "tensor", "fsdp"),
    "blocks/attention/out/bias": P(),
    "block0/mlp1/kernel": P("fsdp", "tensor"),
    "block0/mlp1/bias": P("tensor"),
    "block0/mlp2/kernel": P("tensor", "fsdp"),
    "embedding/table": P("fsdp"),
  }


def test_the_first_rule_that_matches_decides():
  mesh = sharding.make_mesh(4, 2)
  rules = (
    ("small/.*kernel", ("fsdp", None)),
    (".*/kernel", ()),
    ("small/bias", ("fsdp",)),
  )
  specs = partition.partition(PARAMS, mesh, rules=rules)
  assert specs["small/kernel"] == P("fsdp", None)
  assert specs["small/bias"] == P("fsdp")
  assert specs["conv/kernel"] == specs["tall/kernel"] == P()
  # Lists are what a config becomes in JSON.
  assert specs == partition.partition(
    PARAMS, mesh, rules=json.loads(json.dumps(rules))
  )


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    ((("none/.*", ()),), "'none/.*': no parameter meets this rule first"),
    (
      ((".*/kernel", ()), ("conv/kernel", ("fsdp",))),
      "'conv/kernel': no parameter meets this rule first; correct or remove it",
    ),
    (((".*bias", ("data",)),), "no axis 'data'; use fsdp or tensor"),
    (((".*bias", ("fsdp", "tensor")),), "2 entries for small/bias of shape"),
    (
      (("odd/kernel", ("fsdp",)),),
      "odd/kernel has shape (101, 103), and 101 is no multiple of 4",
    ),
    (((".*/kernel", ("fsdp", "fsdp")),), "of the mesh splits one axis only"),
    ((("(", ()),), "'(': no regular expression"),
    (
      ((".*/kernel", ()), (".*/kernel", ())),
      "'.*/kernel': no parameter meets this rule first; correct or remove it",
    ),
    (((".*bias", (3,)),), "a rule is (pattern, (an axis or None, ...))"),
    ((["fsdp"],), "a rule is (pattern, (an axis or None, ...))"),
    (("conv/kernel",), "a rule is (pattern, (an axis or None, ...))"),
    (((".*bias", "fsdp"),), "a rule is (pattern, (an axis or None, ...))"),
  ],
)
def test_rules_that_do_not_fit(rules, message):
  with pytest.raises(checks.ConfigError) as error:
    partition.partition(PARAMS, sharding.make_mesh(2, 4), rules=rules)
  assert str(error.value).startswith("config.mesh.rules = ")
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_an_axis_that_splits_nothing_is_refused():
  with pytest.raises(checks.ConfigError, match=r"mesh\.tensor = 2: splits no"):
    partition.partition(PARAMS, sharding.make_mesh(4, 1, 2))
  with pytest.raises(checks.ConfigError, match=r"mesh\.sharding = 'fdsp': use"):
    partition.partition(PARAMS, sharding.make_mesh(), preset="fdsp")


def test_what_holds_copies_of_parameters_follows_them():
  specs = partition.partition(PARAMS, sharding.make_mesh(2, 4))
  state = (
    {"mean": {"conv": jax.ShapeDtypeStruct((3, 3, 32, 64), np.float32)}},
    {"trace": PARAMS, "count": jax.ShapeDtypeStruct((), np.int32)},
    {"conv": {"kernel": jax.ShapeDtypeStruct((1024,), np.float32)}},
  )
  mean, momentum, sketch = partition.follow(state, PARAMS, specs)
  assert mean["mean"]["conv"] == specs["conv/kernel"]
  assert partition.leaf_paths(momentum["trace"]) == specs
  assert momentum["count"] == sketch["conv"]["kernel"] == P()


def test_the_table_says_what_a_device_holds():
  mesh = sharding.make_mesh(2, 4)
  specs = partition.partition(PARAMS, mesh)
  rows = [x.split() for x in partition.table(PARAMS, specs, mesh).split("\n")]
  shown = "conv/kernel 3 x 3 x 32 x 64 -, -, -, fsdp 4,608"
  assert " ".join(rows[1]) == shown
  sizes = {
    path: math.prod(leaf.shape)
    for path, leaf in partition.leaf_paths(PARAMS).items()
  }
  held = {p: n // (4 if "fsdp" in specs[p] else 1) for p, n in sizes.items()}
  totals = [f"{sum(x.values()):,}" for x in (sizes, held)]
  assert rows[-1] == ["total", *totals]
  assert len(rows) == len(PARAMS) + 3


@pytest.mark.parametrize(
  ("sizes", "shape"),
  [
    ((None, 1, 1), (8, 1, 1)),
    ((1, None, 2), (1, 4, 2)),
    ((None, 4, 2), (1, 4, 2)),
    ((2, 2, None), (2, 2, 2)),
    ((3, 1, 1), (3, 1, 1)),
  ],
)
def test_sizes_of_the_mesh(sizes, shape):
  assert tuple(sharding.make_mesh(*sizes).shape.values()) == shape


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ((None, None, 1), "mesh.fsdp = None: only one axis can be the rest"),
    ((None, 3, 1), "mesh.fsdp = 3: the 8 devices are no multiple of 3; use"),
    ((None, 1, 16), "mesh.tensor = 16: the 8 devices are no multiple of 16"),
    ((4, 4, 1), "mesh.data = 4: there are 8 devices, and data 4 x fsdp 4"),
    ((1, 16, 1), "mesh.data = 1: .*lower mesh.fsdp or mesh.tensor"),
    ((1, 0, 1), "mesh.fsdp = 0: there are 8 devices; use 1..8"),
  ],
)
def test_sizes_that_do_not_fit(sizes, message):
  with pytest.raises(checks.ConfigError, match=message):
    sharding.make_mesh(*sizes)


@pytest.mark.parametrize(
  ("tensor", "readers"),
  [
    (1, [(0, 4), (1, 4), (2, 4), (3, 4)]),
    (2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
    (4, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    (8, [(0, 1)] * 4),
  ],
)
def test_processes_that_share_rows_read_the_same(monkeypatch, tensor, readers):
  mesh = sharding.make_mesh(None, 1, tensor)
  monkeypatch.setattr(jax, "process_count", lambda: 4)
  for index, reader in enumerate(readers):
    monkeypatch.setattr(jax, "process_index", lambda i=index: i)
    assert sharding.rows_of_process(mesh) == reader


def make_config(method, **changes):
  config = digits_vit_tiny.get_config(f"{method},smoke")
  config.update_from_flattened_dict(
    {
      "batch_size": 32,
      "model.width": 64,
      "model.mlp_width": 96,
      "model.heads": 4,
      "model.scan": True,
      "steps": 3,
      **changes,
    }
  )
  return config


def train(method, **changes):
  parts = build.build(make_config(method, **changes))
  programs = build.compile_programs(parts)
  state, losses = programs.init(), []
  first = jax.tree.map(lambda x: x.sharding, state)
  batches = parts.feed.train(0, 3)
  for rows in batches:
    batch = sharding.put_batch(rows, parts.mesh)
    state, metrics = programs.train_step(state, batch)
    losses.append(float(metrics.loss) / float(metrics.count))
  batches.close()
  last = jax.tree.map(lambda x: x.sharding, state)
  assert jax.tree.all(
    jax.tree.map(
      lambda a, b, x: a.is_equivalent_to(b, x.ndim), first, last, state
    )
  )
  return parts, programs, state, losses


TENSOR = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}


def test_a_transformer_split_three_ways():
  """Born split, kept split, with its moments; and the same losses."""
  *_, one = train("float", **{"mesh.data": 1})
  parts, programs, state, losses = train("float", **TENSOR)
  np.testing.assert_allclose(losses, one, rtol=0, atol=1e-5)
  assert len(set(one)) == 3
  mesh = parts.mesh
  mlp1 = state.params["blocks"]["mlp1"]["kernel"]
  assert mlp1.sharding == NamedSharding(mesh, P(None, "fsdp", "tensor"))
  assert mlp1.addressable_shards[0].data.shape == (2, 32, 48)
  moments = [
    x
    for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
    if jax.tree_util.keystr(path).endswith("['blocks']['mlp1']['kernel']")
  ]
  assert [x.sharding for x in moments] == [mlp1.sharding] * 2
  # Parameters are gathered before the products, activations never.
  assert gathers_parameters_only(programs, state)


def gathers_parameters_only(programs, state):
  found = collectives.read(
    programs.train_step.as_text(), {"params": state.params}
  )
  moved = [x for x in found if x.kind not in ("all-reduce", "reduce-scatter")]
  return moved != [] and all(
    x.kind == "all-gather"
    and all(operand.group == "parameters" for operand in x.operands)
    for x in moved
  )


def test_without_the_gather_activations_move(monkeypatch):
  """The check above can fail."""
  monkeypatch.setattr(sharding, "make_gather", lambda mesh, specs: None)
  _, programs, state, _ = train("float", **{"mesh.data": 2, "mesh.fsdp": 4})
  assert not gathers_parameters_only(programs, state)


def test_heads_are_not_torn_apart():
  with pytest.raises(checks.ConfigError, match=r"tensor = 2: the model has 3"):
    sizes = {"model.width": 48, "model.heads": 3}
    build.build(make_config("dpc", **TENSOR, **sizes))


def test_the_gradient_of_a_gathered_parameter_is_split():
  mesh = sharding.make_mesh(1, 8)
  params = {"w": np.ones((64, 64), np.float32)}
  gather = sharding.make_gather(mesh, {"w": P("fsdp")})
  split = NamedSharding(mesh, P("fsdp"))

  @jax.jit
  def gradient(params):
    return jax.grad(lambda p: (gather(p)["w"] ** 2).sum())(params)

  assert gradient(jax.device_put(params, split))["w"].sharding == split
  assert sharding.make_gather(mesh, {"w": P()}) is None
  assert sharding.make_gather(mesh, None) is None


def test_a_quantized_transformer_split_three_ways():
  *_, one, losses_of_one = train("dpc", **{"mesh.data": 1})
  *_, split, losses = train("dpc", **TENSOR)
  assert abs(losses[0] - losses_of_one[0]) < 1e-3
  np.testing.assert_allclose(losses, losses_of_one, rtol=0, atol=0.05)
  names = ("precision", ".cost", ".schedule_state")
  a, b = (
    {k: v for k, v in tiny.leaves(s).items() if any(n in k for n in names)}
    for s in (one, split)
  )
  assert a
  tiny.assert_same(a, b)


def test_statistics_follow_their_kernels():
  config = make_config("adaptive", **{"mesh.data": 2, "mesh.fsdp": 4})
  parts = build.build(config)
  shapes = jax.eval_shape(parts.init, jax.random.key(0))
  shardings = sharding.of_state(shapes, parts.mesh, parts.partition)
  kernel = shardings.params["blocks"]["mlp1"]["kernel"]
  assert kernel.spec == P(None, None, "fsdp")
  tracked = partition.leaf_paths(shardings.opt_state[0].mean)
  assert tracked["blocks/mlp1"] == kernel
  rest = jax.tree.leaves((shardings.model_state, shardings.cost))
  assert rest
  assert all(x.is_fully_replicated for x in rest)


def test_the_run_prints_the_table(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(loop.metrics_lib, "_event_writer", lambda workdir: None)
  config = make_config("dpc", **TENSOR)
  loop.train_and_evaluate(config, tmp_path)
  out = capsys.readouterr().out
  assert "fsdp, tensor" in out
  assert "per device" in out
