"""A link between two nodes that can be cut, one way too, or broken: connections to it are passed on, byte by byte.

What is cut loses nothing: as on a real link that comes back, the senders' kernels send again what was not received.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import TypeVar

CHUNK_BYTES = 1 << 16
HOST = "127.0.0.1"
T = TypeVar("T")


@dataclass
class Link:
    """Listens at `port` and passes on to `target`; in a thread of its own, until `close`."""

    target: int
    port: int = 0
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _there: asyncio.Event = field(default_factory=asyncio.Event)  # set: what goes to the target passes
    _back: asyncio.Event = field(default_factory=asyncio.Event)
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._loop.run_forever, name="chaos-link")
        self._thread.start()
        self.port = self._do(self._open())

    def cut(self, there: bool = True, back: bool = True) -> None:
        """Let nothing through, both ways or one."""
        self._do(self._set(not there, not back))

    def heal(self) -> None:
        self._do(self._set(True, True))

    def break_all(self) -> None:
        """Reset all connections; new ones are taken."""
        self._do(self._abort())

    def close(self) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, coroutine: Coroutine[None, None, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _open(self) -> int:
        self._there.set()
        self._back.set()
        self._server = await asyncio.start_server(self._connected, HOST, 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _set(self, there: bool, back: bool) -> None:
        for event, passes in ((self._there, there), (self._back, back)):
            if passes:
                event.set()
            else:
                event.clear()

    async def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _end(self) -> None:
        self._server.close()
        await self._abort()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mine = {writer}
        self._writers.add(writer)
        try:
            with contextlib.suppress(OSError):
                await self._there.wait()
                away, onward = await asyncio.open_connection(HOST, self.target)
                mine.add(onward)
                self._writers.add(onward)
                passing = (self._pass(reader, onward, self._there), self._pass(away, writer, self._back))
                await asyncio.wait([asyncio.ensure_future(one) for one in passing], return_when="FIRST_COMPLETED")
        finally:
            self._writers -= mine
            for one in mine:
                one.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                await gate.wait()
                writer.write(data)
                await writer.drain()
