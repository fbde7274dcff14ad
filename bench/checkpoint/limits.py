"""What the machine can do at best: one memcpy, direct writes and reads, reads from the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import torch
from states import memoryview_of

BLOCK_BYTES = 64 << 20  # one call: the kernel keeps the disk's queue full with its parts; more threads gain nothing
DIRECT_BYTES = 4096  # what direct I/O comes in multiples of


class Memory:
    """Memory with all its pages there: as tensors have it, or shared by a descriptor as an arena has it."""

    def __init__(self, size: int, shared: bool = False) -> None:
        if shared:
            fd = os.memfd_create("bench-limit")
            os.ftruncate(fd, size)
            self._keep: object = mmap.mmap(fd, size)
            os.close(fd)
            tensor = torch.frombuffer(self._keep, dtype=torch.uint8)
        else:
            tensor = torch.empty(size, dtype=torch.uint8)
        tensor.fill_(1)
        self.tensor = tensor
        self.address = tensor.data_ptr()


def memcpy(size: int, *, shared: bool) -> Callable[[], None]:
    """One memcpy by one thread, into memory of a tensor's kind or into shared memory."""
    source, target = Memory(size), Memory(size, shared)
    return lambda: void(ctypes.memmove(target.address, source.address, size))


def write(path: Path, size: int) -> Callable[[], None]:
    """A new file written by direct I/O, in order, then fdatasync."""
    path.parent.mkdir(parents=True, exist_ok=True)
    block = aligned_block(size)

    def run() -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o644)
        try:
            for at in range(0, padded(size), BLOCK_BYTES):
                part = block[: min(BLOCK_BYTES, padded(size) - at)]
                if os.pwrite(fd, part, at) != len(part):
                    raise OSError(f"{path} took only a part of a direct write at {at}: is the disk full?")
            os.fdatasync(fd)
        finally:
            os.close(fd)

    return run


def read(path: Path, size: int, *, direct: bool) -> Callable[[], None]:
    """All of a file that `write` has made, in order: past the page cache, or out of it."""
    memory = aligned_block(size) if direct else memoryview_of(Memory(padded(size)).tensor)
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)

    def run() -> None:
        fd = os.open(path, flags)
        try:
            for at in range(0, padded(size), BLOCK_BYTES):
                count = min(BLOCK_BYTES, padded(size) - at)
                part = memory[:count] if direct else memory[at : at + count]
                if os.preadv(fd, [part], at) != count:
                    raise OSError(f"{path} ends before its {padded(size)} bytes")
        finally:
            os.close(fd)

    return run


def aligned_block(size: int) -> memoryview:
    """Private pages, touched: at most BLOCK_BYTES, used again and again, for nobody looks at what passes through."""
    length = min(BLOCK_BYTES, padded(size))
    block = memoryview(mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    block[:] = b"\x5a" * length
    return block


def padded(size: int) -> int:
    return -(-size // DIRECT_BYTES) * DIRECT_BYTES


def void(_: object) -> None:
    """Drop a result."""
