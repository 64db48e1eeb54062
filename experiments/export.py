r"""Packs a trained run into integer codes, and measures what is lost by it.

  python -m experiments.export --workdir=runs/digits_dpc --out=runs/packed

The run's newest checkpoint is frozen at the widths that it is evaluated with.
Written to the new folder OUT: `manifest.json` and `weights.bin`, which
`dpc_jax.export.load` makes a function of (dpc_jax/export/format.py describes
them), with --stablehlo `model.stablehlo`, which runs with JAX and without this
package, and `report.json` and `report.md`: sizes, widths, and the whole test
set through the run's own evaluation and through what was read back from OUT.

Without training, of a float run (or of any, whose widths are then left aside):

  python -m experiments.export --workdir=runs/digits_float --out=runs/packed8 \
    --bits=static8

Ranges of activations are then those of --calibration batches of training data.
"""

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import ml_collections

from configs import default
from dpc_jax import export
from dpc_jax.export import description, post_training
from dpc_jax.export import format as format_lib
from dpc_jax.policy import bounds
from dpc_jax.quant import precision
from dpc_jax.training import build
from dpc_jax.training import config as config_lib
from experiments import arguments, exporting, finished, saved

# Batches of training data that ranges are taken from.
_CALIBRATION = 10
# Flags that say how widths are chosen: (name, which --bits read it).
_OF_BITS = {
  "calibration": ("dpc", "cosine", "static"),
  "activations": ("dpc", "cosine", "static"),
  "b_min": ("dpc", "cosine"),
  "b_max": ("dpc", "cosine"),
  "tau": ("cosine",),
}


class _Run(NamedTuple):
  """A run, and what is packed of it.

  Attributes:
    parts: of the run.
    step: of its checkpoint.
    state: restored from it.
    model: that is packed: the run's, or of a float run the quantized one.
    variables: of it.
  """

  parts: build.Parts
  step: int
  state: Any
  model: nn.Module
  variables: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
  """Packs a run and writes the report; returns the exit code."""
  return arguments.run(_parser(), _run, argv)


def _parser() -> argparse.ArgumentParser:
  parser = arguments.Parser("experiments.export", __doc__)
  parser.add_argument(
    "--workdir",
    required=True,
    metavar="RUN",
    type=arguments.folder,
    help="the run's workdir; nothing is written there",
  )
  parser.add_argument(
    "--out",
    required=True,
    metavar="OUT",
    type=arguments.folder,
    help="the export's folder, which must not be there yet",
  )
  parser.add_argument(
    "--fold_batch_norm",
    action="store_true",
    help="fold BatchNorm into the convolutions first; it may move codes, and"
    " the report counts the answers that change",
  )
  parser.add_argument(
    "--stablehlo",
    action="store_true",
    help="write model.stablehlo too (needs flatbuffers)",
  )
  parser.add_argument(
    "--data_dir",
    metavar="DIR",
    help="where the data lies, if not where the run found it",
  )
  _add_choice_of_bits(parser)
  return parser


def _add_choice_of_bits(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--bits",
    metavar="CHOICE",
    help="choose widths anew: dpc, cosine, or static<b> such as static8;"
    " default: those of the run",
  )
  parser.add_argument(
    "--calibration",
    type=int,
    metavar="N",
    help="with --bits: batches of training data for the ranges of activations"
    f" (default: {_CALIBRATION})",
  )
  parser.add_argument(
    "--activations",
    type=int,
    metavar="B",
    help="with --bits: width of all activations; default: as the weights'",
  )
  for name, what in (("b_min", "smallest"), ("b_max", "largest")):
    parser.add_argument(
      f"--{name}",
      type=int,
      metavar="B",
      help=f"with --bits=dpc or cosine: the {what} width; default: dpc, as"
      " `experiments.bounds` finds it; cosine, of 2..16",
    )
  parser.add_argument(
    "--tau",
    type=float,
    help="with --bits=cosine: similarity that each layer's weights keep"
    f" (default: {post_training.TAU})",
  )


