"""Windows of running text: every target once, in order, for any sharding."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dpc_jax.data import token_batches

EOS = 7


def _tokens(count: int) -> np.ndarray:
  """Tokens that tell their place: 1000, 1001, ..."""
  return np.arange(1000, 1000 + count, dtype=np.int32)


def _joined(streams: list[list[dict]]) -> list[dict]:
  """The global batches of several processes."""
  return [
    {k: np.concatenate([p[k] for p in pieces]) for k in pieces[0]}
    for pieces in zip(*streams, strict=True)
  ]


def _assert_equal(left: dict, right: dict) -> None:
  assert left.keys() == right.keys()
  for name in left:
    np.testing.assert_array_equal(left[name], right[name])
    assert left[name].dtype == right[name].dtype


def _check_pass(batches: list[dict], count: int, rows: int, unroll: int):
  """Checks one pass over `_tokens(count)` against the definition."""
  tokens = _tokens(count)
  row_length = -(-count // rows)
  assert len(batches) == -(-row_length // unroll)
  for window, batch in enumerate(batches):
    assert (batch["reset"] == (window == 0)).all()
    assert batch["mask"].shape == batch["tokens"].shape
    assert batch["mask"].shape == batch["targets"].shape
    assert batch["mask"].shape[1] == unroll
    assert set(np.unique(batch["mask"])) <= {0, 1}
  whole = {
    name: np.concatenate([b[name] for b in batches], axis=1)
    for name in ("tokens", "targets", "mask")
  }
  seen = whole["mask"] == 1
  # Row after row, window after window: the split itself, and so each target
  # exactly once; its input is the token before it.
  np.testing.assert_array_equal(whole["targets"][seen], tokens)
  np.testing.assert_array_equal(
    whole["tokens"][seen], np.concatenate([[EOS], tokens[:-1]])
  )
  # Filling goes on in the text, round its end: every word in its place.
  places = np.arange(len(seen))[:, None] * row_length + np.arange(seen.shape[1])
  places %= count
  np.testing.assert_array_equal(whole["targets"], tokens[places])
  before = np.concatenate([[EOS], tokens[:-1]])
  np.testing.assert_array_equal(whole["tokens"], before[places])
  # A row has no holes: nothing but its end is filling.
  lengths = seen.sum(1)
  assert (seen == (np.arange(seen.shape[1]) < lengths[:, None])).all()
  full = count // row_length
  assert (lengths[:full] == row_length).all()
  assert (lengths[full + 1 :] == 0).all()


sizes = st.tuples(
  st.integers(1, 60), st.integers(1, 60), st.integers(1, 12)
).filter(lambda s: s[1] <= s[0])
processes = st.sampled_from((1, 2, 3, 4))


@hypothesis.settings(deadline=None)
@hypothesis.given(sizes, processes, st.integers(0, 3))
def test_an_epoch_of_training_shows_every_target_once(size, count, epoch):
  length, rows, unroll = size
  rows = min(rows * count, length // count * count)
  hypothesis.assume(rows > 0)
  parts = [
    token_batches.TrainBatches(
      _tokens(length),
      batch_size=rows,
      unroll=unroll,
      eos=EOS,
      process_index=p,
      process_count=count,
    )
    for p in range(count)
  ]
  steps = parts[0].windows
  batches = _joined(
    [list(part.iterate(epoch * steps, (epoch + 1) * steps)) for part in parts]
  )
  assert all(len(batch["reset"]) == rows for batch in batches)
  _check_pass(batches, length, rows, unroll)


@hypothesis.settings(deadline=None)
@hypothesis.given(sizes, processes, st.sampled_from((1, 2, 3, 8)))
def test_evaluation_shows_every_target_once(size, count, multiple):
  length, rows, unroll = size
  tokens = _tokens(length)
  streams = [
    list(
      token_batches.eval_batches(
        tokens,
        rows=rows,
        unroll=unroll,
        eos=EOS,
        multiple=multiple,
        process_index=p,
        process_count=count,
      )
    )
    for p in range(count)
  ]
  assert len({b["mask"].shape for stream in streams for b in stream}) == 1
  batches = _joined(streams)
  total = len(batches[0]["reset"])
  block = np.lcm(multiple, count)
  assert total % block == 0
  assert rows <= total < rows + block
  assert not any(batch["mask"][rows:].any() for batch in batches)
  _check_pass(batches, length, rows, unroll)
  # The rows of text are those of one process and one device.
  alone = token_batches.eval_batches(tokens, rows=rows, unroll=unroll, eos=EOS)
  for batch, plain in zip(batches, alone, strict=True):
    _assert_equal({k: v[:rows] for k, v in batch.items()}, plain)


def test_a_small_case_written_out():
  # 7 tokens in 2 rows of 4, windows of 3.
  batches = token_batches.TrainBatches(
    _tokens(7), batch_size=2, unroll=3, eos=EOS
  )
  assert batches.windows == 2
  first, second = batches.iterate(0, 2)
  assert first["tokens"].tolist() == [[7, 1000, 1001], [1003, 1004, 1005]]
  assert first["targets"].tolist() == [[1000, 1001, 1002], [1004, 1005, 1006]]
  assert first["mask"].tolist() == [[1, 1, 1], [1, 1, 1]]
  assert first["reset"].tolist() == [True, True]
  assert second["tokens"].tolist() == [[1002, 1003, 1004], [7, 1000, 1001]]
  assert second["targets"].tolist() == [[1003, 1004, 1005], [1000, 1001, 1002]]
  assert second["mask"].tolist() == [[1, 0, 0], [0, 0, 0]]
  assert second["reset"].tolist() == [False, False]
  _assert_equal(batches.batch(2), first)
  assert {k: v.dtype for k, v in first.items()} == {
    "tokens": np.int32,
    "targets": np.int32,
    "mask": np.float32,
    "reset": np.bool_,
  }


def test_batch_depends_on_the_step_alone():
  batches = token_batches.TrainBatches(
    _tokens(50), batch_size=4, unroll=5, eos=EOS
  )
  in_order = list(batches.iterate(0, 9))
  resumed = token_batches.TrainBatches(
    _tokens(50), batch_size=4, unroll=5, eos=EOS
  )
  for step in (8, 3, 3, 0):
    _assert_equal(resumed.batch(step), in_order[step])
  _assert_equal(resumed.batch(np.int32(7)), in_order[7])
  _assert_equal(next(resumed.iterate(5, 9)), in_order[5])
  far = 3 * 2**40 + 1
  _assert_equal(resumed.batch(far), in_order[far % 3])


def test_a_carried_state_is_that_of_the_row_before():
  batches = token_batches.TrainBatches(
    _tokens(48), batch_size=4, unroll=3, eos=EOS
  )
  for before, after in zip(
    batches.iterate(0, 3), batches.iterate(1, 4), strict=True
  ):
    assert not after["reset"].any()
    np.testing.assert_array_equal(
      before["targets"][:, -1], after["tokens"][:, 0]
    )


GOOD = {"tokens": _tokens(9), "rows": 3, "unroll": 2, "eos": 0}


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"rows": 10}, "=10 .* 9 tokens; use 1..9"),
    ({"rows": 0}, "=0 .*1..9"),
    ({"unroll": 0}, "unroll=0 .*at least 1"),
    ({"eos": -1}, "eos=-1 .*TextData.eos"),
    ({"tokens": _tokens(0)}, "no tokens"),
    ({"tokens": _tokens(9).astype(np.int64)}, "int64 .*int32"),
    ({"tokens": _tokens(9).reshape(3, 3)}, r"\(3, 3\)"),
    ({"process_index": 1, "process_count": 1}, "process_index=1 .*0..0"),
  ],
)
def test_bad_arguments_are_named_at_the_call(arguments, message):
  settings = GOOD | arguments
  with pytest.raises(ValueError, match=message):
    token_batches.eval_batches(**settings)
  settings["batch_size"] = settings.pop("rows")
  with pytest.raises(ValueError, match=message):
    token_batches.TrainBatches(**settings)


def test_rows_that_do_not_divide_are_named():
  with pytest.raises(ValueError, match=r"batch_size=3 .*multiple of 2"):
    token_batches.TrainBatches(
      _tokens(9),
      batch_size=3,
      unroll=2,
      eos=0,
      process_index=0,
      process_count=2,
    )
  with pytest.raises(ValueError, match="multiple=0 "):
    token_batches.eval_batches(**GOOD, multiple=0)


def test_bad_steps_are_named_at_the_call():
  batches = token_batches.TrainBatches(
    _tokens(9), batch_size=3, unroll=2, eos=0
  )
  with pytest.raises(ValueError, match="step=-1 "):
    batches.batch(-1)
  with pytest.raises(ValueError, match="step=-1 "):
    batches.iterate(-1, 3)
  with pytest.raises(ValueError, match="stop=2 lies before start=3"):
    batches.iterate(3, 2)


def test_batches_can_be_closed():
  train = token_batches.TrainBatches(
    _tokens(9), batch_size=3, unroll=1, eos=0
  ).iterate(0, 9)
  for stream in (train, token_batches.eval_batches(**GOOD)):
    next(stream)
    stream.close()
    assert next(stream, None) is None
