"""What it costs to change bit-widths in the middle of a run.

Where bits are data, a change is an assignment, and the compiled step goes on.
Where they are a part of the program, every setting of the layers is a program
of its own.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dpc_jax.policy import adaptive_state, schedule
from dpc_jax.quant import grids, precision
from dpc_jax.training import build
from experiments.bench import peer_tools, turns


class OtherScheduleError(ValueError):
  """A schedule that sets the widths by the step's number."""


class Changes(NamedTuple):
  """A run in which the widths change.

  Attributes:
    asked: number of changes of the run that is spoken of.
    made: how many were made and timed.
    compiles: programs of the whole run, the first one included.
    seconds: what the changes cost, all `asked` of them.
    measured_seconds: what those cost that were made; `seconds` is their mean
      times `asked`, which is an extrapolation where fewer were made.
    note: None, or why there are fewer, or none.
  """

  asked: int
  made: int
  compiles: int | None
  seconds: float | None
  measured_seconds: float
  note: str | None = None


def none(asked: int, note: str | None) -> Changes:
  """No change was made; `note` says why."""
  return Changes(asked, 0, None, None, 0.0, note)


def settings(
  paths: Sequence[str], widths: Sequence[int], gradients: int
) -> Iterator[dict[str, grids.LayerBits]]:
  """Widths drawn for each layer from `widths`, one setting after the other."""
  random = np.random.default_rng(0)
  while True:
    drawn = random.choice(np.asarray(widths), len(paths))
    yield {
      path: grids.LayerBits(int(b), int(b), gradients)
      for path, b in zip(paths, drawn, strict=True)
    }


def assigned(state: Any, bits: Mapping[str, grids.LayerBits]) -> Any:
  """The train state with other widths in its schedule's state.

  Args:
    state: of a schedule that keeps its widths there, not stacked: a fixed one,
      or an adaptive one, in which layers without weights stay as they are.
    bits: of all layers.

  Raises:
    OtherScheduleError: another schedule.
  """
  old = state.schedule_state
  if isinstance(old, schedule.FixedState):
    new = old._replace(bits=_like(dict(bits), old.bits))
  elif isinstance(old, adaptive_state.AdaptiveState):
    vector = np.array([bits[path].weights for path in sorted(old.start)])
    new = old._replace(bits=_like(vector, old.bits))
  else:
    raise OtherScheduleError("its schedule sets the widths by the step")
  return state.replace(schedule_state=new)


def _like(new, old):
  """The numbers as arrays of the old ones' type and place."""
  return jax.tree.map(
    lambda a, b: jax.device_put(np.asarray(a, b.dtype), b.sharding), new, old
  )


def run(
  variant: turns.Variant,
  batch: Any,
  paths: Sequence[str],
  widths: Sequence[int],
  count: int,
) -> Changes:
  """Takes a step after each change of our own widths.

  What is timed is the change; what is counted is every program that is compiled
  by a change or in the step after it.

  Raises:
    OtherScheduleError: see `assigned`.
    RuntimeError: a step did not take the widths that it was given.
  """
  state, _ = variant.step(variant.state, batch)
  draw = settings(paths, widths, grids.DEFAULT_GRADIENT_WIDTH)
  seconds = 0.0
  with turns.compilations() as compiled:
    for _ in range(count):
      bits = next(draw)
      jax.block_until_ready(state)
      start = time.perf_counter()
      state = jax.block_until_ready(assigned(state, bits))
      seconds += time.perf_counter() - start
      state, _ = variant.step(state, batch)
      _check_taken(state, bits)
  seconds += sum(compiled)
  return Changes(count, count, 1 + len(compiled), seconds, seconds)


def _check_taken(state, bits) -> None:
  taken = precision.layer_bits(state.model_state)
  for path, layer in taken.items():
    own = bits[path].weights
    # Of an adaptive schedule, products of activations keep their widths.
    if int(layer.weights) != own and "kernel" in node(state.params, path):
      raise RuntimeError(f"{path} ran at {layer.weights} bits, not at {own}")


def node(params: Mapping[str, Any], path: str) -> Mapping[str, Any]:
  """The parameters of a layer; {} of one without."""
  for name in filter(None, path.split("/")):
    params = params.get(name, {})
  return params


def compile_each(
  tool: peer_tools.Tool,
  parts: build.Parts,
  draw: Iterator[Mapping[str, grids.LayerBits]],
  asked: int,
  made: int,
) -> Changes:
  """Compiles the step of a tool anew for each of some settings.

  Args:
    tool: installed.
    parts: of the float run.
    draw: settings.
    asked: changes of the run that is spoken of.
    made: how many settings are compiled.
  """
  programs, seconds, note = set(), [], None
  for _ in range(made):
    try:
      variant = turns.compile_step(
        parts._replace(model=tool.wrap(parts.model, next(draw)))
      )
    except peer_tools.ERRORS as error:
      note = peer_tools.shortened(error)
      break
    seconds.append(variant.compile_seconds)
    text = variant.step.as_text()
    programs.add(hashlib.sha256(text.encode()).digest())
  total = sum(seconds)
  if not seconds:
    return none(asked, note)
  share = asked / len(seconds)
  return Changes(
    asked,
    len(seconds),
    1 + round(len(programs) * share),
    total * share,
    total,
    note,
  )
