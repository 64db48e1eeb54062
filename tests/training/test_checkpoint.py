"""Checkpoints that are damaged, of another program, or the best of a run."""

import errno
import gc
import json
import os
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

from dpc_jax.training import (
  about,
  build,
  checkpoint,
  checks,
  checksums,
  loop,
  peers,
)
from dpc_jax.training import config as config_lib
from tests.training import processes, runs, tiny

STEPS = 6


@pytest.fixture(scope="module")
def config():
  return tiny.make_config(
    steps=STEPS, **{"checkpoint_every": 2, "eval_every": 6, "log_every": 6}
  )


@pytest.fixture(scope="module")
def whole(tmp_path_factory, config):
  """A finished run with checkpoints of the steps 2, 4 and 6."""
  workdir = tmp_path_factory.mktemp("whole")
  return workdir, runs.train(config, workdir)


@pytest.fixture
def workdir(whole, tmp_path):
  """A copy of it that was killed after the save of step 4."""
  there = tmp_path / "run"
  shutil.copytree(whole[0], there)
  (there / "summary.json").unlink()
  shutil.rmtree(there / "checkpoints" / "6")
  return there


def flip(path: pathlib.Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def truncate(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[:-1])


def shard(folder: pathlib.Path) -> pathlib.Path:
  """The largest file of the arrays."""
  files = (p for p in (folder / "state").rglob("d/*") if p.is_file())
  return max(files, key=lambda p: p.stat().st_size)


DAMAGES = {
  "flipped": (shard, flip, "has changed"),
  "truncated": (shard, truncate, "bytes in place of"),
  "missing": (shard, pathlib.Path.unlink, "is missing"),
  "tree": (lambda f: f / "state" / "_METADATA", flip, "_METADATA has changed"),
  "metadata": (
    lambda f: f / "_CHECKPOINT_METADATA",
    truncate,
    "_CHECKPOINT_METADATA has",
  ),
  "host": (
    lambda f: f / "host" / "metadata",
    pathlib.Path.unlink,
    "host/metadata is missing",
  ),
  "sums": (
    lambda f: f / checksums.NAME,
    truncate,
    "checksums.json is damaged",
  ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_newest(whole, config, workdir, name):
  """The one before it is used, and the run ends as if nothing had been."""
  find, damage, text = DAMAGES[name]
  path = find(workdir / "checkpoints" / "4")
  damage(path) if name != "sums" else path.write_text(path.read_text()[:-9])
  result = runs.train(config, workdir)
  warnings = [x for x in result.output.splitlines() if "warning" in x]
  assert len(warnings) == 1
  assert "checkpoints/4 is damaged: " in warnings[0]
  assert text in warnings[0]
  assert "moved to damaged_checkpoints/4, the one of step 2" in warnings[0]
  assert "going on from the checkpoint of step 2" in result.output
  assert (workdir / checkpoint.DAMAGED / "4").is_dir()
  for step in ("2", "4", "6"):
    assert checksums.exist(workdir / "checkpoints" / step)
    assert checksums.problem(workdir / "checkpoints" / step) is None
  tiny.assert_same(tiny.leaves(result.state), tiny.leaves(whole[1].state))


def test_all_damaged(config, workdir):
  folder = workdir / "checkpoints"
  for step in ("2", "4"):
    flip(shard(folder / step))
  with pytest.raises(checks.ConfigError) as caught:
    runs.train(config, workdir)
  message = str(caught.value)
  assert "\n" not in message
  assert f"workdir = {workdir}: all checkpoints are damaged" in message
  assert "of the newest, checkpoints/4, state/" in message
  assert sorted(p.name for p in folder.iterdir()) == ["2", "4"]
  assert not (workdir / checkpoint.DAMAGED).exists()


class TestWithoutChecksums:
  """Killed between a commit and its checksums, or of an older program."""

  def test_is_used_and_said(self, whole, config, workdir):
    (workdir / "checkpoints" / "4" / checksums.NAME).unlink()
    result = runs.train(config, workdir)
    assert "of step 4 has no checksums.json" in result.output
    assert "going on from the checkpoint of step 4" in result.output
    tiny.assert_same(tiny.leaves(result.state), tiny.leaves(whole[1].state))

  def test_unreadable_is_damaged(self, config, workdir):
    folder = workdir / "checkpoints" / "4"
    (folder / checksums.NAME).unlink()
    (folder / "host" / "metadata").unlink()
    result = runs.train(config, workdir)
    assert "checkpoints/4 is damaged: orbax cannot read it" in result.output
    assert "going on from the checkpoint of step 2" in result.output


def value(step):
  # Large enough not to be written into the files that list the others.
  rows = np.arange(step, 4096 + step, dtype=np.float32)
  return {"a": rows, "b": {"c": np.int32([[3, step]])}}


ABSTRACT = jax.tree.map(
  lambda x: jax.ShapeDtypeStruct(
    x.shape,
    x.dtype,
    sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
  ),
  value(0),
)


def save(workdir, steps=(1, 2), keep=20):
  checkpoints = open_at(workdir, keep)
  for step in steps:
    checkpoints.save(step, jax.device_put(value(step)), {"step": step}, {})
  checkpoints.close()
  return workdir / "checkpoints"


def newest(workdir, abstract=ABSTRACT):
  """(step, lines) of what `restore_newest` finds, which must be right."""
  checkpoints, lines = open_at(workdir), []
  try:
    step, state, host = checkpoints.restore_newest(abstract, lines.append)
  finally:
    checkpoints.close()
  tiny.assert_same(tiny.leaves(state), tiny.leaves(value(step)))
  assert host == {"step": step}
  return step, lines


def empty(path):
  """A file of no bytes, or a folder of nothing."""
  if path.is_dir():
    shutil.rmtree(path)
    path.mkdir()
  else:
    path.write_bytes(b"")


def remove(path):
  shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut(path):
  """A file of its first half."""
  if path.is_file():
    os.truncate(path, path.stat().st_size // 2)


class TestAnyFileWithoutChecksums:
  """Whatever is gone, the one before it is used, or all is there."""

  @pytest.mark.parametrize("damage", [remove, empty, cut])
  def test_gives_way(self, tmp_path, damage, capfd):
    folder = save(tmp_path / "run") / "2"
    (folder / checksums.NAME).unlink()
    gave_way = set()
    for i, path in enumerate(folder.rglob("*")):
      workdir = tmp_path / str(i)
      shutil.copytree(tmp_path / "run", workdir)
      name = path.relative_to(folder)
      damage(workdir / "checkpoints" / "2" / name)
      step, lines = newest(workdir)
      assert len(lines) == 1
      if step == 2:
        assert "no checksums.json" in lines[0]
        continue
      gave_way.add(str(name))
      assert "checkpoints/2 is damaged: " in lines[0]
      assert re.search(r": orbax cannot read it: | cannot be read", lines[0])
      # It makes place for what is saved there again.
      assert (workdir / checkpoint.DAMAGED / "2").is_dir()
    # No thread of orbax says more, then or later.
    gc.collect()
    said = capfd.readouterr().err
    assert "Traceback" not in said and "Exception" not in said
    data = shard(folder).relative_to(folder)
    assert data.parts[1] == "ocdbt.process_0"
    expected = {
      *("state", "state/_METADATA", "state/manifest.ocdbt"),
      *("host", "host/metadata"),
      *(str(data), str(data.parent), str(data.parent.parent)),
    }
    if damage is cut:
      expected = {name for name in expected if (folder / name).is_file()}
    assert gave_way >= expected

  @pytest.mark.parametrize("name", ["state/_METADATA", "state/ocdbt.process_0"])
  def test_by_its_name(self, tmp_path, name):
    """One line, with what to do."""
    folder = save(tmp_path)
    for step in ("1", "2"):
      (folder / step / checksums.NAME).unlink()
      remove(folder / step / name)
    checkpoints = open_at(tmp_path)
    with pytest.raises(checks.ConfigError) as caught:
      checkpoints.restore(2, ABSTRACT)
    with pytest.raises(checks.ConfigError, match="all checkpoints are damaged"):
      checkpoints.restore_newest(ABSTRACT, pytest.fail)
    checkpoints.close()
    message = str(caught.value)
    assert "\n" not in message
    assert re.search("checkpoints/2 is damaged: .* cannot be read", message)
    assert "; move it out of that folder, and the one before it is" in message

  @pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, TimeoutError])
  def test_the_device_has_no_room(self, tmp_path, monkeypatch, kind):
    """That is no fault of the file; nor is it if the time runs out."""
    folder = save(tmp_path)
    (folder / "2" / checksums.NAME).unlink()

    def full(*args):
      raise kind("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(checkpoint.Checkpoints, "_read", full)
    with pytest.raises(kind, match="EXHAUSTED"):
      newest(tmp_path)
    assert not (tmp_path / checkpoint.DAMAGED).exists()


@pytest.mark.parametrize(
  ("code", "exit_code"),
  [
    *[(x, 3) for x in ("EIO", "ESTALE", "ETIMEDOUT", "EREMOTEIO", "EACCES")],
    # A limit of the process; no word on the disk.
    ("EMFILE", None),
  ],
)
def test_a_disk_that_does_not_answer(tmp_path, monkeypatch, code, exit_code):
  """The checkpoint may be whole: it stays where it is."""
  folder = save(tmp_path)

  def fail(path):
    raise OSError(getattr(errno, code), "no answer", str(path))

  with monkeypatch.context() as patch:
    patch.setattr(checksums, "_measure", fail)
    with pytest.raises(OSError, match="no answer") as caught:
      newest(tmp_path)
  assert caught.value.errno == getattr(errno, code)
  ending = peers.explain(caught.value, tmp_path)
  assert exit_code == (None if ending is None else ending.code)
  assert (folder / "2").is_dir()
  assert newest(tmp_path) == (2, [])


class TestADiskThatDoesNotAnswerOrbax:
  """Nor is one without checksums damaged then."""

  def refusal(self, folder, abstract):
    checkpoints = open_at(folder.parent)
    errors = []
    for restore in (
      lambda: checkpoints.restore_newest(abstract, pytest.fail),
      lambda: checkpoints.restore(2, abstract),
    ):
      with pytest.raises(OSError, match=r"\[Errno \d+\] \S+") as caught:
        restore()
      errors.append((caught.value.errno, caught.value.filename))
    checkpoints.close()
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]
    assert not (folder.parent / checkpoint.DAMAGED).exists()
    assert errors[0] == errors[1]
    return errors[0]

  @pytest.mark.parametrize("code", ["EIO", "ESTALE", "EMFILE", "EACCES"])
  @pytest.mark.parametrize("has_cause", [False, True])
  def test_by_a_number(self, tmp_path, monkeypatch, code, has_cause):
    number = getattr(errno, code)
    folder = save(tmp_path)
    (folder / "2" / checksums.NAME).unlink()

    def fail(*args):
      error = OSError(number, "no answer", "a file")
      if has_cause:
        raise Exception("in its own words") from error
      raise error

    with monkeypatch.context() as patch:
      patch.setattr(checkpoint.Checkpoints, "_read", fail)
      assert self.refusal(folder, ABSTRACT) == (number, "a file")
    assert newest(tmp_path)[0] == 2

  @pytest.mark.parametrize("part", ["manifest", "shard"])
  def test_in_the_words_of_tensorstore(self, tmp_path, part):
    """As it is: a link to itself is no file that the system opens."""
    checkpoints = open_at(tmp_path)
    for step in (1, 2):
      checkpoints.save(step, {"a": value(step)["a"]}, {}, {})
    checkpoints.close()
    folder = tmp_path / "checkpoints"
    (folder / "2" / checksums.NAME).unlink()
    found = shard(folder / "2")
    if part == "manifest":
      found = folder / "2" / "state" / "manifest.ocdbt"
    found.unlink()
    found.symlink_to(found.name)
    assert self.refusal(folder, {"a": ABSTRACT["a"]}) == (
      errno.ELOOP,
      str(folder / "2"),
    )


class TestOnTheDisk:
  """Before its checksums say so, and before another is deleted."""

  @pytest.fixture
  def events(self, monkeypatch):
    """(folder that is synced, ...) or (folder that is deleted,), in order."""
    found, sync, delete = [], os.fsync, checkpoint.Checkpoints._delete

    def note_sync(descriptor):
      path = pathlib.Path(f"/proc/self/fd/{descriptor}").resolve()
      sealed = checksums.exist(path)
      found.append((path, sealed) if path.is_dir() else (path,))
      sync(descriptor)

    def note_delete(checkpoints, step):
      found.append(("deleted", step))
      delete(checkpoints, step)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(checkpoint.Checkpoints, "_delete", note_delete)
    return found

  def test_all_of_it(self, tmp_path, events):
    folder = save(tmp_path, steps=(1, 2), keep=1) / "2"
    whole = [p for p in folder.rglob("*") if p.name != checksums.NAME]
    files = {(p,) for p in whole if p.is_file()}
    folders = {
      (p, False) for p in (folder, folder.parent, *whole) if p.is_dir()
    }
    sums = events.index((folder / f"{checksums.NAME}.tmp",))
    assert files | folders <= set(events[:sums])
    assert len(files) > 5 and len(folders) > 5
    # Its own name, too, once it is there.
    assert events[sums + 1 :] == [(folder, True), ("deleted", 1)]

  @pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
  def test_a_disk_that_cannot(self, tmp_path, monkeypatch, number):
    def fail(descriptor):
      raise OSError(number, "No")

    monkeypatch.setattr(os, "fsync", fail)
    folder = save(tmp_path, steps=(1,))
    assert checksums.exist(folder / "1")
    assert newest(tmp_path) == (1, [])

  def test_a_disk_that_fails(self, tmp_path, monkeypatch):
    """Then the one before it stays."""
    save(tmp_path, steps=(1,), keep=1)

    def fail(descriptor):
      raise OSError(errno.EIO, "No")

    with monkeypatch.context() as patch:
      patch.setattr(os, "fsync", fail)
      with pytest.raises(OSError, match="No"):
        save(tmp_path, steps=(2,), keep=1)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["1", "2"]
    assert not checksums.exist(tmp_path / "checkpoints" / "2")


def test_what_a_killed_run_left_unfinished(tmp_path):
  folder = save(tmp_path)
  for name in ("3", "1.deleted"):
    (folder / f"{name}.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
  names = sorted(p.name for p in folder.iterdir())
  # Somebody may look into a run that is under way, and save there.
  open_at(tmp_path).close()
  assert sorted(p.name for p in folder.iterdir()) == names
  assert newest(tmp_path) == (2, [])
  assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]


def test_a_listing_that_is_late(tmp_path):
  """A step that process 0 does not see can be saved, and is not used."""
  folder = save(tmp_path)
  checkpoints = open_at(tmp_path)
  shutil.rmtree(folder / "2")
  checkpoints._tidy = lambda: [1]
  assert checkpoints.restore_newest(ABSTRACT, pytest.fail)[0] == 1
  assert checkpoints.latest_step() == 1
  checkpoints.save(2, value(2), {"step": 2}, {})
  checkpoints.close()
  assert newest(tmp_path) == (2, [])


def test_two_processes(tmp_path):
  """They go by what process 0 sees, and end where one alone cannot read."""
  started = processes.start("tests.training.restoring_processes", 2, tmp_path)
  codes = processes.exit_codes(started)
  said = processes.output(tmp_path)
  assert codes == [3, 2], said
  for text in said:
    assert "told: EIO of a file" in text
    assert "restored: 1 [1.]" in text
  assert "another process of this run was lost" in said[0]
  assert (
    f"error: workdir = {tmp_path}: checkpoints/2 has no checksums.json, and"
    " orbax cannot read it: DATA_LOSS: of a file; move it"
  ) in said[1]
  assert (tmp_path / checkpoint.DAMAGED / "2").is_dir()
  assert (tmp_path / "checkpoints" / "2").is_dir()


def test_a_folder_that_was_damaged_twice(config, workdir):
  (workdir / checkpoint.DAMAGED / "4").mkdir(parents=True)
  flip(shard(workdir / "checkpoints" / "4"))
  assert "damaged_checkpoints/4-2, the" in runs.train(config, workdir).output


def open_at(workdir, keep=20):
  return checkpoint.Checkpoints(workdir, keep)


def test_a_step_by_name(config, workdir):
  """`restore` reads the step that it is told, or none."""
  flip(shard(workdir / "checkpoints" / "4"))
  checkpoints = open_at(workdir)
  abstract = tiny.abstract(runs.parts_of(config))
  with pytest.raises(checks.ConfigError, match=r"checkpoints/4 is damaged: st"):
    checkpoints.restore(4, abstract)
  assert checkpoints.restore(2, abstract)[0].step == 2
  checkpoints.close()


class TestOfAnotherProgram:
  def mistake(self, workdir, abstract):
    checkpoints = open_at(workdir)
    with pytest.raises(checks.ConfigError) as caught:
      checkpoints.restore(4, abstract)
    checkpoints.close()
    message = str(caught.value)
    assert "\n" not in message
    assert "checkpoints/4 does not fit this program: " in message
    assert f"(written by format {about.FORMAT}, dpc_jax " in message
    assert f"jax {jax.__version__}, " in message
    return message

  def test_fields_shapes_and_dtypes(self, config, workdir):
    good = tiny.abstract(runs.parts_of(config))
    more = good.params | {"third": good.params["second"]}
    message = self.mistake(workdir, good.replace(params=more))
    assert "params/third/kernel is missing (written" in message
    less = {k: v for k, v in good.params.items() if k != "second"}
    message = self.mistake(workdir, good.replace(params=less))
    assert "params/second/kernel is unexpected (written" in message
    for shape, dtype in (((), "float32"), ((1,), "int32")):
      leaf = jax.ShapeDtypeStruct(shape, dtype, sharding=good.step.sharding)
      message = self.mistake(workdir, good.replace(step=leaf))
      assert f"step is int32[], not {dtype}{list(shape)} (w" in message

  @pytest.mark.parametrize("is_sealed", [True, False])
  def test_a_newer_one_is_refused(self, tmp_path, is_sealed):
    """It stays: a newer program can read it."""
    folder = save(tmp_path)
    path = folder / "2" / about.NAME / "metadata"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"format": about.FORMAT + 1}))
    (folder / "2" / checksums.NAME).unlink()
    if is_sealed:
      checksums.write(folder / "2")
    checkpoints = open_at(tmp_path)
    for restore in (
      lambda: checkpoints.restore_newest(ABSTRACT, pytest.fail),
      lambda: checkpoints.restore(2, ABSTRACT),
    ):
      with pytest.raises(checks.ConfigError) as caught:
        restore()
      assert str(caught.value) == (
        f"workdir = {tmp_path}: checkpoints/2 is of format {about.FORMAT + 1},"
        f" and this dpc_jax reads formats up to {about.FORMAT}; use a newer"
        " dpc_jax, or another workdir"
      )
    checkpoints.close()
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]

  def test_an_older_one_is_read(self, config, workdir):
    """Format 1 knew of no skipped steps, no versions and no checksums."""
    checkpoints = open_at(workdir)
    programs = runs.programs_of(config)
    state, host = checkpoints.restore(4, programs.abstract)
    old = workdir.parent / "old"
    older = open_at(old)
    older.save(4, state.replace(skips=()), host, {})
    for opened in (checkpoints, older):
      opened.close()
    shutil.rmtree(old / "checkpoints" / "4" / "about")
    (old / "checkpoints" / "4" / checksums.NAME).unlink()
    older, lines = open_at(old), []
    step, found, _ = older.restore_newest(programs.abstract, lines.append)
    older.close()
    assert (step, len(lines)) == (4, 1)
    tiny.assert_same(tiny.leaves(found), tiny.leaves(state))
    shardings = [jax.tree.map(lambda x: x.sharding, s) for s in (found, state)]
    assert shardings[0] == shardings[1]


