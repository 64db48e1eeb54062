"""The tables and figures of the DPC paper, one file and command for each.

  python -m experiments.reproduce --scale=smoke              # all of them
  python -m experiments.reproduce.cifar10 --scale=cpu-hour   # one

Each names the figures to reach and prints ours beside them. How much is run is
the scale's choice (`scales.py`); what was not run says so.
"""
