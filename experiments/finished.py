"""What runs have left, checked before anything is made of it."""

import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from dpc_jax.training import bits_log, checks, summary
from dpc_jax.training import metrics as metrics_lib


class _Kind(NamedTuple):
  """What a value has to be."""

  words: str
  fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
  """That a float64 or an int64 holds."""
  if isinstance(value, float):
    return True
  return type(value) is int and abs(value) < 2**63


def _is_count(value: Any) -> bool:
  return type(value) is int and 0 <= value < 2**63


def _is_width(value: Any) -> bool:
  return type(value) is int and (2 <= value <= 16 or value == 32)


def _are_widths(value: Any) -> bool:
  """Each of the three of one layer, or lists of those that are stacked."""
  if not isinstance(value, list) or len(value) != 3:
    return False
  rows = [width if isinstance(width, list) else [width] for width in value]
  return all(row and all(map(_is_width, row)) for row in rows)


def _is_layer(value: Any) -> bool:
  return (
    isinstance(value, dict)
    and all(_is_count(value.get(name)) for name in ("weights", "macs"))
    and value["macs"] > 0
    and type(value.get("layers")) is int
    and 0 < value["layers"] < 2**16
  )


def _is_signal(value: Any) -> bool:
  rows = value if isinstance(value, list) else [value]
  return all(row is None or _is_number(row) for row in rows)


