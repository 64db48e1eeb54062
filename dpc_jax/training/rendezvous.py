"""Processes meet at a port before JAX joins them: what is wrong is said there.

Process 0 listens at the coordinator's port; the others come, say who they are
and wait. When all are there they are sent on, and JAX's coordination service
takes over the port. A mistake ends all of them, each with one line.

Nothing is secret here, nor in what JAX does afterwards: whoever reaches the
port can join or end a run. It must be private to the run's hosts.
"""

import contextlib
import os
import re
import selectors
import socket
import time
from collections.abc import Iterator

from dpc_jax.training import checks

_HELLO = "dpc_jax process"
# Answers: all are there, or a line after one of the others.
_GO = "go"
_ABSENT = "absent: "
_MISTAKE = "mistake: "
_RETRY_S = 0.3
# What is longer, or slower, is not one of us.
_LONGEST = 1_000
_PATIENCE_S = 5.0


class AbsentError(checks.TransientError):
  """Processes did not find each other in time; another time they may."""


def split(address: str, name: str = "--coordinator") -> tuple[str, int]:
  """(host, port) of HOST:PORT; an IPv6 host is in brackets there.

  Args:
    address: the text.
    name: who gave it, for the error.

  Raises:
    ConfigError: it is something else.
  """
  match = re.fullmatch(r"(?:\[([^\[\]\s]+)\]|([^:\[\]\s/]+)):(\d+)", address)
  if match is None or not 1 <= int(match[3]) <= 65535:
    raise checks.ConfigError(
      f"{name}={address}: must be HOST:PORT, such as 10.0.0.2:8476"
    )
  return match[1] or match[2], int(match[3])


def meet(
  address: str,
  processes: int,
  process: int,
  timeout_s: float,
  name: str = "--coordinator",
) -> None:
  """Returns when all `processes` are at `address`.

  Args:
    address: HOST:PORT of process 0, which listens there at all its interfaces;
      it is free again on return.
    processes: how many, at least 2.
    process: this one, in 0..processes-1.
    timeout_s: how long to wait for the others.
    name: who gave the address, for the errors.

  Raises:
    AbsentError: nobody answers, or processes are missing.
    ConfigError: the port is taken, two processes are the same one, or another
      number of them was started.
  """
  deadline = time.monotonic() + timeout_s
  if process == 0:
    _receive(address, processes, deadline, timeout_s, name)
  else:
    hello = f"{_HELLO} {process} {processes}"
    _come(address, hello, deadline, timeout_s, name)


def _receive(address, processes, deadline, timeout_s, name) -> None:
  """Process 0: waits for the others, and sends them on or home."""
  there: dict[int, socket.socket] = {}
  with contextlib.ExitStack() as stack:
    selector = stack.enter_context(selectors.DefaultSelector())
    server = stack.enter_context(_listen(address, name))
    selector.register(server, selectors.EVENT_READ)
    try:
      while len(there) < processes - 1:
        left = deadline - time.monotonic()
        if left <= 0:
          missing = sorted(set(range(1, processes)) - set(there))
          raise AbsentError(
            f"{_names(missing)} did not come to {address} within"
            f" {timeout_s:g} s; start all of them, or raise --join_timeout"
          )
        ready = {key.fileobj: key.data for key, _ in selector.select(left)}
        # Who waits says nothing: these are gone, and may have come again.
        for gone in ready.keys() - {server}:
          selector.unregister(gone)
          there.pop(ready[gone])
        if server in ready:
          visitor = stack.enter_context(server.accept()[0])
          _greet(visitor, there, processes, selector, deadline)
    except checks.ConfigError as error:
      kind = _ABSENT if isinstance(error, AbsentError) else _MISTAKE
      for visitor in there.values():
        _say(visitor, f"{kind}{error}")
      raise
    server.close()
    for visitor in there.values():
      _say(visitor, _GO)


