"""What ftrain asks of storage: exclusive, durable creation, reads of byte ranges, removal. Nothing is overwritten."""

from __future__ import annotations

import contextlib
import os
import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ftrain.errors import AlreadyExists, UnknownOutcome
from ftrain.storage.pack import Pack, Stream


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard to work: threads, how far below the caller's priority, and bounds (0: none).

    `processors_max` is what each thread may take of one processor while others wait for the processors, too.
    """

    threads: int = 1
    nice: int = 0
    bytes_per_second_max: int = 0
    processors_max: float = 0.0

    def step_back(self) -> None:
        """Give the calling thread this niceness; one that may not have it goes on as it is."""
        if self.nice:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self.nice)


def _words() -> array[int]:
    return array("Q")


@dataclass(frozen=True, slots=True)
class Ranges:
    """Byte ranges of objects and where in memory they go, as columns of 64-bit words."""

    paths: list[str]
    files: array[int] = field(default_factory=_words)  # place in `paths`
    sums: array[int] = field(default_factory=_words)  # crc32c
    offsets: array[int] = field(default_factory=_words)
    sizes: array[int] = field(default_factory=_words)
    addresses: array[int] = field(default_factory=_words)  # 0: only to be proved

    def add(self, file: int, crc32c: int, offset: int, nbytes: int, address: int) -> None:
        self.files.append(file)
        self.sums.append(crc32c)
        self.offsets.append(offset)
        self.sizes.append(nbytes)
        self.addresses.append(address)

    def only(self, places: Sequence[int]) -> Ranges:
        """Some of the ranges, of the same paths."""
        columns = (self.files, self.sums, self.offsets, self.sizes, self.addresses)
        return Ranges(self.paths, *(array("Q", [column[place] for place in places]) for column in columns))

    def __len__(self) -> int:
        return len(self.files)


class Storage(Protocol):
    """A tree of immutable objects under one root. Paths are relative to it, with `/` between names.

    Names that begin with a dot are the implementation's own: they are never listed. All calls block, may come from
    several threads at once, and raise a `StorageError` that says what failed, where and why.
    """

    @property
    def url(self) -> str:
        """Where the root is, for messages."""
        ...

    def check(self) -> None:
        """Prove, before a run relies on it, that it can be written to and that a taken name stays taken.

        Raises `UsageError` where it cannot, and `StorageError` where it does not answer. A full disk passes.
        """
        ...

    def create(self, path: str, data: bytes) -> None:
        """Make `path` with exactly `data`, durably: all of it or nothing, also after a crash.

        Raises `AlreadyExists` where the name is taken, by whomever, and `UnknownOutcome` where it may or may not be
        there now; after any other `StorageError` it is not.
        """
        ...

    def confirm(self, path: str, data: bytes) -> bool:
        """Whether `path` holds exactly `data`, durably: what to ask after `AlreadyExists`, when it may be one's own."""
        ...

    def write_pack(
        self, path: str, pack: Pack, effort: Effort, *, should_stop: Callable[[], bool]
    ) -> tuple[list[int], list[int]]:
        """As `create`, from wherever the pack's boxes lie. Returns the crc32c of each box and of each chunk.

        Fails with `StorageError` soon after `should_stop` answered True.
        """
        ...

    def write_stream(self, path: str, stream: Stream, effort: Effort, *, should_stop: Callable[[], bool]) -> None:
        """As `create`, from parts that are made one after the other, of a length that is known at the end.

        Fails as `write_pack`, and with what making the parts raises.
        """
        ...

    def read(self, path: str) -> bytes:
        """All of `path`. Raises `NotFound`."""
        ...

    def read_ranges(self, ranges: Ranges) -> list[int]:
        """Fill memory from ranges of objects, and prove each: returns the places of those that are damaged.

        Raises `NotFound` or, where an object ends early, `CorruptCheckpoint`.
        """
        ...

    def size(self, path: str) -> int:
        """Bytes in `path`. Raises `NotFound`."""
        ...

    def exists(self, path: str) -> bool:
        """Whether there is an object or a directory at `path`."""
        ...

    def list(self, prefix: str) -> list[str]:
        """The names in the directory `prefix`, sorted; none where there is no such directory."""
        ...

    def remove_tree(self, path: str) -> None:
        """Remove `path` with all in it, and directories above that this empties. No error where it is gone already."""
        ...


def create_once(storage: Storage, path: str, data: bytes) -> bool:
    """Make `path` with exactly `data`, durably, also where an earlier try did; False where something else is there."""
    try:
        storage.create(path, data)
    except (AlreadyExists, UnknownOutcome):
        return storage.confirm(path, data)
    return True
