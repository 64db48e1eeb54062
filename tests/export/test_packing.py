"""Streams of bits give back every code, and are what the docstring says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpc_jax.export import packing


@st.composite
def codes_of_width(draw):
  width = draw(st.integers(2, 16))
  codes = draw(st.lists(st.integers(0, 2**width - 1), max_size=40))
  return width, codes


def by_hand(codes, width):
  """The stream as one integer: code i begins at bit i * width."""
  whole = sum(code << (i * width) for i, code in enumerate(codes))
  return whole.to_bytes(packing.packed_size(len(codes), width), "little")


@given(codes_of_width())
@settings(deadline=None)
def test_a_stream_gives_back_its_codes(case):
  width, codes = case
  data = packing.pack(np.array(codes, np.uint16), width)
  assert data == by_hand(codes, width)
  found = packing.unpack(data, width, len(codes))
  assert found.dtype == np.uint16
  assert found.tolist() == codes


def test_a_stream_is_read_alike_in_jax(monkeypatch):
  # Several chunks, the last one not whole.
  monkeypatch.setattr(packing, "_CHUNK", 16)
  for width in (3, 11, 16):
    codes = np.random.default_rng(width).integers(0, 2**width, (5, 7))
    codes.flat[:2] = 0, 2**width - 1
    data = packing.pack(codes, width)
    assert data == by_hand(codes.ravel().tolist(), width)
    stream = jnp.asarray(packing.padded(data, width))
    unpack = functools.partial(packing.unpack_groups, jnp, width=width)
    found = jax.jit(unpack)(stream)
    assert found[: codes.size].tolist() == codes.ravel().tolist()


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: packing.pack(np.array([8]), 3), "8..8 do not fit 3 bits"),
    (lambda: packing.pack(np.array([-1]), 3), "-1..-1 do not fit 3 bits"),
    (lambda: packing.pack(np.array([0]), 1), "width = 1: use 2..16"),
    (lambda: packing.unpack(b"12", 8, 3), "2 bytes, but 3 codes of 8"),
    (lambda: packing.unpack(b"12", 32, 1), "width = 32: use 2..16"),
  ],
)
def test_what_does_not_fit_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
