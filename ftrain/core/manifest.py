"""What a checkpoint's files say: the index of each pack, and the manifest that makes packs a checkpoint.

Whatever is read is refused unless it is exactly what a writer can have written; every refusal is a `CorruptCheckpoint`
that names the file and the place. docs/format.md has the fields.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import pairwise
from math import prod
from typing import Annotated, Any

import msgspec

from ftrain.core import frames
from ftrain.core.codec import Codec
from ftrain.core.frames import Frames
from ftrain.core.layout import ALIGNMENT_BYTES, CHUNK_BYTES_MAX, ITEM_BYTES, Box, Entry, shard_index_bytes, uncovered
from ftrain.core.messages import PROBLEM_CHARS_MAX, Attempt, Count, Name, PackRecord
from ftrain.errors import CorruptCheckpoint

FORMAT = 1
FORMAT_COMPRESSED = 2  # of what has anything compressed, so that versions that know of no such thing say so
_FORMATS = (FORMAT, FORMAT_COMPRESSED)
MANIFEST_PATH = "manifest.json"
REFERENCES_PATH = "refs.json"
MANIFEST_BYTES_MAX = 64 << 20
INDEX_BYTES_MAX = 1 << 30
DIMENSIONS_MAX = 64
REFERENCES_MAX = 64

Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Crc32c = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
Key = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
Shape = Annotated[tuple[Count, ...], msgspec.Meta(max_length=DIMENSIONS_MAX)]


class BoxRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One box of one tensor: `nbytes` at `offset` of the pack, elements in C order, little-endian.

    A box in frames has as many bytes when they are decoded.
    """

    key: Key
    dtype: Name
    shape: Shape  # of the whole tensor
    box_offset: Shape
    box_shape: Shape
    private: bool
    offset: Count
    nbytes: Count

    @property
    def box(self) -> Box:
        return Box(self.box_offset, self.box_shape)

    @property
    def is_whole(self) -> bool:
        """The box is all of its tensor."""
        return self.box_shape == self.shape


class Reference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Boxes that the same rank's pack of an earlier attempt of the run holds, by their places in its list of boxes."""

    attempt: Attempt
    index_sha256: Sha256  # of that pack's index, so that it proves what is referred to
    boxes: Annotated[tuple[Count, ...], msgspec.Meta(min_length=1)]  # ascending


class PackIndex(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that one rank wrote, and what it refers to. While it is only in the arena, there are no checksums yet."""

    format: int
    attempt: Attempt
    rank: Count
    world_size: Count
    payload_bytes: Count
    chunk_bytes: Annotated[int, msgspec.Meta(ge=ALIGNMENT_BYTES, le=CHUNK_BYTES_MAX)]
    image_bytes: Count
    boxes: tuple[BoxRecord, ...]  # in order of their offsets
    box_crc32c: tuple[Crc32c, ...]  # of each box
    chunk_crc32c: tuple[Crc32c, ...]  # of each chunk of the payload
    plain: dict[str, Any]  # this rank's plain data by name, as `core.plain` encodes it
    references: Annotated[tuple[Reference, ...], msgspec.Meta(max_length=REFERENCES_MAX)] = ()
    codec: str = ""  # what frames are encoded with, as `core.codec` writes it
    frames: tuple[Frames | None, ...] = ()  # of each box, where there is a codec; None for one that is stored as it is

    @property
    def frames_of_boxes(self) -> tuple[Frames | None, ...]:
        """As `frames`, also where there is no codec."""
        return self.frames or (None,) * len(self.boxes)

    @property
    def stored_bytes(self) -> list[int]:
        """Of each box, in the file."""
        boxes = zip(self.boxes, self.frames_of_boxes, strict=True)
        return [_stored_bytes(record, own) for record, own in boxes]

    def entries(self, private: bool, pack: int) -> list[Entry]:
        """The boxes for `core.layout.read_plan`: this rank's own, or those of the tensors that all ranks share.

        `pack` is what the reader calls this pack.
        """
        return [
            Entry(record.key, record.box, pack, record.offset, record.nbytes, crc32c, own)
            for record, crc32c, own in zip(self.boxes, self.box_crc32c, self.frames_of_boxes, strict=True)
            if record.private == private
        ]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One pack for each rank. `writer` names the coordinator's life that published it."""

    format: int
    ftrain: Name  # version that wrote it
    attempt: Attempt
    world_size: Annotated[int, msgspec.Meta(ge=1)]
    writer: Name
    packs: tuple[PackRecord, ...]


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sha256: Sha256
    manifest: msgspec.Raw


class _IndexFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """A `PackIndex` whose largest part is encoded already."""

    format: int
    attempt: Attempt
    rank: int
    world_size: int
    payload_bytes: int
    chunk_bytes: int
    image_bytes: int
    boxes: msgspec.Raw
    box_crc32c: tuple[int, ...]
    chunk_crc32c: tuple[int, ...]
    plain: dict[str, Any]
    references: tuple[Reference, ...] = ()
    codec: str = ""
    frames: tuple[Frames | None, ...] = ()


_INDEX = msgspec.json.Decoder(PackIndex)
_MANIFEST = msgspec.json.Decoder(Manifest)
_ENVELOPE = msgspec.json.Decoder(_Envelope)


def pack_path(rank: int) -> str:
    """The pack's zarr array, relative to the attempt."""
    return f"packs/{rank:05d}"


def index_path(rank: int) -> str:
    """The pack's index, relative to the attempt."""
    return f"packs/{rank:05d}.index.json"


def data_path(pack: str) -> str:
    """The one file of the zarr array `pack` that holds its bytes."""
    return f"{pack}/c/0"


def encode_index(index: PackIndex, boxes: msgspec.Raw | None = None) -> bytes:
    """The index's file. Its digest is in the pack's record, so it carries none itself.

    `boxes` is `encode_boxes(index.boxes)`, for those who have it already.
    """
    raw = encode_boxes(index.boxes) if boxes is None else boxes
    fields = {name: getattr(index, name) for name in PackIndex.__struct_fields__ if name != "boxes"}
    return msgspec.json.encode(_IndexFile(boxes=raw, **fields))


def encode_boxes(boxes: tuple[BoxRecord, ...]) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(boxes))


