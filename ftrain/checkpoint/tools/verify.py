"""Every byte of a checkpoint, read and proved: nothing in its directory is left out. Needs no torch.

    journal ─sha256─► manifest.json ─sha256─► packs/*.index.json ─crc32c─► payload, chunk by chunk, box by box
                                                     ├─────────────────► zarr.json, the packs' tails, refs.json
                                                     └─crc32c, frames──► what compressed boxes become

The right-hand side of the second arrow is what the indexes determine, byte by byte. Frames are decoded, too: what
their checksums prove is what was written, not that it can be read.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from ftrain import _native
from ftrain.checkpoint.catalogue import Commit, read_manifest
from ftrain.checkpoint.written import Written, read_written
from ftrain.core.manifest import MANIFEST_PATH, REFERENCES_PATH, PackIndex, check_coverage, data_path, pack_path
from ftrain.errors import CorruptCheckpoint, NotFound
from ftrain.storage.base import Ranges, Storage
from ftrain.storage.zarr_view import pack_metadata, references, shard_index

READ_BYTES = 64 << 20  # at a time


@dataclass(frozen=True, slots=True)
class Proof:
    """What was proved of a whole checkpoint."""

    bytes_read: int
    tensors: int
    packs: int
    strange: tuple[str, ...]  # files in its directory that are not the checkpoint's


def verify(commit: Commit, on_progress: Callable[[int], None] = lambda _: None) -> Proof:
    """Read everything. `on_progress` is told the bytes of packs that were proved since the last time.

    Raises `CorruptCheckpoint` at the first bad byte, naming tensor, rank, file and offset as far as it has them.
    Memory: the indexes, and 64 MiB.
    """
    storage, path = commit.storage, commit.path
    manifest = read_manifest(commit)
    if commit.manifest_sha256 is not None and not commit.origin and manifest.attempt != commit.attempt:
        raise CorruptCheckpoint(f"{commit.url}/{MANIFEST_PATH}: is of {manifest.attempt}, not of {commit.attempt}")
    try:
        packs = read_written(storage, path, manifest)
        indexes = [pack.index for pack in packs]
        check_coverage(indexes, commit.url)
        _check_references(storage, path, indexes)
        for pack in packs:
            if pack.base == path:
                _check_pack(storage, path, pack.index, on_progress)
            else:
                _check_boxes(storage, pack, on_progress)
            if pack.index.frames:
                from ftrain.checkpoint.tools.frames import check_frames

                check_frames(storage, pack)
    except NotFound as error:
        raise CorruptCheckpoint(f"{commit.url}: a file that the manifest names is gone: {error}") from error
    shared = {record.key for index in indexes for record in index.boxes if not record.private}
    private = sum(record.private for index in indexes for record in index.boxes)
    own = indexes[: manifest.world_size]
    nbytes = sum(index.image_bytes for index in own)
    nbytes += sum(size for index in indexes[len(own) :] for size in index.stored_bytes)
    return Proof(nbytes, len(shared) + private, len(own), _strange(storage, path, own))


def _check_references(storage: Storage, path: str, indexes: Sequence[PackIndex]) -> None:
    """Plain zarr sees the same tensors at the same places."""
    where = f"{path}/{REFERENCES_PATH}"
    data, expected = storage.read(where), references(indexes)
    if data == expected:
        return
    try:
        # Another version may have written the same in another order, or without templates.
        same = _said(data) == _said(expected)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{storage.url}/{where}: not a reference view: {error}") from None
    if not same:
        raise CorruptCheckpoint(f"{storage.url}/{where}: does not say what the packs' indexes say; it was changed")


class _View(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    refs: dict[str, str | tuple[str, int, int]]
    templates: dict[str, str] = {}


def _said(data: bytes) -> tuple[int, dict[str, str | tuple[str, int, int]]]:
    """What a reference view says in the checkpoint's directory."""
    view = msgspec.json.decode(data, type=_View)
    refs = dict(view.refs)
    for name, value in view.templates.items():
        for key, one in refs.items():
            if not isinstance(one, str):
                refs[key] = (one[0].replace(f"{{{{{name}}}}}", value), *one[1:])
    return view.version, refs