def _greet(visitor, there, processes, selector, deadline) -> None:
  """Takes in who says a hello of ours; raises ConfigError on a mistake."""
  patient_until = min(time.monotonic() + _PATIENCE_S, deadline)
  hello = re.fullmatch(
    rf"{_HELLO} (\d+) (\d+)", _hear(visitor, patient_until) or ""
  )
  index, count = (int(hello[1]), int(hello[2])) if hello else (0, 0)
  # Process 0 is here, and nobody counts on from the last.
  if not 1 <= index < count:
    visitor.close()
    return
  if count != processes:
    _refuse(
      visitor,
      f"there are {processes} processes here and {count} for process {index};"
      " give all the same number",
    )
  twice = f"two processes have the number {index}; give each its own"
  if index in there:
    older = there[index]
    if _host(older) not in (None, _host(visitor)):
      _refuse(visitor, twice)
    # Started again, and the end of the older did not come through.
    _say(older, f"{_MISTAKE}{twice}")
    selector.unregister(older)
    older.close()
  there[index] = visitor
  selector.register(visitor, selectors.EVENT_READ, index)


def _host(visitor) -> str | None:
  """Where it comes from; None if it is gone."""
  with contextlib.suppress(OSError):
    return visitor.getpeername()[0]
  return None


def _refuse(visitor, mistake: str) -> None:
  _say(visitor, f"{_MISTAKE}{mistake}")
  raise checks.ConfigError(mistake)


def _listen(address, name) -> socket.socket:
  port = split(address, name)[1]
  try:
    if socket.has_dualstack_ipv6():
      return socket.create_server(
        ("", port), family=socket.AF_INET6, dualstack_ipv6=True
      )
    return socket.create_server(("", port))
  except OSError as error:
    raise checks.ConfigError(
      f"{name}={address}: cannot listen at port {port}"
      f" ({os.strerror(error.errno)}); use another port, the same for all"
      " processes"
    ) from None


def _come(address, hello, deadline, timeout_s, name) -> None:
  """The others: until process 0 is there, and then until all are."""
  reason = "no answer"
  for left in _tries(deadline):
    try:
      with socket.create_connection(
        split(address, name), timeout=left
      ) as server:
        _say(server, hello)
        answer = _hear(server, deadline + _PATIENCE_S) or ""
    except OSError as error:
      reason = error.strerror or str(error)
      continue
    if answer == _GO:
      return
    for kind, raised in (
      (_ABSENT, AbsentError),
      (_MISTAKE, checks.ConfigError),
    ):
      if answer.startswith(kind):
        raise raised(answer.removeprefix(kind))
    reason = "what answers there is no process of this program"
  raise AbsentError(
    f"{name}={address}: not reached within {timeout_s:g} s ({reason});"
    " start process 0 there, or raise --join_timeout"
  )


def _tries(deadline) -> Iterator[float]:
  """The seconds left, at intervals, until there are none."""
  while (left := deadline - time.monotonic()) > 0:
    yield left
    time.sleep(_RETRY_S)


def _say(to: socket.socket, text: str) -> None:
  # Who is gone need not hear it.
  with contextlib.suppress(OSError):
    to.sendall(f"{text}\n".encode())


def _hear(at: socket.socket, deadline: float) -> str | None:
  """One line; None if it is none of ours, or not there by the deadline."""
  said = b""
  with contextlib.suppress(OSError):
    while not said.endswith(b"\n") and len(said) < _LONGEST:
      at.settimeout(max(deadline - time.monotonic(), 0.001))
      part = at.recv(_LONGEST)
      if not part:
        break
      said += part
  if not said.endswith(b"\n") or not said.isascii():
    return None
  return said.decode().strip()


def _names(indices: list[int]) -> str:
  most = ", ".join(map(str, indices[:8])) + (", ..." * (len(indices) > 8))
  return f"process {most}" if len(indices) == 1 else f"processes {most}"
