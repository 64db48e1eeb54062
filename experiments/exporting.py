"""What an export costs and saves: evaluations, sizes, and their report."""

import math
import pathlib
import time
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpc_jax.analysis import cells, report
from dpc_jax.export import freezing, packing
from dpc_jax.quant import grids
from dpc_jax.training import build, sharding
from dpc_jax.training import step as step_lib

# Seconds between two lines of progress.
_QUIET_S = 10
FILES = {
  "manifest.json": "what there is, and checksums",
  "weights.bin": "codes, scales, all other numbers",
  "model.stablehlo": "runs with JAX and flatbuffers alone",
  "report.json": "all figures",
  "report.md": "the same in words",
}
_ABOUT = (
  "`run` is the run's own evaluation of its checkpoint; `exported` what was"
  " read back from the files, and `stablehlo` from model.stablehlo; `before"
  " packing`, where widths were chosen anew or BatchNorm was folded, that model"
  " in memory. Flips are test examples whose most likely answer is not that of"
  " `run`; differences are the largest of all logits (log-probabilities of a"
  " language model)."
)


class Evaluation(NamedTuple):
  """Of one model, the whole test set.

  Attributes:
    name: "run", or of the model that it is of.
    loss: mean cross-entropy, nats.
    accuracy: share of right answers.
    flips: examples with another most likely answer than the run's.
    from_run: largest difference of a logit from the run's.
    from_previous: from those of the evaluation before it in the list.
    examples: images or tokens.
  """

  name: str
  loss: float
  accuracy: float
  flips: int
  from_run: float
  from_previous: float
  examples: int


def evaluate(
  parts: build.Parts,
  state: Any,
  models: Mapping[str, Callable[..., Any]],
) -> list[Evaluation]:
  """Takes the test set through the run's own evaluation and through models.

  Args:
    parts: of the run, on one device.
    state: restored.
    models: {name: function of the model's inputs, and of `carry` if it has
      one}.

  Returns:
    Of the run, then of each model.

  Raises:
    RuntimeError: not every example came through.
  """
  models = {"run": None, **models}
  step = _make_step(parts)
  prepare = jax.jit(lambda batch, carry: parts.task.inputs(batch, carry, None))
  (size, *_), *_ = (x.shape for x in parts.feed.eval_batch.values())
  carries = dict.fromkeys(models, parts.task.initial_carry(size))
  sums = {name: np.zeros(3) for name in models}
  most = {name: np.zeros(2) for name in models}
  count, said = 0, time.monotonic()
  with build.matmul_precision(parts.config):
    for rows in parts.feed.evaluate("test"):
      batch = sharding.put_batch(rows, parts.mesh)
      first = previous = None
      for name, model in models.items():
        if model is None:
          logits, carry = step(state, batch, carries[name])
        else:
          args, kwargs = prepare(batch, carries[name])
          logits, carry = _split(model(args[0], **kwargs))
        carries[name] = carry
        if first is None:
          first = previous = logits
        found = _compare(logits, first, previous, batch)
        previous = logits
        sums[name] += np.array(found[:3])
        most[name] = np.maximum(most[name], found[3:])
      count += int(np.sum(np.asarray(rows["mask"]) > 0))
      if time.monotonic() - said > _QUIET_S:
        said = time.monotonic()
        print(f"  {count:,} {parts.task.unit} of the test set", flush=True)
  _check_count(parts, count)
  return [
    Evaluation(
      name,
      sums[name][0] / count,
      sums[name][1] / count,
      int(sums[name][2]),
      *most[name].tolist(),
      count,
    )
    for name in models
  ]


def _check_count(parts, count) -> None:
  wanted = len(parts.data.splits["test"])
  if count != wanted:
    raise RuntimeError(
      f"{count:,} {parts.task.unit} of the test split came through, and not its"
      f" {wanted:,}"
    )


def _make_step(parts) -> Callable[..., Any]:
  """The run's evaluation step, which gives logits in place of a loss."""

  def apply(variables, *args, **kwargs):
    return parts.model.apply(variables, args[0], **kwargs)

  return jax.jit(
    step_lib.make_eval_step(
      types.SimpleNamespace(apply=apply),
      parts.task._replace(outputs=lambda output, batch: _split(output)),
      parts.schedule,
      sharding.make_gather(parts.mesh, parts.partition),
    )
  )


def _split(output: Any) -> tuple[jax.Array, Any]:
  """(logits, carry), () of a model without any."""
  return output if isinstance(output, tuple) else (output, ())


@jax.jit
def _compare(logits, first, previous, batch):
  """(loss, right answers, flips) summed, and two largest differences."""
  labels = batch["targets"] if "targets" in batch else batch["label"]
  keep = batch["mask"] > 0
  logits, first, previous = (
    x.astype(jnp.float32) for x in (logits, first, previous)
  )
  losses = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(
    logits, labels[..., None], -1
  ).squeeze(-1)
  answers = jnp.argmax(logits, -1)

  def largest(other):
    apart = jnp.max(jnp.abs(logits - other), -1)
    return jnp.max(jnp.where(keep, apart, 0))

  return (
    jnp.sum(jnp.where(keep, losses, 0)),
    jnp.sum(keep & (answers == labels)),
    jnp.sum(keep & (answers != jnp.argmax(first, -1))),
    largest(first),
    largest(previous),
  )


