"""Networks that the paper names, on CIFAR-100.

  python -m experiments.reproduce.cifar100 --scale=smoke

To reach, static 8/8, in percent: ResNet-38 69.78, ResNet-74 71.01 (CPT). DPC's
own figures are not known to us: the paper's text is not public.
"""

import sys

from experiments.reproduce import program, scales, tables, trials

NAME = "cifar100"
_TRIALS = {"smoke": scales.SMOKE, "full": scales.FULL}
ROWS = (
  tables.Row(
    "ResNet-38",
    "cifar100_resnet38",
    {"static8": tables.Published(69.78, "CPT")},
    _TRIALS,
  ),
  tables.Row(
    "ResNet-74",
    "cifar100_resnet74",
    {"static8": tables.Published(71.01, "CPT")},
    _TRIALS,
  ),
  tables.Row("ResNet-110", "cifar100_resnet110", trials=_TRIALS),
  tables.Row("WideResNet-38", "cifar100_wide_resnet38", trials=_TRIALS),
  tables.Row("MobileNetV2", "cifar100_mobilenet_v2", trials=_TRIALS),
)


def reproduce(context: trials.Context) -> tables.Section:
  """The table at the scale of the command."""
  return tables.reproduce(NAME, "Accuracy on CIFAR-100", ROWS, context)


if __name__ == "__main__":
  sys.exit(program.main({NAME: reproduce}, __doc__))
