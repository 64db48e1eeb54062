"""dpc_jax: Decreasing Precision with layer Capacity, in JAX and Flax."""

from dpc_jax import export, models
from dpc_jax.cost.bitops import bitops
from dpc_jax.cost.macs import layer_costs
from dpc_jax.models.lstm import QuantLSTMCell
from dpc_jax.policy import schedules
from dpc_jax.policy.bounds import PrecisionBounds, precision_bounds
from dpc_jax.policy.capacity import layer_capacities
from dpc_jax.policy.dpc import dpc_bit_widths
from dpc_jax.policy.statistics import (
  GradientStatistics,
  gradient_statistics,
  track_gradient_statistics,
)
from dpc_jax.quant import delayed, remat
from dpc_jax.quant.grids import Grid, LayerBits, Quantization, fake_quantize
from dpc_jax.quant.layers import QuantConv, QuantDense
from dpc_jax.quant.precision import assign_bits, layer_bits
from dpc_jax.quant.products import QuantProduct
from dpc_jax.quant.wrap import quantize

__version__ = "0.1.0"

__all__ = [
  "GradientStatistics",
  "Grid",
  "LayerBits",
  "PrecisionBounds",
  "QuantConv",
  "QuantDense",
  "QuantLSTMCell",
  "QuantProduct",
  "Quantization",
  "assign_bits",
  "bitops",
  "delayed",
  "dpc_bit_widths",
  "export",
  "fake_quantize",
  "gradient_statistics",
  "layer_bits",
  "layer_capacities",
  "layer_costs",
  "models",
  "precision_bounds",
  "quantize",
  "remat",
  "schedules",
  "track_gradient_statistics",
]
