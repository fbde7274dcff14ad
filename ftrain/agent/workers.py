"""One worker as its agent holds it: process, control page, arena, channel and output."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ftrain import _native
from ftrain.agent import pages
from ftrain.agent.logs import RankLogs
from ftrain.checkpoint.staging.arena import Arena
from ftrain.checkpoint.staging.black_box import BlackBox
from ftrain.core import local
from ftrain.core.messages import ErrorReport, RankExit
from ftrain.core.page import NO_STEP, Field
from ftrain.spec import Output

_FROM_WORKER = msgspec.json.Decoder(local.FromWorker)
CHANNEL_BUFFER_BYTES = 1 << 20


class RankMemory:
    """One local rank's arena and black box. They outlive the worker, and serve the next one too."""

    def __init__(self, local_rank: int) -> None:
        self.arena_fd = _native.memory_file(f"ftrain-arena-{local_rank}")
        self.box_fd = _native.memory_file(f"ftrain-box-{local_rank}")
        self.arena = Arena(self.arena_fd)
        self.box = BlackBox(self.box_fd)

    def close(self) -> None:
        self.arena.close()
        os.close(self.arena_fd)
        os.close(self.box_fd)


@dataclass(slots=True)
class WorkerProcess:
    rank: int
    local_rank: int
    page: _native.ControlPage
    page_fd: int
    memory: RankMemory
    channel: socket.socket
    worker_channel: socket.socket
    logs: RankLogs
    error_file: Path
    pid: int = 0
    last: tuple[int, int] = (-1, 0)  # where it was when it ended
    given_up: str = ""  # why it cannot go on: what it goes on from cannot be had

    @classmethod
    def prepare(cls, policy: Output, generation: int, rank: int, local_rank: int, memory: RankMemory) -> WorkerProcess:
        """Everything that the worker will be given, before it is forked."""
        page_fd = _native.ControlPage.create(f"ftrain-page-{rank}")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHANNEL_BUFFER_BYTES)
        ours.setblocking(False)
        logs = RankLogs(policy, generation, rank, local_rank)
        page = _native.ControlPage(page_fd)
        page.store(Field.STEP, NO_STEP)
        error_file = logs.directory / "error.json"
        return cls(rank, local_rank, page, page_fd, memory, ours, theirs, logs, error_file)

    @property
    def fds(self) -> tuple[int, ...]:
        """In the order of `FD_NAMES`."""
        memory = self.memory
        return (*self.logs.write_fds, self.page_fd, memory.arena_fd, self.worker_channel.fileno(), memory.box_fd)

    def forked(self, pid: int, said: Callable[[int, local.FromWorker], None]) -> None:
        """The worker holds its ends now: close them here, so that their end can be seen."""
        self.pid = pid
        self.close_worker_ends()
        asyncio.get_running_loop().add_reader(self.channel, self._readable, said)

    def close_worker_ends(self) -> None:
        for fd in self.logs.write_fds:
            os.close(fd)
        self.logs.write_fds.clear()
        self.worker_channel.close()

    def where(self) -> tuple[int, int]:
        return pages.where(self.page)

    def ended(self, code: int, signum: int, said: Callable[[int, local.FromWorker], None]) -> RankExit:
        """Take in all that the worker still said, and write down how it ended."""
        while self._readable(said):
            pass
        self.last = self.where()
        error = None if code == 0 and not signum else self._error_from_file()
        if self.given_up:
            code, signum = 1, 0
            error = ErrorReport("ftrain.errors.PeerLost", self.given_up, "", unix_seconds=time.time())
        return RankExit(
            self.rank,
            self.local_rank,
            self.pid,
            code,
            signum,
            max(self.last[0], -1),
            self.last[1],
            error,
            time.time(),
            kept=self.memory.box.steps(),
        )

    def tell(self, message: local.ToWorker) -> None:
        """Tell a worker what it waits for. One that is dead will be seen to be."""
        if self.channel.fileno() >= 0:
            with contextlib.suppress(ConnectionError):
                self.channel.send(msgspec.json.encode(message))

    def close(self) -> None:
        if self.channel.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self.channel)
            self.channel.close()
        self.page.close()
        if self.page_fd >= 0:
            os.close(self.page_fd)
            self.page_fd = -1

    def _readable(self, said: Callable[[int, local.FromWorker], None]) -> bool:
        """Read one packet. False when there is none left."""
        if self.channel.fileno() < 0:
            return False
        try:
            packet = self.channel.recv(local.PACKET_BYTES_MAX)
        except (BlockingIOError, ConnectionResetError):
            return False
        if not packet:
            asyncio.get_running_loop().remove_reader(self.channel)
            return False
        with contextlib.suppress(msgspec.MsgspecError):  # the script holds this descriptor too: nonsense is not obeyed
            said(self.rank, _FROM_WORKER.decode(packet))
        return True

    def _error_from_file(self) -> ErrorReport | None:
        """What torch's own `@record` wrote for a program that we did not run ourselves."""
        try:
            found = msgspec.json.decode(self.error_file.read_bytes())
            message = found["message"]
            if isinstance(message, str):
                return ErrorReport("Error", message, message)
            extra = message["extraInfo"]
            return ErrorReport("Error", message["message"], extra["py_callstack"], "", float(extra["timestamp"]))
        except (OSError, msgspec.MsgspecError, KeyError, TypeError, ValueError):
            return None


FD_NAMES = ("stdout", "stderr", "page", "arena", "channel", "box")
