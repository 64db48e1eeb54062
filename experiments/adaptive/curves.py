r"""Draws what adaptive runs decided by, and the bits they gave.

  python -m experiments.adaptive.curves RUN [RUN ...]

RUN is a workdir of `experiments.train` or `experiments.compare`; the picture is
RUN/adaptive.png, and RUN/adaptive.svg.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

from dpc_jax.analysis import adaptive_plot
from dpc_jax.training import bits_log, metrics
from experiments import arguments


def main(argv: Sequence[str] | None = None) -> int:
  """Draws a picture into every run's folder; returns the exit code."""
  parser = arguments.Parser("experiments.adaptive.curves", __doc__)
  parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="RUN")
  for run in parser.parse_args(argv).runs:
    try:
      summary = json.loads((run / "summary.json").read_text())
      adaptive_plot.bits_over_time(
        metrics.read_lines(run / bits_log.SIGNALS),
        metrics.read_lines(run / "bits.jsonl"),
        list(summary["layers"]),
        run / "adaptive.png",
        steps=summary["steps"],
      )
    except (OSError, ValueError, KeyError) as error:
      print(
        f"error: {run}: not a finished adaptive run: {error}", file=sys.stderr
      )
      return 2
    print(run / "adaptive.png")
  return 0


if __name__ == "__main__":
  sys.exit(main())
