"""A disk whose writes and flushes are all written down, in the order in which it was given them.

A loop device over a file of our own: what a file system writes to the device comes here as a write, a flush (or a write
that is to be durable by itself, which the kernel turns into a write and a flush) as a sync. Marks that a process writes
to a file beside it lie in the same order.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from ftrain._native import set_parent_death_signal
from tests.power.fuse import serve

_HEAD = struct.Struct("<BQI")
READY_SECONDS = 30


class Kind(IntEnum):
    WRITE = 0
    FLUSH = 1
    MARK = 2


@dataclass(frozen=True, slots=True)
class Entry:
    """One of the log. `data` of a write is what was written at `offset`, of a mark what was said."""

    kind: Kind
    offset: int
    data: memoryview


def read_log(path: Path) -> list[Entry]:
    log = memoryview(path.read_bytes())
    entries, at = [], 0
    while at < len(log):
        kind, offset, nbytes = _HEAD.unpack_from(log, at)
        at += _HEAD.size
        entries.append(Entry(Kind(kind), offset, log[at : at + nbytes]))
        at += nbytes
    return entries


class _Log:
    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def add(self, kind: Kind, offset: int, data: bytes | memoryview = b"") -> None:
        self._file.write(b"".join((_HEAD.pack(kind, offset, len(data)), data)))


class _Disk:
    name = "disk"

    def __init__(self, image: Path, log: _Log) -> None:
        self._descriptor = os.open(image, os.O_RDWR | os.O_CLOEXEC)
        self.nbytes = os.fstat(self._descriptor).st_size
        self._log = log

    def read(self, offset: int, nbytes: int) -> bytes:
        return os.pread(self._descriptor, nbytes, offset)

    def write(self, offset: int, data: memoryview) -> None:
        os.pwrite(self._descriptor, data, offset)
        self._log.add(Kind.WRITE, offset, data)

    def sync(self) -> None:
        self._log.add(Kind.FLUSH, 0)


class _Marks:
    name = "marks"
    nbytes = 0

    def __init__(self, log: _Log) -> None:
        self._log = log

    def read(self, offset: int, nbytes: int) -> bytes:
        raise OSError(errno.EINVAL, f"{nbytes} bytes at {offset}: marks cannot be read")

    def write(self, offset: int, data: memoryview) -> None:
        self._log.add(Kind.MARK, offset, data)

    def sync(self) -> None:
        """They are nobody's data."""


@dataclass(frozen=True, slots=True)
class Recorder:
    disk: Path  # for a loop device
    marks: Path  # what is written here stands in the log


@contextlib.contextmanager
def recording(image: Path, log: Path, mountpoint: Path) -> Iterator[Recorder]:
    """Serves the file `image` and appends to `log`. In a process of its own: the kernel waits for its answers."""
    mountpoint.mkdir()
    ready, says = os.pipe()
    command = [sys.executable, "-m", "tests.power.recorder", str(image), str(log), str(mountpoint), str(says)]
    process = subprocess.Popen(command, pass_fds=(says,), cwd=Path(__file__).parents[2])
    os.close(says)
    try:
        with os.fdopen(ready, "rb") as file:
            if file.read(1) != b"1":
                raise OSError(f"the recorder ended with {process.wait(READY_SECONDS)}")
        yield Recorder(mountpoint / _Disk.name, mountpoint / _Marks.name)
    finally:
        subprocess.run(["umount", str(mountpoint)], check=False, stderr=subprocess.DEVNULL)
        try:
            process.wait(READY_SECONDS)
        except subprocess.TimeoutExpired:  # something still uses it; without its process the mount is of no use
            process.kill()
            process.wait()
            subprocess.run(["umount", "--lazy", str(mountpoint)], check=False, stderr=subprocess.DEVNULL)


def main() -> None:
    image, log_path, mountpoint, ready = sys.argv[1:]
    set_parent_death_signal(signal.SIGKILL)  # then whoever uses the disk gets errors, and waits for nothing
    log = _Log(Path(log_path))
    serve(Path(mountpoint), [_Disk(Path(image), log), _Marks(log)], int(ready))


if __name__ == "__main__":
    main()
