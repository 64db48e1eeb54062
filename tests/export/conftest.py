"""The tiny model is one of the table."""

import pytest

from dpc_jax import models
from tests.training import tiny


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
  monkeypatch.setitem(models._CONSTRUCTORS, "tiny", tiny.Tiny)
