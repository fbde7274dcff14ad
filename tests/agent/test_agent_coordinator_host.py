"""The coordinator's shell when it begins and when it is told to end, while storage still answers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ftrain.agent.coordinator_host import CoordinatorHost
from ftrain.control.secret import Secret
from ftrain.control.service import LOOPBACK
from ftrain.core import run_state
from ftrain.core.membership import FormationPolicy
from ftrain.core.run_state import RunPolicy
from ftrain.storage import open_storage


async def test_answer_that_comes_after_the_end_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy = RunPolicy("run", "1", FormationPolicy(1, 1))
    host = CoordinatorHost(policy, open_storage(str(tmp_path)), Secret.create(), LOOPBACK, 0, None)
    await host.start()
    running = asyncio.create_task(host.run())
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait({running})
    host._post(run_state.Tick())
    assert [record.getMessage() for record in caplog.records] == []


async def test_status_before_the_journal_is_read_has_all_that_it_has_later(tmp_path: Path) -> None:
    policy = RunPolicy("run", "1", FormationPolicy(1, 1))
    host = CoordinatorHost(policy, open_storage(str(tmp_path)), Secret.create(), LOOPBACK, 0, None)
    early = host.status()
    await host.start()
    later = host.status()
    await host.close()
    assert early["phase"] == "reading the journal" and early["generation"] == 0
    assert early.keys() == later.keys()
