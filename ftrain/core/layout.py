"""Which bytes of which tensor are where: from a mesh and placements to boxes, and from files back to boxes.

A *box* is an offset and a shape inside the global tensor. Each rank holds a *shard* of each tensor that it names: as a
rule one box, several where it is sharded with strides. Ranks that hold the same box are replicas, of which one writes
it (`core.write_plan`). A reader asks for boxes of its own mesh and gets them from the boxes that were written, whatever
mesh those came from.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import prod

import msgspec

from ftrain.core.frames import Frames
from ftrain.core.placement import Run, local_runs
from ftrain.errors import CorruptCheckpoint, UnsupportedTensor

ALIGNMENT_BYTES = 4096  # of every tensor in a pack, and of the pack: what direct I/O needs
CHUNK_BYTES_MAX = 4 << 20  # an inner chunk of the pack's shard, and what one checksum covers
PIECE_BYTES_MAX = 32 << 20  # of a read that is not straight into its place

ITEM_BYTES: Mapping[str, int] = {
    "bool": 1,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "bfloat16": 2,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
}


def item_bytes(dtype: str, key: str) -> int:
    """Bytes of one element. Raises `UnsupportedTensor` naming `key` for a dtype that the format does not have."""
    try:
        return ITEM_BYTES[dtype]
    except KeyError:
        raise UnsupportedTensor(
            f"{key}: a checkpoint cannot hold the dtype {dtype}; convert the tensor first"
        ) from None


class Mesh(msgspec.Struct, frozen=True, gc=False):
    """Ranks in a grid. `ranks` is row-major: the last dimension of `shape` runs fastest."""

    shape: tuple[int, ...]
    ranks: tuple[int, ...]


class TensorSpec(msgspec.Struct, frozen=True, gc=False):
    """One rank's view of one tensor.

    `shape` is the global shape, `placements` has one for each mesh dimension, as `core.placement` writes them.
    Without a mesh the tensor is the same on all ranks that name its key, unless it is `private`: then it belongs to
    its rank alone.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    mesh: Mesh | None = None
    placements: tuple[str, ...] = ()
    private: bool = False

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return prod(self.shape) * item_bytes(self.dtype, self.key)


def describe(spec: TensorSpec) -> str:
    """The tensor for people: float32[10, 4], and how it is placed."""
    where = f" placed {','.join(spec.placements)} on a mesh of {list(spec.mesh.shape)}" if spec.mesh else ""
    return f"{spec.dtype}{list(spec.shape)}{where}"


class Box(msgspec.Struct, frozen=True, order=True, gc=False):
    """A block of a global tensor. A scalar's box is `Box((), ())`, of volume 1."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def volume(self) -> int:
        return prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """What both hold, or None."""
        offset = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        ends = (
            min(a + n, b + m) for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )
        shape = tuple(end - start for start, end in zip(offset, ends, strict=True))
        return Box(offset, shape) if all(size > 0 for size in shape) else None


def whole(shape: tuple[int, ...]) -> Box:
    """The box that is the whole tensor."""
    return Box((0,) * len(shape), shape)


class Shard(msgspec.Struct, frozen=True, gc=False):
    """What one rank holds of a tensor, in a local tensor of `shape`: boxes with elements, each at its offset there.

    No box where the shard is empty.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    offsets: tuple[tuple[int, ...], ...]  # of each box in the local tensor


def local_shard(spec: TensorSpec, rank: int) -> Shard | None:
    """What `rank` holds: None when it is not in the mesh."""
    if spec.mesh is None:
        return _shard([[(0, size)] for size in spec.shape])
    position = _positions(spec.mesh).get(rank)
    if position is None:
        return None
    return _placed(spec.shape, spec.mesh.shape, unravel(position, spec.mesh.shape), spec.placements)


@lru_cache(maxsize=4096)
def _placed(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], coordinate: tuple[int, ...], placements: tuple[str, ...]
) -> Shard:
    return _shard(local_runs(shape, mesh_shape, coordinate, placements))


def _shard(runs: Sequence[Sequence[Run]]) -> Shard:
    shape = tuple(sum(count for _, count in one) for one in runs)
    if 0 in shape:
        return Shard(shape, (), ())
    if all(len(one) == 1 for one in runs):
        return Shard(shape, (Box(tuple(one[0][0] for one in runs), shape),), ((0,) * len(shape),))
    begins = [itertools.accumulate((count for _, count in one[:-1]), initial=0) for one in runs]
    blocks = [list(zip(one, begin, strict=True)) for one, begin in zip(runs, begins, strict=True)]
    boxes, offsets = [], []
    for block in itertools.product(*blocks):
        boxes.append(Box(tuple(begin for (begin, _), _ in block), tuple(count for (_, count), _ in block)))
        offsets.append(tuple(offset for _, offset in block))
    return Shard(shape, tuple(boxes), tuple(offsets))


@lru_cache(maxsize=64)
def _positions(mesh: Mesh) -> Mapping[int, int]:
    return {rank: position for position, rank in enumerate(mesh.ranks)}


