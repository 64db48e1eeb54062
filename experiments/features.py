"""Features of saved runs: the input of the classifier, for whole splits."""

import collections
import math
import pathlib
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from configs import default
from dpc_jax.analysis import embedding_numbers, embeddings
from dpc_jax.cost import bitops
from dpc_jax.quant import grids
from dpc_jax.training import build, resume, sharding
from dpc_jax.training import config as config_lib
from dpc_jax.training import state as state_lib
from dpc_jax.training import step as step_lib
from experiments import saved

# Seconds between two lines of progress.
_QUIET_S = 10
# Runs with other values of these in `data` saw other examples.
_SAME_DATA = ("name", "fake", "holdout", "train_size", "image_size")


class Run(NamedTuple):
  """A run of which the features are taken.

  Attributes:
    workdir: its folder, as the command line has it.
    parts: built.
    step: of the checkpoint.
    state: restored from it, without what only training reads.
  """

  workdir: str
  parts: build.Parts
  step: int
  state: state_lib.TrainState


def config_of(
  folder: str, data_dir: str | None = None
) -> ml_collections.ConfigDict:
  """The run's own config, for the devices of this machine.

  Args:
    folder: its workdir.
    data_dir: where the data lies; None: where the run found it.

  Raises:
    ConfigError: no run is there, or its config is damaged.
  """
  config = default.get_config()
  saved.update_config(folder, config, f"--workdirs: {folder}")
  if data_dir is not None:
    config.data.dir = data_dir
  # A batch of training must divide, too, though none is made here.
  devices = math.gcd(jax.device_count(), config.batch_size)
  config.mesh.update(data=devices, fsdp=1, tensor=1, sharding=None, rules=None)
  return config


def check_same_data(
  folders: Sequence[str], configs: Sequence[ml_collections.ConfigDict]
) -> None:
  """Refuses runs that do not all have the same examples.

  Raises:
    ConfigError: naming the field of `data` that differs.
  """
  for folder, config in zip(folders, configs, strict=True):
    for name in _SAME_DATA:
      first, here = configs[0].data[name], config.data[name]
      if first != here:
        raise config_lib.ConfigError(
          f"--workdirs: {folders[0]} has data.{name} = {first!r}, {folder} has"
          f" {here!r}; give runs of one data set"
        )


def load(
  folder: str,
  config: ml_collections.ConfigDict,
  data: Any = None,
  which: str = "newest",
) -> Run:
  """Builds a run and restores one of its checkpoints.

  Args:
    folder: its workdir.
    config: its own, of `config.json`.
    data: loaded; None loads what the config names.
    which: "newest", or "best" on the validation split.

  Raises:
    ConfigError: a model that does not classify; no checkpoint, a damaged one,
      or one that does not fit.
  """
  parts = build.build(config, data)
  if parts.task.metric != "accuracy":
    raise _no_layer(config)
  step = None
  try:
    if which == "best":
      run = pathlib.Path(folder).expanduser()
      step = _best_step(run, parts.task.metric)
    step, state = saved.restore(folder, parts, f"--workdirs: {folder}", step)
  except OSError as error:
    # A run under way may have deleted it meanwhile.
    raise config_lib.ConfigError(
      f"--workdirs: {folder}: its checkpoint cannot be read: {error.strerror};"
      " try again"
    ) from error
  # A run among others: its optimizer's state may be twice its parameters.
  return Run(
    folder, parts, step, state.replace(opt_state=(), rng=None, carry=())
  )


def _best_step(run: pathlib.Path, metric: str) -> int:
  scores = resume.scores(run, metric)
  kept = [
    int(path.name)
    for path in (run / "checkpoints").iterdir()
    if path.name.isdecimal() and int(path.name) in scores
  ]
  if not kept:
    raise config_lib.ConfigError(
      f"--checkpoint=best: {run} kept no checkpoint that it evaluated on a"
      " validation split; leave the flag out"
    )
  return max(kept, key=scores.__getitem__)


def evaluation_bits(run: Run) -> dict[str, grids.LayerBits]:
  """The widths that a run is evaluated with, and its features taken with.

  They are those of the checkpoint, or what its schedule says of evaluation: of
  CPT and DPC + CPT the highest of a cycle.

  Args:
    run: restored.

  Returns:
    {path: LayerBits of int32 arrays, () or (layers,)}; {} of a float run.
  """
  schedule, state = run.parts.schedule, run.state
  if schedule.evaluation is None:
    return jax.device_get(state_lib.layer_bits(state))
  return jax.device_get(schedule.evaluation(state.schedule_state))


