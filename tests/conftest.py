"""Test set-up: 8 virtual CPU devices, strict JAX, no network."""

import os
import pathlib

import jax
import pytest

from tests import compiling

ROOT = pathlib.Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"

os.environ.setdefault("TFDS_DATA_DIR", str(ROOT / ".cache" / "no-data"))
# Child processes of the tests compile the same small programs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)
jax.config.update(
  "jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"]
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_numpy_rank_promotion", "raise")
# On GPUs float32 products default to TF32, which no tolerance here allows.
jax.config.update("jax_default_matmul_precision", "highest")

# Files of minutes, the longest first: at the end one would run alone.
FIRST = (
  "experiments/test_configs.py",
  "training/test_topologies.py",
  "experiments/test_faults.py",
  "training/test_two_processes.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Puts the long files first, for `--dist loadfile` to share out."""

  def place(item):
    name = item.path.relative_to(ROOT / "tests").as_posix()
    return FIRST.index(name) if name in FIRST else len(FIRST)

  items.sort(key=place)


@pytest.fixture
def fast_compiler():
  """For tests that do not look at rounding; see `compiling`."""
  with compiling.fast():
    yield


@pytest.fixture
def shared_data() -> pathlib.Path:
  """Prepared real data beside the project; absent in a stranger's clone."""
  if not SHARED_DATA.is_dir():
    pytest.skip(f"no real data at {SHARED_DATA}")
  return SHARED_DATA
