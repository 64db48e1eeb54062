"""Processes that meet at a real port, and what each of them is told."""

import contextlib
import socket
import threading
import time

import pytest

from dpc_jax.training import checks, rendezvous
from tests.training import processes


def test_addresses():
  assert rendezvous.split("a.b-c:80") == ("a.b-c", 80)
  assert rendezvous.split("[fe80::1]:65535") == ("fe80::1", 65535)


class Absent(str):
  """A line after which the same command may succeed."""


def meet(*arguments):
  """What each of the processes is told: None or a line."""
  told = {}

  def call(key, address, processes, process, timeout_s, *name):
    try:
      rendezvous.meet(address, processes, process, timeout_s, *name)
      told[key] = None
    except rendezvous.AbsentError as error:
      told[key] = Absent(error)
    except checks.ConfigError as error:
      told[key] = str(error)

  threads = [
    threading.Thread(target=call, args=(key, *given))
    for key, given in enumerate(arguments)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
    assert not thread.is_alive()
  return told


@pytest.fixture
def address():
  return f"127.0.0.1:{processes.free_port()}"


def test_all_meet_and_the_port_is_free_again(address):
  arguments = [(address, 4, i, 20) for i in (3, 1, 0, 2)]
  assert meet(*arguments) == dict.fromkeys(range(4))
  with socket.create_server(rendezvous.split(address)):
    pass


def test_who_is_missing_is_named(address, monkeypatch):
  """After 20 s, which are over as soon as one has come."""
  clock, greet = Clock(), rendezvous._greet

  def greet_and_wait(*arguments):
    greet(*arguments)
    clock.ahead = 30

  monkeypatch.setattr(rendezvous, "time", clock)
  monkeypatch.setattr(rendezvous, "_greet", greet_and_wait)
  told = meet((address, 4, 0, 20), (address, 4, 2, 60))
  line = (
    f"processes 1, 3 did not come to {address} within 20 s; start all of them,"
    " or raise --join_timeout"
  )
  assert told == {0: line, 1: line}
  assert {type(x) for x in told.values()} == {Absent}


class Clock:
  """Of the module `time`, what goes on by the clock, with a jump."""

  ahead = 0
  sleep = staticmethod(time.sleep)

  def monotonic(self):
    return time.monotonic() + self.ahead


def test_another_count(address):
  told = meet((address, 2, 0, 20), (address, 3, 1, 20))
  line = (
    "there are 2 processes here and 3 for process 1; give all the same number"
  )
  assert told == {0: line, 1: line}
  assert {type(x) for x in told.values()} == {str}


TWICE = "two processes have the number 1; give each its own"


def come(address, index, count, source="127.0.0.1"):
  """A process at process 0, which may not be there yet."""
  for _ in rendezvous._tries(time.monotonic() + 20):
    with contextlib.suppress(ConnectionRefusedError):
      visitor = socket.create_connection(
        rendezvous.split(address), source_address=(source, 0)
      )
      visitor.sendall(f"dpc_jax process {index} {count}\n".encode())
      return visitor
  return pytest.fail("process 0 does not listen")


def hear(visitor):
  return rendezvous._hear(visitor, time.monotonic() + 20)


def test_two_hosts_with_one_number(address):
  told = {}
  thread = threading.Thread(
    target=lambda: told.update(meet((address, 3, 0, 20)))
  )
  thread.start()
  with come(address, 1, 3) as one, come(address, 1, 3, "127.0.0.2") as other:
    assert hear(one) == hear(other) == f"mistake: {TWICE}"
  thread.join()
  assert told == {0: TWICE}


def test_who_comes_again_takes_its_own_place(address):
  """The end of the older may not come through, as of a host that broke."""
  told = {}
  thread = threading.Thread(
    target=lambda: told.update(meet((address, 3, 0, 20)))
  )
  thread.start()
  with come(address, 1, 3) as older, come(address, 1, 3) as newer:
    assert hear(older) == f"mistake: {TWICE}"
    with come(address, 2, 3) as last:
      assert hear(newer) == hear(last) == "go"
  thread.join()
  assert told == {0: None}


def test_numbers_that_nobody_has_do_not_count(address):
  told = {}
  thread = threading.Thread(
    target=lambda: told.update(meet((address, 2, 0, 20)))
  )
  thread.start()
  for index, count in ((0, 2), (2, 2), (7, 2), (9, 3)):
    with come(address, index, count) as visitor:
      assert hear(visitor) is None
  with come(address, 1, 2) as visitor:
    assert hear(visitor) == "go"
  thread.join()
  assert told == {0: None}


def test_a_hello_has_one_deadline():
  """Not one for each of its parts."""
  ours, theirs = socket.socketpair()
  done = threading.Event()

  def drip():
    while not done.wait(0.05):
      theirs.sendall(b"x")

  thread = threading.Thread(target=drip)
  with ours, theirs:
    thread.start()
    start = time.monotonic()
    assert rendezvous._hear(ours, start + 0.3) is None
    # A part every 0.05 s would go on for 50 s.
    assert time.monotonic() - start < 20
    done.set()
    thread.join()


def test_nobody_or_a_stranger_answers(address):
  (line,) = meet((address, 2, 1, 1)).values()
  assert line.startswith(f"--coordinator={address}: not reached within 1 s (Co")
  assert type(line) is Absent
  (line,) = meet((address, 2, 1, 0.1, "SLURM")).values()
  assert line.startswith(f"SLURM={address}: not reached within 0.1 s (Co")
  with socket.create_server(rendezvous.split(address)) as server:
    thread = threading.Thread(target=answer, args=(server,))
    thread.start()
    (line,) = meet((address, 2, 1, 1)).values()
    thread.join()
    assert "(what answers there is no process of this program)" in line
    (line,) = meet((address, 2, 0, 20)).values()
  assert "cannot listen at port" in line
  assert "(Address already in use); use another port" in line


def answer(server):
  """As a program that speaks something else, until nobody comes."""
  server.settimeout(1.2)
  with contextlib.suppress(TimeoutError):
    while True:
      visitor, _ = server.accept()
      with visitor:
        visitor.sendall(b"HTTP/1.1 400 \xff\r\n")


def test_strangers_and_the_dead_do_not_count(address):
  """A port scan, and a process that was killed and started again."""
  there = []

  def visit():
    for hello in (b"GET / HTTP/1.1\r\n", b"dpc_jax process 1 3\n"):
      for _ in rendezvous._tries(time.monotonic() + 20):
        with contextlib.suppress(ConnectionRefusedError):
          with socket.create_connection(rendezvous.split(address)) as visitor:
            visitor.sendall(hello)
          there.append(hello)
          break
    told.update(meet((address, 3, 1, 20), (address, 3, 2, 20)))

  told = {}
  thread = threading.Thread(target=visit)
  thread.start()
  rendezvous.meet(address, 3, 0, 20)
  thread.join()
  assert len(there) == 2
  assert told == {0: None, 1: None}
