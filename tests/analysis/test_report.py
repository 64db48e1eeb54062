"""Tables and reports say what the runs hold, and no more."""

import pytest

from dpc_jax.analysis import cells, comparison, report
from tests.analysis import summaries

summary = summaries.summary


def one(**methods):
  return {method: {3: run} for method, run in methods.items()}


def grid(**methods):
  return {
    method: {seed: summary(x, seed=seed) for seed, x in enumerate(values)}
    for method, values in methods.items()
  }


BETTER = grid(static8=[0.80, 0.90, 0.85], dpc=[0.8111, 0.9102, 0.8606])


def short(runs, b_max=8):
  return report.short(comparison.compare(runs, b_max=b_max))


def text(runs, b_max=8, **arguments):
  result = comparison.compare(runs, b_max=b_max)
  return report.comparison(result, runs, command="make it", **arguments)


def line(table, start):
  (found,) = (x for x in table.splitlines() if x.startswith(start))
  return found


def words(text):
  return " ".join(text.split())


def test_one_seed_is_a_short_table_without_verdicts():
  out = short(one(static8=summary(), dpc=summary(0.5)))
  assert words(out.splitlines()[0]) == (
    "method test accuracy GBitOPs saving mean bits seconds"
  )
  assert words(line(out, "dpc")) == "dpc 0.5000 2,373 44.4% 5.56 5"
  assert out.endswith("\n\nsaving: against static 8/8 with 8-bit gradients")
  assert len(out.splitlines()) == 6


def test_a_run_that_costs_more_saves_nothing():
  out = short(one(float=summary(saving_vs_static=-14.0)))
  assert "none (15.0x)" in out


def test_several_seeds_have_verdicts():
  out = short(BETTER)
  methods, differences, _ = out.split("\n\n")
  assert words(line(methods, "dpc")).startswith("dpc 3 0.8606 ± 0.0496 0.8616")
  assert words(line(differences, "dpc")) == (
    "dpc 3 +0.0106 [+0.0095, +0.0118] better"
  )


def test_controls_say_whether_they_cost_the_same():
  runs = BETTER | grid(uniform=[0.8, 0.9, 0.85])
  out = short(runs)
  control = out[out.index("against uniform") :]
  assert line(control, "dpc").split()[:3] == ["dpc", "3", "yes"]
  for run in runs["uniform"].values():
    run["gbitops"] *= 1.02
  control = short(runs)[out.index("against uniform") :]
  assert line(control, "dpc").split()[:3] == ["dpc", "3", "no"]
  assert "| 1.020x, **not of equal cost** | better |" in text(runs)


def test_perplexities_have_two_digits_and_fall():
  runs = grid(static8=[100.0, 101.0, 99.5], dpc=[90.111, 91.0, 89.6])
  for by_seed in runs.values():
    for run in by_seed.values():
      run["metric"] = "perplexity"
      run["test_perplexity"] = run["best_test_perplexity"] = run[
        "test_accuracy"
      ]
  assert "-9.93 [-10.08, -9.78] better" in words(short(runs))
  out = text(runs)
  assert "Lower is better" in out and "| test perplexity, final |" in out
  assert "90.24 ± 0.71" in out


def test_text_table_is_aligned():
  out = report.text_table([("a", "1"), ("long", "1,000")], ("name", "n"))
  assert out.splitlines() == [
    "name      n",
    "-----------",
    "a         1",
    "long  1,000",
  ]


