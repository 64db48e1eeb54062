"""Processes meet at a port before JAX joins them: what is wrong is said there.

Process 0 listens at the coordinator's port; the others come, say who they are
and wait. When all are there they are sent on, and JAX's coordination service
takes over the port. A mistake ends all of them, each with one line.
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
_GO = "go"
_RETRY_S = 0.3
# What is longer, or slower, is not one of us.
_LONGEST = 1_000
_PATIENCE_S = 5.0


def split(address: str) -> tuple[str, int]:
  """(host, port) of HOST:PORT; an IPv6 host is in brackets there.

  Raises:
    ConfigError: it is something else.
  """
  match = re.fullmatch(r"(?:\[([^\[\]\s]+)\]|([^:\[\]\s/]+)):(\d+)", address)
  if match is None or not 1 <= int(match[3]) <= 65535:
    raise checks.ConfigError(
      f"--coordinator={address}: must be HOST:PORT, such as 10.0.0.2:8476"
    )
  return match[1] or match[2], int(match[3])


def meet(
  address: str,
  processes: int,
  process: int,
  timeout_s: float,
  bind: str | None = None,
) -> None:
  """Returns when all `processes` are at `address`.

  Args:
    address: HOST:PORT of process 0; it is free again on return.
    processes: how many, at least 2.
    process: this one, in 0..processes-1.
    timeout_s: how long to wait for the others.
    bind: HOST:PORT to listen at; None: all interfaces, the same port.

  Raises:
    ConfigError: the port is taken, nobody answers, processes are missing, two
      are the same one, or another number of them was started.
  """
  deadline = time.monotonic() + timeout_s
  if process == 0:
    _receive(address, processes, deadline, timeout_s, bind)
  else:
    _come(address, f"{_HELLO} {process} {processes}", deadline, timeout_s)


def _receive(address, processes, deadline, timeout_s, bind) -> None:
  """Process 0: waits for the others, and sends them on or home."""
  there: dict[int, socket.socket] = {}
  with contextlib.ExitStack() as stack:
    selector = stack.enter_context(selectors.DefaultSelector())
    server = stack.enter_context(_listen(address, bind))
    selector.register(server, selectors.EVENT_READ)
    try:
      while len(there) < processes - 1:
        left = deadline - time.monotonic()
        if left <= 0:
          missing = sorted(set(range(1, processes)) - set(there))
          raise checks.ConfigError(
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
          _greet(visitor, there, processes, selector)
    except checks.ConfigError as error:
      for visitor in there.values():
        _say(visitor, str(error))
      raise
    server.close()
    for visitor in there.values():
      _say(visitor, _GO)


def _greet(visitor, there, processes, selector) -> None:
  visitor.settimeout(_PATIENCE_S)
  hello = re.fullmatch(rf"{_HELLO} (\d+) (\d+)", _hear(visitor) or "")
  if hello is None:
    visitor.close()
    return
  index, count = int(hello[1]), int(hello[2])
  mistake = None
  if count != processes:
    mistake = f"--processes is {processes} here and {count} of process {index}"
  elif index in there:
    mistake = f"--process={index} was given to two processes"
  if mistake:
    _say(visitor, mistake)
    raise checks.ConfigError(mistake)
  there[index] = visitor
  selector.register(visitor, selectors.EVENT_READ, index)


def _listen(address, bind) -> socket.socket:
  port = split(bind or address)[1]
  host = split(bind)[0] if bind else ""
  try:
    if not host and socket.has_dualstack_ipv6():
      return socket.create_server(
        ("", port), family=socket.AF_INET6, dualstack_ipv6=True
      )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)
  except OSError as error:
    raise checks.ConfigError(
      f"--coordinator={address}: cannot listen at port {port}"
      f" ({os.strerror(error.errno)}); use another port, the same for all"
      " processes"
    ) from None


def _come(address, hello, deadline, timeout_s) -> None:
  """The others: until process 0 is there, and then until all are."""
  reason = "no answer"
  for left in _tries(deadline):
    try:
      with socket.create_connection(split(address), timeout=left) as server:
        _say(server, hello)
        server.settimeout(max(deadline - time.monotonic(), 0) + _PATIENCE_S)
        answer = _hear(server)
    except OSError as error:
      reason = error.strerror or str(error)
      continue
    if answer == _GO:
      return
    if answer:
      raise checks.ConfigError(answer)
    reason = "what answers there is no process of this program"
  raise checks.ConfigError(
    f"--coordinator={address}: not reached within {timeout_s:g} s ({reason});"
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


def _hear(at: socket.socket) -> str | None:
  """One line; None if it is none of ours, or does not come."""
  said = b""
  with contextlib.suppress(OSError):
    while not said.endswith(b"\n") and len(said) < _LONGEST:
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
