"""What process 0 sees or decides, the others go by."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpc_jax.training import checks


def from_first(look: Callable[[], Any]) -> Any:
  """What process 0 sees, in all processes, which must all call it.

  Args:
    look: called in process 0 alone; returns what JSON can hold.

  Returns:
    Its result; of several processes as JSON gives it back.

  Raises:
    Exception: what `look` raised. In the other processes as TransientError,
      ConfigError or OSError with the same words, or else as RuntimeError.
  """
  if jax.process_count() == 1:
    return look()
  said, error = None, None
  if jax.process_index() == 0:
    try:
      said = ["value", look()]
    # Whatever it is, the others wait for a word.
    except Exception as caught:
      error = caught
      said = _said_of(error)
  kind, value = _broadcast(said)
  if error is not None:
    raise error
  match kind:
    case "value":
      return value
    case "OSError":
      raise OSError(*value)
    case "TransientError":
      raise checks.TransientError(value)
    case "ConfigError":
      raise checks.ConfigError(value)
    case _:
      raise RuntimeError(f"in process 0: {value}")


def _said_of(error: Exception) -> list[Any]:
  if isinstance(error, OSError) and error.errno is not None:
    name = None if error.filename is None else str(error.filename)
    return ["OSError", [error.errno, error.strerror, name]]
  if isinstance(error, checks.TransientError):
    return ["TransientError", str(error)]
  if isinstance(error, checks.ConfigError):
    return ["ConfigError", str(error)]
  return ["other", f"{type(error).__name__}: {error}"]


def _broadcast(value: Any) -> Any:
  """What process 0 says; by its length first, as shapes must agree."""
  data = json.dumps(value).encode()
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  # Each shape is compiled once.
  buffer = np.zeros(-(-size // 1024) * 1024, np.uint8)
  if jax.process_index() == 0:
    buffer[:size] = np.frombuffer(data, np.uint8)
  return json.loads(bytes(multihost_utils.broadcast_one_to_all(buffer))[:size])
