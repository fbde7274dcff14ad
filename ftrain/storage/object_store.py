"""Storage in an object store: S3 and what speaks like it, Google Cloud Storage, Azure.

A small object is made by one conditional create. A large pack goes up in parts, which no store makes conditional on all
their ways, so its writer first makes a claim beside it, conditionally: who has the claim is the only one to write.
Each create carries an identifier of its own, its write-id, in the object's metadata: when a reply is lost, or says
that the name is taken, the identifier that is found there tells whether it was us. docs/format.md.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from ftrain import _native
from ftrain._native import crc32c_address
from ftrain.errors import (
    AlreadyExists,
    CorruptCheckpoint,
    ForeignAnswer,
    NotFound,
    StorageError,
    UnknownOutcome,
    UsageError,
)
from ftrain.storage.base import Effort, Ranges
from ftrain.storage.bucket import Bucket
from ftrain.storage.pace import Pace
from ftrain.storage.pack import Pack, PackParts, Parts, Stream
from ftrain.storage.spans import Piece, Span, errands

log = logging.getLogger("ftrain")
PART_BYTES = 8 << 20
PARTS_MAX = 10_000  # of one upload, to S3
READS_IN_FLIGHT = 16
PROBE = ".ftrain-probe"

_Parts = TypeVar("_Parts", bound=Parts)


@dataclass(frozen=True, slots=True)
class Patience:
    """How often a create is tried whose reply does not come, and how long to wait in between, growing twofold."""

    tries: int = 6
    wait_seconds: float = 0.2
    wait_seconds_max: float = 5.0

    def waits(self) -> Iterator[float]:
        """Before each try; with jitter, for whole jobs meet the same trouble at the same time."""
        yield 0.0
        for number in range(self.tries - 1):
            yield random.uniform(0.5, 1.0) * min(self.wait_seconds * 2**number, self.wait_seconds_max)


class ObjectStorage:
    """`Storage` below a bucket's prefix. Packs larger than `part_bytes` go up in parts of that size."""

    def __init__(self, bucket: Bucket, part_bytes: int = PART_BYTES, patience: Patience | None = None) -> None:
        self._bucket = bucket
        self._part_bytes = part_bytes
        self._patience = patience or Patience()

    @property
    def url(self) -> str:
        return self._bucket.url

    def check(self) -> None:
        key = f"{PROBE}-{uuid.uuid4().hex}"
        try:
            try:
                self._create(key, b"first")
                self._bucket.put_new(key, b"second", uuid.uuid4().hex)
            except AlreadyExists:
                if self._bucket.get(key) == b"first":
                    return
        except ForeignAnswer as error:
            raise UsageError(f"{self.url} cannot be used: {error}") from None
        except UnknownOutcome as error:
            raise StorageError(f"{self.url} does not answer: {error}") from None
        except StorageError as error:
            raise UsageError(f"{self.url} cannot be used: {error}") from None
        finally:
            self._forget(key)
        raise UsageError(
            f"{self.url}: this store overwrites objects although it is asked not to (If-None-Match: *), so two "
            "coordinators could both commit; use a store or a gateway that honours conditional creates"
        )

    def create(self, path: str, data: bytes) -> None:
        self._create(self._key(path), data)

    def confirm(self, path: str, data: bytes) -> bool:
        try:
            return self._bucket.get(self._key(path)) == data
        except NotFound:
            return False

    def write_pack(
        self, path: str, pack: Pack, effort: Effort, *, should_stop: Callable[[], bool]
    ) -> tuple[list[int], list[int]]:
        parts = self._write(path, pack.nbytes, partial(PackParts, pack), effort, should_stop)
        return parts.boxes, parts.chunks

    def write_stream(self, path: str, stream: Stream, effort: Effort, *, should_stop: Callable[[], bool]) -> None:
        self._write(path, stream.nbytes_max, partial(_Regrouped, stream), effort, should_stop)

    def read(self, path: str) -> bytes:
        return self._bucket.get(self._key(path))

    def read_ranges(self, ranges: Ranges) -> list[int]:
        for path in ranges.paths:
            self._key(path)
        reader = _Reader(self._bucket, ranges)
        with ThreadPoolExecutor(READS_IN_FLIGHT, "ftrain-read") as pool:
            tasks = [pool.submit(reader.read, errand) for errand in errands(ranges)]
            try:
                for task in tasks:
                    task.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return reader.damaged()

    def size(self, path: str) -> int:
        return self._bucket.look(self._key(path)).nbytes

    def exists(self, path: str) -> bool:
        key = self._key(path)
        try:
            self._bucket.look(key)
        except NotFound:
            return bool(self._bucket.keys(key, count_max=1))
        return True

    def list(self, prefix: str) -> list[str]:
        key = self._key(prefix)
        objects, levels = self._bucket.names(key)
        levels = [name for name in levels if not name.startswith(".")]
        # Stores that are made of directories go on showing emptied levels for a while.
        there = {name for name in levels if self._bucket.keys(f"{key}/{name}".lstrip("/"), count_max=1)}
        return sorted(there.union(name for name in objects if not name.startswith(".")))

    def remove_tree(self, path: str) -> None:
        key = self._key(path)
        below = self._bucket.keys(key)
        depth = key.count("/") + 1 if key else 0
        # Its own objects first: without the manifest nobody takes a half removed checkpoint for a whole one.
        self._bucket.delete([one for one in below if one.count("/") == depth])
        self._bucket.delete([one for one in below if one.count("/") != depth])
        self._bucket.abort_uploads(key)

    def _write(
        self,
        path: str,
        nbytes_max: int,
        cut: Callable[[int, Pace], _Parts],
        effort: Effort,
        should_stop: Callable[[], bool],
    ) -> _Parts:
        """Make `path` from what `cut` cuts into parts of so many bytes: in one create, or in an upload."""
        key = self._key(path)
        part_bytes = self._part_bytes_of(nbytes_max)
        parts = cut(part_bytes, Pace(effort.bytes_per_second_max, should_stop, f"{self.url}/{path}"))
        if nbytes_max <= part_bytes:
            self._create(key, b"".join(parts))
        else:
            self._upload(key, parts, part_bytes)
        return parts

    def _part_bytes_of(self, nbytes: int) -> int:
        """Of an object of so many bytes, so that there are not too many parts."""
        return max(self._part_bytes, -(-nbytes // (PARTS_MAX << 20)) << 20)

    def _key(self, path: str) -> str:
        if path and any(part in ("", ".", "..") for part in path.split("/")):
            raise StorageError(f"{path!r} is not a path inside of {self.url}")
        return path

    def _create(self, key: str, data: bytes) -> None:
        """One conditional create, tried again while it may not have been done: with one write-id it is done once."""
        write_id = uuid.uuid4().hex
        lost: UnknownOutcome | None = None
        for wait in self._patience.waits():
            time.sleep(wait)
            try:
                self._bucket.put_new(key, data, write_id)
                return
            except AlreadyExists as error:
                try:
                    if self._is_ours(key, write_id):
                        return
                except UnknownOutcome as unknown:  # or nothing is there: stores answer so, too, while another is at it
                    lost = unknown
                else:
                    raise error
            except UnknownOutcome as error:
                lost = error
            except StorageError as error:
                if lost is None:
                    raise
                raise UnknownOutcome(f"{error}; an earlier try may have been done") from error
        assert lost is not None
        if not self._is_ours(key, write_id, lost):
            raise AlreadyExists(f"cannot write {self.url}/{key}: it exists already")

    def _is_ours(self, key: str, write_id: str, lost: UnknownOutcome | None = None) -> bool:
        """Whether what is there was made under this write-id. Raises `lost`, or `UnknownOutcome`, where nobody says."""
        try:
            return self._bucket.look(key).write_id == write_id
        except StorageError as error:
            raise lost or UnknownOutcome(f"{self.url}/{key} may be ours or another's: {error}") from error

    def _upload(self, key: str, parts: Parts, part_bytes: int) -> None:
        claim = self._claim(key)
        write_id = uuid.uuid4().hex
        try:
            self._refuse_taken(key)
            self._bucket.put_parts(key, parts, part_bytes, write_id)
        except UnknownOutcome as error:
            if parts.all_taken:  # its end was asked for, perhaps
                if not self._is_ours(key, write_id, error):
                    raise AlreadyExists(f"cannot write {self.url}/{key}: it exists already") from error
                return
            self._forget(claim)
            raise StorageError(str(error)) from error
        except StorageError:
            if parts.all_taken and self._was_ours(key, write_id):
                return
            self._forget(claim)
            raise
        except BaseException:  # what the parts raised: the upload was given up
            self._forget(claim)
            raise

    def _claim(self, key: str) -> str:
        directory, _, name = key.rpartition("/")
        claim = f"{directory}/.{name}.claim".lstrip("/")
        try:
            self._create(claim, b"")
        except AlreadyExists:
            raise AlreadyExists(f"cannot write {self.url}/{key}: another writer is at it, or was") from None
        return claim

    def _refuse_taken(self, key: str) -> None:
        with contextlib.suppress(NotFound):
            self._bucket.look(key)
            raise AlreadyExists(f"cannot write {self.url}/{key}: it exists already")

    def _was_ours(self, key: str, write_id: str) -> bool:
        try:
            return self._bucket.look(key).write_id == write_id
        except NotFound:
            return False

    def _forget(self, key: str) -> None:
        """Remove what is of no use any more; if that fails it lies there until its tree is removed."""
        try:
            self._bucket.delete([key])
        except StorageError as error:
            log.debug("%s/%s stays for now: %s", self.url, key, error)


class _Regrouped:
    """A stream in parts of `part_bytes`, each in memory of its own; only the last may be smaller."""

    def __init__(self, stream: Stream, part_bytes: int, before: Callable[[int], None]) -> None:
        self._stream = stream
        self._part_bytes = part_bytes
        self._before = before
        self.all_taken = False

    def __iter__(self) -> Iterator[memoryview]:
        held, done = bytearray(), 0
        with contextlib.closing(iter(self._stream)) as parts:
            for part in parts:
                self._before(done + len(held))
                held += part
                while len(held) > self._part_bytes:
                    full, held = held[: self._part_bytes], held[self._part_bytes :]
                    done += len(full)
                    yield memoryview(full)
        self.all_taken = True
        yield memoryview(held)


class _Reader:
    """Brings ranges to memory and proves them. Its reads run in several threads."""

    def __init__(self, bucket: Bucket, ranges: Ranges) -> None:
        self._bucket = bucket
        self._ranges = ranges
        self._sums = [0] * len(ranges)  # of what of the range was read so far; each is some one thread's
        self._cut: set[int] = set()  # ranges in several pieces that lie in memory: summed when all is there

    def read(self, errand: Sequence[Span]) -> None:
        for span in errand:
            nbytes = span.end - span.begin
            data = self._bucket.get_range(span.path, span.begin, nbytes)
            if len(data) < nbytes:
                raise CorruptCheckpoint(
                    f"{self._bucket.url}/{span.path} was cut short: it ends at {span.begin + len(data)}, "
                    f"before {span.end}"
                )
            source = np.frombuffer(data, np.uint8).ctypes.data
            for piece in span.pieces:
                self._take(piece, source + piece.offset - span.begin)

    def _take(self, piece: Piece, source: int) -> None:
        if piece.address:
            _native.copy_batch([(piece.address, source, piece.nbytes)])
        if piece.address and piece.nbytes < self._ranges.sizes[piece.place]:
            self._cut.add(piece.place)
        else:
            self._sums[piece.place] = crc32c_address(source, piece.nbytes, self._sums[piece.place])

    def damaged(self) -> list[int]:
        ranges = self._ranges
        for place in self._cut:
            self._sums[place] = crc32c_address(ranges.addresses[place], ranges.sizes[place])
        return [place for place, found in enumerate(self._sums) if found != ranges.sums[place]]