def _each(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
  return lambda value: (
    isinstance(value, dict) and all(map(fits, value.values()))
  )


_TEXT = _Kind("text", lambda value: isinstance(value, str))
_COUNT = _Kind("a count", _is_count)
_WIDTH = _Kind("a width", _is_width)
_FIGURE = _Kind(
  "a finite number", lambda value: _is_number(value) and math.isfinite(value)
)
# A loss may be NaN.
_ANY_FIGURE = _Kind("a number", _is_number)
_GROUP = _Kind("a group of fields", lambda value: isinstance(value, dict))
_WIDTHS = _Kind("three widths", _are_widths)

_SUMMARY = {
  **dict.fromkeys(("method", "model", "dataset", "device"), _TEXT),
  **dict.fromkeys(("seed", "steps"), _COUNT),
  **dict.fromkeys(("gbitops", "saving_vs_static", "saving_vs_float"), _FIGURE),
  **dict.fromkeys(("mean_bits", "seconds"), _FIGURE),
  "metric": _Kind(
    "accuracy or perplexity", lambda value: value in ("accuracy", "perplexity")
  ),
  "versions": _Kind("text for each package", _each(_TEXT.fits)),
  "bits": _Kind("three widths for each layer", _each(_are_widths)),
  "layers": _Kind(
    "weights, macs and layers of at least one layer",
    lambda value: bool(value) and _each(_is_layer)(value),
  ),
}
_METRICS = {"step": _COUNT, "split": _TEXT, "relative_cost": _FIGURE}
_MOVES = {
  **{"step": _COUNT, "path": _TEXT, "new": _WIDTHS, "reason": _TEXT},
  "old": _Kind(
    "three widths, or null", lambda value: value is None or _are_widths(value)
  ),
}
_SIGNALS = {
  "step": _COUNT,
  "signals": _Kind("a number for each layer", _each(_is_signal)),
}
_REMEDY = (
  "the files are not of this version, or damaged: train anew in another folder"
)


def runs_meant(where: pathlib.Path) -> list[pathlib.Path]:
  """Runs that may be meant by a folder that is none, finished or not.

  That which it is part of, or else the nearest below it, no deeper than those
  of a folder of grids; [] if there are none.
  """
  parent = _parent(where)
  if (parent / "config.json").is_file():
    return [parent]
  for pattern in ("*", "*/*", "*/*/seed*"):
    found = sorted(p.parent for p in where.glob(f"{pattern}/config.json"))
    if found:
      return found
  return []


def grids_meant(where: pathlib.Path) -> list[pathlib.Path]:
  """Finished runs and grids with some that may be meant by a folder of neither.

  The grid of which it is one method's part, or else those of `runs_meant`.
  """
  found: dict[pathlib.Path, None] = {}
  for run in runs_meant(where):
    if not (run / "summary.json").is_file():
      continue
    if re.fullmatch(r"seed\d+", run.name):
      found[_parent(_parent(run))] = None
    else:
      found[run] = None
  return list(found)


def did_you_mean(paths: Iterable[pathlib.Path], other: str) -> str:
  """A question as the end of a line of error; `other` if there are no paths."""
  shown = list(paths)
  if not shown:
    return other
  more = f", or another of {len(shown)} there" if len(shown) > 1 else ""
  return f"did you mean {shown[0]}{more}?"


def _parent(path: pathlib.Path) -> pathlib.Path:
  return path.parent if path.name not in ("", "..") else path.resolve().parent


def read_summary(run: pathlib.Path) -> dict[str, Any] | None:
  """The summary of a finished run, or None.

  Args:
    run: its folder.

  Raises:
    ConfigError: it is damaged, or lacks a field.
  """
  found = summary.read(run)
  if found is None:
    return None
  where = f"workdir = {run}: summary.json"
  _check(found, _SUMMARY, where)
  metric = found["metric"]
  names = (f"test_{metric}", f"best_test_{metric}")
  _check(found, dict.fromkeys(names, _FIGURE), where)
  _check_layers(found, where)
  return found


def read_config(run: pathlib.Path) -> dict[str, Any]:
  """The resolved config of a run, as far as a report needs it.

  Args:
    run: its folder.

  Raises:
    ConfigError: it is damaged, or lacks a field.
  """
  found = read_object(run / "config.json")
  where = f"workdir = {run}: config.json"
  _check(found, {"precision": _GROUP}, where)
  _check(found["precision"], {"b_max": _WIDTH}, f"{where}: precision")
  return found


def read_metrics(run: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of a run's `metrics.jsonl`; [] without one.

  Args:
    run: its folder.

  Raises:
    ConfigError: it is damaged, or a line lacks a field.
  """
  lines = _read_lines(run / "metrics.jsonl", _METRICS)
  for number, line in enumerate(lines, 1):
    drawn = {"loss", "accuracy", "perplexity"} & line.keys()
    where = f"workdir = {run}: line {number} of metrics.jsonl"
    _check(line, dict.fromkeys(sorted(drawn), _ANY_FIGURE), where)
  return lines


def read_decisions(
  run: pathlib.Path,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """The lines of a run's `signals.jsonl` and of its `bits.jsonl`.

  Args:
    run: its folder.

  Returns:
    (what it decided by, moves of the bits); [] of a file that is not there.

  Raises:
    ConfigError: one is damaged, lacks a field, or does not fit the other.
  """
  signals = _read_lines(run / bits_log.SIGNALS, _SIGNALS)
  moves = _read_lines(run / "bits.jsonl", _MOVES)
  first = {
    line["path"]: _shape(line["new"][0])
    for line in moves
    if line["old"] is None
  }
  for number, line in enumerate(signals, 1):
    shapes = {path: _shape(value) for path, value in line["signals"].items()}
    if not shapes or any(
      path not in first or shape != first[path]
      for path, shape in shapes.items()
    ):
      raise checks.ConfigError(
        f"workdir = {run}: line {number} of {bits_log.SIGNALS} does not fit"
        f" bits.jsonl; {_REMEDY}"
      )
    if shapes.keys() != signals[0]["signals"].keys():
      raise checks.ConfigError(
        f"workdir = {run}: line {number} of {bits_log.SIGNALS} is of other"
        f" layers than line 1; {_REMEDY}"
      )
  return signals, moves


def _shape(value: Any) -> int | None:
  return len(value) if isinstance(value, list) else None


def _check_layers(found: Mapping[str, Any], where: str) -> None:
  for path, widths in found["bits"].items():
    layers = found["layers"].get(path, {}).get("layers")
    if layers is None or any(_shape(w) not in (None, layers) for w in widths):
      raise checks.ConfigError(
        f"{where}: the bits of {path!r} do not fit its layers; {_REMEDY}"
      )


def read_object(path: pathlib.Path) -> dict[str, Any]:
  """A JSON file that holds an object.

  Raises:
    ConfigError: it holds anything else.
    OSError: it cannot be read.
  """
  try:
    found = json.loads(path.read_bytes())
  except ValueError:
    found = None
  if not isinstance(found, dict):
    raise checks.ConfigError(
      f"workdir = {path.parent}: {path.name} is damaged; remove it, and the"
      " command that trained there writes it again"
    )
  return found


def _read_lines(path, kinds) -> list[dict[str, Any]]:
  lines = metrics_lib.read_lines(path)
  for number, line in enumerate(lines, 1):
    where = f"workdir = {path.parent}: line {number} of {path.name}"
    _check(line, kinds, where)
  return lines


def _check(
  found: Mapping[str, Any], kinds: Mapping[str, _Kind], where: str
) -> None:
  for name, kind in kinds.items():
    if name not in found:
      raise checks.ConfigError(f"{where} lacks the field {name!r}; {_REMEDY}")
    if not kind.fits(found[name]):
      raise checks.ConfigError(
        f"{where}: the field {name!r} is not {kind.words}; {_REMEDY}"
      )
