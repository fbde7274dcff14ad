"""The black box: what a rank alone knew at its two newest boundaries, in memory that outlives its process.

A memory file with two places, written in turn, far enough apart never to meet; what was not written takes no memory.
Each begins with a record of what it holds and a checksum over both, so that a place whose write was cut short is not
there, while the other one is still whole.
"""

from __future__ import annotations

import os
import struct

from ftrain import _native
from ftrain.errors import OutOfMemory

DATA_BYTES_MAX = (1 << 30) - 4096
_PLACES = (0, 1 << 30)  # offsets in the file
_HEAD = struct.Struct("<QqQ")  # magic, step, bytes of data
_CHECKSUM = struct.Struct("<I")  # crc32c of the head and the data
_RECORD_BYTES = _HEAD.size + _CHECKSUM.size
_MAGIC = 0x786F626B63616C62


class BlackBox:
    """One rank's black box, seen from its worker, its successor or its agent. The descriptor stays the caller's.

    One process writes at a time; any may read, also while one writes.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._held: list[int | None] | None = None  # the step in each place, once this process has looked

    def write(self, step: int, data: bytes) -> None:
        """Keep `data` as that of `step`, and beside it that of the newest step before. Later steps are dropped.

        Whenever this is cut short, the step before is still whole. Raises `OutOfMemory` beyond DATA_BYTES_MAX, and
        where the host has no memory left.
        """
        if len(data) > DATA_BYTES_MAX:
            raise OutOfMemory(f"{len(data)} bytes at step {step} are more than a black box holds, {DATA_BYTES_MAX}")
        held = self._look()
        before = [one if one is not None and one < step else None for one in held]
        # Over what is of no use any more, otherwise over the older one.
        place = 0 if before[0] is None or (before[1] is not None and before[0] < before[1]) else 1
        head = _HEAD.pack(_MAGIC, step, len(data))
        record = head + _CHECKSUM.pack(_native.crc32c(data, _native.crc32c(head)))
        held[place] = None
        self._write(place, [record, data])
        held[place] = step
        self.forget_after(step)

    def read(self, step: int) -> bytes | None:
        """What was written for the step; None where it is not there, or not whole."""
        for place in range(len(_PLACES)):
            found, data = self._read(place)
            if found == step:
                return data
        return None

    def steps(self) -> tuple[int, ...]:
        """The steps that are there, each whole, in ascending order."""
        return tuple(sorted(step for step in map(self._step, range(len(_PLACES))) if step is not None))

    def forget_after(self, step: int) -> None:
        """Drop what is of later steps: of a future that was given up."""
        held = self._look()
        for place, found in enumerate(held):
            if found is not None and found > step:
                self._write(place, [bytes(_RECORD_BYTES)])
                held[place] = None

    def _look(self) -> list[int | None]:
        if self._held is None:
            self._held = [self._step(place) for place in range(len(_PLACES))]
        return self._held

    def _step(self, place: int) -> int | None:
        return self._read(place)[0]

    def _read(self, place: int) -> tuple[int | None, bytes]:
        record = os.pread(self._fd, _RECORD_BYTES, _PLACES[place])
        if len(record) < _RECORD_BYTES:
            return None, b""
        magic, step, nbytes = _HEAD.unpack_from(record)
        if magic != _MAGIC or nbytes > DATA_BYTES_MAX:
            return None, b""
        data = os.pread(self._fd, nbytes, _PLACES[place] + _RECORD_BYTES)
        checksum = _native.crc32c(data, _native.crc32c(record[: _HEAD.size]))
        whole = len(data) == nbytes and checksum == _CHECKSUM.unpack_from(record, _HEAD.size)[0]
        return (step, data) if whole else (None, b"")

    def _write(self, place: int, parts: list[bytes]) -> None:
        wanted = sum(map(len, parts))
        try:
            written = os.pwritev(self._fd, parts, _PLACES[place])
        except OSError as error:
            raise OutOfMemory(f"the black box cannot take {wanted} bytes: {error.strerror}; track less") from error
        if written != wanted:
            raise OutOfMemory(f"the black box took {written} of {wanted} bytes: the host has no memory left")
