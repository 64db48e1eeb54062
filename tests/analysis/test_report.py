"""Tables and reports say what the summaries hold."""

import pytest

from dpc_jax.analysis import report


def summary(**changes):
  return {
    "model": "resnet8",
    "dataset": "digits",
    "seed": 3,
    "steps": 449,
    "metric": "accuracy",
    "test_accuracy": 0.98611,
    "gbitops": 2373.36,
    "saving_vs_static": 0.4436,
    "mean_bits": 5.556,
    "seconds": 4.6,
    "device": "1 x cpu",
    "versions": {"jax": "0.10.2"},
    "bits": {"stem": [8, 8, 8]},
    "layers": {
      "stem": {"weights": 144, "macs": 9216, "layers": 1},
      "classifier": {"weights": 640, "macs": 640, "layers": 1},
    },
  } | changes


def test_rows_hold_the_figures():
  (row,) = report.rows({"dpc": summary()})
  assert row == ("dpc", "0.9861", "2,373", "44.4%", "5.56", "5")


def test_perplexities_have_two_digits_and_their_name():
  run = summary(metric="perplexity", test_perplexity=123.456)
  assert report.rows({"dpc": run})[0][1] == "123.46"
  text = report.comparison({"dpc": run}, command="x", b_max=8)
  assert "| method | test perplexity |" in text


def test_a_run_that_costs_more_saves_nothing():
  (row,) = report.rows({"float": summary(saving_vs_static=-14.0)})
  assert row[3] == "none (15.0x)"


def test_text_table_is_aligned():
  text = report.text_table([("a", "1"), ("long", "1,000")], ("name", "n"))
  assert text.splitlines() == [
    "name      n",
    "-----------",
    "a         1",
    "long  1,000",
  ]


def test_markdown_table():
  text = report.markdown_table([("a", "1")], ("name", "n"))
  assert text.splitlines() == ["| name | n |", "|---|---:|", "| a | 1 |"]


@pytest.mark.parametrize(
  "part",
  [
    "# resnet8 on digits",
    "`make it`",
    "449 steps per run on 1 x cpu; jax 0.10.2",
    "| dpc | 0.9861 |",
    "static 8/8",
    "| `stem` | 144 | 9,216 | 8/8/8 |",
    "| `classifier` | 640 | 640 | float |",
    "seed 3",
  ],
)
def test_comparison_report(part):
  text = report.comparison({"dpc": summary()}, command="make it", b_max=8)
  assert part in text


def test_every_run_has_its_own_column_of_bits():
  text = report.comparison(
    {"static8": summary(), "dpc": summary(bits={"stem": [3, 4, 5]})},
    command="x",
    b_max=8,
  )
  assert "| layer | N_k | MACs | bits, static8 | bits, dpc |" in text
  assert "| `stem` | 144 | 9,216 | 8/8/8 | 3/4/5 |" in text