def unravel(position: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The coordinate of the position in C order."""
    coordinate = []
    for size in reversed(shape):
        position, at = divmod(position, size)
        coordinate.append(at)
    return tuple(reversed(coordinate))


# ------------------------------------------------------------------------------------------------------ a pack's image


def image_of(end: int) -> tuple[int, int, int, int]:
    """(payload_bytes, chunk_bytes, index_offset, image_bytes) of an image whose boxes end at `end`."""
    chunks = max(1, -(-end // CHUNK_BYTES_MAX))
    chunk_bytes = max(ALIGNMENT_BYTES, align(-(-end // chunks)))
    payload_bytes = chunks * chunk_bytes
    index_bytes = shard_index_bytes(chunks)
    image_bytes = align(payload_bytes + index_bytes)
    return payload_bytes, chunk_bytes, image_bytes - index_bytes, image_bytes


def shard_index_bytes(chunks: int) -> int:
    """An offset and a length of 64 bits for each chunk, and the crc32c of them all."""
    return 16 * chunks + 4


def align(nbytes: int) -> int:
    """The next multiple of 4 KiB."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


# ----------------------------------------------------------------------------------------------------- reading it back


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One written box: `nbytes` at `offset` of the payload of the pack that rank `pack` wrote.

    With `frames` these are there instead, `crc32c` is of them, and `nbytes` is what they become.
    """

    key: str
    box: Box
    pack: int
    offset: int
    nbytes: int
    crc32c: int
    frames: Frames | None = None

    @property
    def item_bytes(self) -> int:
        return self.nbytes // self.box.volume


class Piece(msgspec.Struct, frozen=True, gc=False):
    """What one entry gives to one wanted box.

    The elements of `box` (in global coordinates) are all within the `nbytes` at `offset` of the entry's pack, with
    the strides of the entry's box: where `box` does not span its inner dimensions there are others between them. Of
    an entry in frames `offset` and `nbytes` say where they would be, were it stored as it is.
    """

    wanted: int  # place in the list of wanted boxes
    entry: Entry
    box: Box
    offset: int
    nbytes: int

    @property
    def is_whole(self) -> bool:
        """The piece is all of the entry, so that the entry's own checksum proves it."""
        return self.box == self.entry.box


def read_plan(wanted: Sequence[tuple[str, Box]], entries: Iterable[Entry]) -> list[Piece]:
    """What to read for every wanted (key, box). The entries of a key are disjoint (`uncovered` found nothing).

    Raises `CorruptCheckpoint` naming a box of which a part was never written.
    """
    by_key: dict[str, list[Entry]] = {key: [] for key, _ in wanted}
    for entry in entries:
        if entry.key in by_key and entry.box.volume:
            by_key[entry.key].append(entry)
    pieces = []
    for number, (key, box) in enumerate(wanted):
        found = 0
        if box.volume == 0:
            continue
        for entry in by_key[key]:
            overlap = box.intersect(entry.box)
            if overlap is not None:
                found += overlap.volume
                pieces.append(_piece(number, entry, overlap))
        if found != box.volume:
            raise CorruptCheckpoint(
                f"{key}: {found} of the {box.volume} elements at offset {list(box.offset)}, shape {list(box.shape)} "
                "are in the checkpoint; it is incomplete"
            )
    return pieces


def split(piece: Piece, nbytes_max: int = PIECE_BYTES_MAX) -> list[Piece]:
    """The piece in parts that each need at most `nbytes_max` bytes in memory (or one element, where that is more)."""
    rest, done = [piece], []
    while rest:
        part = rest.pop()
        dim = next((dim for dim, size in enumerate(part.box.shape) if size > 1), None)
        if part.nbytes <= nbytes_max or dim is None:
            done.append(part)
            continue
        half = part.box.shape[dim] // 2
        for start, size in ((half, part.box.shape[dim] - half), (0, half)):
            offset, shape = list(part.box.offset), list(part.box.shape)
            offset[dim] += start
            shape[dim] = size
            rest.append(_piece(part.wanted, part.entry, Box(tuple(offset), tuple(shape))))
    return done


def _piece(number: int, entry: Entry, box: Box) -> Piece:
    first = last = 0
    for at, size, begin, count in zip(entry.box.offset, entry.box.shape, box.offset, box.shape, strict=True):
        first = first * size + begin - at
        last = last * size + begin - at + count - 1
    return Piece(number, entry, box, entry.offset + first * entry.item_bytes, (last - first + 1) * entry.item_bytes)


def strides(box: Box) -> tuple[int, ...]:
    """Elements from one index to the next in each dimension of a C-contiguous box."""
    steps, step = [], 1
    for size in reversed(box.shape):
        steps.append(step)
        step *= size
    return tuple(reversed(steps))


def uncovered(shape: tuple[int, ...], boxes: Sequence[Box]) -> str:
    """Why the boxes are not the tensor, each element exactly once; empty when they are."""
    for box in boxes:
        fits = len(box.offset) == len(box.shape) == len(shape) and all(
            0 <= at <= at + count <= size for at, count, size in zip(box.offset, box.shape, shape, strict=True)
        )
        if not fits:
            return f"the box at {list(box.offset)} of shape {list(box.shape)} is outside of the shape {list(shape)}"
    total = sum(box.volume for box in boxes)
    if total != prod(shape):
        return f"{total} of {prod(shape)} elements are there"
    return _overlap(boxes)


def _overlap(boxes: Sequence[Box]) -> str:
    """A sweep along the dimension that tells most boxes apart, comparing only those that meet there."""
    solid = [box for box in boxes if box.volume]
    if len(solid) < 2 or not solid[0].shape:
        return "" if len(solid) < 2 else "the same element is there twice"
    dim = max(range(len(solid[0].shape)), key=lambda dim: len({box.offset[dim] for box in solid}))
    active: list[Box] = []
    for box in sorted(solid, key=lambda box: box.offset[dim]):
        active = [other for other in active if other.offset[dim] + other.shape[dim] > box.offset[dim]]
        for other in active:
            both = box.intersect(other)
            if both is not None:
                return f"the elements at {list(both.offset)} of shape {list(both.shape)} are there twice"
        active.append(box)
    return ""
