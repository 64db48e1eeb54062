"""The paper's language models, on PTB and WikiText-103.

  python -m experiments.reproduce.language --scale=smoke

To reach, test perplexity: LSTM on PTB 96.95 static 8/8, 96.39 CPT; Transformer
on WikiText-103 31.77 static 8/8, 30.22 CPT (CPT). DPC's own figures are not
known to us: the paper's text is not public.
"""

import sys

from experiments.reproduce import program, scales, tables, trials

NAME = "language"
_TRIALS = {"smoke": scales.SMOKE, "full": scales.FULL_TEXT}
ROWS = (
  tables.Row(
    "LSTM, PTB",
    "ptb_lstm",
    {
      "static8": tables.Published(96.95, "CPT"),
      "cpt": tables.Published(96.39, "CPT"),
    },
    _TRIALS,
    "Other settings of CPT's LSTM than its size are not known to us.",
  ),
  tables.Row(
    "Transformer, WikiText-103",
    "wikitext103_transformer",
    {
      "static8": tables.Published(31.77, "CPT"),
      "cpt": tables.Published(30.22, "CPT"),
    },
    _TRIALS,
    "CPT's Transformer is smaller than that of our recipe (Baevski & Auli).",
  ),
  tables.Row(
    "Transformer, WikiText-2",
    "wikitext2_transformer",
    trials={"cpu-hour": scales.Trial(("static8", "dpc"))},
    note="WikiText-2 is not the paper's: a third of an epoch of a small network"
    " is what a CPU trains.",
  ),
)


def reproduce(context: trials.Context) -> tables.Section:
  """The table at the scale of the command."""
  return tables.reproduce(NAME, "Perplexity of language models", ROWS, context)


if __name__ == "__main__":
  sys.exit(program.main({NAME: reproduce}, __doc__))
