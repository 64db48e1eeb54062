"""The persistent compilation cache: where it lies, and when it is left out."""

import os
import pathlib
import stat
import subprocess
import sys

import jax
import pytest

from dpc_jax.training import compile_cache

# Compiles three times, before the last with a damaged entry.
PROGRAM = """
import os, pathlib, sys, warnings
import jax, jax.numpy as jnp, numpy as np
from dpc_jax.training import compile_cache

print(compile_cache.switch_on(os.environ))
warnings.simplefilter("ignore")
x = jax.ShapeDtypeStruct((3,), jnp.float32)
for i in range(3):
  if i == 2:
    (entry,) = pathlib.Path(sys.argv[1]).rglob("*-cache")
    entry.write_bytes(entry.read_bytes()[:20])
  with compile_cache.hits() as hits:
    compiled = jax.jit(lambda x: jnp.sin(x) + 1).lower(x).compile()
  found = np.asarray(compiled(np.zeros(3, np.float32)))
  print(len(hits), found[0])
  jax.clear_caches()
"""


@pytest.fixture
def no_cache():
  """JAX as it starts without any word on a cache."""
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  yield
  jax.config.update("jax_compilation_cache_dir", before)


def test_the_second_program_comes_from_the_folder(tmp_path):
  """And a damaged one is compiled anew."""
  environment = {
    k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"
  } | {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XDG_CACHE_HOME": str(tmp_path),
  }
  out = subprocess.run(
    [sys.executable, "-c", PROGRAM, str(tmp_path)],
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  folder = tmp_path / "dpc_jax" / "jax"
  assert out.splitlines() == [str(folder), "0 1.0", "1 1.0", "0 1.0"]
  assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_folder_of_a_user():
  folder = compile_cache.default_folder
  assert folder({"XDG_CACHE_HOME": "/x"}) == pathlib.Path("/x/dpc_jax/jax")
  home = pathlib.Path.home() / ".cache/dpc_jax/jax"
  for environment in ({}, {"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "here"}):
    assert folder(environment) == home


@pytest.mark.usefixtures("no_cache")
class TestWithoutAFolder:
  def test_jax_s_own_switches_hold(self, tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path / "x")}
    for name, value in (
      ("jax_compilation_cache_dir", str(tmp_path / "own")),
      ("jax_compilation_cache_dir", ""),
      ("jax_enable_compilation_cache", False),
    ):
      before = getattr(jax.config, name)
      jax.config.update(name, value)
      try:
        assert compile_cache.switch_on(environment) is None
        assert getattr(jax.config, name) == value
      finally:
        jax.config.update(name, before)
    assert not (tmp_path / "x").exists()
    folder = compile_cache.switch_on(environment)
    assert folder == tmp_path / "x/dpc_jax/jax" and folder.is_dir()

  def test_one_that_cannot_be_made(self, tmp_path):
    (tmp_path / "file").write_text("")
    environment = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    assert compile_cache.switch_on(environment) is None
    assert jax.config.jax_compilation_cache_dir is None

  def test_one_that_cannot_be_written(self, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    assert compile_cache.switch_on(environment) is None
    assert jax.config.jax_compilation_cache_dir is None

  def test_a_user_without_a_home(self, monkeypatch):
    def no_home():
      raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "home", no_home)
    assert compile_cache.switch_on({}) is None