def test_about_names_the_versions(whole):
  said = json.loads(
    (whole[0] / "checkpoints" / "6" / "about" / "metadata").read_text()
  )
  assert said["format"] == about.FORMAT
  assert said["versions"]["jax"] == jax.__version__
  assert {"dpc_jax", "flax", "optax", "orbax-checkpoint"} <= set(
    said["versions"]
  )


class TestTheBest:
  def save_all(self, workdir, scores, keep, keep_best, sign=1):
    checkpoints = checkpoint.Checkpoints(workdir, keep, keep_best)
    for step, value in enumerate(scores, 1):
      checkpoints.save(step, {"x": np.float32(step)}, {}, {})
      if value is not None:
        checkpoints.score(step, sign * value)
    checkpoints.close()
    names = (p.name for p in (workdir / "checkpoints").iterdir())
    return sorted(map(int, names))

  def test_stays_beside_the_newest(self, tmp_path):
    scores = [1, 3, 2, 3, 0, None, 1]
    # Of equal ones the first, as in the summary.
    assert self.save_all(tmp_path / "a", scores, 2, True) == [2, 6, 7]
    assert self.save_all(tmp_path / "b", scores, 2, False) == [6, 7]
    nothing = [None] * 4
    assert self.save_all(tmp_path / "c", nothing, 1, True) == [4]
    # The last may become the best; until then both stay.
    assert self.save_all(tmp_path / "d", [1, 2, 3], 1, True) == [2, 3]

  @pytest.mark.parametrize("holdout", [0, 200])
  def test_of_a_run_that_goes_on(self, tmp_path, holdout, monkeypatch):
    """By the validation split, which a restart reads from the run's lines."""
    accuracy = {1: 0.2, 2: 0.9, 3: 0.1, 4: 0.2, 5: 0.3, 6: 0.4}
    monkeypatch.setattr(
      loop._Run,
      "_evaluate_split",
      lambda run, split: {"loss": 1.0, "accuracy": accuracy[run.step]},
    )
    every = dict.fromkeys(("checkpoint_every", "eval_every"), 1)
    config = tiny.make_config(
      **every, **{"keep_checkpoints": 1, "data.holdout": holdout}
    )
    runs.train(config, tmp_path, stop=4)
    runs.train(config, tmp_path)
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == ({"2", "6"} if holdout else {"6"})


