"""What ftrain asks of storage: exclusive, durable creation, reads of byte ranges, removal. Nothing is overwritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Storage(Protocol):
    """A tree of immutable objects under one root. Paths are relative to it, with `/` between names.

    Names that begin with a dot are the implementation's own: they are never listed. All calls block, may come from
    several threads at once, and raise a `StorageError` that says what failed, where and why.
    """

    @property
    def url(self) -> str:
        """Where the root is, for messages."""
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

    def write_from(self, path: str, address: int, nbytes: int, *, should_stop: Callable[[], bool]) -> None:
        """As `create`, from memory at `address`. Fails with `StorageError` soon after `should_stop` answered True.

        Fastest where `address` and `nbytes` are multiples of 4096.
        """
        ...

    def read(self, path: str) -> bytes:
        """All of `path`. Raises `NotFound`."""
        ...

    def read_into(self, path: str, offset: int, address: int, nbytes: int) -> None:
        """Fill memory at `address` from `offset` of `path`. Raises `NotFound` or, when short, `CorruptCheckpoint`."""
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
