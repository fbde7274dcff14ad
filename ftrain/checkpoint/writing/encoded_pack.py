"""A pack whose boxes are compressed on their way to storage: its length is known when the last byte is.

A few frames are held at a time, encoded by threads that step back behind training; the state is never there twice.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from math import prod

import msgspec

from ftrain._native import crc32c
from ftrain.checkpoint.compression import encode
from ftrain.core.codec import Codec
from ftrain.core.frames import Cut, Frames, frame_shape, is_cut, stored_bytes_max
from ftrain.core.layout import ALIGNMENT_BYTES, CHUNK_BYTES_MAX, ITEM_BYTES, align, shard_index_bytes
from ftrain.core.manifest import FORMAT_COMPRESSED, BoxRecord, PackIndex
from ftrain.storage.base import Effort
from ftrain.storage.zarr_view import shard_index

AHEAD = 2  # frames for each thread that are encoded, or being encoded, before they are written
CHUNKS = 1024  # of the largest that the pack can become: what is left of its last one is zeros

_Bytes = bytes | memoryview


class EncodedPack:
    """A `Stream`. Boxes lie at `addresses`, C-contiguous; `index` names them, whatever it says of their offsets."""

    def __init__(self, index: PackIndex, addresses: Sequence[int], codec: Codec, effort: Effort) -> None:
        self._plain = index
        self._boxes = [
            _Source(box, address, index.world_size) for box, address in zip(index.boxes, addresses, strict=True)
        ]
        self._codec = codec
        self._effort = effort
        end = sum(align(box.stored_bytes_max) for box in self._boxes)
        self._chunk_bytes = min(CHUNK_BYTES_MAX, max(ALIGNMENT_BYTES, align(-(-end // CHUNKS))))
        self._payload_max = -(-end // self._chunk_bytes) * self._chunk_bytes
        self._index: PackIndex | None = None

    @property
    def nbytes_max(self) -> int:
        chunks = self._payload_max // self._chunk_bytes
        return align(self._payload_max + shard_index_bytes(chunks))

    @property
    def index(self) -> PackIndex:
        """With places, frames and checksums, once all parts were taken."""
        assert self._index is not None
        return self._index

    def __iter__(self) -> Generator[memoryview]:
        pages = _Pages(self._chunk_bytes)
        boxes: list[BoxRecord] = []
        sums: list[int] = []
        frames: list[Frames | None] = []
        with contextlib.closing(self._stored()) as stored:
            for source in self._boxes:
                yield from pages.fill(-pages.end % ALIGNMENT_BYTES)
                boxes.append(msgspec.structs.replace(source.box, offset=pages.end))
                sizes: list[int] = []
                crcs: list[int] = []
                whole = 0
                for _ in range(source.pieces):
                    data = next(stored)
                    sizes.append(len(data))
                    crcs.append(crc32c(data))
                    whole = crc32c(data, whole)
                    yield from pages.add(data)
                sums.append(whole)
                frames.append(Frames(source.frame, tuple(sizes), tuple(crcs)) if source.frame else None)
        yield from pages.fill(-pages.end % self._chunk_bytes or self._chunk_bytes * (pages.end == 0))
        yield from pages.flush()
        chunks, payload_bytes = tuple(pages.sums), pages.end
        ending = shard_index(payload_bytes, self._chunk_bytes)
        image_bytes = align(payload_bytes + len(ending))
        yield from pages.fill(image_bytes - payload_bytes - len(ending))
        yield from pages.add(ending)
        yield from pages.flush()
        self._index = msgspec.structs.replace(
            self._plain,
            format=FORMAT_COMPRESSED,
            payload_bytes=payload_bytes,
            chunk_bytes=self._chunk_bytes,
            image_bytes=image_bytes,
            boxes=tuple(boxes),
            box_crc32c=tuple(sums),
            chunk_crc32c=chunks,
            codec=str(self._codec),
            frames=tuple(frames),
        )

    def _stored(self) -> Generator[_Bytes]:
        """What is stored of all boxes, piece by piece, some of it made ahead."""
        threads = self._effort.threads
        running: deque[Future[_Bytes]] = deque()
        with ThreadPoolExecutor(threads, "ftrain-encode", self._effort.step_back) as pool:
            try:
                for make in self._makers():
                    running.append(pool.submit(make))
                    if len(running) > AHEAD * threads:
                        yield running.popleft().result()
                while running:
                    yield running.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _makers(self) -> Iterator[Callable[[], _Bytes]]:
        for source in self._boxes:
            for number in range(source.pieces):
                yield partial(source.make, number, self._codec)


class _Source:
    """A box in memory, and the pieces in which it is stored: frames, or all of it as it is."""

    def __init__(self, box: BoxRecord, address: int, world_size: int) -> None:
        self.box = box
        self._address = address
        self._item_bytes = ITEM_BYTES[box.dtype]
        self.frame: tuple[int, ...] = ()
        if is_cut(box.shape, self._item_bytes, box.nbytes):
            self.frame = frame_shape(box.shape, box.box_offset, box.box_shape, self._item_bytes, world_size)
        self._cut = Cut.of(box.box_shape, self.frame) if self.frame else None
        self.pieces = self._cut.count if self._cut else int(box.nbytes > 0)

    @property
    def stored_bytes_max(self) -> int:
        return self.pieces * stored_bytes_max(self._frame_bytes) if self.frame else self.box.nbytes

    @property
    def _frame_bytes(self) -> int:
        return prod(self.frame) * self._item_bytes

    def make(self, number: int, codec: Codec) -> _Bytes:
        if self._cut is None:
            return memoryview((ctypes.c_ubyte * self.box.nbytes).from_address(self._address)).cast("B")
        begin, count = (elements * self._item_bytes for elements in self._cut.run(number))
        return encode(codec, self._address + begin, count, self._frame_bytes, self._item_bytes)


class _Pages:
    """What is written, collected in whole chunks, which are summed on the way; `end` is how much went in so far."""

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._buffer = memoryview(mmap.mmap(-1, CHUNK_BYTES_MAX // chunk_bytes * chunk_bytes))
        self._used = 0
        self.end = 0
        self.sums: list[int] = []

    def add(self, data: _Bytes) -> Iterator[memoryview]:
        rest = memoryview(data)
        while rest:
            count = min(len(rest), len(self._buffer) - self._used)
            self._buffer[self._used : self._used + count] = rest[:count]
            rest = rest[count:]
            self._used += count
            self.end += count
            if self._used == len(self._buffer):
                yield from self.flush()

    def fill(self, nbytes: int) -> Iterator[memoryview]:
        """Zeros."""
        return self.add(bytes(nbytes))

    def flush(self) -> Iterator[memoryview]:
        """What is held: whole pages, by now."""
        held = self._buffer[: self._used]
        self.sums += [crc32c(held[at : at + self._chunk_bytes]) for at in range(0, self._used, self._chunk_bytes)]
        self._used = 0
        if held:
            yield held
