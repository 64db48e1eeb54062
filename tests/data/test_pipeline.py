"""Batches: purity, sharding by process, epochs, and exact evaluation."""

import numpy as np
import pytest

from dpc_jax.data import pipeline, sources


def _split(count: int) -> sources.Split:
  """Images whose pixels and labels tell their row."""
  rows = np.arange(count)
  images = np.broadcast_to(
    rows[:, None, None, None].astype(np.uint8), (count, 4, 3, 2)
  )
  return sources.Split(images=images.copy(), labels=rows.astype(np.int32))


def _assert_equal(left: dict, right: dict) -> None:
  assert left.keys() == right.keys()
  for name in left:
    np.testing.assert_array_equal(left[name], right[name])
    assert left[name].dtype == right[name].dtype


def test_batch_has_its_form_and_pairs_images_with_labels():
  batches = pipeline.TrainBatches(_split(50), batch_size=12, seed=0)
  batch = batches.batch(0)
  assert batch.keys() == {"image", "label"}
  assert batch["image"].dtype == np.uint8
  assert batch["image"].shape == (12, 4, 3, 2)
  assert batch["label"].dtype == np.int32
  assert batch["label"].shape == (12,)
  assert (batch["image"] == batch["label"][:, None, None, None]).all()
  np.testing.assert_array_equal(batch["label"], batches.indices(0))
  assert batches.indices(0).dtype == np.int32


def test_batch_depends_on_the_step_alone():
  forward = pipeline.TrainBatches(_split(50), batch_size=12, seed=3)
  in_order = [forward.batch(step) for step in range(20)]
  resumed = pipeline.TrainBatches(_split(50), batch_size=12, seed=3)
  for step in (19, 3, 3, 0, 11):
    _assert_equal(resumed.batch(step), in_order[step])
  _assert_equal(resumed.batch(np.int32(7)), in_order[7])


def test_iterate_gives_the_batches_from_anywhere():
  batches = pipeline.TrainBatches(_split(50), batch_size=12, seed=3)
  for start, stop in ((0, 3), (4, 9), (5, 5), (np.int32(2**31 - 1), 2**31)):
    stream = batches.iterate(start, stop)
    for step, batch in zip(range(start, stop), stream, strict=True):
      _assert_equal(batch, batches.batch(step))


@pytest.mark.parametrize(("count", "size"), [(50, 12), (5, 12), (12, 12)])
def test_every_epoch_is_another_permutation(count, size):
  batches = pipeline.TrainBatches(_split(count), batch_size=size, seed=1)
  steps = 5 * count // size + 1
  rows = np.concatenate([batches.indices(step) for step in range(steps)])
  epochs = rows[: 5 * count].reshape(5, count)
  for epoch in epochs:
    assert sorted(epoch) == list(range(count))
  assert len({tuple(epoch) for epoch in epochs}) == 5
  assert tuple(epochs[0]) != tuple(range(count))


def test_seeds_give_different_orders():
  orders = {
    tuple(pipeline.TrainBatches(_split(50), batch_size=50, seed=s).indices(0))
    for s in (0, 1, 2, 2**32 - 1)
  }
  assert len(orders) == 4


def test_order_is_the_recorded_one():
  # Resuming relies on the order alone: if another grain shuffles otherwise,
  # old checkpoints continue on other images, and somebody has to know.
  batches = pipeline.TrainBatches(_split(50), batch_size=8, seed=0)
  assert batches.indices(0).tolist() == [49, 4, 10, 45, 39, 22, 27, 9]
  assert batches.indices(1000).tolist() == [5, 21, 1, 2, 31, 39, 17, 23]


def test_far_steps_do_not_overflow():
  batches = pipeline.TrainBatches(_split(50), batch_size=50, seed=0)
  rows = batches.indices(np.int32(2**31 - 1))
  assert sorted(rows) == list(range(50))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_hold_contiguous_parts_of_one_batch(count):
  split = _split(50)
  whole = pipeline.TrainBatches(split, batch_size=12, seed=5)
  parts = [
    pipeline.TrainBatches(
      split, batch_size=12, seed=5, process_index=p, process_count=count
    )
    for p in range(count)
  ]
  for step in (0, 4, 9):  # step 4 crosses the end of the first epoch
    pieces = [part.batch(step) for part in parts]
    assert all(len(piece["label"]) == 12 // count for piece in pieces)
    joined = {
      name: np.concatenate([piece[name] for piece in pieces])
      for name in pieces[0]
    }
    _assert_equal(joined, whole.batch(step))
  assert parts[0].local_batch_size == 12 // count


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 29])
def test_evaluation_shows_every_image_once(count, processes):
  split = _split(count)
  streams = [
    list(
      pipeline.eval_batches(
        split, batch_size=8, process_index=p, process_count=processes
      )
    )
    for p in range(processes)
  ]
  assert {len(stream) for stream in streams} == {-(-count // 8)}
  seen = []
  for pieces in zip(*streams, strict=True):
    for piece in pieces:
      assert piece["image"].shape == (8 // processes, 4, 3, 2)
      assert piece["image"].dtype == np.uint8
      assert piece["label"].shape == piece["mask"].shape == (8 // processes,)
      assert piece["label"].dtype == np.int32
      assert piece["mask"].dtype == np.float32
      filling = piece["mask"] == 0
      assert not piece["image"][filling].any()
      assert not piece["label"][filling].any()
      labels = piece["label"][~filling]
      assert (piece["image"][~filling] == labels[:, None, None, None]).all()
      seen.extend(labels)
  assert seen == list(range(count))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"batch_size": 10, "process_count": 4}, "batch_size=10 .* multiple of 4"),
    ({"batch_size": 0, "process_count": 1}, "batch_size=0 .*"),
    ({"process_index": 2, "process_count": 2}, "process_index=2 .*0..1"),
    ({"process_index": -1, "process_count": 2}, "process_index=-1 .*"),
    ({"split": _split(0)}, "split is empty"),
  ],
)
def test_bad_arguments_are_named_at_the_call(arguments, message):
  settings = {"split": _split(9), "batch_size": 8, "process_index": 0}
  settings.update(arguments)
  with pytest.raises(ValueError, match=message):
    pipeline.eval_batches(**settings)
  with pytest.raises(ValueError, match=message):
    pipeline.TrainBatches(**settings, seed=0)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_bad_seed_is_named(seed):
  with pytest.raises(ValueError, match=f"seed={seed} "):
    pipeline.TrainBatches(_split(9), batch_size=3, seed=seed)


def test_batches_can_be_closed():
  train = pipeline.TrainBatches(_split(9), batch_size=3, seed=0).iterate(0, 9)
  for stream in (train, pipeline.eval_batches(_split(9), batch_size=3)):
    next(stream)
    stream.close()
    assert next(stream, None) is None


def test_bad_steps_are_named():
  batches = pipeline.TrainBatches(_split(9), batch_size=3, seed=0)
  with pytest.raises(ValueError, match="step=-1 "):
    batches.batch(-1)
  with pytest.raises(ValueError, match="step=-1 "):
    batches.iterate(-1, 3)
  with pytest.raises(ValueError, match="stop=2 lies before start=3"):
    batches.iterate(3, 2)
