"""From a config to the parts of a run, and to its compiled programs."""

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections
import optax
from jax.sharding import Mesh

from dpc_jax import models
from dpc_jax.cost import bitops, macs
from dpc_jax.data import corpus, sources
from dpc_jax.policy import schedules, statistics
from dpc_jax.quant import grids
from dpc_jax.training import (
  checkpoint,
  checks,
  config_precision,
  methods,
  partition,
  programs,
  sharding,
  tasks,
)
from dpc_jax.training import config as config_lib
from dpc_jax.training import feed as feed_lib
from dpc_jax.training import optimizer as optimizer_lib
from dpc_jax.training import state as state_lib
from dpc_jax.training import step as step_lib


class Parts(NamedTuple):
  """A run, built but not compiled.

  Attributes:
    config: resolved: `steps` is set.
    data: the data set.
    feed: its batches.
    task: what the steps do with them.
    mesh: of the devices.
    partition: {path of a parameter: PartitionSpec over the mesh}.
    model: with or without quantization.
    optimizer: of its parameters.
    schedule: of its widths; empty for a float model.
    schedule_state: (b_min, b_max) -> the schedule's first state between these
      bounds, pure.
    costs: {path: LayerCost} of the model.
    static_bits: {path: B_max}, what savings are relative to, of all layers
      that a method other than float quantizes.
    init: key -> TrainState, pure.
  """

  config: ml_collections.FrozenConfigDict
  data: feed_lib.Data
  feed: feed_lib.Feed
  task: tasks.Task
  mesh: Mesh
  partition: partition.Specs
  model: nn.Module
  optimizer: optax.GradientTransformation
  schedule: schedules.Schedule
  schedule_state: Callable[[int, int], Any]
  costs: dict[str, bitops.LayerCost]
  static_bits: dict[str, int]
  init: Callable[[jax.Array], state_lib.TrainState]


class Programs(NamedTuple):
  """The compiled programs of a run.

  Attributes:
    init: () -> TrainState, sharded from birth.
    train_step: (state, batch) -> (state, metrics); donates the state. Where
      `config.steps_per_call` is above 1, one step of the program below.
    eval_step: (state, batch, carry) -> (metrics, carry).
    eval_carry: () -> the recurrent state before an evaluation.
    abstract: the state's shapes, dtypes and shardings.
    seconds: tracing and compiling the two steps.
    traces: how often the train step was traced; a run has one.
    cached: whether the train step came from the persistent compilation cache.
    train_steps: (state, batches, count) -> (state, metrics), what
      `step.make_train_steps` returns, compiled for `config.steps_per_call`
      batches; donates the state. None where that is 1.
  """

  init: Callable[[], state_lib.TrainState]
  train_step: Callable[..., Any]
  eval_step: Callable[..., Any]
  eval_carry: Callable[[], Any]
  abstract: state_lib.TrainState
  seconds: float
  traces: list[int]
  cached: bool = False
  train_steps: Callable[..., Any] | None = None


