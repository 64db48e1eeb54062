"""Several real processes on this machine, joined by JAX and gloo."""

import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

from tests import compiling

ROOT = pathlib.Path(__file__).parent.parent.parent
DEADLINE_S = 240


def free_port() -> int:
  """A port that nothing listens on now."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def start(
  module: str, count: int, workdir: pathlib.Path
) -> list[subprocess.Popen[Any]]:
  """Starts `module ADDRESS COUNT INDEX WORKDIR`, `count` times.

  What process i says is in `workdir/i.txt`.
  """
  address = f"127.0.0.1:{free_port()}"
  started = []
  for index in range(count):
    with (workdir / f"{index}.txt").open("w") as file:
      started.append(
        subprocess.Popen(
          [
            *(sys.executable, "-m", module),
            *(address, str(count), str(index), str(workdir)),
          ],
          cwd=ROOT,
          stdout=file,
          stderr=subprocess.STDOUT,
          env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": compiling.FLAGS,
          },
        )
      )
  return started


def output(workdir: pathlib.Path) -> list[str]:
  """The last words of each process."""
  return [p.read_text()[-3000:] for p in sorted(workdir.glob("[0-9].txt"))]


def exit_codes(
  started: list[subprocess.Popen[Any]], deadline_s: float = DEADLINE_S
) -> list[int]:
  """Waits for all; none is left after `deadline_s` for one of them."""
  try:
    return [p.wait(deadline_s) for p in started]
  finally:
    for p in started:
      p.kill()
      p.wait()


def finish(started: list[subprocess.Popen[Any]], workdir: pathlib.Path) -> None:
  """Waits until all end well."""
  codes = exit_codes(started)
  assert codes == [0] * len(started), output(workdir)


def run(module: str, count: int, workdir: pathlib.Path) -> None:
  """Starts them and waits until all end well."""
  finish(start(module, count, workdir), workdir)
