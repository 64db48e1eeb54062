"""What the timing programs share: compiling one step, and taking turns."""

import argparse
import contextlib
import json
import pathlib
import re
import shlex
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from dpc_jax.training import build, checkpoint, programs, sharding

MIB = 2**20
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Variant(NamedTuple):
  """A compiled train step and what it took to compile.

  Attributes:
    step: (state, batch) -> (state, metrics); donates the state.
    state: the first one.
    compile_seconds: of tracing, lowering and compiling this step alone.
    peak_bytes: arguments, results and temporaries, less what they share.
    temporary_bytes: of the temporaries alone.
  """

  step: Callable[..., Any]
  state: Any
  compile_seconds: float
  peak_bytes: int
  temporary_bytes: int


def compile_step(parts: build.Parts) -> Variant:
  """Compiles the train step of a run, and nothing else.

  Args:
    parts: of the run, of one step per call; its model may be another one that
      takes the same variables, with `apply` as Flax has it.
  """
  mesh = parts.mesh
  key = jax.random.key(parts.config.seed)
  shapes = jax.eval_shape(parts.init, key)
  shardings = sharding.of_state(shapes, mesh, parts.partition)
  abstract = checkpoint.abstract_state(shapes, shardings)
  gather = sharding.make_gather(mesh, parts.partition)
  start = time.perf_counter()
  with build.matmul_precision(parts.config):
    compiled, *_ = programs.compile_train(parts, abstract, gather)
  seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  return Variant(
    step=compiled,
    state=jax.jit(parts.init, out_shardings=shardings)(key),
    compile_seconds=seconds,
    peak_bytes=memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes,
    temporary_bytes=memory.temp_size_in_bytes,
  )


def warm_up(parts: build.Parts) -> None:
  """Compiles a train step and forgets it.

  The first one of a process takes seconds more, for what JAX loads once: they
  would count for the row that happens to come first, which is float's.
  """
  compile_step(parts)
  jax.clear_caches()


def first_batch(parts: build.Parts) -> Any:
  """The first batch of a run, on its devices."""
  batches = parts.feed.train(0, 1)
  rows = next(batches)
  batches.close()
  return sharding.put_batch(rows, parts.mesh)


def time_in_turns(
  compiled: Mapping[str, Any], batch: Any, rounds: int, steps: int
) -> dict[str, list[float]]:
  """Seconds per step, {label: one per round}; states are donated onwards.

  Args:
    compiled: {label: anything with `step` and `state` as `Variant` has them}.
    batch: what all of them take.
    rounds: of one timing each; one more before them warms up.
    steps: per timing.
  """
  states = {label: variant.state for label, variant in compiled.items()}
  seconds = {label: [] for label in compiled}
  for i in range(rounds + 1):
    for label, variant in compiled.items():
      start = time.perf_counter()
      for _ in range(steps):
        states[label], metrics = variant.step(states[label], batch)
      jax.block_until_ready((states[label], metrics))
      if i:  # the first round warms up
        seconds[label].append((time.perf_counter() - start) / steps)
  return seconds


def spread(own: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
  """`ratio` and `ratio_quartiles` of two that took turns, round by round.

  Args:
    own: seconds, one per round, at least two.
    base: likewise, of the same rounds.
  """
  ratios = [a / b for a, b in zip(own, base, strict=True)]
  low, _, high = statistics.quantiles(ratios, n=4)
  return {
    "ratio": statistics.median(ratios),
    "ratio_quartiles": [low, high],
  }


def power_law(
  x: Sequence[float], y: Sequence[float]
) -> dict[str, float | None]:
  """Fits y = c * x^exponent by least squares of the logarithms.

  Args:
    x: positive, at least two different ones.
    y: positive, as many.

  Returns:
    `exponent`, `r_squared` (None of two points, which any line fits, and where
    all y are equal) and `worst_percent`, the largest distance of a y from the
    line, in percent of the line.
  """
  u, v = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
  exponent, offset = np.polyfit(u, v, 1)
  rest = v - (exponent * u + offset)
  total = np.sum((v - v.mean()) ** 2)
  says = total > 0 and len(u) > 2
  return {
    "exponent": float(exponent),
    "r_squared": float(1 - np.sum(rest**2) / total) if says else None,
    "worst_percent": float(100 * np.max(np.abs(np.expm1(rest)))),
  }


def slug(device: str) -> str:
  """A device's name as a part of a file's: "1 x cpu" -> "cpu"."""
  return re.sub(r"[^a-z0-9]+", "_", device.lower().split(" x ")[-1])


def count(least: int) -> Callable[[str], int]:
  """The type of a flag that takes an integer of at least `least`."""

  def read(text):
    if not text.isdecimal() or int(text) < least:
      raise argparse.ArgumentTypeError(
        f"{text!r} must be an integer of at least {least}"
      )
    return int(text)

  return read


@contextlib.contextmanager
def no_cache() -> Iterator[None]:
  """Within it nothing comes from the persistent compilation cache."""
  before = jax.config.jax_enable_compilation_cache
  try:
    jax.config.update("jax_enable_compilation_cache", False)
    # JAX remembers whether there is one.
    compilation_cache.reset_cache()
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def write(
  results: dict[str, Any],
  folder: pathlib.Path,
  name: str,
  argv: Sequence[str],
  start: float,
) -> pathlib.Path:
  """Writes NAME[_MODEL]_DEVICE.json, and adds how it was made.

  Args:
    results: with `device`, and `model` where there is one; gets `command` and
      `wall_seconds`.
    folder: where to.
    name: of the program in this folder.
    argv: its flags.
    start: `time.perf_counter()` when it began.
  """
  results["command"] = shlex.join(
    ["python", "-m", f"experiments.bench.{name}", *argv]
  )
  results["wall_seconds"] = time.perf_counter() - start
  parts = [name, results.get("model"), slug(results["device"])]
  path = folder / f"{'_'.join(filter(None, parts))}.json"
  path.write_text(json.dumps(results, indent=2) + "\n")
  return path


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
  """Seconds of everything that is compiled within it, one by one."""
  found = []

  def listen(name, seconds, **_):
    if name == _COMPILED:
      found.append(seconds)

  monitoring.register_event_duration_secs_listener(listen)
  try:
    yield found
  finally:
    monitoring.unregister_event_duration_listener(listen)