def bits_per_quantized_weight(
  bits: Mapping[str, grids.LayerBits], costs: Mapping[str, bitops.LayerCost]
) -> float | None:
  """Mean width of the weights over all weights of the quantized layers.

  sum_l N_l b_l / sum_l N_l over layers l, stacked ones one by one: N_l its
  weights, b_l their width. Layers in float count on neither side.

  Args:
    bits: {path: widths}, as `evaluation_bits` gives them.
    costs: {path: LayerCost}, of more paths perhaps.

  Returns:
    None of a model without quantized weights.
  """
  # Of stacked layers, which are equal in size, `weights` is one's.
  sizes = [costs[path].weights * costs[path].layers for path in bits]
  if not sum(sizes):
    return None
  widths = [float(np.mean(layer.weights)) for layer in bits.values()]
  return float(np.average(widths, weights=sizes))


def make_feature_step(parts: build.Parts) -> Any:
  """Compiles nothing yet: (state, batch) -> arrays of the whole batch.

  It is the run's own evaluation step, of a model that also returns the input of
  its layer `classifier`.

  Raises:
    ConfigError: the model has no such layer.
  """

  def apply(variables, *args, mutable, **kwargs):
    del mutable  # evaluation: nothing is
    return embeddings.apply_with_features(
      parts.model, variables, *args, **kwargs
    )

  def outputs(output, batch):
    logits, features = output
    metrics, carry = parts.task.outputs(logits, batch)
    return {
      "features": features.astype(jnp.float32),
      "label": batch["label"],
      "correct": jnp.argmax(logits, -1) == batch["label"],
      "mask": batch["mask"],
      "loss": metrics.loss,
    }, carry

  eval_step = step_lib.make_eval_step(
    types.SimpleNamespace(apply=apply),
    parts.task._replace(outputs=outputs),
    parts.schedule,
    sharding.make_gather(parts.mesh, parts.partition),
  )
  shapes = jax.eval_shape(parts.init, jax.random.key(0))
  try:
    jax.eval_shape(eval_step, shapes, parts.feed.eval_batch)
  except ValueError as error:
    raise _no_layer(parts.config) from error
  return jax.jit(
    lambda state, batch: eval_step(state, batch)[0],
    out_shardings=sharding.replicated(parts.mesh),
  )


def _no_layer(config) -> config_lib.ConfigError:
  return config_lib.ConfigError(
    f"config.model.name = {config.model.name!r}: has no layer named"
    f" {embeddings.LAYER!r} that is called once; use a model that classifies"
    " images"
  )


def embed(run: Run, step: Any, split: str) -> embedding_numbers.Embedded:
  """Takes a whole split through the network, every example once.

  Args:
    run: restored.
    step: of `make_feature_step`.
    split: its name.

  Raises:
    ConfigError: features or a loss that are not finite.
    RuntimeError: not every example came through, or one twice.
  """
  parts, count = run.parts, len(run.parts.data.splits[split])
  found = {"features": [], "label": [], "correct": []}
  loss, done = 0.0, 0
  start = said = time.monotonic()
  pending, ahead = collections.deque(), sharding.steps_ahead()

  def collect():
    nonlocal loss, done
    arrays = jax.device_get(pending.popleft())
    rows = arrays["mask"] > 0
    for name, parts_of in found.items():
      parts_of.append(arrays[name][rows])
    loss += float(arrays["loss"])
    done += int(rows.sum())

  with build.matmul_precision(parts.config):
    for rows in parts.feed.evaluate(split):
      pending.append(step(run.state, sharding.put_batch(rows, parts.mesh)))
      if len(pending) > ahead:
        collect()
      if time.monotonic() - said > _QUIET_S:
        said = time.monotonic()
        print(f"  {split}: {done:,} of {count:,} images", flush=True)
    while pending:
      collect()
  if done != count:
    raise RuntimeError(
      f"{run.workdir}: {done:,} examples of the {split} split came through, and"
      f" not its {count:,}"
    )
  seconds = time.monotonic() - start
  print(f"  {split}: {count:,} images in {seconds:.1f} s", flush=True)
  features, labels, correct = map(np.concatenate, found.values())
  _check_finite(run.workdir, split, features, loss)
  return embedding_numbers.Embedded(features, labels, correct, loss / count)


def _check_finite(workdir, split, features, loss) -> None:
  finite = np.isfinite(features).all(1)
  rows = int(np.count_nonzero(~finite))
  if rows:
    what = (
      f"{rows:,} of {len(finite):,} feature rows of the {split} split are not"
      " finite"
    )
  elif not math.isfinite(loss):
    what = f"the loss on the {split} split is {loss}"
  else:
    return
  raise config_lib.ConfigError(
    f"--workdirs: {workdir}: {what}; its training has diverged: leave it out"
  )
