"""The report of one run says what it was, what came out, and what moved."""

import pytest

from dpc_jax.analysis import run_report
from tests.analysis import summaries

CONFIG = {
  "seed": 3,
  "data": {"dir": "/a|b/`c`", "name": "digits"},
  "precision": {"method": "adaptive", "b_max": 8, "weights": None},
}


def move(step, old, new, reason="noisy", signal=0.5):
  return {
    "step": step,
    "path": "stem",
    "old": old,
    "new": new,
    "reason": reason,
    "signal": signal,
  }


MOVES = [
  move(0, None, [5, 5, 8], "dpc", None),
  move(20, [5, 5, 8], [6, 6, 8]),
  move(40, [8, 6, 8], [8, 5, 8], "<over> budget", None),
]


def text(moves=MOVES, pictures=None, **changes):
  summary = summaries.summary(method="adaptive", **changes)
  return run_report.run(
    summary, CONFIG, moves, workdir="runs/x y", b_max=8, pictures=pictures
  )


@pytest.mark.parametrize(
  "part",
  [
    "# adaptive: resnet8 on digits\n",
    "`runs/x y`: 449 steps, seed 3; on 1 x cpu; jax 0.10.2.",
    "| test accuracy, final | 0.9861 |",
    "| test accuracy, best of all (optimistic) | 0.9871 |",
    "| GBitOPs of the run | 2,373 |",
    "| cost / static 8/8 | 0.5564 |",
    "| cost / float | 0.1000 |",
    "| mean bits of the weights | 5.56 |",
    "| 20 | `stem` | 5 → 6 | +0.50 | noisy |",
    # Of fixed weights the activations' move.
    "| 40 | `stem` | 6 → 5 | - | \\<over\\> budget |",
    "All moves of the run",
    "| `stem` | 144 | 9,216 | 8/8/8 | 0.59 | 1.18 |",
    "| `data.dir` | `` /a\\|b/`c` `` |",
    "| `precision.b_max` | `8` |",
    "One run: how much",
    "`python -m experiments.compare --config=FILE --methods=adaptive --seeds=5`"
    " would show, FILE being",
    "The bits are those of the run's end: they moved before",
    "the optimizer and the quantizer itself are left out",
  ],
)
def test_it_says(part):
  assert part in text()


def test_what_is_not_there_is_not_spoken_of():
  out = text(moves=MOVES[:1])
  assert "they moved before" not in out
  for part in ("## Moves", "## Training", "## Bits", "![", "precision.weights"):
    assert part not in out
  assert "validation" not in out and "compiling" not in out


def test_what_is_there_is():
  out = text(
    pictures={"curves.png": "c", "moves.png": "m", "bits.png": "b"},
    compile_seconds=7.0,
    skipped_steps=2,
    validation_accuracy=0.9,
    test_accuracy_at_best_validation=0.91,
    test_examples=360,
  )
  for part in (
    "## Training\n\n![c](curves.png)\n",
    "## Bits over time\n\n![m](moves.png)\n",
    "## Layers\n\n![b](bits.png)\n",
    "| seconds of compiling | 7 |",
    "| steps skipped for gradients that were not finite | 2 |",
    "| validation accuracy, final | 0.9000 |",
    "| test accuracy, best validation | 0.9100 |",
    "The test set has 360 examples",
  ):
    assert part in out


def test_many_moves_are_cut():
  moves = MOVES[:1] + [move(i, [5, 5, 8], [6, 6, 8]) for i in range(1, 1_500)]
  out = text(moves=moves)
  assert out.count("5 → 6") == 40
  assert "The first 40 of 1,499; bits.jsonl has all." in out
