"""A pack for any storage: files take it whole, by direct I/O; object stores take it in parts, made here."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Generator, Iterator
from typing import Protocol

from ftrain import _native
from ftrain._native import crc32c, crc32c_address


class Pack(_native.Pack):
    """The native pack, with its columns at hand."""

    def __init__(
        self,
        offsets: array[int],
        addresses: array[int],
        sizes: array[int],
        payload_bytes: int,
        chunk_bytes: int,
        image_bytes: int,
        ending: bytes,
        image: int = 0,
    ) -> None:
        super().__init__(offsets, addresses, sizes, payload_bytes, chunk_bytes, image_bytes, ending, image)
        self.offsets = offsets
        self.addresses = addresses
        self.sizes = sizes
        self.payload_bytes = payload_bytes
        self.chunk_bytes = chunk_bytes
        self.ending = ending
        self.image = image


class Stream(Protocol):
    """A file whose length is known only when it has been made."""

    @property
    def nbytes_max(self) -> int:
        """A bound of its length."""
        ...

    def __iter__(self) -> Generator[memoryview]:
        """Its parts in order: whole pages each, in memory that begins with a page and is the next part's afterwards.

        Each time all of it is made anew.
        """
        ...


class Parts(Protocol):
    """A file in parts, in order. `all_taken` once the last of them is handed out."""

    all_taken: bool

    def __iter__(self) -> Iterator[memoryview]: ...


class PackParts:
    """The file of a pack as parts of `part_bytes`, in order; its checksums are there once all parts were taken.

    Where the pack has an image, a part is a view of that memory; otherwise a buffer of its own. `before` is called
    with the number of bytes handed out so far before each part is made; what it raises comes out of the iterator.
    """

    def __init__(self, pack: Pack, part_bytes: int, before: Callable[[int], None]) -> None:
        self._pack = pack
        self._part_bytes = part_bytes
        self._before = before
        self._chunk = 0  # checksum of what was seen of the chunk that is not over yet
        self._first = 0  # of the boxes that are not over yet
        self.boxes = [0] * len(pack.offsets)
        self.chunks: list[int] = []
        self.all_taken = False

    def __iter__(self) -> Iterator[memoryview]:
        for begin in range(0, self._pack.nbytes, self._part_bytes):
            self._before(begin)
            end = min(begin + self._part_bytes, self._pack.nbytes)
            part = self._make(begin, end)
            self._sum_boxes(begin, end)
            self._sum_chunks(part, begin, end)
            self.all_taken = end == self._pack.nbytes
            yield part

    def _make(self, begin: int, end: int) -> memoryview:
        pack = self._pack
        if pack.image and end <= pack.payload_bytes:
            return _memory(pack.image + begin, end - begin)
        buffer = (ctypes.c_ubyte * (end - begin))()  # zeros
        at = ctypes.addressof(buffer)
        _native.copy_batch(
            [(at + inside - begin, address, nbytes) for _, inside, address, nbytes in self._boxes(begin, end)]
        )
        part = memoryview(buffer).cast("B")
        ending = pack.nbytes - len(pack.ending)
        if end > ending:
            from_ = max(begin, ending)
            part[from_ - begin :] = pack.ending[from_ - ending : end - ending]
        return part

    def _boxes(self, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """(box, offset in the file, address, bytes) of what of each box is in between."""
        pack = self._pack
        for box in range(self._first, len(pack.offsets)):
            offset, nbytes = pack.offsets[box], pack.sizes[box]
            if offset >= end:
                return
            from_, to = max(offset, begin), min(offset + nbytes, end)
            if from_ < to:
                yield box, from_, pack.addresses[box] + from_ - offset, to - from_

    def _sum_boxes(self, begin: int, end: int) -> None:
        pack = self._pack
        for box, _, address, nbytes in self._boxes(begin, end):
            self.boxes[box] = crc32c_address(address, nbytes, self.boxes[box])
        while self._first < len(pack.offsets) and pack.offsets[self._first] + pack.sizes[self._first] <= end:
            self._first += 1

    def _sum_chunks(self, part: memoryview, begin: int, end: int) -> None:
        chunk_bytes = self._pack.chunk_bytes
        at, end = begin, min(end, self._pack.payload_bytes)
        while at < end:
            to = min(end, at // chunk_bytes * chunk_bytes + chunk_bytes)
            self._chunk = crc32c(part[at - begin : to - begin], self._chunk)
            if to % chunk_bytes == 0:
                self.chunks.append(self._chunk)
                self._chunk = 0
            at = to


def _memory(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")
