"""The tiny model in the table; no TensorFlow but where a test asks for it."""

import pytest

from dpc_jax import models
from dpc_jax.training import metrics
from tests.training import tiny


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
  monkeypatch.setitem(models._CONSTRUCTORS, "tiny", tiny.Tiny)


@pytest.fixture(autouse=True)
def no_events(request, monkeypatch):
  if not getattr(request.module, "WRITES_EVENTS", False):
    monkeypatch.setattr(metrics, "_event_writer", lambda workdir: None)
