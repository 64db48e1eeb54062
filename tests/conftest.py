"""Test set-up: 8 virtual CPU devices, strict JAX, no network.

`make test` runs once with each value of `--compiler`: what does not look at
rounding compiles in a third of the time. Without it every test runs, compiled
as users have it.
"""

import os
import pathlib

import jax
import pytest

from tests import compiling

ROOT = pathlib.Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"

os.environ.setdefault("TFDS_DATA_DIR", str(ROOT / ".cache" / "no-data"))
# Child processes of the tests compile the same small programs, the smallest of
# them by the hundred.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# JAX writes an entry in place: another process may read a part of it, and
# compiles then.
os.environ["PYTHONWARNINGS"] = "ignore:Error reading persistent compilation"
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)
jax.config.update(
  "jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"]
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_numpy_rank_promotion", "raise")
# On GPUs float32 products default to TF32, which no tolerance here allows.
jax.config.update("jax_default_matmul_precision", "highest")

# Files of minutes, the longest first: at the end one would run alone.
FIRST = (
  "experiments/test_configs.py",
  "training/test_topologies.py",
  "experiments/test_faults.py",
  "training/test_two_processes.py",
  "experiments/test_notebooks.py",
)

# What looks at rounding in every test.
AS_USERS = ("quant/", "policy/test_bounds.py", "policy/test_cyclic.py")


def pytest_addoption(parser: pytest.Parser) -> None:
  """Adds `--compiler`."""
  parser.addoption(
    "--compiler",
    choices=("users", "fast"),
    help="users: the tests marked as_users, and no others; fast: all others,"
    " compiled in a hurry, their child processes too",
  )


def pytest_configure(config: pytest.Config) -> None:
  """Sets the compiler, which reads its flags once."""
  if config.getoption("compiler") == "fast":
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags += [x for x in compiling.FLAGS.split() if x not in flags]
    os.environ["XLA_FLAGS"] = " ".join(flags)


def pytest_collection_modifyitems(
  config: pytest.Config, items: list[pytest.Item]
) -> None:
  """Selects by `--compiler`, the long files first for `--dist loadfile`."""

  def name(item):
    return item.path.relative_to(ROOT / "tests").as_posix()

  def place(item):
    return FIRST.index(name(item)) if name(item) in FIRST else len(FIRST)

  for item in items:
    if name(item).startswith(AS_USERS):
      item.add_marker("as_users")
  items.sort(key=place)
  wanted = config.getoption("compiler")
  if wanted is None:
    return
  chosen = [
    (item.get_closest_marker("as_users") is None) == (wanted == "fast")
    for item in items
  ]
  config.hook.pytest_deselected(
    items=[item for item, own in zip(items, chosen, strict=True) if not own]
  )
  items[:] = [item for item, own in zip(items, chosen, strict=True) if own]


# Linux maps at most 65,530 pieces of memory for a process, and XLA needs tens
# of them for a program: one more is a segmentation fault.
MAPS = 32_000


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
  """Forgets the programs of earlier files before there are too many."""
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
    jax.clear_caches()


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