@pytest.mark.parametrize(
  ("cells", "is_right"),
  [
    (["1", "1,000", "-"], True),
    (["0.8606 ± 0.0496", "+0.0106 [+0.0095, +0.0118]", "<0.001"], True),
    (["8/8/8", "float"], True),
    (["float", "float"], False),
    (["30.2%", "none (15.8x)"], True),
    (["1e-05", "nan", "1.2e+06", "inf"], True),
    (["8 → 7", "10 → 9"], True),
    (["`3`", "(0.5, 0.75)"], True),
    (["-", ""], True),
    ([], True),
    (["better", "worse"], False),
    (["1.001x", "1.034x, **not of equal cost**"], False),
    (["8", "digits"], False),
    (["resnet8", "resnet20"], False),
    (["float32", "8"], False),
    (["step 449 of 449"], False),
    (["`stage1/block0/conv1`"], False),
    (["12 s"], False),
  ],
)
def test_a_column_of_figures_is_flush_right(cells, is_right):
  table = [("x", cell) for cell in cells]
  mark = report.markdown_table(table, ("a", "head")).splitlines()[1]
  assert mark == ("|---|---:|" if is_right else "|---|---|")
  text = report.text_table([*table, ("x", "")], ("a", "a longer head" * 9))
  for cell, line in zip(cells, text.splitlines()[2:], strict=False):
    assert line.endswith(cell) and line.startswith(f"x  {cell}") != is_right


def test_markdown_table():
  out = report.markdown_table([("a|b", "1")], ("name", "n"))
  assert out.splitlines() == ["| name | n |", "|---|---:|", "| a\\|b | 1 |"]


@pytest.mark.parametrize(
  "part",
  [
    "# resnet8 on digits",
    "`make it`",
    "449 steps per run; seed 3; on 1 x cpu; jax 0.10.2.",
    "| dpc | 1 | 0.9861 | 0.9871 | 2,373 | 0.5564 | 0.1000 | 5.56 | 5 |",
    "optimistic",
    "cost / static 8/8",
    "![Cost and test metric of the methods](pareto.png)",
    "![Bits and weights per layer](bits.png)",
    "| `stem` | 144 | 9,216 | 8/8/8 |",
    "| `classifier` | 640 | 640 | float |",
    "One seed has no interval",
    "\nAdd static8 to `--methods` to compare with static bits.\n",
    "\nAdd uniform to `--methods` to compare with uniform bits of equal cost.",
    "| mean over the run |  |  | 5.56 |",
    # 9216 * 3 * 64 and 640 * 3 * 1024 BitOPs; 8/8 is what it has.
    "| `stem` | 1.77 |",
    "| `classifier` | 1.97 |",
    "| sum | 3.74 |",
    "| sum / static 8/8 | 1.0000 |",
    "One run per method (seed 3): how much",
  ],
)
def test_report_of_one_run(part):
  assert part in text(one(dpc=summary()))


@pytest.mark.parametrize(
  "part",
  [
    "449 steps per run; seeds 0, 1, 2; on",
    "| dpc | 3 | 0.8606 ± 0.0496 | 0.8616 ± 0.0496 |",
    "Mean ± sample standard deviation over seeds.",
    "### Final, against static8\n",
    "### Best, against static8\n",
    "| dpc | 3 | +0.0106 [+0.0095, +0.0118] | <0.001 | <0.001 | 0.0015 |",
    "Higher is better",
    "\nAdd uniform to `--methods` to compare with uniform bits of equal cost.",
    "(seed 0)",
    "3 seeds: the intervals",
  ],
)
def test_report_of_three_seeds(part):
  assert part in text(BETTER)


def test_the_family_is_stated():
  runs = BETTER | grid(static6=[0.8, 0.9, 0.84])
  assert "### Final, against static8, 2 comparisons\n" in text(runs)


def test_one_seed_has_differences_but_no_interval():
  out = text(one(static8=summary(0.9), dpc=summary(0.95)))
  assert "| dpc | 1 | +0.0500 | - | - | - | one seed: no interval |" in out


def test_best_at_validation_is_not_called_optimistic():
  run = summary(validation_accuracy=0.9, test_accuracy_at_best_validation=0.97)
  out = text(one(dpc=run))
  assert "| 0.9861 | 0.9700 |" in out
  assert "best is the test value at the best validation" in out
  assert "optimistic" not in out


def test_failed_runs_are_listed():
  failure = comparison.Failure("cpt", 4, "the loss | is nan")
  out = text(one(dpc=summary()), failures=[failure])
  assert "| cpt | 4 | `the loss \\| is nan` |" in out
  assert "seeds 3, 4;" in out
  assert "## Failed runs" not in text(one(dpc=summary()))


