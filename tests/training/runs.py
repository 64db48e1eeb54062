"""Whole runs of the tiny model that share compiled programs."""

import contextlib
import io
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
import pytest
from ml_collections import config_dict

import dpc_jax as dpc
from dpc_jax import models
from dpc_jax.training import build, loop, metrics, state
from dpc_jax.training import config as config_lib
from tests.training import tiny

# Weights of the layers of `tiny`.
CAPACITIES = {"first": 36, "second": 288}
# Nothing in a summary but these depends on interruptions.
TIMES = ("seconds", "compile_seconds", "compile_count")

_built = {}
_compile = build.compile_programs
_compiled = {}


class KilledError(Exception):
  """Ends a run at once."""


class Result(NamedTuple):
  """What a run leaves, beside its workdir.

  Attributes:
    summary: None of a run that was stopped or killed.
    state: of its last step.
    output: of the console.
  """

  summary: dict[str, Any] | None
  state: state.TrainState
  output: str


def train(
  config: config_dict.ConfigDict,
  workdir: pathlib.Path,
  *,
  stop: int | None = None,
  kill: int | None = None,
  compiles: bool = False,
) -> Result:
  """Trains as `loop.train_and_evaluate` does.

  Args:
    config: of the run.
    workdir: of the run, which goes on there.
    stop: the step to stop at, as by SIGTERM.
    kill: the step to end at without a word.
    compiles: whether to compile anew, in place of sharing what an earlier run
      of this config has compiled.
  """

  def is_stopping(step):
    if step == kill:
      raise KilledError
    return step == stop

  summary = None
  output = io.StringIO()
  with patched(), contextlib.redirect_stdout(output):
    parts = parts_of(config)
    if compiles:
      _compiled.pop(_key(parts.config), None)
    config_lib.claim_workdir(parts.config, workdir)
    run = loop._Run(parts, workdir)
    try:
      summary = run.train(is_stopping)
    except KilledError:
      pass
    finally:
      run.close()
  return Result(summary, run.state, output.getvalue())


@contextlib.contextmanager
def patched():
  """The fixtures of conftest, for those of a module; shared programs."""

  def compile_programs(parts):
    key = _key(parts.config)
    if key not in _compiled:
      _compiled[key] = _compile(parts)
    return _compiled[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(models._CONSTRUCTORS, "tiny", tiny.Tiny)
    patch.setattr(metrics, "_event_writer", lambda workdir: None)
    patch.setattr(build, "compile_programs", compile_programs)
    yield


def parts_of(config: config_dict.ConfigDict) -> build.Parts:
  """The parts of a config, built once."""
  key = _key(config)
  if key not in _built:
    with patched():
      _built[key] = build.build(config)
  return _built[key]


def programs_of(config: config_dict.ConfigDict) -> build.Programs:
  """The compiled programs that runs of a config share."""
  with patched():
    return build.compile_programs(parts_of(config))


def _key(config):
  return json.dumps(config.to_dict(), sort_keys=True)


def lines_of(workdir: pathlib.Path, name: str = "bits.jsonl") -> list[dict]:
  """The objects of a file of JSON lines, which knows no NaN."""

  def refuse(text):
    raise ValueError(f"{text} is not JSON")

  text = (workdir / name).read_text()
  return [json.loads(x, parse_constant=refuse) for x in text.splitlines()]


def widths_by_step(
  workdir: pathlib.Path, steps: int
) -> list[dict[str, list[int]]]:
  """What `bits.jsonl` says of each step, [{path: widths}]."""
  lines = lines_of(workdir)
  assert lines == sorted(lines, key=lambda line: line["step"])
  assert all(0 <= line["step"] < steps for line in lines)
  now, found = {}, []
  for step in range(steps):
    for line in lines:
      if line["step"] == step:
        assert line["old"] == now.get(line["path"])
        assert line["new"] != line["old"]
        now[line["path"]] = line["new"]
    found.append(dict(now))
  return found


def assert_is_what_ran(
  workdir: pathlib.Path, result: Result, config: config_dict.ConfigDict
) -> None:
  """The cost, counted in the steps, and the last widths are as logged."""
  widths = widths_by_step(workdir, config.steps)
  costs = parts_of(config).costs
  total = sum(
    dpc.bitops(costs, as_bits(w), samples=config.batch_size).total
    for w in widths
  )
  assert result.summary["gbitops"] == total / 1e9
  assert result.summary["bits"] == widths[-1] == widths_of(result.state)


def as_bits(widths: dict[str, list[int]]) -> dict[str, dpc.LayerBits]:
  """{path: [8, 8, 8]} as {path: LayerBits}."""
  return {path: dpc.LayerBits(*layer) for path, layer in widths.items()}


def widths_of(train_state: state.TrainState) -> dict[str, list[int]]:
  """The widths in the collection `precision`."""
  return {
    path: [int(width) for width in layer]
    for path, layer in state.layer_bits(train_state).items()
  }


def assert_same_run(
  a: tuple[pathlib.Path, Result], b: tuple[pathlib.Path, Result]
) -> None:
  """Bit for bit, and in all files."""
  tiny.assert_same(tiny.leaves(a[1].state), tiny.leaves(b[1].state))
  names = [{p.name for p in run[0].iterdir()} for run in (a, b)]
  assert names[0] == names[1]
  for name in names[0] - {"checkpoints", "metrics.jsonl", "summary.json"}:
    assert (a[0] / name).read_text() == (b[0] / name).read_text(), name
  without = "images_per_second"
  assert tiny.read_lines(a[0] / "metrics.jsonl", without) == tiny.read_lines(
    b[0] / "metrics.jsonl", without
  )
  summaries = [
    {k: v for k, v in run[1].summary.items() if k not in TIMES}
    for run in (a, b)
  ]
  assert summaries[0] == summaries[1]


def cpt(b_min: int, b_max: int, period: int, step: int) -> int:
  """CPT's formula, in numpy."""
  phase = np.pi * (step % period) / period
  width = b_min + (b_max - b_min) / 2 * (1 + np.cos(phase + np.pi))
  return int(np.rint(np.round(width, 9)))
