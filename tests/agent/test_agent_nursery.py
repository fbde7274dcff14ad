"""What the nursery imports before its first fork, and what it leaves out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ftrain.agent.forks import Nursery
from ftrain.agent.nursery import Ready

STARTS_A_THREAD = "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()"


async def ready(directory: Path, modules: tuple[str, ...], **environment: str) -> Ready:
    def died(cause: str) -> None:
        raise AssertionError(cause)

    nursery = Nursery(lambda *_: None, died)
    nursery.start(modules, {**os.environ, **environment}, str(directory))
    try:
        return await nursery.ready()
    finally:
        await nursery.close()


async def test_numpy_whose_threads_end_before_a_fork_is_imported(tmp_path: Path) -> None:
    found = await ready(tmp_path, ("numpy",), OMP_NUM_THREADS="4", OPENBLAS_NUM_THREADS="4")
    assert found.left_out == {}


@pytest.mark.parametrize("others", [("numpy",), ()])
async def test_module_that_starts_a_thread_of_its_own_is_left_out_alone_and_named(
    tmp_path: Path, others: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ftrain")
    (tmp_path / "threaded.py").write_text(STARTS_A_THREAD)
    found = await ready(tmp_path, (*others, "threaded", "json"), PYTHONPATH=str(tmp_path), OPENBLAS_NUM_THREADS="4")
    assert found.left_out == {"threaded": "its import starts threads"}
    assert "threaded is not imported in advance, but by each worker (its import starts threads)" in caplog.text


async def test_module_that_fails_to_import_is_left_out_with_its_error(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise ValueError('not here')")
    found = await ready(tmp_path, ("broken", "json"), PYTHONPATH=str(tmp_path))
    assert found.left_out == {"broken": "ValueError: not here"}