def _check_pack(storage: Storage, path: str, index: PackIndex, on_progress: Callable[[int], None]) -> None:
    where = f"{path}/{pack_path(index.rank)}/zarr.json"
    if storage.read(where) != pack_metadata(index.payload_bytes, index.chunk_bytes):
        raise CorruptCheckpoint(f"{storage.url}/{where}: is not what the pack's index says")
    file = f"{path}/{data_path(pack_path(index.rank))}"
    sums = _BoxSums(index, f"{storage.url}/{file}")
    chunk = index.chunk_bytes
    several = max(1, READ_BYTES // chunk)
    count = len(index.chunk_crc32c)
    buffer = array("B", bytes(min(several, count) * chunk))
    address, _ = buffer.buffer_info()
    for first in range(0, count, several):
        ranges = Ranges([file])
        for number in range(first, min(first + several, count)):
            ranges.add(0, index.chunk_crc32c[number], number * chunk, chunk, address + (number - first) * chunk)
        for place in storage.read_ranges(ranges):
            raise _damaged(storage, file, index, ranges.offsets[place], ranges.sizes[place])
        sums.add(address, first * chunk, len(ranges) * chunk)
        on_progress(len(ranges) * chunk)
    tail = shard_index(index.payload_bytes, chunk)
    tail = bytes(index.image_bytes - index.payload_bytes - len(tail)) + tail
    ranges = Ranges([file])
    ranges.add(0, _native.crc32c(tail), index.payload_bytes, len(tail), 0)
    if storage.read_ranges(ranges):
        raise CorruptCheckpoint(
            f"{storage.url}/{file}: the shard index in the last {len(tail)} bytes is not what the pack's index says"
        )
    on_progress(len(tail))


def _check_boxes(storage: Storage, pack: Written, on_progress: Callable[[int], None]) -> None:
    """Those boxes of an earlier attempt's pack that the checkpoint refers to."""
    index = pack.index
    for box, nbytes, crc32c in zip(index.boxes, index.stored_bytes, index.box_crc32c, strict=True):
        ranges = Ranges([pack.file])
        ranges.add(0, crc32c, box.offset, nbytes, 0)
        if nbytes and storage.read_ranges(ranges):
            raise _damaged(storage, pack.file, index, box.offset, nbytes)
        on_progress(nbytes)


class _BoxSums:
    """The checksums of a pack's boxes, computed as its payload goes by."""

    def __init__(self, index: PackIndex, where: str) -> None:
        self._index = index
        self._sizes = index.stored_bytes
        self._where = where
        self._next = 0  # box
        self._sum = 0  # of what of it has gone by
        self._at = 0  # bytes of it that have

    def add(self, address: int, offset: int, nbytes: int) -> None:
        """The payload's next bytes, from `offset` on. Raises `CorruptCheckpoint`."""
        boxes, end = self._index.boxes, offset + nbytes
        while self._next < len(boxes):
            box, size = boxes[self._next], self._sizes[self._next]
            begin = box.offset + self._at
            count = min(box.offset + size, end) - begin
            if size and count <= 0:
                return
            self._sum = _native.crc32c_address(address + begin - offset, count, self._sum) if count > 0 else self._sum
            self._at += count
            if self._at < size:
                return
            if self._sum != self._index.box_crc32c[self._next]:
                raise CorruptCheckpoint(
                    f"{self._where}: tensor {box.key}, saved by rank {self._index.rank}, does not match its checksum "
                    f"({size} bytes at offset {box.offset}), although the chunks around it do: the index is wrong"
                )
            self._next, self._sum, self._at = self._next + 1, 0, 0


def _damaged(storage: Storage, file: str, index: PackIndex, offset: int, nbytes: int) -> CorruptCheckpoint:
    touched = [
        box.key
        for box, size in zip(index.boxes, index.stored_bytes, strict=True)
        if box.offset < offset + nbytes and box.offset + size > offset
    ]
    more = f" and {len(touched) - 3} more" if len(touched) > 3 else ""
    what = f"in tensor {', '.join(touched[:3])}{more}" if touched else "in the padding between tensors"
    return CorruptCheckpoint(
        f"{storage.url}/{file}: the {nbytes} bytes at offset {offset} do not match their checksum ({what}; saved by "
        f"rank {index.rank})"
    )


def _strange(storage: Storage, path: str, indexes: Sequence[PackIndex]) -> tuple[str, ...]:
    """What lies beside the checkpoint's files."""
    ranks = [index.rank for index in indexes]
    expected = {"": {MANIFEST_PATH, REFERENCES_PATH, "packs"}}
    expected["packs"] = {name for rank in ranks for name in (f"{rank:05d}", f"{rank:05d}.index.json")}
    found = []
    for folder, names in expected.items():
        inside = f"{path}/{folder}" if folder else path
        found += [f"{folder}/{name}".lstrip("/") for name in storage.list(inside) if name not in names]
    return tuple(found)
