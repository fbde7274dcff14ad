"""The arena: memory that a worker fills with snapshots and its agent persists, and that outlives the worker.

It is a memory file: a header page, and for each slot an image (a pack's bytes as they will be in the file) and an
index (what they are). The worker sizes it, since it alone knows what it tracks; the agent follows. A slot grows by
moving to the end of the file, so that the other slot can be persisted meanwhile; memory of its old place goes back
to the host.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
from dataclasses import dataclass

from ftrain import _native
from ftrain.checkpoint.staging.memory import available_bytes
from ftrain.core.layout import ALIGNMENT_BYTES, align
from ftrain.errors import CorruptCheckpoint, OutOfMemory

SLOTS_MAX = 16
INDEX_SLACK_BYTES = 256 << 10
_MAGIC = 0x616E657261746601
_HEADER = struct.Struct("<QQ")  # magic, slots
_SLOT = struct.Struct("<QQQQ")  # image offset, image bytes, index offset, index bytes
_CHECKSUM = struct.Struct("<I")
_SEAL = struct.Struct("<QI")  # length of the index, crc32c of it


def with_slack(index_bytes: int) -> int:
    """Room for an index of this size that may grow a little, without its slot having to move."""
    return index_bytes + index_bytes // 4 + INDEX_SLACK_BYTES


@dataclass(frozen=True, slots=True)
class Region:
    """Where one slot is in the file, in bytes."""

    image_offset: int
    image_bytes: int
    index_offset: int
    index_bytes: int  # room for the seal and the index

    @property
    def end(self) -> int:
        return max(self.image_offset + self.image_bytes, self.index_offset + self.index_bytes)

    @property
    def nbytes(self) -> int:
        return self.image_bytes + self.index_bytes


@dataclass(frozen=True, slots=True)
class Image:
    """One slot's image in this process: `nbytes` at `address`, mapped for as long as this object lives."""

    address: int
    nbytes: int
    mapping: _native.Mapping


