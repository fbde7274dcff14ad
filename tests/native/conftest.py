"""A GPU that is none, for each test that asks for one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.native.standin.gpu import Gpu, library


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the stand-in of this test's own, which ftrain takes for the driver."""
    path = tmp_path / "libcuda.so.1"
    shutil.copy(library(), path)
    monkeypatch.setenv("FTRAIN_LIBCUDA", str(path))
    return path


@pytest.fixture
def gpu(driver: Path) -> Iterator[Gpu]:
    """A GPU that, at the end, must have been left as it was found."""
    one = Gpu(driver)
    one.start()
    yield one
    one.finish()
