"""What each layer costs: forward M*w*a, backward M*g*w + M*g*a."""

import pytest

from dpc_jax.analysis import layer_tables


def summary(bits, layers=1):
  return {
    "bits": bits,
    "mean_bits": 5.125,
    "layers": {
      "conv": {"weights": 100, "macs": 10**6, "layers": layers},
      "head": {"weights": 50, "macs": 10**5, "layers": 1},
    },
  }


DPC = summary({"conv": [4, 5, 8]})
FLOAT = summary({})


def rows(table):
  lines, header = table
  return {line[0]: dict(zip(header, line, strict=True)) for line in lines}


def test_one_run_shows_sizes_costs_and_shares():
  found = rows(layer_tables.run(DPC, 8))
  conv, head, total = (found[k] for k in ("`conv`", "`head`", "sum"))
  assert conv["bits, w/a/g"] == "4/5/8"
  # 4 * 5 forward, 8 * 4 + 8 * 5 backward; of 3 * 64.
  assert (conv["forward"], conv["backward"]) == ("20", "72")
  assert conv["/ static 8/8"] == f"{92 / 192:.3f}"
  # A float layer is the same in both.
  assert (head["bits, w/a/g"], head["/ static 8/8"]) == ("float", "1.000")
  assert (head["forward"], head["backward"]) == ("102", "205")
  assert conv["share"] == f"{92 / (92 + 307.2):.1%}"
  assert (total["N_k"], total["MACs"]) == ("150", "1,100,000")
  assert (total["forward"], total["backward"]) == ("122", "277")
  assert total["/ static 8/8"] == f"{399.2 / (192 + 307.2):.3f}"


def test_a_float_run_has_no_static_column():
  lines, header = layer_tables.run(FLOAT, 8)
  assert header[-1] == "share"
  assert all(len(line) == len(header) for line in lines)


def test_methods_side_by_side():
  found = rows(layer_tables.costs({"float": FLOAT, "dpc": DPC}, 8))
  assert found["`conv`"] == {
    "MBitOPs": "`conv`",
    "float": "3,072",
    "dpc": "92",
  }
  static = 192 + 307.2
  assert found["sum / static 8/8"]["dpc"] == f"{399.2 / static:.4f}"
  assert found["sum / static 8/8"]["float"] == (
    f"{(3072 + 307.2) / static:.4f}"
  )
  assert "sum / static 8/8" not in rows(layer_tables.costs({"float": FLOAT}, 8))


def test_the_static_width_is_the_one_given():
  found = rows(layer_tables.costs({"dpc": DPC}, 6))
  # 6 * 6 + 2 * 6 * 8.
  assert found["sum / static 6/6"]["dpc"] == (f"{399.2 / (132 + 307.2):.4f}")


def test_stacked_layers_count_each():
  stacked = summary({"conv": [[4, 2], [5, 2], [8, 8]]}, layers=2)
  found = rows(layer_tables.run(stacked, 8))
  assert found["`conv`"]["forward"] == "24"
  assert found["sum"]["N_k"] == "250"
  assert found["sum"]["MACs"] == "2,100,000"
  sizes = rows(layer_tables.widths({"dpc": stacked}))
  assert sizes["`conv`"]["bits, dpc"] == "[4, 2]/[5, 2]/[8, 8]"


def test_widths_are_those_of_the_end_beside_the_mean_of_the_run():
  found = rows(layer_tables.widths({"float": FLOAT, "dpc": DPC}))
  assert found["`conv`"]["bits, dpc"] == "4/5/8"
  assert found["mean over the run"]["bits, dpc"] == "5.12"
  text = layer_tables.about_widths("seed 0", ["cpt", "my_own_"])
  assert "at the end of the run (seed 0)." in text
  assert "During the run they moved: cpt, my_own\\_." in text
  assert "moved" not in layer_tables.about_widths("seed 0", [])


@pytest.mark.parametrize(("run", "has"), [(DPC, True), (FLOAT, False)])
def test_a_float_run_has_no_widths(run, has):
  assert layer_tables.has_widths(run) is has
