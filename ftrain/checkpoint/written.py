"""All boxes of a checkpoint, and the files that hold them: its own packs, and packs of earlier attempts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from ftrain.core.manifest import (
    MANIFEST_PATH,
    Manifest,
    PackIndex,
    Reference,
    data_path,
    decode_index,
    index_path,
    pack_path,
)
from ftrain.core.messages import Attempt, PackRecord
from ftrain.errors import CorruptCheckpoint, NotFound
from ftrain.storage.base import Storage

THREADS = 4  # that read indexes
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Written:
    """One pack, as far as a checkpoint needs it: of an earlier attempt, `index` has those boxes alone."""

    index: PackIndex
    base: str  # of the attempt that wrote it

    @property
    def rank(self) -> int:
        return self.index.rank

    @property
    def file(self) -> str:
        return f"{self.base}/{data_path(pack_path(self.rank))}"

    def damaged(self, storage: Storage, key: str, offset: int, nbytes: int, how: str = "") -> CorruptCheckpoint:
        """What to raise where bytes of the tensor `key` are not what was written."""
        problem = how or "do not match their checksum"
        return CorruptCheckpoint(
            f"{storage.url}/{self.file}: the {nbytes} bytes at offset {offset} {problem} "
            f"(tensor {key}, saved by rank {self.rank}); restore from another checkpoint"
        )


def read_written(storage: Storage, base: str, manifest: Manifest) -> list[Written]:
    """All packs of the checkpoint at `base`, each proved by its digest: its own by rank, then those it refers to.

    Raises `CorruptCheckpoint`, or `NotFound` where a file is gone.
    """
    packs = read_packs(storage, base, manifest)
    if manifest.format != format_of(packs):
        raise CorruptCheckpoint(f"{base}/{MANIFEST_PATH}: is of format {manifest.format}, its packs are not")
    return packs


def format_of(packs: Iterable[Written]) -> int:
    """Of a checkpoint of these packs."""
    return max(pack.index.format for pack in packs)


def read_packs(storage: Storage, base: str, manifest: Manifest) -> list[Written]:
    """As `read_written`, for a manifest of which the format is not known yet."""
    own = _for_each(lambda pack: read_index(storage, base, manifest, pack), manifest.packs)
    wanted = [(index, one) for index in own for one in index.references]
    run = _run_of(storage, base, manifest.attempt) if wanted else ""
    earlier = _for_each(lambda one: _read_reference(storage, run, *one), wanted)
    _check_once([*own, *(one.index for one in earlier)], base)
    return [*(Written(index, base) for index in own), *earlier]


def _for_each(read: Callable[[T], R], what: Sequence[T]) -> list[R]:
    """Several at a time, where there are several."""
    if len(what) < 2:
        return [read(one) for one in what]
    with ThreadPoolExecutor(min(THREADS, len(what)), "ftrain-indexes") as pool:
        return list(pool.map(read, what))


def read_index(storage: Storage, base: str, manifest: Manifest, pack: PackRecord) -> PackIndex:
    """The index of one of the manifest's packs below `base`, proved by its digest; its pack has the right size.

    Raises `CorruptCheckpoint`, or `NotFound` where a file is gone.
    """
    path = f"{base}/{pack.index_path}"
    index = _read(storage, path, pack.index_sha256, pack.rank)
    if (index.rank, index.attempt, index.world_size) != (pack.rank, manifest.attempt, manifest.world_size):
        raise CorruptCheckpoint(f"{path}: is of rank {index.rank} of {index.world_size}, {index.attempt}")
    if tuple(one.attempt for one in index.references) != pack.refers:
        raise CorruptCheckpoint(f"{path}: does not refer to the attempts that the manifest says")
    _check_size(storage, f"{base}/{data_path(pack.path)}", pack.rank, index, pack.file_bytes)
    return index


def referred(packs: Iterable[PackRecord]) -> frozenset[Attempt]:
    """The attempts that any of the packs refers to."""
    return frozenset(attempt for pack in packs for attempt in pack.refers)


def _read_reference(storage: Storage, run: str, index: PackIndex, reference: Reference) -> Written:
    base = f"{run}{reference.attempt.path}"
    path = f"{base}/{index_path(index.rank)}"
    found = _read(storage, path, reference.index_sha256, index.rank)
    if (found.rank, found.attempt) != (index.rank, reference.attempt):
        raise CorruptCheckpoint(f"{path}: is of rank {found.rank}, {found.attempt}")
    if reference.boxes[-1] >= len(found.boxes):
        raise CorruptCheckpoint(f"{path}: has {len(found.boxes)} boxes, but {index.attempt} refers to more")
    _check_size(storage, f"{base}/{data_path(pack_path(found.rank))}", found.rank, found, found.image_bytes)
    chosen = msgspec.structs.replace(
        found,
        boxes=tuple(found.boxes[number] for number in reference.boxes),
        box_crc32c=tuple(found.box_crc32c[number] for number in reference.boxes),
        frames=tuple(found.frames[number] for number in reference.boxes) if found.frames else (),
        plain={},
        references=(),
    )
    return Written(chosen, base)


def _read(storage: Storage, path: str, sha256: str, rank: int) -> PackIndex:
    data = storage.read(path)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CorruptCheckpoint(f"{path}: the pack index of rank {rank} does not match its sha256")
    return decode_index(data, path)


def _check_size(storage: Storage, file: str, rank: int, index: PackIndex, nbytes: int) -> None:
    size = storage.size(file)
    if not size == nbytes == index.image_bytes:
        raise CorruptCheckpoint(f"{file}: the pack of rank {rank} has {size} bytes instead of {nbytes}")


def _run_of(storage: Storage, base: str, attempt: Attempt) -> str:
    """The run's directory below the storage's root, "" or with a slash at its end."""
    if base != attempt.path and not base.endswith(f"/{attempt.path}"):
        raise CorruptCheckpoint(
            f"{storage.url}/{base}: refers to earlier checkpoints of its run, but is not in a run's directory: open it "
            f"as RUN/{attempt.path}, or export it there"
        )
    return base[: -len(attempt.path)]


def _check_once(indexes: Sequence[PackIndex], where: str) -> None:
    """What belongs to one rank alone is there once; for what ranks share, `check_coverage` sees to that."""
    seen: set[tuple[int, str]] = set()
    for index in indexes:
        for record in index.boxes:
            if record.private and (index.rank, record.key) in seen:
                raise CorruptCheckpoint(f"{where}: {record.key} of rank {index.rank} is there twice")
            if record.private:
                seen.add((index.rank, record.key))


def is_gone(storage: Storage, base: str, attempt: Attempt, referred_to: Attempt, rank: int) -> bool:
    """A quick look: whether the files of a pack that a checkpoint refers to are missing."""
    path = f"{_run_of(storage, base, attempt)}{referred_to.path}"
    try:
        storage.size(f"{path}/{data_path(pack_path(rank))}")
    except NotFound:
        return True
    return not storage.exists(f"{path}/{index_path(rank)}")
