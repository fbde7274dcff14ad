"""From frames on storage into tensors: read, proved, decoded, some at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ftrain.checkpoint.batches import batches
from ftrain.checkpoint.compression import decode
from ftrain.checkpoint.written import Written
from ftrain.core.codec import Codec
from ftrain.core.frames import Cut, Frames
from ftrain.core.layout import Entry, Piece, split, strides
from ftrain.errors import CorruptCheckpoint
from ftrain.storage.base import Ranges, Storage

THREADS = 4
BATCH_BYTES = 64 << 20  # of what is read and what it becomes, together

_Bytes = NDArray[np.uint8]


class Target(Protocol):
    """A tensor that is being filled, as integers."""

    bits: torch.dtype

    def takes_directly(self, piece: Piece) -> bool: ...

    def place(self, piece: Piece) -> torch.Tensor: ...


def read_frames(storage: Storage, packs: Sequence[Written], parts: Sequence[tuple[Piece, Target]]) -> None:
    """Fill targets from entries in frames, and prove every byte before it is decoded.

    Memory: 64 MiB and a few frames. Raises `CorruptCheckpoint` naming tensor, rank, file and offset.
    """
    with ThreadPoolExecutor(THREADS, "ftrain-decode") as pool:
        for batch in batches(_runs(parts), lambda run: run.nbytes + run.stored_bytes, BATCH_BYTES):
            _read(storage, packs, batch, pool)


@dataclass(frozen=True, slots=True)
class _Run:
    """Frames of an entry that follow each other, and the part of a target that comes out of them.

    They go through a buffer; or, of a target that is the whole box and lies as the box does, into its memory.
    """

    entry: Entry
    frames: Frames
    cut: Cut
    numbers: range
    offset: int  # of the first one, in the pack
    piece: Piece
    target: Target
    memory: _Bytes | None  # of all of the entry, decoded

    @property
    def begin(self) -> int:
        """Of the run in the entry, in bytes when decoded."""
        return self.cut.run(self.numbers[0])[0] * self.entry.item_bytes

    @property
    def nbytes(self) -> int:
        first, count = self.cut.run(self.numbers[-1])
        return (first + count) * self.entry.item_bytes - self.begin

    @property
    def stored_bytes(self) -> int:
        return sum(self.frames.nbytes[number] for number in self.numbers)

    def room(self) -> _Bytes:
        if self.memory is None:
            return np.empty(self.nbytes, np.uint8)
        return self.memory[self.begin : self.begin + self.nbytes]

    def place(self, found: _Bytes) -> None:
        """Move the piece's elements from the decoded run to the target, where they are not there already."""
        if self.memory is not None:
            return
        start = self.piece.offset - self.entry.offset - self.begin
        elements = torch.from_numpy(found[start : start + self.piece.nbytes]).view(self.target.bits)
        self.target.place(self.piece).copy_(elements.as_strided(self.piece.box.shape, strides(self.entry.box)))


def _runs(parts: Sequence[tuple[Piece, Target]]) -> Iterator[_Run]:
    for piece, target in parts:
        entry, frames = piece.entry, piece.entry.frames
        assert frames is not None
        cut = Cut.of(entry.box.shape, frames.shape)
        offsets = list(itertools.accumulate(frames.nbytes, initial=entry.offset))
        if target.takes_directly(piece):
            memory = target.place(piece).flatten().view(torch.uint8).numpy()
            for number in range(cut.count):
                yield _Run(entry, frames, cut, range(number, number + 1), offsets[number], piece, target, memory)
            continue
        for part in split(piece):
            begin = (part.offset - entry.offset) // entry.item_bytes
            numbers = cut.covering(begin, begin + part.nbytes // entry.item_bytes)
            yield _Run(entry, frames, cut, numbers, offsets[numbers[0]], part, target, None)


@dataclass(frozen=True, slots=True)
class _Frame:
    run: _Run
    number: int
    offset: int  # in the pack
    stored: _Bytes
    into: _Bytes  # without the zeros at its end


def _read(storage: Storage, packs: Sequence[Written], batch: Sequence[_Run], pool: ThreadPoolExecutor) -> None:
    buffer = np.empty(sum(run.stored_bytes for run in batch), np.uint8)
    ranges = Ranges([pack.file for pack in packs])
    frames: list[_Frame] = []
    rooms = [run.room() for run in batch]
    at = 0
    for run, room in zip(batch, rooms, strict=True):
        offset = run.offset
        for number in run.numbers:
            nbytes = run.frames.nbytes[number]
            begin, count = (elements * run.entry.item_bytes for elements in run.cut.run(number))
            begin -= run.begin
            ranges.add(run.entry.pack, run.frames.crc32c[number], offset, nbytes, buffer.ctypes.data + at)
            frames.append(_Frame(run, number, offset, buffer[at : at + nbytes], room[begin : begin + count]))
            at += nbytes
            offset += nbytes
    for place in storage.read_ranges(ranges):
        frame = frames[place]
        entry = frame.run.entry
        raise packs[entry.pack].damaged(storage, entry.key, frame.offset, len(frame.stored))
    codecs = {pack: Codec.parse(packs[pack].index.codec) for pack in {run.entry.pack for run in batch}}

    def carry_out(frame: _Frame) -> None:
        entry = frame.run.entry
        try:
            _decode(codecs[entry.pack], frame, frame.run.cut.elements * entry.item_bytes)
        except CorruptCheckpoint as error:
            raise packs[entry.pack].damaged(storage, entry.key, frame.offset, len(frame.stored), str(error)) from None

    for _ in pool.map(carry_out, frames):
        pass
    for run, room in zip(batch, rooms, strict=True):
        run.place(room)


def _decode(codec: Codec, frame: _Frame, nbytes: int) -> None:
    if len(frame.into) == nbytes:
        decode(codec, frame.stored, frame.into)
        return
    whole = np.empty(nbytes, np.uint8)
    decode(codec, frame.stored, whole)
    frame.into[:] = whole[: len(frame.into)]