def _run(flags: argparse.Namespace, command: str) -> None:
  _check_flags(flags)
  format_lib.check_new(flags.out)
  run = _read(flags)
  config = run.parts.config
  print(
    f"{flags.workdir}: {config.model.name} on {config.data.name}, method"
    f" {config.precision.method}, checkpoint of step {run.step:,} of"
    f" {config.steps:,}",
    flush=True,
  )
  variables = _variables(flags, run)
  about = {
    "dataset": config.data.name + (" (fake)" if config.data.fake else ""),
    "method": config.precision.method,
    "seed": config.seed,
    "step": run.step,
    "bits": flags.bits or "of the run",
    "fold_batch_norm": flags.fold_batch_norm,
    "preprocessing": exporting.preprocessing(run.parts.data),
  }
  print("packing", flush=True)
  packed = export.freeze(
    run.model, variables, run.parts.feed.sample, about=about
  )
  program = None
  if flags.stablehlo:
    print("lowering to StableHLO", flush=True)
    # It keeps the precision of products that it was lowered with.
    with build.matmul_precision(config):
      program = export.stablehlo(packed)
  export.save(packed, flags.out, program and program.data)
  models = _models(flags, run, variables)
  print(f"evaluating the test set: run, {', '.join(models)}", flush=True)
  evaluations = exporting.evaluate(run.parts, run.state, models)
  result = exporting.result(packed, flags.out, evaluations, run.parts)
  result |= {
    "command": command,
    "calibration_batches": _batches(flags) if flags.bits else None,
    "stablehlo_batch": (program.batch or "any") if program else None,
  }
  _write(result, flags.out)


def _models(
  flags: argparse.Namespace, run: _Run, variables: dict[str, Any]
) -> dict[str, Callable[..., Any]]:
  """What the run is compared with: {name: function of inputs}."""
  models: dict[str, Callable[..., Any]] = {}
  if flags.bits or flags.fold_batch_norm:
    models["before packing"] = export.Inference(
      description.for_inference(run.model), variables, {}
    )
  models["exported"] = export.load(flags.out)
  # A program takes no state: it starts each text anew.
  if flags.stablehlo and not hasattr(run.model, "initial_carry"):
    models["stablehlo"] = export.run_program(export.read_program(flags.out))
  return models


def _check_flags(flags: argparse.Namespace) -> None:
  """Before anything is read, as far as it goes."""
  kind = None
  if flags.bits is not None:
    static = re.fullmatch(r"static(\d+)", flags.bits)
    if static is None and flags.bits not in post_training.CHOICES:
      raise config_lib.ConfigError(
        f"--bits={flags.bits}: use dpc, cosine, or static<b> such as static8"
      )
    if static and not 2 <= int(static[1]) <= 16:
      raise config_lib.ConfigError(
        f"--bits={flags.bits}: the width must be in 2..16"
      )
    kind = "static" if static else flags.bits
  for name, kinds in _OF_BITS.items():
    value = getattr(flags, name)
    if value is not None and kind not in kinds:
      needs = "--bits" if "static" in kinds else f"--bits={' or '.join(kinds)}"
      raise config_lib.ConfigError(
        f"--{name}={value}: means nothing without {needs}; leave it out"
      )
  for name in ("b_min", "b_max", "activations"):
    value = getattr(flags, name)
    if value is not None and not 2 <= value <= 16:
      raise config_lib.ConfigError(f"--{name}={value}: must be in 2..16")
  if flags.calibration is not None and flags.calibration < 1:
    raise config_lib.ConfigError(
      f"--calibration={flags.calibration}: must be at least 1"
    )
  if flags.tau is not None:
    try:
      bounds.check_thresholds(flags.tau, flags.tau)
    except ValueError:
      raise config_lib.ConfigError(
        f"--tau={flags.tau}: must be in (0, 1]"
      ) from None


