from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def log_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a command has set up in this process before."""
    monkeypatch.setattr(logging.getLogger("ftrain"), "propagate", True)
