"""Networks that the paper names, on ImageNet.

  python -m experiments.reproduce.imagenet --scale=smoke

To reach, static 8/8, in percent: ResNet-18 69.60 (CPT). DPC's own figures are
not known to us: the paper's text is not public.
"""

import sys

from experiments.reproduce import program, scales, tables, trials

NAME = "imagenet"
_TRIALS = {"smoke": scales.SMOKE, "full": scales.FULL}
ROWS = (
  tables.Row(
    "ResNet-18",
    "imagenet_resnet18",
    {"static8": tables.Published(69.60, "CPT")},
    _TRIALS,
  ),
  tables.Row("ResNet-34", "imagenet_resnet34", trials=_TRIALS),
  tables.Row("ResNet-50", "imagenet_resnet50", trials=_TRIALS),
)


def reproduce(context: trials.Context) -> tables.Section:
  """The table at the scale of the command."""
  return tables.reproduce(NAME, "Accuracy on ImageNet", ROWS, context)


if __name__ == "__main__":
  sys.exit(program.main({NAME: reproduce}, __doc__))