def test_a_reference_that_failed_is_not_to_be_added():
  failure = comparison.Failure("uniform", 0, "stopped")
  out = text(BETTER, failures=[failure])
  assert (
    "No run of uniform is finished, so that nothing is compared with uniform"
    " bits of equal cost."
  ) in out
  assert "to `--methods`" not in out


def test_bits_that_moved_are_said_to_be_the_last():
  out = text(one(dpc=summary(), cpt=summary()), moved=["cpt"])
  assert (
    "at the end of the run (seed 3). During the run they moved: cpt." in out
  )
  assert "During the run" not in text(one(dpc=summary()))


def test_size_of_the_test_set():
  out = text(one(dpc=summary(0.9, test_examples=10_000)))
  assert "10,000 examples: an accuracy of 0.9000" in out
  assert "interval (Wilson's) of 0.8940..0.9057" in out
  assert "binomial" not in text(one(dpc=summary(0.9)))


def test_every_method_has_its_own_column_of_bits():
  runs = one(static8=summary(), dpc=summary(bits={"stem": [3, 4, 5]}))
  out = text(runs)
  assert "| layer | N_k | MACs | bits, static8 | bits, dpc |" in out
  assert "| `stem` | 144 | 9,216 | 8/8/8 | 3/4/5 |" in out


def test_float_alone_has_no_picture_of_bits():
  assert "bits.png" not in text(one(float=summary(bits={})))


def test_curves_and_moves_have_their_parts_where_they_were_drawn():
  pictures = {"curves.png": "by step", "curves_cost.png": "by cost"}
  out = text(BETTER, pictures=pictures)
  assert "![by step](curves.png)\n![by cost](curves_cost.png)\n" in out
  assert "bands reach from the lowest to the highest" in out
  assert "## Bits over time" not in out
  assert "An axis of accuracies spans at least 0.05" in out
  out = text(one(dpc=summary()), pictures={"moves_a.png": "moves"})
  assert "## Bits over time\n\n![moves](moves_a.png)\n" in out
  assert "## Training" not in out and "bands" not in out


def test_what_a_user_wrote_means_nothing_in_markdown():
  run = summary(model="*bold*", dataset="<b>[x](y)", device="a_b _c_")
  out = report.comparison(
    comparison.compare(one(dpc=run), b_max=8),
    one(dpc=run),
    command="echo `date` | <script>",
  )
  assert out.startswith(r"# \*bold\* on \<b\>\[x\](y)" + "\n")
  assert "\n``echo `date` | <script>``\n" in out
  assert r"on a_b \_c\_;" in out


def test_different_machines_are_all_named():
  runs = grid(dpc=[0.8, 0.9])
  runs["dpc"][1]["device"] = "8 x TPU v4"
  assert "on 1 x cpu and 8 x TPU v4;" in text(runs)


def test_cells_of_costs_and_p_values():
  by_method = {
    m.method: m
    for m in comparison.compare(
      one(
        static8=summary(saving_vs_static=0.0),
        cheap=summary(saving_vs_static=0.25),
        dear=summary(saving_vs_static=-0.5),
      ),
      b_max=8,
    ).methods
  }
  assert cells.cost(by_method["static8"])[1] == "0.0%"
  assert cells.cost(by_method["cheap"])[1] == "25.0%"
  assert cells.cost(by_method["dear"])[1] == "none (1.5x)"
  texts = [cells.p_value(p) for p in (None, 0.0009, 0.001, 0.005, 1.0)]
  assert texts == ["-", "<0.001", "0.001", "0.005", "1.000"]


def test_seconds_are_each_methods_own():
  text = report.short(
    comparison.compare(
      one(static8=summary(seconds=11.0), dpc=summary(seconds=22.0)), b_max=8
    )
  )
  rows = {
    line.split()[0]: line.split()[-1] for line in text.splitlines() if line
  }
  assert (rows["static8"], rows["dpc"]) == ("11", "22")
