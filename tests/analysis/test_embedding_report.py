"""The text beside the picture says what the numbers do, and no more."""

import re

import pytest

from dpc_jax.analysis import embedding_report, html


def estimate(value, low, high):
  return {"value": value, "low": low, "high": high, "n": 60}


def made_up(name, **differences):
  """A run whose measures are all 0.5; `differences` are from the first."""
  measures = (*embedding_report.COMPARED, "feature_variance")
  run = {
    "name": name,
    "method": "dpc",
    "model": "tiny",
    "seed": 0,
    "step": 6,
    "steps": 6,
    "bits_per_quantized_weight": 4.5 if differences else None,
    "accuracy": {"train": 0.75, "test": 0.5},
    "loss": {"train": 0.125, "test": 1.5},
    "estimates": {k: estimate(0.5, 0.4, 0.6) for k in measures},
    "weight_variance": {"first": 2.0},
  }
  if differences:
    none = dict.fromkeys(embedding_report.COMPARED, estimate(0.0, -0.1, 0.1))
    run["differences"] = none | differences
    run["weight_variance_ratio"] = 1.0
  return run


def markdown(*runs, **changes):
  result = {
    "dataset": "digits",
    "split": "test",
    "examples": 60,
    "pictured": 60,
    "perplexity": 20.0,
    "seed": 0,
    "neighbors": 10,
    "silhouette_examples": 60,
    "resamples": 2000,
    "runs": runs,
    "command": "the command",
  }
  return embedding_report.markdown(result | changes)


TWO = (
  made_up("one"),
  made_up(
    "two",
    silhouette=estimate(0.2, 0.1, 0.3),
    scatter_ratio=estimate(-0.2, -0.3, -0.1),
    relative_variance=estimate(-2e-4, -3e-4, -1e-4),
  ),
)


def test_verdicts():
  lines = [x for x in markdown(*TWO).splitlines() if x.startswith("- two: ")]
  assert lines == [
    "- two: silhouette higher; no difference shown in k-NN accuracy; scatter"
    " ratio lower.",
    "- two: no difference shown in generalization gap; relative feature"
    " variance lower.",
  ]


def test_a_measure_with_a_scale_of_its_own_is_not_compared():
  text = markdown(*TWO)
  assert "| run | generalization gap | relative feature variance |\n" in text
  header = "| generalization gap | relative feature variance | feature variance"
  assert header in text
  assert not re.search(r"[^e] feature variance (higher|lower)", text)


def test_a_float_run_has_no_bits():
  text = markdown(*TWO)
  assert "| checkpoint | bits per quantized weight |\n" in text
  assert "| step 6 of 6 | - |\n" in text and "| step 6 of 6 | 4.50 |\n" in text
  assert "at the widths of evaluation" in text


def test_limits_of_training_examples_and_of_the_second_question():
  text = markdown(*TWO)
  assert "(that of the gap: its training part is of the training split)" in text
  assert "no quantized activation is" in text and "no interval" in text
  text = markdown(*TWO, split="train")
  assert "of every measure: it is the training split)" in text


def test_names_mean_nothing_in_markdown(tmp_path):
  nasty = "<b>*x* a|b `c` _d_"
  run = made_up(nasty, gap=estimate(0.1, 0.05, 0.15)) | {"model": nasty}
  run["weight_variance"] = {nasty: 1.0}
  text = markdown(
    made_up(nasty), run, dataset=nasty, command="echo `x` | <script>"
  ).replace("![t-SNE", "[t-SNE")
  page = html.page(text, tmp_path)
  assert not re.search("<(b|em|i|script)>", page)
  assert "echo</span> <span>`x`</span> <span>|</span> <span>&lt;sc" in page
  shown = re.sub("<[^>]*>", "", page)
  plain = "&lt;b&gt;*x* a|b `c` _d_"
  assert f"Embeddings: {plain}, test split" in shown
  assert f"Difference from {plain}, paired" in shown
  # A bar that ended a cell would cut the rest of the name off.
  assert shown.count("*x*") == shown.count(plain) > 10


@pytest.mark.parametrize(
  ("ends", "text"),
  [
    ((0.0003, 0.0002, 0.0004), "0.00030 [0.00020, 0.00040]"),
    ((12345.6, 12195.6, 12495.6), "12,350 [12,200, 12,500]"),
    ((0.8123, 0.7941, 0.8304), "0.812 [0.794, 0.830]"),
    ((0.81234, 0.81134, 0.81334), "0.8123 [0.8113, 0.8133]"),
    ((-1e-5, -0.01, 0.01), "0.000 [-0.010, 0.010]"),
    ((3e-9, 2e-9, 4e-9), "3.0e-09 [2.0e-09, 4.0e-09]"),
    ((5e8, 4e8, 6e8), "5.0e+08 [4.0e+08, 6.0e+08]"),
    ((0.25, 0.25, 0.25), "0.2500 [0.2500, 0.2500]"),
    ((12345.6, 12345.6, 12345.6), "12,346 [12,346, 12,346]"),
    ((0, 0, 0), "0.000 [0.000, 0.000]"),
  ],
)
def test_an_interval_has_the_digits_that_it_tells(ends, text):
  assert embedding_report.interval(estimate(*ends)) == text


def test_a_difference_has_its_sign():
  for ends, text in (
    ((0.0053, 0.001, 0.0096), "+0.0053 [+0.0010, +0.0096]"),
    ((-0.2, -0.4, 0), "-0.20 [-0.40, +0.00]"),
  ):
    assert embedding_report.interval(estimate(*ends), sign=True) == text