class Arena:
    """One rank's arena, seen from the worker or from the agent. The descriptor stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._mapping: _native.Mapping | None = None
        self._regions: tuple[Region, ...] = ()
        # A file that shrinks under a reader kills it with SIGBUS. Refused where it is sealed already.
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.attach()

    @property
    def slots(self) -> int:
        """How many slots there are: none before the first `reserve`."""
        return len(self._regions)

    @property
    def nbytes(self) -> int:
        """Memory that the slots take."""
        return sum(region.nbytes for region in self._regions)

    def reserve(self, slots: int, image_bytes: int, index_bytes: int, bytes_max: int) -> None:
        """Have at least `slots` slots of at least these sizes. No-op when they are there.

        A slot that holds a sealed snapshot stays as it is, since the agent may be persisting it: `grow` it when it
        is to be filled again. Raises `OutOfMemory` before taking what the host, or the bound `bytes_max` (0 for
        none), does not have.
        """
        free = [slot for slot in range(self.slots) if not self.is_sealed(slot)]
        self._resize([*free, *range(self.slots, slots)], image_bytes, index_bytes, bytes_max)

    def grow(self, slot: int, image_bytes: int, index_bytes: int, bytes_max: int) -> None:
        """Make one slot at least this large. It must be the worker's to fill: what it held is lost if it moves."""
        self._resize([slot], image_bytes, index_bytes, bytes_max)

    def attach(self) -> None:
        """See the slots as they are now. What `image` gave before stays mapped for as long as it is held."""
        size = os.fstat(self._fd).st_size
        if size == 0:
            return
        if self._mapping is None or self._mapping.nbytes != size:
            self._mapping = _native.Mapping(self._fd, size)
        # A worker may die while it makes room: what has no whole header holds nothing, and is made anew.
        try:
            self._regions = _read_header(self._mapping, size)
        except CorruptCheckpoint:
            self._regions = ()

    def address(self, slot: int) -> int:
        """Where the slot's image begins in this process."""
        return self._map.address + self._region(slot).image_offset

    def image_bytes(self, slot: int) -> int:
        return self._region(slot).image_bytes

    def image(self, slot: int) -> Image:
        """The slot's image, to be held while it is in use."""
        return Image(self.address(slot), self.image_bytes(slot), self._map)

    def view(self, slot: int, offset: int, nbytes: int) -> memoryview:
        """Part of the slot's image as writable bytes."""
        region = self._region(slot)
        assert offset + nbytes <= region.image_bytes
        begin = region.image_offset + offset
        return self._map.view()[begin : begin + nbytes]

    def zero(self, slot: int, offset: int, nbytes: int) -> None:
        """Clear part of the slot's image."""
        assert offset + nbytes <= self._region(slot).image_bytes
        ctypes.memset(self.address(slot) + offset, 0, nbytes)

    def clear_index(self, slot: int) -> None:
        """The slot holds no snapshot any more. To be called before its image is touched."""
        self._write(self._region(slot).index_offset, _SEAL.pack(0, 0))

    def write_index(self, slot: int, data: bytes) -> None:
        """Seal the slot: its image is complete and `data` describes it."""
        region = self._region(slot)
        assert _SEAL.size + len(data) <= region.index_bytes
        self._write(region.index_offset + _SEAL.size, data)
        self._write(region.index_offset, _SEAL.pack(len(data), _native.crc32c(data)))

    def is_sealed(self, slot: int) -> bool:
        """Whether `write_index` came after the last `clear_index`."""
        return self._seal(slot)[0] != 0

    def read_index(self, slot: int) -> bytes:
        """What the slot was sealed with. Raises `CorruptCheckpoint` where it was not, or was damaged since."""
        if slot >= self.slots:
            raise CorruptCheckpoint(f"the arena has no slot {slot}: its header is gone")
        region = self._region(slot)
        length, checksum = self._seal(slot)
        if not 0 < length <= region.index_bytes - _SEAL.size:
            raise CorruptCheckpoint(f"slot {slot} of the arena holds no sealed snapshot")
        data = self._read(region.index_offset + _SEAL.size, length)
        if _native.crc32c(data) != checksum:
            raise CorruptCheckpoint(f"slot {slot} of the arena: the index does not match its checksum")
        return data

    def close(self) -> None:
        """Let the memory go from this process. The file stays while anybody holds a descriptor of it."""
        self._mapping, self._regions = None, ()

    @property
    def _map(self) -> _native.Mapping:
        assert self._mapping is not None, "the arena is not reserved yet"
        return self._mapping

    def _region(self, slot: int) -> Region:
        assert 0 <= slot < len(self._regions), f"slot {slot} of {len(self._regions)}"
        return self._regions[slot]

    def _seal(self, slot: int) -> tuple[int, int]:
        length, checksum = _SEAL.unpack(self._read(self._region(slot).index_offset, _SEAL.size))
        return length, checksum

    def _read(self, offset: int, nbytes: int) -> bytes:
        return bytes(self._map.view()[offset : offset + nbytes])

    def _write(self, offset: int, data: bytes) -> None:
        self._map.view()[offset : offset + len(data)] = data

    def _resize(self, slots: list[int], image_bytes: int, index_bytes: int, bytes_max: int) -> None:
        image_bytes, index_bytes = align(image_bytes), align(index_bytes + _SEAL.size)
        regions = dict(enumerate(self._regions))
        small = [
            slot
            for slot in slots
            if slot not in regions or regions[slot].image_bytes < image_bytes or regions[slot].index_bytes < index_bytes
        ]
        if not small:
            return
        old = [regions[slot] for slot in small if slot in regions]
        end = max((region.end for region in regions.values()), default=ALIGNMENT_BYTES)
        begin = end
        for slot in small:
            had = regions.get(slot, Region(0, 0, 0, 0))
            image, index = max(image_bytes, had.image_bytes), max(index_bytes, had.index_bytes)
            regions[slot] = Region(end, image, end + image, index)
            end += image + index
        total = sum(region.nbytes for region in regions.values())
        if bytes_max and total > bytes_max:
            raise OutOfMemory(
                f"snapshots need {total} bytes of arena for this rank, over its bound of {bytes_max}; "
                "raise the bound, or track less"
            )
        self._allocate(begin, end - begin)
        for region in old:
            self._give_back(region)
        self._write_header(tuple(regions[slot] for slot in range(len(regions))), end)
        self.attach()
        for region in self._regions:
            # A snapshot is to wait for no page.
            self._map.populate(region.image_offset, region.image_bytes)

    def _allocate(self, offset: int, nbytes: int) -> None:
        available = available_bytes()
        problem = f"the arena for snapshots needs {nbytes} more bytes of memory, and {available} are available"
        if nbytes > available:
            raise OutOfMemory(f"{problem}; use a machine with more memory, or fewer ranks on it")
        try:
            os.posix_fallocate(self._fd, 0, ALIGNMENT_BYTES)
            os.posix_fallocate(self._fd, offset, nbytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                raise
            raise OutOfMemory(f"{problem}: {os.strerror(error.errno)}; use a machine with more memory") from error

    def _give_back(self, region: Region) -> None:
        # A hint to the kernel: where it refuses, the old place costs memory but nothing else.
        with contextlib.suppress(OSError), mmap.mmap(self._fd, region.nbytes, offset=region.image_offset) as memory:
            memory.madvise(mmap.MADV_REMOVE)

    def _write_header(self, regions: tuple[Region, ...], size: int) -> None:
        header = _HEADER.pack(_MAGIC, len(regions)) + b"".join(
            _SLOT.pack(region.image_offset, region.image_bytes, region.index_offset, region.index_bytes)
            for region in regions
        )
        with mmap.mmap(self._fd, size) as memory:
            memory[: len(header) + _CHECKSUM.size] = header + _CHECKSUM.pack(_native.crc32c(header))


def _read_header(mapping: _native.Mapping, size: int) -> tuple[Region, ...]:
    page = bytes(mapping.view()[:ALIGNMENT_BYTES])
    magic, slots = _HEADER.unpack_from(page)
    if magic != _MAGIC or slots > SLOTS_MAX:
        raise CorruptCheckpoint("the arena has no header; something else wrote to it")
    end = _HEADER.size + slots * _SLOT.size
    if _native.crc32c(page[:end]) != _CHECKSUM.unpack_from(page, end)[0]:
        raise CorruptCheckpoint("the arena's header does not match its checksum")
    regions = tuple(Region(*_SLOT.unpack_from(page, _HEADER.size + slot * _SLOT.size)) for slot in range(slots))
    if any(region.end > size or region.image_offset % ALIGNMENT_BYTES for region in regions):
        raise CorruptCheckpoint("the arena's header names memory that it does not have")
    return regions