def decode_index(data: bytes, path: str, *, sealed: bool = False) -> PackIndex:
    """Read an index back; `sealed` for one from the arena, which has no checksums yet. Raises `CorruptCheckpoint`."""
    if len(data) > INDEX_BYTES_MAX:
        raise CorruptCheckpoint(f"{path}: a pack index of {len(data)} bytes is over the limit of {INDEX_BYTES_MAX}")
    try:
        index = _INDEX.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path}: not a pack index: {str(error)[:PROBLEM_CHARS_MAX]}") from None
    _validate_index(index, path, sealed)
    return index


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest's file: its body, and the checksum of that body's bytes."""
    raw = msgspec.json.encode(manifest)
    return msgspec.json.encode(_Envelope(hashlib.sha256(raw).hexdigest(), msgspec.Raw(raw))) + b"\n"


def decode_manifest(data: bytes, path: str) -> Manifest:
    """Read a manifest back. Raises `CorruptCheckpoint` naming `path` and what is wrong with it."""
    if len(data) > MANIFEST_BYTES_MAX:
        raise CorruptCheckpoint(f"{path}: a manifest of {len(data)} bytes is over the limit of {MANIFEST_BYTES_MAX}")
    try:
        envelope = _ENVELOPE.decode(data)
        if hashlib.sha256(bytes(envelope.manifest)).hexdigest() != envelope.sha256:
            raise CorruptCheckpoint(f"{path}: the manifest does not match its checksum; it was changed or torn")
        manifest = _MANIFEST.decode(envelope.manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path}: not a manifest: {str(error)[:PROBLEM_CHARS_MAX]}") from None
    _validate_manifest(manifest, path)
    return manifest


def check_coverage(indexes: Iterable[PackIndex], where: str) -> None:
    """Each element of every tensor is there exactly once. Raises `CorruptCheckpoint` naming one that is not."""
    alone: set[str] = set()  # covered by one box, as most are
    tensors: dict[str, tuple[BoxRecord, int, list[Box]]] = {}
    for index in indexes:
        for record in index.boxes:
            if record.private:
                continue
            if record.is_whole and all(record.shape):
                if record.key in alone:
                    raise CorruptCheckpoint(f"{where}: {record.key} is not covered exactly once: it is there twice")
                alone.add(record.key)
                continue
            first, rank, boxes = tensors.setdefault(record.key, (record, index.rank, []))
            if (record.dtype, record.shape) != (first.dtype, first.shape):
                raise CorruptCheckpoint(
                    f"{where}: {record.key} is {first.dtype}{list(first.shape)} in the pack of rank {rank}, "
                    f"{record.dtype}{list(record.shape)} in that of rank {index.rank}"
                )
            boxes.append(record.box)
    for key, (first, _, boxes) in tensors.items():
        if key in alone:
            raise CorruptCheckpoint(f"{where}: {key} is not covered exactly once: parts of it are there twice")
        problem = uncovered(first.shape, boxes)
        if problem:
            raise CorruptCheckpoint(f"{where}: {key} is not covered exactly once: {problem}")


def _validate_index(index: PackIndex, path: str, sealed: bool) -> None:
    def check(holds: bool, problem: str) -> None:
        if not holds:
            raise CorruptCheckpoint(f"{path}: {problem}")

    check(index.format in _FORMATS, _unknown(index.format))
    check(index.rank < index.world_size, f"rank {index.rank} in a world of {index.world_size}")
    check(index.payload_bytes > 0 and index.payload_bytes % index.chunk_bytes == 0, "the payload is not whole chunks")
    check(index.chunk_bytes % ALIGNMENT_BYTES == 0, "chunks are not whole pages")
    chunks = index.payload_bytes // index.chunk_bytes
    check(
        index.image_bytes % ALIGNMENT_BYTES == 0
        and index.image_bytes >= index.payload_bytes + shard_index_bytes(chunks),
        f"{index.image_bytes} bytes have no room for the payload and its index",
    )
    check(
        len(index.chunk_crc32c) == (0 if sealed else chunks),
        f"{len(index.chunk_crc32c)} chunk checksums for {chunks} chunks",
    )
    check(
        len(index.box_crc32c) == (0 if sealed else len(index.boxes)),
        f"{len(index.box_crc32c)} box checksums for {len(index.boxes)} boxes",
    )
    check(not (sealed and index.references), "a snapshot in memory refers to other attempts")
    attempts = [index.attempt, *(reference.attempt for reference in index.references)]
    check(len(set(attempts)) == len(attempts), "refers to an attempt twice, or to itself")
    for one in index.references:
        check(all(a < b for a, b in pairwise(one.boxes)), f"the boxes of {one.attempt} are out of order")
    is_compressed = index.format == FORMAT_COMPRESSED
    check(is_compressed == bool(index.codec) == any(index.frames), "format, codec and frames do not go together")
    check(len(index.frames) == (len(index.boxes) if is_compressed else 0), "the frames are not those of the boxes")
    check(not is_compressed or _is_codec(index.codec), f"is compressed with {index.codec!r}, which is not read")
    check(not (sealed and index.frames), "a snapshot in memory is compressed")
    end = 0
    for record, own in zip(index.boxes, index.frames_of_boxes, strict=True):
        problem = _box_problem(record, own, end, index.payload_bytes)
        if problem:
            raise CorruptCheckpoint(f"{path}: the box of {record.key} at {list(record.box_offset)} {problem}")
        end = record.offset + _stored_bytes(record, own)
    seen: set[tuple[str, tuple[int, ...] | None]] = set()
    for record in index.boxes:
        place = (record.key, None if record.private else record.box_offset)
        if place in seen:
            raise CorruptCheckpoint(f"{path}: {record.key} is there twice")
        seen.add(place)


def _unknown(format_: int) -> str:
    return f"format {format_}, but this version reads formats {FORMAT} and {FORMAT_COMPRESSED}"


def _is_codec(text: str) -> bool:
    try:
        return str(Codec.parse(text)) == text
    except ValueError:
        return False


def _box_problem(record: BoxRecord, own: Frames | None, end: int, payload_bytes: int) -> str:
    """What is wrong with a box that follows one that ends at `end`; empty when nothing is."""
    item = ITEM_BYTES.get(record.dtype)
    if item is None:
        return f"has the unknown dtype {record.dtype}"
    if _misplaced(record):
        return f"does not fit into the shape {list(record.shape)}"
    size = prod(record.box_shape) * item
    if record.nbytes != size:
        return f"has {record.nbytes} bytes instead of {size}"
    if record.offset % ALIGNMENT_BYTES:
        return "begins within a page"
    if record.offset < end:
        return "overlaps the one before it, or is out of order"
    if own is not None and not frames.is_cut(record.shape, item, record.nbytes):
        return "is too small to be compressed"
    if own is not None and (problem := frames.problem(own, record.box_shape, item)):
        return problem
    if record.offset + _stored_bytes(record, own) > payload_bytes:
        return "reaches beyond the payload"
    return ""


def _stored_bytes(record: BoxRecord, own: Frames | None) -> int:
    """Of a box, in the file: of its frames, where it has any."""
    return record.nbytes if own is None else own.stored_bytes


def _misplaced(record: BoxRecord) -> bool:
    """The box is not inside of its tensor, or is a part of a private one."""
    if record.is_whole and len(record.box_offset) == len(record.shape) and not any(record.box_offset):
        return False
    dimensions = len(record.shape)
    if len(record.box_offset) != dimensions or len(record.box_shape) != dimensions:
        return True
    if record.private:
        return record.box_shape != record.shape or any(record.box_offset)
    return any(
        at + count > size for at, count, size in zip(record.box_offset, record.box_shape, record.shape, strict=True)
    )


def _validate_manifest(manifest: Manifest, path: str) -> None:
    if manifest.format not in _FORMATS:
        raise CorruptCheckpoint(f"{path}: {_unknown(manifest.format)}")
    ranks = [pack.rank for pack in manifest.packs]
    if len(ranks) != manifest.world_size or ranks != list(range(len(ranks))):
        raise CorruptCheckpoint(f"{path}: the packs are not one for each of {manifest.world_size} ranks, in order")
    for pack in manifest.packs:
        for what, said, true in (
            ("pack", pack.path, pack_path(pack.rank)),
            ("pack index", pack.index_path, index_path(pack.rank)),
        ):
            if said != true:
                raise CorruptCheckpoint(f"{path}: the {what} of rank {pack.rank} is said to be at {said!r:.200}")