def _read(flags: argparse.Namespace) -> _Run:
  """Builds the run and restores its newest checkpoint, on one device."""
  config = _config_of(flags)
  parts = build.build(config)
  is_float = config.precision.method == "float"
  if is_float and flags.bits is None:
    raise config_lib.ConfigError(
      f"--workdir={flags.workdir}: a run of the method float has no widths; add"
      " --bits=dpc, cosine or static8"
    )
  try:
    step, state = saved.restore(
      flags.workdir, parts, f"--workdir={flags.workdir}"
    )
  except OSError as error:
    raise config_lib.ConfigError(
      f"--workdir={flags.workdir}: its checkpoint cannot be read:"
      f" {error.strerror}; try again"
    ) from error
  model = parts.model
  if is_float:
    # Which has the same parameters, layer for layer.
    quantized = ml_collections.ConfigDict(parts.config.to_dict())
    quantized.precision.method = "dpc"
    model = build.make_model(quantized, parts.data.num_classes)
  variables = {"params": state.params, **state.model_state}
  if parts.schedule.evaluation is not None:
    variables = precision.assign_bits(
      variables, parts.schedule.evaluation(state.schedule_state)
    )
  return _Run(parts, step, state, model, variables)


def _config_of(flags: argparse.Namespace) -> ml_collections.ConfigDict:
  """The run's own, for one device."""
  if not (flags.workdir / "config.json").is_file():
    found = finished.runs_meant(flags.workdir)
    if found:
      raise config_lib.ConfigError(
        f"--workdir={flags.workdir}: holds no run;"
        f" {finished.did_you_mean(found, '')}"
      )
  config = default.get_config()
  saved.update_config(flags.workdir, config, f"--workdir={flags.workdir}")
  if flags.data_dir is not None:
    config.data.dir = flags.data_dir
  config.mesh.update(data=1, fsdp=1, tensor=1, sharding=None, rules=None)
  return config


def _variables(flags: argparse.Namespace, run: _Run) -> dict[str, Any]:
  """What is packed: folded, and quantized anew, if that is asked for."""
  variables = run.variables
  if flags.fold_batch_norm:
    try:
      variables = export.fold_batch_norm(run.model, variables)
    except export.ExportError as error:
      raise config_lib.ConfigError(f"--fold_batch_norm: {error}") from None
  if flags.bits is None:
    return variables
  static = re.fullmatch(r"static(\d+)", flags.bits)
  bits: Any = flags.bits
  options = {}
  if static:
    width = int(static[1])
    other = width if flags.activations is None else flags.activations
    bits = (width, other, 8)
  else:
    options = {
      name: getattr(flags, name)
      for name in ("b_min", "b_max", "tau", "activations")
      if getattr(flags, name) is not None
    }
  count = _batches(flags)
  rows = run.parts.config.batch_size
  unit = "images" if run.parts.task.unit == "images" else "rows"
  print(
    f"choosing widths, calibrating on {count} x {rows} {unit} of training data",
    flush=True,
  )
  try:
    return export.quantize_trained(
      run.model, variables, _calibration(run, count), bits, **options
    )
  except export.ExportError as error:
    raise config_lib.ConfigError(
      f"--workdir={flags.workdir}: {error}"
    ) from None
  except ValueError as error:
    raise config_lib.ConfigError(f"--bits={flags.bits}: {error}") from None


def _batches(flags: argparse.Namespace) -> int:
  return _CALIBRATION if flags.calibration is None else flags.calibration


def _calibration(run: _Run, count: int) -> Iterator[Any]:
  """Inputs of the model: the first batches of training, not augmented."""
  parts = run.parts
  carry = parts.task.initial_carry(parts.config.batch_size)
  batches = parts.feed.train(0, count)
  try:
    for rows in batches:
      yield parts.task.inputs(rows, carry, None)[0][0]
  finally:
    batches.close()


def _write(result: dict[str, Any], out: pathlib.Path) -> None:
  """Writes report.json and report.md, prints the same tables."""
  text = exporting.tables(result)
  try:
    for name, content in (
      ("report.json", json.dumps(result, indent=2, allow_nan=False) + "\n"),
      ("report.md", exporting.markdown(result)),
    ):
      temporary = out / f"{name}.tmp"
      temporary.write_text(content)
      temporary.replace(out / name)
  except OSError as error:
    raise config_lib.ConfigError(
      f"--out={out}: {error.strerror}; the export is whole, its report is not"
    ) from None
  print(f"\n{text}\n\nwritten:")
  for name, what in exporting.FILES.items():
    if (out / name).exists():
      print(f"  {out / name}  {what}")


if __name__ == "__main__":
  sys.exit(main())
