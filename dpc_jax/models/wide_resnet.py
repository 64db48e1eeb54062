"""WideResNet-38: the CIFAR ResNet-38 with wider stages.

The DPC paper names WideResNet-38 and gives no widening factor k. Our decision:
ResNet-(6n + 2) with n = 6, stages of 16k, 32k and 64k channels, and k = 2. As
in Zagoruyko and Komodakis, 2016, the stem keeps 16 channels, so that the first
block of stage 1 too has a shortcut convolution. Unlike theirs the blocks are
post-activation, as in the family that the paper compares with.
"""

from typing import Any

from dpc_jax.models import resnet

WIDENING = 2


def wide_resnet(*, widening: int = WIDENING, **sizes: Any) -> resnet.ResNet:
  """A `resnet.ResNet` with its stages widened.

  Args:
    widening: the factor k.
    **sizes: further attributes of `resnet.ResNet`, such as `blocks`.
  """
  return resnet.ResNet(widening=widening, **sizes)
