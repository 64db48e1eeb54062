r"""All tables and figures of the DPC paper, one after the other.

  python -m experiments.reproduce --scale=smoke

Scales: smoke, in minutes; cpu-hour, gpu-hour, full. Published figures stand
beside ours, and what was not run says so. Written to DIR/SCALE: `report.html`,
`report.md`, `report.json`; the runs, in folders named after their recipes.
"""

import sys

from experiments.reproduce import program

if __name__ == "__main__":
  sys.exit(program.main(None, __doc__))