def build(
  config: ml_collections.ConfigDict, data: feed_lib.Data | None = None
) -> Parts:
  """Checks a config and builds the run; compiles nothing.

  Args:
    config: see `configs/default.py`.
    data: a data set at hand; None loads `config.data`.

  Raises:
    ConfigError: one line that names the field, its value and the remedy.
  """
  config_lib.validate(config)
  mesh = sharding.make_mesh(
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor
  )
  _check_kind(config)
  with _as_config_error("config.model"):
    model = make_model(config, num_classes=1)
  data = _load(config) if data is None else data
  feed_lib.check_fields(config, data)
  row_parts = sharding.batch_parts(mesh)
  with _as_config_error("config.data"):
    rows = feed_lib.rows_per_epoch(config, data)
  config = config_lib.resolve(config, rows, row_parts)
  with _as_config_error("config.model"):
    model = make_model(config, num_classes=data.num_classes)
  with _as_config_error("config.data"):
    reader = sharding.rows_of_process(mesh)
    feed = feed_lib.make_feed(config, data, row_parts, reader)
  task = feed_lib.make_task(config, data, model)
  with _as_config_error("config.model"):
    costs = macs.layer_costs(model, feed.sample)
  run = _describe(config, rows, costs)
  capacities = _capacities(model, feed.sample)
  schedule = make_schedule(config, run)
  optimizer = _with_tracker(config, run, schedule, capacities)
  carry = jax.eval_shape(lambda: task.initial_carry(config.batch_size))
  with _as_config_error("config.model"):
    init = state_lib.make_init(model, optimizer, schedule, feed.sample, carry)
  return Parts(
    config=config,
    data=data,
    feed=feed,
    task=task,
    mesh=mesh,
    partition=_partition(config, model, init, mesh),
    model=model,
    optimizer=optimizer,
    schedule=schedule,
    schedule_state=functools.partial(_between, config, run, capacities),
    costs=costs,
    static_bits=_static_bits(config, data.num_classes, feed.sample, capacities),
    init=init,
  )


def _partition(config, model, init, mesh) -> partition.Specs:
  heads, tensor = getattr(model, "heads", None), mesh.shape["tensor"]
  # Else whole activations would be gathered to tell the heads apart.
  if heads is not None and heads % tensor:
    checks.fail(
      "mesh.tensor", tensor, f"the model has {heads} heads; use a divisor"
    )
  with _as_config_error("config.precision"):
    shapes = jax.eval_shape(init, jax.random.key(0))
  return partition.partition(
    shapes.params,
    mesh,
    preset=config.mesh.sharding,
    rules=config.mesh.rules or (),
  )


def _load(config) -> feed_lib.Data:
  with _as_config_error("config.data"):
    return sources.load(
      config.data.name,
      data_dir=config.data.dir,
      holdout=config.data.holdout,
      train_size=config.data.train_size,
      fake=config.data.fake,
    )


def _check_kind(config):
  reads_text = config.model.name in models.LANGUAGE_MODELS
  if reads_text == (config.data.name in corpus.known()):
    return
  have, want = ("images", "text") if reads_text else ("text", "images")
  raise config_lib.ConfigError(
    f"config.model.name = {config.model.name!r}: reads {want}, but"
    f" {config.data.name} is {have}; change model.name or data.name"
  )


def make_model(
  config: ml_collections.ConfigDict, num_classes: int
) -> nn.Module:
  """The model of a config; plain float for the method float."""
  quantization = None
  if config.precision.method != "float":
    kind = config.precision.kind
    quantization = grids.Quantization(
      weights=grids.Grid(kind, "channel"),
      activations=grids.Grid(kind),
      gradients=grids.Grid(kind, rounding="stochastic"),
      storage_bits=config.precision.storage_bits,
      ranges=config.precision.ranges,
      backend=config.precision.backend,
      input_gradient=config.precision.input_gradient,
    )
  sizes = {
    name: value
    for name, value in config.model.items()
    if name != "name" and value is not None
  }
  return models.create(
    config.model.name,
    num_classes=num_classes,
    quantization=quantization,
    **sizes,
  )


def _static_bits(config, num_classes, sample, capacities):
  """{path: B_max} of the layers that have widths, or would in a float run."""
  if config.precision.method == "float":
    config = ml_collections.ConfigDict(config.to_dict())
    config.precision.method = "dpc"
    capacities = _capacities(make_model(config, num_classes), sample)
  return dict.fromkeys(capacities, config.precision.b_max)


def make_schedule(
  config: ml_collections.ConfigDict, run: methods.Run
) -> schedules.Schedule:
  """The bit schedule of a config; empty for the method float.

  Where the bounds are to be found on the way, it starts at b_max everywhere.
  """
  precision = ml_collections.ConfigDict(config.precision.to_dict())
  if config_precision.finds_bounds(config):
    precision.b_min = precision.b_max
    # A limit below the cost of b_max everywhere is for what comes after.
    precision.adaptive.budget = None
  with _as_config_error("config.precision"):
    return methods.make_schedule(precision, run)


