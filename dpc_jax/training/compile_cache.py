"""JAX's persistent compilation cache: where it lies, and whether it helped."""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping

import jax

_HIT = "/jax/compilation_cache/cache_hits"


def default_folder(environment: Mapping[str, str]) -> pathlib.Path:
  """`dpc_jax/jax` in the user's cache directory.

  That is XDG_CACHE_HOME, where it is set to an absolute path, else `~/.cache`.

  Raises:
    RuntimeError: the user has no home.
  """
  base = pathlib.Path(environment.get("XDG_CACHE_HOME", ""))
  if not base.is_absolute():
    base = pathlib.Path.home() / ".cache"
  return base / "dpc_jax" / "jax"


def switch_on(environment: Mapping[str, str]) -> pathlib.Path | None:
  """Keeps compiled programs in `default_folder`, unless JAX was told otherwise.

  Nothing changes where JAX_COMPILATION_CACHE_DIR names a folder, which is then
  JAX's own choice, or is empty, and where JAX_ENABLE_COMPILATION_CACHE is 0. A
  folder that cannot be made or written is done without: nobody asked for it.
  To be called before anything compiles, and in a program of one process only:
  the first of several writes alone, and where the folder is its own, it would
  load what the others wait to compile together with it.

  Returns:
    The folder, or None.
  """
  config = jax.config
  if config.jax_compilation_cache_dir is not None:
    return None
  if not config.jax_enable_compilation_cache:
    return None
  try:
    folder = default_folder(environment)
    # Programs of one user are run by that user: where the folder is made here,
    # nobody else may put one there.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  except (OSError, RuntimeError):
    return None
  if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
    return None
  config.update("jax_compilation_cache_dir", str(folder))
  return folder


@contextlib.contextmanager
def hits() -> Iterator[list[str]]:
  """Yields a list that gets an entry for each program found in the cache."""
  found = []

  def hear(event, **details):
    del details
    if event == _HIT:
      found.append(event)

  jax.monitoring.register_event_listener(hear)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_listener(hear)
