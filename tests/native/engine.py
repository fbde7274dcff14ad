"""For the tests of the native engine: memory at addresses, and what a pack must hold worked out the plain way."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import pytest

from ftrain._native import Pack, transfer_backend

PAGE_BYTES = 4096


def has_io_uring() -> bool:
    try:
        return transfer_backend("io_uring") == "io_uring"
    except OSError:
        return False


each_backend = pytest.mark.parametrize(
    "backend",
    ["threads", pytest.param("io_uring", marks=pytest.mark.skipif(not has_io_uring(), reason="io_uring is refused"))],
)


def words(*values: int) -> array[int]:
    return array("Q", values)


def random_bytes(seed: int, nbytes: int) -> bytes:
    return random.Random(seed).randbytes(nbytes)


class Memory:
    """Bytes that begin with a page, at an address that stays."""

    def __init__(self, data: bytes | int) -> None:
        self.nbytes = data if isinstance(data, int) else len(data)
        self._mapped = mmap.mmap(-1, max(1, self.nbytes))
        if isinstance(data, bytes):
            self._mapped[: self.nbytes] = data
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapped))

    def bytes(self) -> bytes:
        return self._mapped[: self.nbytes]

    def fill(self, data: bytes) -> None:
        self._mapped[: len(data)] = data


@dataclass(frozen=True)
class Layout:
    """Boxes as (offset, bytes) in the image of a pack, whose payload is whole chunks and which ends with `ending`."""

    boxes: tuple[tuple[int, bytes], ...]
    chunks: int
    chunk_bytes: int = PAGE_BYTES
    ending_pages: int = 1
    ending: bytes = b"the end"

    @property
    def payload_bytes(self) -> int:
        return self.chunks * self.chunk_bytes

    @property
    def image_bytes(self) -> int:
        return self.payload_bytes + self.ending_pages * PAGE_BYTES

    def image(self) -> bytes:
        image = bytearray(self.image_bytes)
        for offset, data in self.boxes:
            image[offset : offset + len(data)] = data
        image[self.image_bytes - len(self.ending) :] = self.ending
        return bytes(image)

    def sums(self) -> tuple[list[int], list[int]]:
        image = self.image()
        starts = range(0, self.payload_bytes, self.chunk_bytes)
        boxes = [google_crc32c.value(data) for _, data in self.boxes]
        return boxes, [google_crc32c.value(image[start : start + self.chunk_bytes]) for start in starts]

    def pack(self, memory: Memory, *, in_place: bool) -> Pack:
        """`memory` gets the image itself, all but its ending, or the boxes from its end to its beginning."""
        sizes = [len(data) for _, data in self.boxes]
        offsets = [offset for offset, _ in self.boxes]
        if in_place:
            memory.fill(self.image()[: self.payload_bytes])
            addresses = [memory.address + offset for offset in offsets]
        else:
            memory.fill(b"".join(data for _, data in reversed(self.boxes)))
            ends = [sum(sizes[number:]) for number in range(len(sizes))]
            addresses = [memory.address + end - size for end, size in zip(ends, sizes, strict=True)]
        return Pack(
            words(*offsets),
            words(*addresses),
            words(*sizes),
            self.payload_bytes,
            self.chunk_bytes,
            self.image_bytes,
            self.ending,
            memory.address if in_place else 0,
        )


def random_layout(seed: int, sizes: Sequence[int], gaps: Sequence[int], chunk_bytes: int = PAGE_BYTES) -> Layout:
    """A gap before each box; gaps and sizes are repeated until both are used up."""
    at, boxes = 0, []
    for number, size in enumerate(sizes):
        at += gaps[number % len(gaps)]
        boxes.append((at, random_bytes(seed + number, size)))
        at += size
    return Layout(tuple(boxes), -(-at // chunk_bytes), chunk_bytes)


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def opened_direct(path: Path, flags: int) -> Iterator[int]:
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_DIRECT, 0o600)
    except OSError:
        pytest.skip(f"no direct I/O in {path.parent}")
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def threads() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}