def result(
  packed: freezing.Packed,
  folder: pathlib.Path,
  evaluations: list[Evaluation],
  parts: build.Parts,
) -> dict[str, Any]:
  """What report.json holds, but for the command.

  Args:
    packed: the frozen model.
    folder: of the export.
    evaluations: of `evaluate`.
    parts: of the run.
  """
  metric = parts.task.metric
  rows = []
  for found in evaluations:
    row = found._asdict() | {"same_answer": 1 - found.flips / found.examples}
    if metric == "perplexity":
      row["perplexity"] = math.exp(found.loss)
    rows.append(row)
  layers = _layers(packed, list(parts.costs))
  floats = sum(x["float32_bytes"] for x in layers.values())
  others = {
    collection: sum(
      x.nbytes
      for name, x in packed.tensors.items()
      if name.split("/")[0] == collection
    )
    for collection in sorted({name.split("/")[0] for name in packed.tensors})
  }
  files = {
    path.name: path.stat().st_size
    for path in sorted(folder.iterdir())
    if path.name in FILES and not path.name.startswith("report")
  }
  return packed.about | {
    "model": parts.config.model.name,
    "steps": parts.config.steps,
    "metric": metric,
    "evaluations": rows,
    "layers": layers,
    "float32_bytes": {"kernels": floats, **others},
    "packed_bytes": sum(x["packed_bytes"] for x in layers.values()),
    "files": files,
  }


def preprocessing(data: Any) -> dict[str, Any] | None:
  """What a user of the export has to do to images; None of text."""
  if not hasattr(data, "mean"):
    return None
  return {
    "formula": "(pixel / 255 - mean) / std",
    "mean": list(data.mean),
    "std": list(data.std),
  }


def _layers(packed, order) -> dict[str, Any]:
  """{layer: what it takes}, in the network's order, stacked ones one by one."""
  bits = freezing.flat_bits(packed)
  found = {}
  for path in sorted(packed.bits, key=order.index):
    prefix = f"{path}/" if path else ""
    kernel = packed.kernels.get(f"params/{prefix}kernel")
    if kernel is None:
      continue
    for index, part in enumerate(kernel.parts):
      name = f"{path}[{index}]" if kernel.stack else path
      found[name] = {
        "weights": part.codes.size,
        "bits": bits[name],
        "float32_bytes": 4 * part.codes.size,
        "packed_bytes": _bytes_of(part),
      }
  return found


def _bytes_of(part: freezing.Part) -> int:
  if part.width == grids.FLOAT_WIDTH:
    return part.codes.nbytes
  ends = (part.scale, part.offset)
  return packing.packed_size(part.codes.size, part.width) + sum(
    x.nbytes for x in ends if x is not None
  )


def tables(found: Mapping[str, Any]) -> str:
  """What a terminal shows."""
  return "\n\n".join(
    report.text_table(table, header)
    for table, header in (_evaluations(found), _sizes(found), _widths(found))
  )


def markdown(found: Mapping[str, Any]) -> str:
  """What report.md holds."""
  calibration = found["calibration_batches"]
  how = f"widths: {found['bits']}" + (
    f", ranges of activations from {calibration} batches of training data"
    if calibration
    else ""
  )
  if found["fold_batch_norm"]:
    how += "; BatchNorm folded into the convolutions"
  parts = [
    f"# {found['model']} on {found['dataset']}, packed",
    cells.code(found["command"]),
    f"Method {found['method']}, seed {found['seed']}, step {found['step']:,} of"
    f" {found['steps']:,}; {how}.",
    "## Test set",
    report.markdown_table(*_evaluations(found)),
    _ABOUT,
    "## Size",
    report.markdown_table(*_sizes(found)),
  ]
  if found["stablehlo_batch"] is not None:
    parts.append(
      f"model.stablehlo takes batches of size: {found['stablehlo_batch']}. It"
      " holds packed codes, and decodes them at each call."
    )
  parts += ["## Layers", report.markdown_table(*_widths(found))]
  return "\n\n".join(parts) + "\n"


def _evaluations(found):
  metric = found["metric"]
  header = (
    *("model", metric, "flips", "same answer"),
    *("largest difference", "from row above"),
  )
  table = []
  for row in found["evaluations"]:
    is_first = row["name"] == "run"
    table.append(
      (
        row["name"],
        cells.figure(row[metric], metric),
        *(
          ("", "", "", "")
          if is_first
          else (
            f"{row['flips']:,}",
            f"{row['same_answer']:.3%}",
            f"{row['from_run']:.2g}",
            f"{row['from_previous']:.2g}",
          )
        ),
      )
    )
  return table, header


def _sizes(found):
  kernels = found["float32_bytes"]["kernels"]
  others = {k: v for k, v in found["float32_bytes"].items() if k != "kernels"}
  table = [
    (
      "quantized kernels",
      f"{kernels:,}",
      f"{found['packed_bytes']:,}",
      _times(kernels, found["packed_bytes"]),
    ),
    *(
      (f"{name}, as it is", f"{size:,}", f"{size:,}", _times(size, size))
      for name, size in others.items()
    ),
  ]
  whole = kernels + sum(others.values())
  weights = found["files"]["weights.bin"]
  table.append(
    ("weights.bin", f"{whole:,}", f"{weights:,}", _times(whole, weights))
  )
  table += [
    (name, "", f"{size:,}", "")
    for name, size in found["files"].items()
    if name != "weights.bin"
  ]
  return table, ("part", "float32 bytes", "packed bytes", "smaller by")


def _times(float_bytes: int, packed_bytes: int) -> str:
  return f"{float_bytes / packed_bytes:.2f}x" if packed_bytes else ""


def _widths(found):
  table = [
    (
      name or "(root)",
      f"{layer['weights']:,}",
      "/".join(map(str, layer["bits"][:2])),
      f"{layer['float32_bytes']:,}",
      f"{layer['packed_bytes']:,}",
    )
    for name, layer in found["layers"].items()
  ]
  return table, ("layer", "weights", "bits w/a", "float32", "packed")
