"""The bench beside other libraries: rows, changes of widths, widths tried."""

import json

import jax
import pytest

from dpc_jax.quant import grids
from dpc_jax.training import checks
from experiments.bench import (
  builds,
  peer_changes,
  peer_plot,
  peer_rows,
  peer_tools,
  peer_widths,
  peers,
  turns,
)
from tests import compiling
from tests.training import tiny


def wrap_deaf(module, bits):
  """Its gradients stop at the input: what AQT's convolution does in Flax."""
  model = peer_tools.wrap_ours(module, bits)

  def apply(variables, *args, **kwargs):
    return model.apply(*jax.lax.stop_gradient((variables, *args)), **kwargs)

  return peer_tools.Model(apply)


def wrap_raising(module, bits):
  raise NotImplementedError("no\n such layer")


# Widths are constants of its programs.
STATIC = peer_tools.Tool("static", "jax", peer_tools.wrap_ours, is_traced=True)
DEAF = peer_tools.Tool("deaf", "jax", wrap_deaf, is_traced=True)
RAISING = peer_tools.Tool("raising", "jax", wrap_raising)
ABSENT = peer_tools.Tool("absent", "no-such-package", wrap_raising)
CHOSEN = peer_rows.Settings(
  ours=("dpc", "adaptive"),
  rounds=2,
  changes=6,
  peer_changes=2,
  tools=(ABSENT, STATIC, DEAF, RAISING),
)


@pytest.fixture(scope="module")
def warmed():
  """What was compiled before anything that counts; in truth it was not."""
  return []


@pytest.fixture(scope="module")
def rows(warmed):
  tiny.register()
  with (
    compiling.fast(),
    turns.no_cache(),
    pytest.MonkeyPatch.context() as patch,
  ):
    patch.setattr(turns, "warm_up", warmed.append)
    return peer_rows.measure(tiny.make_config("float"), CHOSEN)


def test_the_first_that_is_compiled_is_not_counted(rows, warmed):
  (parts,) = warmed
  assert parts.config.precision.method == "float"


def test_every_row_is_there_in_order(rows):
  others = [
    f"{tool}, {passes}"
    for tool in ("absent", "static", "deaf", "raising")
    for passes in ("int8 forward", "int8 forward + backward")
  ]
  assert list(rows) == [
    "Flax, float",
    *others,
    "ours, dpc",
    "ours, adaptive",
  ]


def test_what_cannot_be_done_is_said(rows):
  reasons = {label: row["cannot"] for label, row in rows.items()}
  assert reasons["absent, int8 forward"] == (
    "not installed: pip install -r experiments/bench/requirements.txt"
  )
  zero = "convolution: the gradient of the input is zero everywhere"
  assert reasons["deaf, int8 forward"] == zero
  assert reasons["raising, int8 forward + backward"] == (
    "convolution: NotImplementedError: no such layer"
  )
  for label in ("Flax, float", "static, int8 forward", "ours, dpc"):
    assert reasons[label] is None


def test_figures_are_relative_to_float(rows):
  base = rows["Flax, float"]
  assert base["ratio"] == base["compile_ratio"] == base["peak_ratio"] == 1
  assert base["changes"] is None
  own = rows["ours, dpc"]
  low, high = own["ratio_quartiles"]
  assert low <= own["ratio"] <= high
  assert own["temporary_ratio"] == pytest.approx(
    own["temporary_mib"] / base["temporary_mib"]
  )


@pytest.mark.parametrize("label", ["ours, dpc", "ours, adaptive"])
def test_our_changes_compile_nothing(rows, label):
  changes = rows[label]["changes"]
  assert changes["made"] == changes["asked"] == 6
  assert changes["compiles"] == 1
  assert 0 < changes["seconds"] == changes["measured_seconds"]


def test_constant_widths_compile_for_each_change(rows):
  changes = rows["static, int8 forward"]["changes"]
  assert changes["made"] == 2 and changes["compiles"] == 1 + 6
  assert changes["seconds"] == pytest.approx(3 * changes["measured_seconds"])


