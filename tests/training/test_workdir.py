"""A folder is one run's at a time, and all processes of a run agree on it."""

import fcntl
import json
import os

import jax
import pytest

from dpc_jax.training import agreement, checks, loop, workdir
from tests.training import processes, several_configs, tiny


@pytest.fixture
def folder(tmp_path):
  return tmp_path / "run"


def test_nobody_else_meanwhile(folder):
  config = tiny.make_config()
  with workdir.held(config, folder) as done:
    assert done is None
    assert json.loads((folder / "config.json").read_text())
    with (
      pytest.raises(workdir.BusyError) as caught,
      workdir.held(config, folder),
    ):
      pass
    line = f"workdir = {folder}: another process trains this run; start again"
    assert str(caught.value).startswith(line)
    assert str(caught.value).endswith(f"none runs there, delete {folder}/lock")
    # As the line says, of a lock that outlived its host.
    (folder / "lock").unlink()
    with workdir.held(config, folder) as done:
      assert done is None
  with workdir.held(config, folder):
    pass


def test_a_run_in_a_busy_folder_ends_before_it_compiles(folder, monkeypatch):
  monkeypatch.setattr(
    loop.build, "compile_programs", lambda parts: pytest.fail("compiles")
  )
  folder.mkdir()
  with (folder / "lock").open("w") as file:
    fcntl.flock(file, fcntl.LOCK_SH)
    with pytest.raises(checks.ConfigError, match="start again when it is done"):
      loop.train_and_evaluate(tiny.make_config(), folder)
  assert [p.name for p in folder.iterdir()] == ["lock"]


def test_without_locks_nothing_is_locked(folder, monkeypatch):
  def refuse(file, how):
    raise OSError(95, os.strerror(95))

  monkeypatch.setattr(fcntl, "flock", refuse)
  with (
    workdir.held(tiny.make_config(), folder) as done,
    workdir.held(tiny.make_config(), folder),
  ):
    assert done is None


def test_a_finished_run_is_told(folder):
  """To several at once, and the others are told that it is another's."""
  config = tiny.make_config()
  with workdir.held(config, folder):
    (folder / "summary.json").write_text('{"steps": 3}')
    with (
      workdir.held(config, folder) as done,
      workdir.held(config, folder) as again,
    ):
      assert done == again == {"steps": 3}
    with (
      pytest.raises(checks.ConfigError, match="seed: there 0, here 1"),
      workdir.held(tiny.make_config(seed=1), folder),
    ):
      pass


def test_a_folder_that_is_read_only(folder, monkeypatch):
  """A new one is a mistake, one of this run may be mended, a finished one read.

  By the answer alone: root may write anywhere.
  """
  config = tiny.make_config()
  folder.mkdir()
  mended = os.access
  monkeypatch.setattr(workdir.config_lib.os, "access", lambda *_: False)

  def error():
    with (
      pytest.raises(checks.ConfigError) as caught,
      workdir.held(config, folder),
    ):
      pass
    return caught.value

  assert str(error()).endswith("cannot be written; use another workdir")
  assert not isinstance(error(), checks.TransientError)
  monkeypatch.setattr(workdir.config_lib.os, "access", mended)
  with workdir.held(config, folder):
    pass
  monkeypatch.setattr(workdir.config_lib.os, "access", lambda *_: False)
  assert isinstance(error(), checks.TransientError)
  assert str(error()).startswith(f"workdir = {folder}: holds this run, and")
  (folder / "summary.json").write_text('{"steps": 3}')
  with workdir.held(config, folder) as done:
    assert done == {"steps": 3}


def test_a_run_that_ends_as_another_starts_is_told(folder, monkeypatch):
  def lock(file, how):
    (folder / "summary.json").write_text('{"steps": 3}')

  monkeypatch.setattr(fcntl, "flock", lock)
  with workdir.held(tiny.make_config(), folder) as done:
    assert done == {"steps": 3}


def test_one_process_tells_itself():
  assert jax.process_count() == 1
  texts = (None, "", "ä")
  assert texts == tuple(agreement.from_first(lambda t=t: t) for t in texts)


def test_processes_agree(tmp_path):
  """What the first one says, all take; other configs are refused by all."""
  processes.run("tests.training.several_configs", 2, tmp_path)
  told = [
    json.loads((tmp_path / f"told-{index}.json").read_text())
    for index in range(2)
  ]
  assert told[0] == told[1]
  told = told[0]
  assert told["texts"] == [None, "", "ä" * 3000]
  listed = []
  for name, (first, other) in several_configs.DIFFERENCES.items():
    listed.append(f"{name}: process 0 has {first}, process 1 has {other}")
    when, line = told[name]
    assert when == "never"
    assert line.startswith("config: not the same in all processes; ")
    assert f"; {listed[-1]}; start all of them with the same command" in line
    assert not (tmp_path / name).exists()
  assert f"; {'; '.join(sorted(listed))}; start all of them" in told["all"][1]
  assert told["other"][0] == told["seed"][0] == "never"
  assert "holds another run; steps: there 6, here 7" in told["other"][1]
  assert told["busy"][0] == "later"
  assert "another process trains this run" in told["busy"][1]
  assert told["done"] == {"steps": 3}
