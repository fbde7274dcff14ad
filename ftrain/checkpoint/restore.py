"""From a committed checkpoint into tensors, of whatever mesh and world size they are now."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import msgspec
import torch

from ftrain import _native
from ftrain.checkpoint.arena import Image
from ftrain.checkpoint.host import lies_in_host_memory
from ftrain.checkpoint.items import TensorItem
from ftrain.checkpoint.look import host_addresses
from ftrain.checkpoint.publish import read_index
from ftrain.core import plain as plain_data
from ftrain.core.layout import Box, Entry, Piece, local_box, read_plan, split, strides
from ftrain.core.manifest import (
    MANIFEST_PATH,
    BoxRecord,
    Manifest,
    PackIndex,
    check_coverage,
    data_path,
    decode_manifest,
)
from ftrain.errors import CheckpointNotFound, CorruptCheckpoint, MismatchedState, NotFound
from ftrain.storage.base import Ranges, Storage

THREADS = 4  # that read indexes
GATHER_THREADS = 2
BUFFER_BYTES = 64 << 20  # for what does not go straight to its place, and twice that where its parts are large
_NAMED_MAX = 5  # keys in one error


class TensorInfo(msgspec.Struct, frozen=True, gc=False):
    """A tensor in a checkpoint: its global shape, and its dtype as in `torch.<dtype>`."""

    dtype: str
    shape: tuple[int, ...]
    private: bool


class Held(Protocol):
    """Somebody who holds a state: what `Tracked` restores from, whatever its tier. Docs: `Checkpoint`."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def private_tensors(self, rank: int) -> Mapping[str, TensorInfo] | None:
        """None where this holder has nothing that is the rank's alone, which then stays as it is."""
        ...

    def plain(self, rank: int) -> Mapping[str, object]: ...

    def read_into(self, items: Sequence[TensorItem], rank: int, *, elsewhere: Collection[str] = ()) -> None: ...


