"""A frozen model as StableHLO, which runs without this package.

The program holds what weights.bin does, kernels as the same streams of bits,
and decodes them at each call: its size is about that of the packed weights.

    from jax import export
    run = export.deserialize(open("model.stablehlo", "rb").read()).call
    logits = run(images)

needs jax and flatbuffers, and no other package. It is the serialization of
`jax.export`, which later versions of JAX read for at least six months. In it
are the names, with their folders, of the source files that it was traced from.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import export

from dpc_jax.export import errors, freezing, inference, packing
from dpc_jax.quant import grids

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Program(NamedTuple):
  """A serialized program.

  Attributes:
    data: for `jax.export.deserialize`.
    batch: None takes batches of any size, else the only size that it takes.
  """

  data: bytes
  batch: int | None


def stablehlo(
  packed: freezing.Packed,
  model: nn.Module | None = None,
  platforms: Sequence[str] = PLATFORMS,
  batch: int | None = None,
) -> Program:
  """Lowers a frozen model: inputs -> what an evaluation gives.

  The leading axis of every input is one size, of any value; where the model
  cannot be traced so, that of the inputs it was frozen with. A program of one
  size gave what `load` does bit for bit; one of any size is compiled in a
  slightly different way, and a value that lies on a tie may be rounded to the
  other side (of 500 random images in ResNet-8, one or two).

  Args:
    packed: of `freeze`.
    model: as of `inference.load`.
    platforms: that it is to run on.
    batch: the only size of the leading axis; None allows any.

  Raises:
    ExportError: flatbuffers is not installed; as `inference.load`.
  """
  model = inference.restore(packed, model).model

  def run(*inputs):
    return model.apply(_constants(packed), *inputs, mutable=False)

  def lower(batch):
    (size,) = export.symbolic_shape(batch)
    specs = [
      jax.ShapeDtypeStruct((size, *x["shape"][1:]), jnp.dtype(x["dtype"]))
      for x in packed.inputs
    ]
    return export.export(jax.jit(run), platforms=platforms)(*specs)

  try:
    lowered = lower("batch" if batch is None else str(batch))
  except (TypeError, ValueError, jax.errors.InconclusiveDimensionOperation):
    # What JAX raises where Python code branches on a size that is not known.
    if batch is not None:
      raise
    batch = packed.inputs[0]["shape"][0]
    lowered = lower(str(batch))
  try:
    return Program(bytes(lowered.serialize()), batch)
  except ImportError:
    raise errors.ExportError(
      "a StableHLO program needs flatbuffers: pip install flatbuffers"
    ) from None


def run_program(data: bytes) -> Callable[..., Any]:
  """The function of a serialized program: inputs -> outputs."""
  return jax.jit(export.deserialize(bytearray(data)).call)


def _constants(packed: freezing.Packed) -> dict[str, Any]:
  """`freezing.thaw`, as operations on packed constants."""
  flat = freezing.flat_variables(packed)
  for name, kernel in packed.kernels.items():
    rows = [_decode(part, kernel.kind) for part in kernel.parts]
    flat[name] = jnp.stack(rows).reshape(*kernel.stack, *rows[0].shape)
  tree = flax.traverse_util.unflatten_dict(flat, sep="/")
  # What a compiler computes of constants may differ in the last bit, and move
  # an activation over a tie: behind this, they are arguments to it.
  return jax.lax.optimization_barrier(tree)


def _decode(part, kind) -> jax.Array:
  if part.width == grids.FLOAT_WIDTH:
    return jnp.asarray(part.codes)
  stream = packing.padded(packing.pack(part.codes, part.width), part.width)
  # Else a compiler decodes it once and for all, and takes its time for that.
  stream = jax.lax.optimization_barrier(jnp.asarray(stream))
  codes = packing.unpack_groups(jnp, stream, part.width)[: part.codes.size]
  codes = codes.astype(jnp.int32) + freezing.lowest(part.width, kind)
  return grids.decode(
    grids.Quantized(codes.reshape(part.codes.shape), part.scale, part.offset),
    jnp.float32,
  )
