"""A trained state as integer codes, on the disk and back.

    packed = export.freeze(model, variables, images)
    export.save(packed, "out")
    logits = export.load("out")(images)

Of a float model, `export.quantize_trained` makes the variables first. The
format is that of `dpc_jax.export.format`.
"""

from dpc_jax.export.errors import ExportError
from dpc_jax.export.folding import fold_batch_norm
from dpc_jax.export.format import read, read_program, save
from dpc_jax.export.freezing import Packed, freeze
from dpc_jax.export.inference import Inference, load, restore
from dpc_jax.export.post_training import (
  calibrate,
  choose_bits,
  quantize_trained,
)
from dpc_jax.export.program import Program, run_program, stablehlo

__all__ = [
  "ExportError",
  "Inference",
  "Packed",
  "Program",
  "calibrate",
  "choose_bits",
  "fold_batch_norm",
  "freeze",
  "load",
  "quantize_trained",
  "read",
  "read_program",
  "restore",
  "run_program",
  "save",
  "stablehlo",
]