def _between(config, run, capacities, b_min, b_max) -> Any:
  """The schedule's first state between bounds that the run has found."""
  precision = ml_collections.ConfigDict(config.precision.to_dict())
  precision.b_min, precision.b_max = b_min, b_max
  # The reference is of gradients at the new widths.
  epochs = -(-precision.bounds_step // run.steps_per_epoch)
  precision.adaptive.warmup += epochs
  with _as_config_error("config.precision"):
    return methods.make_schedule(precision, run).init(capacities)


def _describe(config, rows, costs) -> methods.Run:
  return methods.Run(
    steps=config.steps,
    steps_per_epoch=max(1, round(rows / config.batch_size)),
    macs={path: cost.macs for path, cost in costs.items()},
    jumps=optimizer_lib.jumps(config),
    seed=config.seed,
  )


def _capacities(model, sample):
  return state_lib.quantized_capacities(
    jax.eval_shape(model.init, jax.random.key(0), sample)
  )


def _with_tracker(config, run, schedule, capacities):
  """The optimizer, behind gradient statistics where the schedule needs them."""
  optimizer = optimizer_lib.make_optimizer(config)
  if "statistics" not in schedule.needs:
    return optimizer
  adaptive = config.precision.adaptive
  average = adaptive.average
  if average is None:
    # Half an epoch: what came before it is nearly forgotten at its end. A
    # single step would leave no decay.
    average = 1 - 1 / max(2, run.steps_per_epoch / 2)
  tracker = statistics.track_gradient_statistics(
    adaptive.decay, adaptive.memory, capacities=capacities, average=average
  )
  return optax.chain(tracker, optimizer)


def compile_programs(parts: Parts) -> Programs:
  """Compiles init, the train step and the eval step, each once."""
  config, mesh, task = parts.config, parts.mesh, parts.task
  replicated, batched = sharding.replicated(mesh), sharding.batch(mesh)
  key = jax.random.key(config.seed)
  shapes = jax.eval_shape(parts.init, key)
  shardings = sharding.of_state(shapes, mesh, parts.partition)
  gather = sharding.make_gather(mesh, parts.partition)
  abstract = checkpoint.abstract_state(shapes, shardings)

  def eval_carry():
    return task.initial_carry(
      next(iter(parts.feed.eval_batch.values())).shape[0]
    )

  eval_step = step_lib.make_eval_step(parts.model, task, parts.schedule, gather)
  start = time.perf_counter()
  with matmul_precision(config):
    train_step, train_steps, traces, cached = programs.compile_train(
      parts, abstract, gather
    )
    compiled_eval = (
      jax.jit(eval_step, out_shardings=(replicated, batched))
      .lower(
        abstract,
        programs.with_sharding(parts.feed.eval_batch, batched),
        programs.with_sharding(jax.eval_shape(eval_carry), batched),
      )
      .compile()
    )
  seconds = time.perf_counter() - start
  init = jax.jit(parts.init, out_shardings=shardings)
  return Programs(
    init=lambda: init(key),
    train_step=train_step,
    eval_step=compiled_eval,
    eval_carry=jax.jit(eval_carry, out_shardings=batched),
    abstract=abstract,
    seconds=seconds,
    traces=traces,
    cached=cached,
    train_steps=train_steps,
  )


def matmul_precision(
  config: ml_collections.ConfigDict,
) -> contextlib.AbstractContextManager:
  """The precision of float32 products; none leaves JAX's setting."""
  if config.matmul_precision is None:
    return contextlib.nullcontext()
  return jax.default_matmul_precision(config.matmul_precision)


@contextlib.contextmanager
def _as_config_error(field):
  try:
    yield
  except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
    if isinstance(error, config_lib.ConfigError):
      raise
    raise config_lib.ConfigError(f"{field}: {error}") from error
