"""Workers' output: into one file a stream and rank, and on the terminal with the rank in front of each line."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TextIO

from ftrain.spec import Output

log = logging.getLogger("ftrain")
CHUNK_BYTES = 1 << 16
LINE_BYTES_MAX = 1 << 16
TAIL_LINES = 20


@dataclass(slots=True)
class Stream:
    """One pipe from one worker. `closed` is set when its last writer has closed it."""

    fd: int
    file: BinaryIO
    prefix: str
    terminal: TextIO | None
    tail: deque[str]
    rest: bytes = b""
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    def readable(self) -> None:
        try:
            data = os.read(self.fd, CHUNK_BYTES)
        except BlockingIOError:
            return
        if not data:
            self.close()
            return
        with contextlib.suppress(OSError):  # as in `_open`
            self.file.write(data)
        *lines, self.rest = (self.rest + data).split(b"\n")
        if len(self.rest) > LINE_BYTES_MAX:
            lines, self.rest = [*lines, self.rest], b""
        for line in lines:
            self._show(line)

    def close(self) -> None:
        if self.closed.is_set():
            return
        asyncio.get_running_loop().remove_reader(self.fd)
        os.close(self.fd)
        if self.rest:
            self._show(self.rest)
        with contextlib.suppress(OSError):
            self.file.close()
        self.closed.set()

    def _show(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip("\r")
        self.tail.append(text)
        if self.terminal is not None:
            with contextlib.suppress(OSError, ValueError):  # the reader of our output may have gone
                print(f"{self.prefix}{text}", file=self.terminal, flush=True)


def _open(path: Path) -> BinaryIO:
    """The file, or nothing in its place: a full disk must not stop the training; the terminal still has the lines."""
    try:
        return path.open("ab", buffering=0)
    except OSError as error:
        log.warning("%s cannot be written: %s; this output is on the terminal only", path, error.strerror)
        return open(os.devnull, "ab", buffering=0)


class RankLogs:
    """Both streams of one worker. The write ends are the worker's; close them here once it is forked."""

    def __init__(self, policy: Output, generation: int, rank: int, local_rank: int) -> None:
        directory = policy.directory / f"generation-{generation:04d}" / f"rank-{rank}"
        with contextlib.suppress(OSError):  # opening the files tells
            directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        shown = policy.shown is None or local_rank in policy.shown
        quiet = {"stdout": policy.quiet_stdout, "stderr": policy.quiet_stderr}
        self.streams: list[Stream] = []
        self.write_fds: list[int] = []
        for name, terminal in (("stdout", sys.stdout), ("stderr", sys.stderr)):
            read, write = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(read, False)
            where = terminal if shown and local_rank not in quiet[name] else None
            stream = Stream(read, _open(directory / f"{name}.log"), f"[rank{rank}]: ", where, self.tail)
            asyncio.get_running_loop().add_reader(read, stream.readable)
            self.streams.append(stream)
            self.write_fds.append(write)

    async def drained(self, seconds: float) -> None:
        """Wait until all that was written is read, at most `seconds`: a stray child may keep the pipe open."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                for stream in self.streams:
                    await stream.closed.wait()
        for stream in self.streams:
            stream.close()
