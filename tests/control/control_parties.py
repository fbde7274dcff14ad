"""An owner that writes down what happens, an agent that does, and the log: parties of the control plane's tests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from ftrain.control.client import Client
from ftrain.control.secret import Secret
from ftrain.control.service import Peer
from ftrain.core import messages as m
from ftrain.errors import FtrainError

PATIENCE_SECONDS = 120.0


def hello(node: str = "a", **changes: Any) -> m.Hello:
    fields: dict[str, Any] = {
        "node": node,
        "node_rank": -1,
        "processes": 2,
        "address": "127.0.0.1",
        "host": "here",
        "pid": 7,
        "run_id": "r",
        "job_sha256": "0",
        "version": "0",
        "term_seen": 0,
    }
    return m.Hello(**(fields | changes))


class Recorder:
    """An owner that puts all that it is told into a queue: ("open" | "message" | "close", peer, what)."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[tuple[str, Peer, Any]] = asyncio.Queue()

    def on_open(self, peer: Peer) -> None:
        self.events.put_nowait(("open", peer, peer.hello))

    def on_message(self, peer: Peer, message: m.FromAgent) -> None:
        self.events.put_nowait(("message", peer, message))

    def on_close(self, peer: Peer, reason: str) -> None:
        self.events.put_nowait(("close", peer, reason))

    def status(self) -> dict[str, Any]:
        return {"run_id": "r", "generation": 3}

    def metrics(self) -> str:
        return "ftrain_generation 3\n"

    async def next(self, kind: str, node: str | None = None) -> tuple[Peer, Any]:
        """The next event of that kind (and node), passing over others."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                found, peer, what = await self.events.get()
                if found == kind and node in (None, peer.hello.node):
                    return peer, what


class Agent:
    """A client that runs, with what it heard."""

    def __init__(self, port: int, secret: Secret, node: str = "a") -> None:
        self.hellos = 0
        self.node = node
        self.heard: asyncio.Queue[m.FromCoordinator] = asyncio.Queue()
        self.states: asyncio.Queue[FtrainError | None] = asyncio.Queue()
        self.client = Client(f"127.0.0.1:{port}", secret)
        self.task = asyncio.create_task(
            self.client.run(self._hello, self.heard.put_nowait, self.states.put_nowait), name=f"agent {node}"
        )

    def _hello(self) -> m.Hello:
        self.hellos += 1
        return hello(self.node, term_seen=self.hellos)

    async def next_state(self) -> FtrainError | None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self.states.get()

    async def next_heard(self) -> m.FromCoordinator:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self.heard.get()

    async def stop(self) -> None:
        self.client.stop()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await self.task


class Log(logging.Handler):
    """Every line that the control plane, aiohttp and asyncio log at warning level or above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self.tracebacks = 0
        self._arrived = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self.tracebacks += record.exc_info is not None
        self._arrived.set()

    async def wait_for(self, condition: Callable[[list[str]], bool]) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not condition(self.lines):
                self._arrived.clear()
                await self._arrived.wait()