def test_tables_and_picture_show_them(rows, tmp_path):
  text = peers.network_table(rows, CHOSEN.changes)
  assert "absent, int8 forward: cannot; not installed" in text
  assert "static, int8 forward: 2 changes were made" in text
  assert json.loads(json.dumps(rows)) == rows
  peer_plot.draw({"tiny": {"rows": rows}}, tmp_path / "peers.png")
  assert {p.name for p in tmp_path.iterdir()} == {"peers.png", "peers.svg"}


def test_a_schedule_of_steps_takes_no_widths():
  class State:
    schedule_state = ()

  with pytest.raises(peer_changes.OtherScheduleError, match="by the step"):
    peer_changes.assigned(State(), {})


@pytest.mark.usefixtures("fast_compiler")
def test_widths_are_found_by_trying():
  found = peer_widths.probe(peer_tools.OURS, "dense", (2, 8))
  yes = {2: "yes", 8: "yes"}
  assert found == peer_widths.Widths(yes, yes, yes, yes, "yes")

  def wrap_wide(module, bits):
    wide = {path: grids.LayerBits(8, 8, 8) for path in bits}
    model = peer_tools.wrap_ours(module, wide)

    def drop(variables, *args, rngs):
      del rngs
      return model.apply(variables, *args)

    return peer_tools.Model(drop)

  wide = peer_tools.Tool("wide", "jax", wrap_wide, is_traced=True)
  eight = grids.LayerBits(8, 8, 8)
  check = peer_widths.check
  assert check(wide, "dense", eight) == "yes"
  assert "levels of weights at 4 bits" in check(
    wide, "dense", eight._replace(weights=4, activations=4)
  )
  assert "levels of the gradient of the input at 4 bits" in check(
    wide, "dense", eight._replace(gradients=4)
  )
  assert peer_widths.check_noise(wide, "dense", eight) == "no noise"
  raising = peer_widths.probe(RAISING, "dense", (8,))
  assert set(raising.forward.values()) == {"NotImplementedError: no such layer"}
  text = peers.width_table(
    {"ours": found._asdict(), "raising": raising._asdict()}
  )
  assert "raising, forward 8: NotImplementedError: no such layer" in text


def test_numbers_in_words():
  assert peers.ranges([2, 3, 4, 8]) == "2-4, 8"
  assert peers.ranges([]) == "none"


def test_a_variant_is_a_method_and_fields():
  config = tiny.make_config()
  found = builds.variant(config, "static6,storage_bits=8,max_skipped=3", "ours")
  assert found.precision.method == "static6" and found.max_skipped == 3
  assert found.precision.storage_bits == 8
  assert config.precision.storage_bits is None
  for text, words in (
    ("dpc,storage_bit=8", "storage_bit is no field; did you mean storage_bits"),
    ("dpc,storage_bits", "storage_bits is no field"),
    ("dpc,b_min=x", "--ours=dpc,b_min=x: "),
  ):
    with pytest.raises(checks.ConfigError, match=words):
      builds.variant(config, text, "ours")


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--models=resnt14"], "--models=resnt14: use transformer, resnet8,"),
    (["--rounds=1"], "--rounds: '1' must be an integer of at least 2"),
    (
      ["--models=resnet8", "--smoke", "--ours=dpc,b_mim=3"],
      "--ours=dpc,b_mim=3: b_mim is no field; did you mean b_min?",
    ),
  ],
)
def test_mistakes_are_one_line(arguments, words, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(peers, "_WIDTHS", ())
  try:
    code = peers.main([f"--workdir={tmp_path}", *arguments])
  except SystemExit as stopped:
    code = stopped.code
  lines = capsys.readouterr().err.strip().splitlines()
  assert code == 2 and len(lines) == 1
  assert lines[0].startswith(f"error: {words}")


# What they import warns of Flax's older names.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("tool", peer_tools.TOOLS, ids=lambda tool: tool.name)
def test_the_libraries_themselves(tool):
  """Skipped by the project's own environment, which does not have them."""
  if peer_tools.version(tool) is None:
    pytest.skip(peer_tools.INSTALL)
  eight = grids.LayerBits(8, 8, 8)
  assert peer_widths.check(tool, "dense", eight) == "yes"
  assert peer_widths.check_noise(tool, "dense", eight) == "yes"
  forward = eight._replace(gradients=32)
  for kind in peer_widths.KINDS:
    assert peer_widths.check(tool, kind, forward, trains=False) == "yes"
