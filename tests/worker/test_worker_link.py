"""The worker's end of its channel: what it waits for from its agent."""

from __future__ import annotations

import socket
import threading
import time

import msgspec
import pytest
from torch.distributed import HashStore

from ftrain._native import ControlPage, memory_file
from ftrain.checkpoint.state.tracked import Tracked
from ftrain.core import local
from ftrain.core.messages import Line, Tier
from ftrain.core.page import Field
from ftrain.errors import Unavailable
from ftrain.worker import after_failure, link
from ftrain.worker.boundary import Boundary
from ftrain.worker.link import Link
from ftrain.worker.recovery import LAYOUTS, Coming, Recovery
from tests.launching.harness import wait_for

LINE = Line(4, Tier.LIVE)


def linked(*, fetched: bool) -> tuple[Link, socket.socket]:
    """A worker's link, and its agent's end of the channel."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    page, arena, box = ControlPage.create("test-page"), memory_file("test-arena"), memory_file("test-box")
    fds = (page, arena, theirs.detach(), box)
    return Link(local.Boot("run", "", "", 1, 0, 0, 2, *fds, 0, checkpoints=True, resume=None, fetched=fetched)), ours


def quiet_until(worker: Link) -> int:
    """Until when (CLOCK_MONOTONIC, ns) the worker is not taken for hung."""
    return worker.page.load(Field.QUIET_UNTIL_NS)


def test_worker_whose_state_comes_from_another_node_waits_for_it_and_is_not_taken_for_hung(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link, "QUIET_SECONDS", 0.2)
    worker, agent = linked(fetched=True)
    waiting = threading.Thread(target=worker.wait_fetched)
    with agent:
        waiting.start()
        asked: set[int] = set()
        wait_for(
            lambda: len(asked.add(quiet_until(worker)) or asked) > 3, "a worker that asks for quiet again and again"
        )
        assert quiet_until(worker) - time.monotonic_ns() <= 0.2e9  # one that is stopped there is to be seen
        assert waiting.is_alive()
        agent.send(msgspec.json.encode(local.Fetched()))
        waiting.join()
    assert quiet_until(worker) == 0


def test_newcomer_comes_to_the_line_once_its_state_was_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(after_failure, "lay_out_buckets", lambda *_: None)  # that takes a group
    worker, agent = linked(fetched=True)
    tracked, store = Tracked(), HashStore()
    store.set(LAYOUTS, "[]")
    recovery = Recovery(worker, tracked, Boundary(tracked, []), lambda _: 0, lambda _: None)
    coming: list[Coming] = []
    waiting = threading.Thread(target=lambda: coming.append(recovery.newcomer(LINE, store)))
    with agent:
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        agent.send(msgspec.json.encode(local.Fetched()))
        waiting.join()
    assert [one.line for one in coming] == [LINE]


def test_worker_whose_state_was_there_from_the_beginning_waits_for_nothing() -> None:
    worker, agent = linked(fetched=False)
    with agent:
        worker.wait_fetched()


def test_worker_whose_agent_is_gone_does_not_wait_for_ever() -> None:
    worker, agent = linked(fetched=True)
    agent.close()
    with pytest.raises(Unavailable, match="agent is gone"):
        worker.wait_fetched()


def test_what_was_fetched_for_a_worker_is_no_order_to_go_on() -> None:
    worker, agent = linked(fetched=True)
    with agent:
        agent.send(msgspec.json.encode(local.Fetched()))
        agent.send(msgspec.json.encode(local.Recover(2, "127.0.0.1", 1, LINE, None)))
        assert worker.wait_recover().generation == worker.generation == 2
