"""What the nursery imports before its first fork, and what it leaves out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STARTS_A_THREAD = "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()"

# In a process of its own: an agent that closes its nursery ends whatever is below itself.
AGENT = """
import asyncio, json, logging, os, sys
from ftrain.agent.forks import Nursery

async def main():
    def died(cause):
        raise AssertionError(cause)

    nursery = Nursery(lambda *_: None, died)
    nursery.start(sys.argv[1:], os.environ, os.getcwd())
    try:
        print(json.dumps((await nursery.ready()).left_out))
    finally:
        await nursery.close()

logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
asyncio.run(main())
"""


def left_out(directory: Path, modules: tuple[str, ...], **environment: str) -> tuple[dict[str, str], str]:
    """What was left out and why, and what the log says."""
    done = subprocess.run(
        [sys.executable, "-c", AGENT, *modules],
        env={**os.environ, **environment},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_numpy_whose_threads_end_before_a_fork_is_imported(tmp_path: Path) -> None:
    assert left_out(tmp_path, ("numpy",), OMP_NUM_THREADS="4", OPENBLAS_NUM_THREADS="4") == ({}, "")


@pytest.mark.parametrize("others", [("numpy",), ()])
def test_module_that_starts_a_thread_of_its_own_is_left_out_alone_and_named(
    tmp_path: Path, others: tuple[str, ...]
) -> None:
    (tmp_path / "threaded.py").write_text(STARTS_A_THREAD)
    found, log = left_out(tmp_path, (*others, "threaded", "json"), OPENBLAS_NUM_THREADS="4")
    assert found == {"threaded": "its import starts threads"}
    assert log == "threaded is not imported in advance, but by each worker (its import starts threads)\n"


def test_module_that_fails_to_import_is_left_out_with_its_error(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise ValueError('not here')")
    found, _ = left_out(tmp_path, ("broken", "json"))
    assert found == {"broken": "ValueError: not here"}