class TestAnErrorOfTheChecksums:
  @pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), MemoryError("none left")]
  )
  def test_is_raised(self, tmp_path, monkeypatch, error):
    def fail(folder):
      raise error

    checkpoints = open_at(tmp_path)
    monkeypatch.setattr(checksums, "write", fail)
    checkpoints.save(1, value(1), {}, {})
    with pytest.raises(type(error), match="left"):
      checkpoints.wait()
    checkpoints.close()

  def test_leaves_the_one_before(self, tmp_path, monkeypatch):
    """Only a checkpoint with checksums takes the place of one."""
    folder = save(tmp_path, steps=(1, 2), keep=1)
    assert [p.name for p in folder.iterdir()] == ["2"]
    seen = []

    def fail(path):
      seen.append((path.name, checksums.exist(folder / "2")))
      raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
      patch.setattr(checksums, "write", fail)
      with pytest.raises(OSError, match="No space left"):
        save(tmp_path, steps=(3,), keep=1)
    assert seen == [("3", True)]
    assert checksums.problem(folder / "2") is None
    assert checksums.exist(folder / "2")
    # Once there is one, all older ones go.
    save(tmp_path, steps=(4,), keep=1)
    assert [p.name for p in folder.iterdir()] == ["4"]


def test_a_sharded_state_on_other_devices(tmp_path):
  """Written from 8 devices, read by 1 and by 4, bit for bit."""
  value = np.arange(64, dtype=np.float32).reshape(8, 8)

  def placed(devices):
    mesh = jax.make_mesh((devices,), ("x",), devices=jax.devices()[:devices])
    spec = jax.sharding.PartitionSpec("x")
    return jax.sharding.NamedSharding(mesh, spec)

  checkpoints = open_at(tmp_path)
  checkpoints.save(1, {"x": jax.device_put(value, placed(8))}, {}, {})
  checkpoints.wait()
  for devices in (1, 4):
    abstract = {
      "x": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=placed(devices))
    }
    step, state, _ = checkpoints.restore_newest(abstract, pytest.fail)
    assert step == 1
    assert state["x"].sharding == placed(devices)
    np.testing.assert_array_equal(state["x"], value)
  checkpoints.close()


