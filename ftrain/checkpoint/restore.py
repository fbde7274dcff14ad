"""From a committed checkpoint into tensors, of whatever mesh and world size they are now."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial

import torch

from ftrain import _native
from ftrain.checkpoint.items import TensorItem
from ftrain.checkpoint.publish import read_index
from ftrain.core import plain as plain_data
from ftrain.core.layout import Box, Entry, Piece, local_box, read_plan, split, strides
from ftrain.core.manifest import MANIFEST_PATH, Manifest, PackIndex, check_coverage, data_path, decode_manifest
from ftrain.errors import CheckpointNotFound, CorruptCheckpoint, MismatchedState, NotFound
from ftrain.storage.base import Storage

THREADS = 4
DIRECT_BYTES = 32 << 20  # read straight into a tensor at a time
_NAMED_MAX = 5  # keys in one error


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a checkpoint: its global shape, and its dtype as in `torch.<dtype>`."""

    dtype: str
    shape: tuple[int, ...]
    private: bool


class Checkpoint:
    """A committed checkpoint, open for reading. Its indexes are in memory, its tensors are not."""

    def __init__(self, storage: Storage, path: str, manifest: Manifest, indexes: Sequence[PackIndex]) -> None:
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

    def read_into(
        self, items: Sequence[TensorItem], rank: int, *, elsewhere: Collection[str] = (), threads: int = THREADS
    ) -> None:
        """Fill the local tensors in place, from whichever boxes were saved; private ones from those of the same rank.

        `elsewhere` are keys that only other ranks ask for. Every byte is proved by a checksum before this returns.
        Raises `MismatchedState` where items and checkpoint are not of one state, with nothing read, and
        `CorruptCheckpoint` naming tensor, rank, file and offset where bytes are damaged: what was filled until then
        is of no use.
        """
        self._check(items, rank, elsewhere)
        jobs: list[Callable[[], None]] = []
        for private in (False, True):
            chosen = [item for item in items if item.spec.private == private]
            boxes = [local_box(item.spec, rank) for item in chosen]
            wanted = [(item.spec.key, box) for item, box in zip(chosen, boxes, strict=True) if box is not None]
            targets = [_Target(item.local, box) for item, box in zip(chosen, boxes, strict=True) if box is not None]
            for piece in read_plan(wanted, self._entries(private, rank)):
                target = targets[piece.wanted]
                parts = [piece] if target.takes_directly(piece) else split(piece)
                jobs += [partial(self._fill, part, target) for part in parts]
        _run_all(jobs, threads)

    def _entries(self, private: bool, rank: int) -> Iterable[Entry]:
        if not private:
            return (entry for index in self._indexes for entry in index.entries(private=False))
        return self._indexes[rank].entries(private=True) if rank < self.world_size else ()

    def _check(self, items: Sequence[TensorItem], rank: int, elsewhere: Collection[str]) -> None:
        own = self.private_tensors(rank)
        missing, different = [], []
        for item in items:
            spec = item.spec
            saved = (own if spec.private else self._tensors).get(spec.key)
            if saved is None:
                missing.append(spec.key)
            elif (saved.dtype, saved.shape) != (spec.dtype, spec.shape):
                different.append(
                    f"{spec.key} ({saved.dtype}{list(saved.shape)} saved, {spec.dtype}{list(spec.shape)} here)"
                )
        asked = {item.spec.key for item in items if not item.spec.private} | set(elsewhere)
        extra = [key for key in self._tensors if key not in asked]
        found = [
            _named("not in the checkpoint", missing),
            _named("only in the checkpoint", extra),
            _named("different", different),
        ]
        if any(found):
            raise MismatchedState(
                f"{self._storage.url}/{self._path} is of another model or optimizer: {'; '.join(filter(None, found))}"
            )

    def _fill(self, piece: Piece, target: _Target) -> None:
        if target.takes_directly(piece):
            self._read_proved(piece, target.place(piece).data_ptr())
            return
        entry, index = piece.entry, self._indexes[piece.entry.pack]
        begin, end = piece.offset, piece.offset + piece.nbytes
        if not piece.is_whole:
            chunk = index.chunk_bytes
            begin, end = begin // chunk * chunk, -(-end // chunk) * chunk
        buffer = torch.empty(end - begin, dtype=torch.uint8)
        if piece.is_whole:
            self._read_proved(piece, buffer.data_ptr())
        else:
            self._read_chunks(entry, begin, buffer)
        start = piece.offset - begin
        elements = buffer[start : start + piece.nbytes].view(target.bits)
        saved = elements.as_strided(piece.box.shape, strides(entry.box))
        target.place(piece).copy_(saved)

    def _read_proved(self, piece: Piece, address: int) -> None:
        """Read a whole entry to `address`; its own checksum proves it."""
        checksum = 0
        for start in range(0, piece.nbytes, DIRECT_BYTES):
            nbytes = min(DIRECT_BYTES, piece.nbytes - start)
            self._storage.read_into(self._file(piece.entry), piece.offset + start, address + start, nbytes)
            checksum = _native.crc32c_address(address + start, nbytes, checksum)
        if checksum != piece.entry.crc32c:
            raise self._damaged(piece.entry, piece.offset, piece.nbytes)

    def _read_chunks(self, entry: Entry, begin: int, buffer: torch.Tensor) -> None:
        """Read whole chunks from `begin` of the entry's pack; the checksums of the chunks prove them."""
        index = self._indexes[entry.pack]
        self._storage.read_into(self._file(entry), begin, buffer.data_ptr(), buffer.nbytes)
        found = _native.crc32c_chunks(buffer.data_ptr(), buffer.nbytes, index.chunk_bytes)
        first = begin // index.chunk_bytes
        for number, checksum in enumerate(found, first):
            if checksum != index.chunk_crc32c[number]:
                raise self._damaged(entry, number * index.chunk_bytes, index.chunk_bytes)

    def _file(self, entry: Entry) -> str:
        return f"{self._path}/{data_path(self._manifest.packs[entry.pack].path)}"

    def _damaged(self, entry: Entry, offset: int, nbytes: int) -> CorruptCheckpoint:
        return CorruptCheckpoint(
            f"{self._storage.url}/{self._file(entry)}: the {nbytes} bytes at offset {offset} do not match their "
            f"checksum (tensor {entry.key}, saved by rank {entry.pack}); restore from another checkpoint"
        )


class _Target:
    """A local tensor that is being filled, and the box that it is. Elements are moved as integers, never converted."""

    def __init__(self, local: torch.Tensor, box: Box) -> None:
        assert tuple(local.shape) == box.shape, f"a tensor of shape {tuple(local.shape)} for a box of {box.shape}"
        self._box = box
        self.bits = _BITS[local.element_size()]
        self._bits = local.detach().view(self.bits)

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


def _run_all(jobs: Sequence[Callable[[], None]], threads: int) -> None:
    """Run the jobs in threads, and raise the first error once none runs any more."""
    with ThreadPoolExecutor(threads, "ftrain-restore") as pool:
        futures = [pool.submit(job) for job in jobs]
        done, rest = wait(futures, return_when=FIRST_EXCEPTION)
        for future in rest:
            future.cancel()
    for future in done:
        future.result()
