"""AQT's products with the widths of a layer. Needs the package aqtp."""

import functools
from typing import Any

from aqt.jax.v2 import aqt_conv_general, aqt_dot_general
from aqt.jax.v2 import config as aqt_config
from aqt.jax.v2.flax import aqt_flax

from dpc_jax.quant import grids

# Of a network for images.
_SPATIAL = 2


def config(layer: grids.LayerBits) -> aqt_dot_general.DotGeneral:
  """AQT's `config_v4` with widths of their own for weights and activations."""
  weights, activations, gradients = map(_bits, layer)
  found = aqt_config.config_v4(
    fwd_bits=activations, dlhs_bits=gradients, drhs_bits=gradients
  )
  if weights is activations:
    return found
  is_backward = gradients is not None
  return aqt_config.set_bits(
    found,
    fwd_lhs_bit=activations,
    fwd_rhs_bit=weights,
    dlhs_lhs_bit=gradients,
    dlhs_rhs_bit=weights if is_backward else None,
    drhs_lhs_bit=gradients,
    drhs_rhs_bit=activations if is_backward else None,
  )


def dense(layer: grids.LayerBits) -> Any:
  """What `nn.Dense` takes as `dot_general_cls`."""
  return functools.partial(aqt_flax.AqtDotGeneral, config(layer))


def convolution(layer: grids.LayerBits) -> Any:
  """What `nn.Conv` over images takes as `conv_general_dilated_cls`.

  Its config has a part for each product of the backward pass, as that of a dot
  product.
  """
  found = config(layer)
  found.fwd = aqt_conv_general.conv_general_dilated_make(
    _SPATIAL, _bits(layer.activations), _bits(layer.weights)
  )
  return functools.partial(aqt_flax.AqtConvGeneralDilated, found)


def _bits(width):
  is_float = isinstance(width, int) and width == grids.FLOAT_WIDTH
  return None if is_float else width
