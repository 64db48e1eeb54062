r"""All tables and figures of the DPC paper, one after the other.

  python -m experiments.reproduce --scale=smoke

Scales: smoke, in minutes; cpu-hour, gpu-hour, full. Published figures stand
beside ours, and what was not run says so. Written to DIR/SCALE, after each
table: `report.html`, `report.md`, `report.json`; and the runs, in
RECIPE/METHOD/seedN. One process does it all, on the devices of its host; what
needs several hosts is for `experiments.train`.
"""

import sys

from experiments.reproduce import (
  cifar10,
  cifar100,
  embeddings,
  imagenet,
  language,
  program,
  savings,
)

TABLES = (savings, cifar10, cifar100, imagenet, language, embeddings)

if __name__ == "__main__":
  made = {table.NAME: table.reproduce for table in TABLES}
  sys.exit(program.main(made, __doc__))