class TestAnotherConfig:
  def claim(self, workdir, **changes):
    config = tiny.make_config(**changes)
    config_lib.claim_workdir(build.build(config).config, workdir)

  def test_every_difference_is_named(self, tmp_path):
    self.claim(tmp_path)
    with pytest.raises(config_lib.ConfigError) as caught:
      self.claim(tmp_path, **{"seed": 1, "optimizer.learning_rate": 0.2})
    assert str(caught.value) == (
      f"workdir = {tmp_path}: holds another run; optimizer.learning_rate:"
      " there 0.1, here 0.2; seed: there 0, here 1; use another workdir, or"
      " delete it"
    )
    path = tmp_path / "config.json"
    there = json.loads(path.read_text())
    del there["precision"]["kind"]
    path.write_text(json.dumps(there | {"many": 1, "more": 2, "zoo": 3}))
    with pytest.raises(config_lib.ConfigError) as caught:
      self.claim(tmp_path, seed=1, steps=7, batch_size=8, log_every=3)
    assert (
      "batch_size: there 16, here 8; log_every: there 4, here 3; many: there 1,"
      " here no such field; more: there 2, here no such field; precision.kind:"
      " there no such field, here 'affine'; and 3 more; use"
    ) in str(caught.value)

  def test_what_changes_no_number_may_change(self, tmp_path):
    self.claim(tmp_path)
    self.claim(
      tmp_path,
      **{
        "mesh.data": 8,
        "keep_checkpoints": 1,
        "keep_best": False,
        "checkpoint_every": 2,
        "max_skipped": 3,
      },
    )
