"""From a committed checkpoint into tensors, of whatever mesh and world size they are now."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ftrain import _native
from ftrain.checkpoint.batches import batches
from ftrain.checkpoint.reading.decoding import read_frames
from ftrain.checkpoint.reading.straight import add_straight
from ftrain.checkpoint.staging.arena import Image
from ftrain.checkpoint.staging.device import begin_upload
from ftrain.checkpoint.staging.host import lies_in_host_memory
from ftrain.checkpoint.staging.look import host_addresses
from ftrain.checkpoint.state.comparison import compare
from ftrain.checkpoint.state.items import TensorItem
from ftrain.checkpoint.state.source import TensorInfo, Wanted
from ftrain.checkpoint.state.wanted import wanted_boxes
from ftrain.checkpoint.written import Written, read_written
from ftrain.core import plain as plain_data
from ftrain.core.frames import Frames
from ftrain.core.layout import Entry, Piece, read_plan, split, strides
from ftrain.core.manifest import (
    MANIFEST_PATH,
    BoxRecord,
    Manifest,
    PackIndex,
    check_coverage,
    decode_manifest,
)
from ftrain.errors import CheckpointNotFound, CorruptCheckpoint, MismatchedState, NotFound
from ftrain.storage.base import Ranges, Storage

GATHER_THREADS = 2
BUFFER_BYTES = 64 << 20  # for what does not go straight to its place, and twice that where its parts are large


class Checkpoint:
    """A committed checkpoint, open for reading. Its indexes are in memory, its tensors are not."""

    def __init__(self, storage: Storage, path: str, manifest: Manifest, packs: Sequence[Written]) -> None:
        self._held: dict[int, Image] = {}  # packs that are in memory, too
        self._storage = storage
        self._path = path
        self._manifest = manifest
        self._packs = packs  # its own by rank, then those of earlier attempts
        self._indexes = [pack.index for pack in packs]
        self._tensors = {
            record.key: TensorInfo(record.dtype, record.shape)
            for index in self._indexes
            for record in index.boxes
            if not record.private
        }

    @classmethod
    def open(cls, storage: Storage, path: str, manifest_sha256: str | None = None) -> Checkpoint:
        """Open the checkpoint whose attempt is at `path`, and prove its manifest and indexes.

        `manifest_sha256` is what the journal's commit says. Raises `CheckpointNotFound` where there is no manifest and
        nobody said that there is one, and `CorruptCheckpoint` where any record is damaged, missing, or does not belong
        to the others.
        """
        where = f"{path}/{MANIFEST_PATH}"
        try:
            data = storage.read(where)
        except NotFound:
            if manifest_sha256 is not None:
                raise CorruptCheckpoint(f"{where}: the manifest of a committed checkpoint is gone") from None
            raise CheckpointNotFound(
                f"{storage.url}/{path} is not a committed checkpoint: it has no {MANIFEST_PATH}"
            ) from None
        if manifest_sha256 is not None and hashlib.sha256(data).hexdigest() != manifest_sha256:
            raise CorruptCheckpoint(f"{where}: the manifest is not the one that was committed")
        manifest = decode_manifest(data, where)
        try:
            packs = read_written(storage, path, manifest)
        except NotFound as error:
            raise CorruptCheckpoint(f"{where}: names a file that is gone: {error}") from error
        check_coverage([pack.index for pack in packs], path)
        return cls(storage, path, manifest, packs)

    @property
    def world_size(self) -> int:
        """Of the run that saved it."""
        return self._manifest.world_size

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def url(self) -> str:
        return f"{self._storage.url}/{self._path}"

    @property
    def step(self) -> int:
        """The number of steps that were done when it was saved."""
        return self._manifest.attempt.step

    @property
    def codecs(self) -> list[str]:
        """Those with which tensors of it are compressed; none where all are stored as they are."""
        return sorted({index.codec for index in self._indexes if any(index.frames)})

    @property
    def stored_bytes(self) -> int:
        """Of its tensors, as they are on storage."""
        return sum(size for index in self._indexes for size in index.stored_bytes)

    @property
    def names(self) -> set[str]:
        """What the state had on any rank, by name."""
        return {name for tracked in self._tracked_by_rank().values() for name in tracked}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors that the ranks shared, by key."""
        return self._tensors

    def private_tensors(self, rank: int) -> dict[str, TensorInfo]:
        """The tensors that were this rank's alone, by key; none for a rank beyond `world_size`."""
        if rank >= self.world_size:
            return {}
        return {
            record.key: TensorInfo(record.dtype, record.shape, private=True)
            for index in self._indexes
            if index.rank == rank
            for record in index.boxes
            if record.private
        }

    def private_keys(self, rank: int) -> list[str]:
        return list(self.private_tensors(rank))

    def plain(self, rank: int) -> dict[str, object]:
        """The plain data that this rank saved, by name. `rank` is below `world_size`."""
        return {name: plain_data.decode(value) for name, value in self._indexes[rank].plain.items()}

    def others(self, rank: int) -> Iterator[tuple[int, dict[str, object]]]:
        """Other ranks and their plain data, each only where the state differs from that of the ranks before."""
        for other in self._tracked_by_rank():
            if other != rank:
                yield other, self.plain(other)

    def _tracked_by_rank(self) -> dict[int, dict[str, Any]]:
        """What ranks say of the state, as it is encoded, by the first rank that says it."""
        found: dict[int, dict[str, Any]] = {}
        for index in self._indexes[: self.world_size]:
            tracked = index.plain.get("tracked")
            if isinstance(tracked, dict) and tracked not in found.values():
                found[index.rank] = tracked
        return found

    def hold(self, pack: int, sealed: PackIndex, image: Image) -> bool:
        """Take a pack from memory, where its bytes prove right there. False where `sealed` is of another checkpoint."""
        index = self._indexes[pack]  # of a pack that refers to others, the boxes lie elsewhere in memory
        is_it = (sealed.attempt, sealed.rank, sealed.boxes) == (index.attempt, index.rank, index.boxes)
        if not is_it or index.frames:  # of frames the checksums are those of what is stored
            return False
        self._held[pack] = image
        return True

    def read_into(self, items: Sequence[TensorItem], rank: int, *, elsewhere: Collection[str] = ()) -> None:
        """Fill the local tensors in place, from whichever boxes were saved; private ones from those of the same rank.

        `elsewhere` are keys that only other ranks ask for. Every byte is proved by a checksum before this returns.
        Raises `MismatchedState` where items and checkpoint are not of one state, with nothing read, and
        `CorruptCheckpoint` naming tensor, rank, file and offset where bytes are damaged: what was filled until then
        is of no use.
        """
        reading = self._reading()
        if self.world_size == 1 and add_straight(items, self._indexes[0], 0, reading.ranges):
            self._carry_out(reading)
            return
        self._check(items, rank, elsewhere)
        for private in (False, True):
            chosen = [item for item in items if item.spec.private == private]
            rest = self._add_whole(chosen, private, rank, reading) if chosen else []
            self._add(wanted_boxes(rest, rank), private, rank, reading)
        self._carry_out(reading)

    def read(self, wanted: Sequence[Wanted]) -> None:
        """Fill boxes of tensors that the ranks shared. Proves every byte, and raises `CorruptCheckpoint`."""
        reading = self._reading()
        self._add(wanted, private=False, rank=0, reading=reading)
        self._carry_out(reading)

    def _reading(self) -> _Reading:
        return _Reading(Ranges([pack.file for pack in self._packs]))

    def _add(self, wanted: Sequence[Wanted], private: bool, rank: int, reading: _Reading) -> None:
        if not wanted:
            return
        targets = [_Target(one) for one in wanted]
        for piece in read_plan([(one.key, one.box) for one in wanted], self._entries(private, rank)):
            target = targets[piece.wanted]
            if piece.entry.frames is not None:
                reading.encoded.append((piece, target))
            elif target.takes_directly(piece):
                entry, address = piece.entry, target.place(piece).data_ptr()
                reading.ranges.add(entry.pack, entry.crc32c, piece.offset, piece.nbytes, address)
                reading.proofs.append((entry.key, entry.pack))
            else:
                reading.indirect.extend([(part, target) for part in split(piece)])

    def _carry_out(self, reading: _Reading) -> None:
        ranges = reading.ranges
        for place in self._read(ranges):
            key, pack = reading.proofs[place] if reading.proofs else (self._indexes[0].boxes[place].key, 0)
            raise self._damaged(key, pack, ranges.offsets[place], ranges.sizes[place])
        for batch in batches(reading.indirect, lambda part: part[0].nbytes, BUFFER_BYTES):
            self._read_through_buffer(batch)
        if reading.encoded:
            read_frames(self._storage, self._packs, reading.encoded)

    def _add_whole(self, items: Sequence[TensorItem], private: bool, rank: int, reading: _Reading) -> list[TensorItem]:
        """Add the ranges of tensors that were saved in one box and are wanted in one; return the other items."""
        packs = [number for number, pack in enumerate(self._packs) if not private or pack.rank == rank]
        found = {
            record.key: (pack, record, crc32c)
            for pack in packs
            for record, crc32c, frames in _columns(self._indexes[pack])
            if record.private == private and record.is_whole and frames is None
        }
        direct: list[torch.Tensor] = []
        rest: list[TensorItem] = []
        records: list[tuple[int, BoxRecord, int]] = []
        addresses = host_addresses([item.local for item in items])
        for item in items:
            spec, local = item.spec, item.local
            record = found.get(spec.key) if spec.mesh is None else None
            if record is not None and (addresses is not None or lies_in_host_memory(local)):
                records.append(record)
                direct.append(local)
            else:
                rest.append(item)
        ranges = reading.ranges
        ranges.files.extend([pack for pack, _, _ in records])
        ranges.sums.extend([crc32c for _, _, crc32c in records])
        ranges.offsets.extend([record.offset for _, record, _ in records])
        ranges.sizes.extend([record.nbytes for _, record, _ in records])
        if rest or addresses is None:
            addresses = array("Q", map(torch.Tensor.data_ptr, direct))
        ranges.addresses.extend(addresses)
        reading.proofs.extend([(record.key, pack) for pack, record, _ in records])
        return rest

    def _entries(self, private: bool, rank: int) -> Iterable[Entry]:
        return (
            entry
            for number, index in enumerate(self._indexes)
            if not private or index.rank == rank
            for entry in index.entries(private, number)
        )

    def _check(self, items: Sequence[TensorItem], rank: int, elsewhere: Collection[str]) -> None:
        own = self.private_tensors(rank) if any(item.spec.private for item in items) else {}
        found = compare((item.spec for item in items), self._tensors, own, elsewhere)
        if str(found):
            raise MismatchedState(f"{self.url} is of another model or optimizer: {found}")

    def _read(self, ranges: Ranges) -> list[int]:
        """The places of ranges that are damaged, from wherever their bytes were nearest."""
        if not self._held:
            return self._storage.read_ranges(ranges)
        packs = set(ranges.files)
        is_rest = bool(packs - self._held.keys())
        rest = [place for place, pack in enumerate(ranges.files) if pack not in self._held] if is_rest else []
        for pack in packs & self._held.keys():
            image, own = self._held[pack], ranges
            places: Sequence[int] = range(len(ranges))
            if packs != {pack}:
                places = [place for place, number in enumerate(ranges.files) if number == pack]
                own = ranges.only(places)
            damaged = _native.gather(
                image.address, image.nbytes, own.sums, own.offsets, own.sizes, own.addresses, threads=GATHER_THREADS
            )
            rest += [places[place] for place in damaged]  # storage is asked before anything is given up
        return [rest[place] for place in self._storage.read_ranges(ranges.only(rest))] if rest else []

    def _read_through_buffer(self, batch: Sequence[tuple[Piece, _Target]]) -> None:
        """Read what does not go straight to its place, and move it there. Chunks prove a part of an entry."""
        spans = [self._span(piece) for piece, _ in batch]
        ranges = Ranges([pack.file for pack in self._packs])
        sources: list[int] = []  # of each range, its place in the batch
        pinned = any(target.is_on_device for _, target in batch)
        room = sum(_aligned(end - begin) for begin, end in spans)
        buffer = torch.empty(room, dtype=torch.uint8, pin_memory=pinned)
        address, places = buffer.data_ptr(), []
        for number, ((piece, _), (begin, end)) in enumerate(zip(batch, spans, strict=True)):
            entry, index = piece.entry, self._indexes[piece.entry.pack]
            places.append(address - buffer.data_ptr())
            if piece.is_whole:
                ranges.add(entry.pack, entry.crc32c, begin, end - begin, address)
                sources.append(number)
            else:
                for chunk in range(begin // index.chunk_bytes, end // index.chunk_bytes):
                    start = chunk * index.chunk_bytes
                    ranges.add(entry.pack, index.chunk_crc32c[chunk], start, index.chunk_bytes, address + start - begin)
                    sources.append(number)
            address += _aligned(end - begin)
        for place in self._read(ranges):
            entry = batch[sources[place]][0].entry
            raise self._damaged(entry.key, entry.pack, ranges.offsets[place], ranges.sizes[place])
        uploads: list[tuple[int, torch.Tensor]] = []
        for (piece, target), (begin, _), place in zip(batch, spans, places, strict=True):
            start = place + piece.offset - begin
            elements = buffer[start : start + piece.nbytes].view(target.bits)
            found = elements.as_strided(piece.box.shape, strides(piece.entry.box))
            if target.is_on_device and found.is_contiguous():
                uploads.append((found.data_ptr(), target.place(piece)))
            else:
                target.place(piece).copy_(found)
        if uploads:
            begin_upload(uploads).wait()

    def _span(self, piece: Piece) -> tuple[int, int]:
        """The bytes of the pack to be read for a piece: itself, or all chunks that it touches."""
        begin, end = piece.offset, piece.offset + piece.nbytes
        if piece.is_whole:
            return begin, end
        chunk = self._indexes[piece.entry.pack].chunk_bytes
        return begin // chunk * chunk, -(-end // chunk) * chunk

    def _damaged(self, key: str, pack: int, offset: int, nbytes: int) -> CorruptCheckpoint:
        return self._packs[pack].damaged(self._storage, key, offset, nbytes)


def _columns(index: PackIndex) -> Iterable[tuple[BoxRecord, int, Frames | None]]:
    return zip(index.boxes, index.box_crc32c, index.frames_of_boxes, strict=True)


@dataclass(frozen=True, slots=True)
class _Reading:
    """What is to be read: ranges that go to their place, each with the key and the pack that it is of, and pieces."""

    ranges: Ranges
    proofs: list[tuple[str, int]] = field(default_factory=list)
    indirect: list[tuple[Piece, _Target]] = field(default_factory=list)
    encoded: list[tuple[Piece, _Target]] = field(default_factory=list)  # of entries in frames


class _Target:
    """A tensor that is being filled, and the box that it is. Elements are moved as integers, never converted."""

    def __init__(self, wanted: Wanted) -> None:
        self._box = wanted.box
        self.bits = _BITS[wanted.into.element_size()]
        self._bits = wanted.into.detach().view(self.bits)

    @property
    def is_on_device(self) -> bool:
        return self._bits.device.type == "cuda"

    def takes_directly(self, piece: Piece) -> bool:
        """The piece is all of its entry and comes to lie in one run of this tensor's memory."""
        return piece.is_whole and self._bits.device.type == "cpu" and self.place(piece).is_contiguous()

    def place(self, piece: Piece) -> torch.Tensor:
        """The part of the tensor that the piece fills, as integers."""
        view = self._bits
        for dim, (at, begin, count) in enumerate(zip(self._box.offset, piece.box.offset, piece.box.shape, strict=True)):
            view = view.narrow(dim, begin - at, count)
        return view


# Copies between equal types move bits as they are; 16 bytes have no integer.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def _aligned(nbytes: int) -> int:
    """So that the next one begins where an element of any type may."""
    return -(-nbytes // 64) * 64