class Checkpoint:
    """A committed checkpoint, open for reading. Its indexes are in memory, its tensors are not."""

    def __init__(self, storage: Storage, path: str, manifest: Manifest, indexes: Sequence[PackIndex]) -> None:
        self._held: dict[int, Image] = {}  # packs that are in memory, too
        self._storage = storage
        self._path = path
        self._manifest = manifest
        self._indexes = indexes
        self._tensors = {
            record.key: TensorInfo(record.dtype, record.shape, private=False)
            for index in indexes
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
            with ThreadPoolExecutor(min(THREADS, manifest.world_size), "ftrain-restore") as pool:
                indexes = list(pool.map(lambda pack: read_index(storage, path, manifest, pack), manifest.packs))
        except NotFound as error:
            raise CorruptCheckpoint(f"{where}: names a file that is gone: {error}") from error
        check_coverage(indexes, path)
        return cls(storage, path, manifest, indexes)

    @property
    def world_size(self) -> int:
        """Of the run that saved it."""
        return self._manifest.world_size

    @property
    def manifest(self) -> Manifest:
        return self._manifest

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
            for record in self._indexes[rank].boxes
            if record.private
        }

    def private_keys(self, rank: int) -> list[str]:
        return list(self.private_tensors(rank))

    def plain(self, rank: int) -> dict[str, object]:
        """The plain data that this rank saved, by name. `rank` is below `world_size`."""
        return {name: plain_data.decode(value) for name, value in self._indexes[rank].plain.items()}

    def hold(self, pack: int, sealed: PackIndex, image: Image) -> bool:
        """Take a pack from memory, where its bytes prove right there. False where `sealed` is of another checkpoint."""
        index = self._indexes[pack]
        if (sealed.attempt, sealed.rank, sealed.boxes) != (index.attempt, index.rank, index.boxes):
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
        self._check(items, rank, elsewhere)
        ranges = Ranges([self._file(pack) for pack in range(self.world_size)])
        proofs: list[tuple[str, int]] = []  # key and pack of each range
        indirect: list[tuple[Piece, _Target]] = []
        for private in (False, True):
            chosen = [item for item in items if item.spec.private == private]
            if not chosen:
                continue
            rest = self._add_whole(chosen, private, rank, ranges, proofs)
            boxes = [local_box(item.spec, rank) for item in rest]
            wanted = [(item.spec.key, box) for item, box in zip(rest, boxes, strict=True) if box is not None]
            targets = [_Target(item.local, box) for item, box in zip(rest, boxes, strict=True) if box is not None]
            for piece in read_plan(wanted, self._entries(private, rank)) if wanted else ():
                target = targets[piece.wanted]
                if target.takes_directly(piece):
                    entry = piece.entry
                    ranges.add(entry.pack, entry.crc32c, piece.offset, piece.nbytes, target.place(piece).data_ptr())
                    proofs.append((entry.key, entry.pack))
                else:
                    indirect += [(part, target) for part in split(piece)]
        for place in self._read(ranges):
            raise self._damaged(*proofs[place], ranges.offsets[place], ranges.sizes[place])
        for batch in _batches(indirect):
            self._read_through_buffer(batch)

    def _add_whole(
        self, items: Sequence[TensorItem], private: bool, rank: int, ranges: Ranges, proofs: list[tuple[str, int]]
    ) -> list[TensorItem]:
        """Add the ranges of tensors that were saved in one box and are wanted in one; return the other items."""
        packs = range(self.world_size) if not private else [rank] if rank < self.world_size else []
        found = {
            record.key: (pack, record, crc32c)
            for pack in packs
            for record, crc32c in zip(self._indexes[pack].boxes, self._indexes[pack].box_crc32c, strict=True)
            if record.private == private and record.is_whole
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
        ranges.files.extend([pack for pack, _, _ in records])
        ranges.sums.extend([crc32c for _, _, crc32c in records])
        ranges.offsets.extend([record.offset for _, record, _ in records])
        ranges.sizes.extend([record.nbytes for _, record, _ in records])
        if rest or addresses is None:
            addresses = array("Q", map(torch.Tensor.data_ptr, direct))
        ranges.addresses.extend(addresses)
        proofs += [(record.key, pack) for pack, record, _ in records]
        return rest

    def _entries(self, private: bool, rank: int) -> Iterable[Entry]:
        if not private:
            return (entry for index in self._indexes for entry in index.entries(private=False))
        return self._indexes[rank].entries(private=True) if rank < self.world_size else ()

    def _check(self, items: Sequence[TensorItem], rank: int, elsewhere: Collection[str]) -> None:
        own = self.private_tensors(rank) if any(item.spec.private for item in items) else {}
        missing, different = [], []
        shared = self._tensors
        for spec in [item.spec for item in items]:
            saved = (own if spec.private else shared).get(spec.key)
            if saved is None:
                missing.append(spec.key)
            elif saved.shape != spec.shape or saved.dtype != spec.dtype:
                different.append(
                    f"{spec.key} ({saved.dtype}{list(saved.shape)} saved, {spec.dtype}{list(spec.shape)} here)"
                )
        asked = {item.spec.key for item in items if not item.spec.private} | set(elsewhere)
        extra = [] if asked >= shared.keys() else [key for key in shared if key not in asked]
        found = [
            _named("not in the checkpoint", missing),
            _named("only in the checkpoint", extra),
            _named("different", different),
        ]
        if any(found):
            raise MismatchedState(
                f"{self._storage.url}/{self._path} is of another model or optimizer: {'; '.join(filter(None, found))}"
            )

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
        ranges = Ranges([self._file(pack) for pack in range(self.world_size)])
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
        for (piece, target), (begin, _), place in zip(batch, spans, places, strict=True):
            start = place + piece.offset - begin
            elements = buffer[start : start + piece.nbytes].view(target.bits)
            target.place(piece).copy_(elements.as_strided(piece.box.shape, strides(piece.entry.box)))

    def _span(self, piece: Piece) -> tuple[int, int]:
        """The bytes of the pack to be read for a piece: itself, or all chunks that it touches."""
        begin, end = piece.offset, piece.offset + piece.nbytes
        if piece.is_whole:
            return begin, end
        chunk = self._indexes[piece.entry.pack].chunk_bytes
        return begin // chunk * chunk, -(-end // chunk) * chunk

    def _file(self, pack: int) -> str:
        return f"{self._path}/{data_path(self._manifest.packs[pack].path)}"

    def _damaged(self, key: str, pack: int, offset: int, nbytes: int) -> CorruptCheckpoint:
        return CorruptCheckpoint(
            f"{self._storage.url}/{self._file(pack)}: the {nbytes} bytes at offset {offset} do not match their "
            f"checksum (tensor {key}, saved by rank {pack}); restore from another checkpoint"
        )


class _Target:
    """A local tensor that is being filled, and the box that it is. Elements are moved as integers, never converted."""

    def __init__(self, local: torch.Tensor, box: Box) -> None:
        assert tuple(local.shape) == box.shape, f"a tensor of shape {tuple(local.shape)} for a box of {box.shape}"
        self._box = box
        self.bits = _BITS[local.element_size()]
        self._bits = local.detach().view(self.bits)

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


def _named(what: str, keys: Sequence[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - _NAMED_MAX} more" if len(keys) > _NAMED_MAX else ""
    return f"{what}: {', '.join(keys[:_NAMED_MAX])}{more}"


def _aligned(nbytes: int) -> int:
    """So that the next one begins where an element of any type may."""
    return -(-nbytes // 64) * 64


def _batches(parts: Sequence[tuple[Piece, _Target]]) -> Iterator[list[tuple[Piece, _Target]]]:
    """The parts in runs that need about BUFFER_BYTES each."""
    batch: list[tuple[Piece, _Target]] = []
    nbytes = 0
    for piece, target in parts:
        if batch and nbytes + piece.nbytes > BUFFER_BYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append((piece, target))
        nbytes += piece.nbytes
    if batch:
        yield batch
