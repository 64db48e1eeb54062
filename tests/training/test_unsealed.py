"""A checkpoint without checksums that cannot be read: what is said of it."""

import errno
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from dpc_jax.training import checkpoint, checksums, unsealed
from tests.training import test_checkpoint as cases

# On two devices, which read each its part; argument: the workdir.
RESTORE = """
import gc, pathlib, sys
import jax, numpy as np
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 2)
from dpc_jax.training import checkpoint
mesh = jax.make_mesh((2,), ('x',))
at = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
wanted = {
  f'x{i}': jax.ShapeDtypeStruct((4096,), np.float32, sharding=at)
  for i in range(20)
}
found = checkpoint.Checkpoints(pathlib.Path(sys.argv[1]), keep=2)
print(found.restore_newest(wanted, print)[0])
found.close()
gc.collect()
"""


@pytest.fixture
def folder(tmp_path):
  """Of step 2, without checksums; that of step 1 has them."""
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
  for step in (1, 2):
    rows = np.random.default_rng(step).random((20, 4096), np.float32)
    state = {f"x{i}": jax.numpy.asarray(row) for i, row in enumerate(rows)}
    checkpoints.save(step, state, {}, {})
  checkpoints.close()
  found = tmp_path / "checkpoints" / "2"
  (found / checksums.NAME).unlink()
  return found


def test_a_whole_one(folder):
  assert unsealed.problem(folder) is None


def test_is_one_line(folder):
  """No thread of orbax adds to it."""
  os.truncate(cases.shard(folder), 100)
  done = subprocess.run(
    [sys.executable, "-c", RESTORE, str(folder.parent.parent)],
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert (done.returncode, done.stderr) == (0, "")
  line, step = done.stdout.splitlines()
  assert line.startswith(
    "warning: checkpoints/2 is damaged: a file in state/ cannot be read, nor"
    " can the array x"
  )
  assert line.endswith(
    "; moved to damaged_checkpoints/2, the one of step 1 is used"
  )
  assert step == "1"


def test_names_the_file(folder):
  (path,) = (folder / "state" / "d").iterdir()
  path.unlink()
  name = path.relative_to(folder)
  assert unsealed.problem(folder) == (
    f"{name} cannot be read, nor can the array x0"
  )
  (folder / "state" / "_METADATA").write_text("[]")
  assert unsealed.problem(folder) == "state/_METADATA cannot be read"


def test_a_disk_that_does_not_answer(folder):
  """As it is: a link to itself is no file that the system opens."""
  path = cases.shard(folder)
  path.unlink()
  path.symlink_to(path.name)
  with pytest.raises(OSError, match=r"\[Errno \d+\] \S+") as caught:
    unsealed.problem(folder)
  assert caught.value.errno == errno.ELOOP
  assert caught.value.filename == str(folder)


def test_the_words_of_orbax():
  error = ValueError(
    "Encountered error while reading array index: ().\n See full TensorStore"
    " details: <bound method pybind11_detail_function_record_v1_system_l"
  )
  assert unsealed.text(error) == (
    "Encountered error while reading array index: ()"
  )
