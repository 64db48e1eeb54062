"""How much of a table is run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

# What a scale is, for a reader of its tables.
ABOUT = {
  "smoke": (
    "Every recipe on tiny shapes and made-up data, four steps: that all of it"
    " works on a machine, in minutes."
  ),
  "cpu-hour": (
    "What two cores train in an hour or two; none of these networks is the"
    " paper's."
  ),
  "gpu-hour": (
    "At full length, one seed, what one large GPU may train in an hour: an"
    " estimate, not measured on one."
  ),
  "full": (
    "Every recipe at full length, three seeds, eight methods: 360 runs. By an"
    " estimate, those on CIFAR take days on one GPU, those on ImageNet and"
    " WikiText-103 months."
  ),
}
SCALES = tuple(ABOUT)


@dataclasses.dataclass(frozen=True)
class Trial:
  """What a scale runs of a recipe.

  Attributes:
    methods: names, as `experiments.compare` takes them.
    seeds: of each method.
    fields: of the recipe that change, {"data.holdout": 0}.
    is_smoke: the recipe's smoke variant.
  """

  methods: tuple[str, ...]
  seeds: int = 1
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  is_smoke: bool = False


SMOKE = Trial(("dpc",), is_smoke=True)
# All choices are fixed: published figures come from all training images.
_ALL_DATA = {"data.holdout": 0}
_METHODS = (
  "float",
  "static8",
  "uniform",
  "dpc",
  "uniform_log_midpoint",
  "dpc_log_midpoint",
  "adaptive",
  "cpt",
)
FULL_TEXT = Trial(_METHODS, seeds=3)
FULL = dataclasses.replace(FULL_TEXT, fields=_ALL_DATA)
# Of gpu-hour.
GPU = Trial(("static8", "dpc"), fields=_ALL_DATA)
GPU_FLOAT = dataclasses.replace(GPU, methods=("float", "static8", "dpc"))
# Of cpu-hour: ten epochs of 5,000 images, which the embeddings share.
CPU = Trial(
  _METHODS,
  seeds=4,
  fields={
    "data.train_size": 5_000,
    "steps": 390,
    "eval_every": 390,
    "checkpoint_every": 390,
    "log_every": 39,
  },
)
