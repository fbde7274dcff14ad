"""What of a snapshot is byte for byte what its rank wrote for an earlier commit, and need not be written again.

The agent remembers the SHA-256 of boxes, in its own memory: a box is the same only if its digest is. Digests cost time
(about as much as a fast disk), so a box gets one only while it looks as if it did not change: a sample of its bytes
is compared first. What is trained differs there, and is written without being digested; what is frozen is digested
instead of being written.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ftrain._native import crc32c_address
from ftrain.core.manifest import BoxRecord, Reference
from ftrain.core.messages import Attempt
from ftrain.errors import StorageError

BYTES_MIN = 4096  # smaller boxes are written always: their own pages cost no more than a reference
SAVED_MIN = 1 / 8  # of a pack's bytes, below which it is written whole
OWNERS_MAX = 8  # earlier attempts that one pack refers to: each of them stays on storage for it, with all that it holds
SAMPLE_BYTES = 4096  # at the beginning, in the middle and at the end
DIGEST_BYTES = 64 << 20  # at a time, between two looks whether to stop

Identity = tuple[str, str, tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]


@dataclass(frozen=True, slots=True)
class Stored:
    """A box on storage: box `number` of the pack that `attempt` has of this rank."""

    attempt: Attempt
    index_sha256: str
    number: int
    sample: int
    sha256: bytes | None  # None where nobody has computed it


@dataclass(frozen=True, slots=True)
class Split:
    """The numbers of a snapshot's boxes that are to be written, and the others: where they are already."""

    changed: tuple[int, ...]
    stored: Mapping[int, Stored]
    samples: Sequence[int]  # of all boxes
    digests: Mapping[int, bytes]  # of those of which one was computed

    @property
    def references(self) -> tuple[Reference, ...]:
        """For the index, in order of attempts."""
        found: dict[tuple[Attempt, str], list[int]] = {}
        for one in self.stored.values():
            found.setdefault((one.attempt, one.index_sha256), []).append(one.number)
        return tuple(Reference(*owner, tuple(sorted(numbers))) for owner, numbers in sorted(found.items()))


@dataclass(slots=True)
class Memory:
    """What an agent knows of what its ranks have written. For several threads, each with ranks of its own."""

    _known: dict[int, dict[Attempt, Mapping[Identity, Stored]]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, rank: int, base: Attempt | None) -> Mapping[Identity, Stored]:
        """What the rank has on storage as a part of the commit `base`; nothing where that is not known here."""
        with self._lock:
            return self._known.get(rank, {}).get(base, {}) if base is not None else {}

    def remember(self, rank: int, base: Attempt | None, attempt: Attempt, boxes: Mapping[Identity, Stored]) -> None:
        """The rank has persisted `attempt`: the next base is that, or still `base`, where it comes to no commit."""
        with self._lock:
            known = self._known.get(rank, {})
            kept = {base: known[base]} if base is not None and base in known else {}
            self._known[rank] = {**kept, attempt: boxes}


def identity(box: BoxRecord) -> Identity:
    return box.key, box.dtype, box.shape, box.box_offset, box.box_shape, box.private


def split(
    boxes: Sequence[BoxRecord],
    addresses: Sequence[int],
    known: Mapping[Identity, Stored],
    should_stop: Callable[[], bool],
) -> Split:
    """Compare boxes that lie at `addresses` with what is `known`. Raises `StorageError` when told to stop."""
    samples = [_sample(address, box.nbytes) for address, box in zip(addresses, boxes, strict=True)]
    digests: dict[int, bytes] = {}
    stored: dict[int, Stored] = {}
    for number, (box, address) in enumerate(zip(boxes, addresses, strict=True)):
        before = known.get(identity(box))
        if before is None or before.sample != samples[number] or before.sha256 is None or box.nbytes < BYTES_MIN:
            continue
        digests[number] = _digest(address, box.nbytes, should_stop)
        if digests[number] == before.sha256:
            stored[number] = before
    stored = _of_few_owners(boxes, stored)
    if sum(boxes[number].nbytes for number in stored) < SAVED_MIN * sum(box.nbytes for box in boxes):
        stored = {}
    changed = tuple(number for number in range(len(boxes)) if number not in stored)
    return Split(changed, stored, samples, digests)


def written(
    found: Split,
    boxes: Sequence[BoxRecord],
    addresses: Sequence[int],
    known: Mapping[Identity, Stored],
    attempt: Attempt,
    index_sha256: str,
    should_stop: Callable[[], bool],
) -> Mapping[Identity, Stored]:
    """What is on storage once the changed boxes have been written, in their order, as the pack of `attempt`."""
    now = {identity(boxes[number]): one for number, one in found.stored.items()}
    for place, number in enumerate(found.changed):
        box, sample = boxes[number], found.samples[number]
        sha256 = found.digests.get(number)
        before = known.get(identity(box))
        looks_frozen = before is None or before.sample == sample  # one that nobody has seen before may be
        if sha256 is None and looks_frozen and box.nbytes >= BYTES_MIN:
            sha256 = _digest(addresses[number], box.nbytes, should_stop)
        now[identity(box)] = Stored(attempt, index_sha256, place, sample, sha256)
    return now


def _of_few_owners(boxes: Sequence[BoxRecord], stored: dict[int, Stored]) -> dict[int, Stored]:
    """Without the references to those attempts that have least of it, where there are too many."""
    nbytes: dict[Attempt, int] = {}
    for number, one in stored.items():
        nbytes[one.attempt] = nbytes.get(one.attempt, 0) + boxes[number].nbytes
    kept = sorted(nbytes, key=lambda attempt: nbytes[attempt], reverse=True)[:OWNERS_MAX]
    return {number: one for number, one in stored.items() if one.attempt in kept}


def _sample(address: int, nbytes: int) -> int:
    size = min(nbytes, SAMPLE_BYTES)
    found = 0
    for at in (0, (nbytes - size) // 2, nbytes - size):
        found = crc32c_address(address + at, size, found)
    return found


def _digest(address: int, nbytes: int, should_stop: Callable[[], bool]) -> bytes:
    found = hashlib.sha256()
    for at in range(0, nbytes, DIGEST_BYTES):
        if should_stop():
            raise StorageError("given up while unchanged tensors were looked for")
        count = min(DIGEST_BYTES, nbytes - at)
        found.update(memoryview((ctypes.c_ubyte * count).from_address(address + at)))
    return found.digest()
