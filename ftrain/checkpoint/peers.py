"""The ranks that save or load one checkpoint together, and how they tell each other things: no tensors, no pickle."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Protocol

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store

from ftrain.errors import StorageError

_FAILED, _FINE = b"\0", b"\1"


class Peers(Protocol):
    """All ranks call the same methods in the same order."""

    rank: int
    world_size: int

    def exchange(self, own: bytes) -> list[bytes]:
        """What each rank gave, by rank."""
        ...


class Alone:
    """One rank, of one."""

    rank = 0
    world_size = 1

    def exchange(self, own: bytes) -> list[bytes]:
        return [own]


class Together:
    """All ranks of the default process group, through its store: no collective that training could get in the way of.

    May be used from a thread.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        store: Store = dist.distributed_c10d._get_default_store()
        self._store = PrefixStore(f"ftrain/save/{_numbers.next(store)}", store)
        self._rounds = itertools.count()

    def exchange(self, own: bytes) -> list[bytes]:
        number = next(self._rounds)
        self._store.set(f"{number}/{self.rank}", own)  # type: ignore[arg-type]  # bytes are taken as they are
        given = [bytes(self._store.get(f"{number}/{rank}")) for rank in range(self.world_size)]
        if number:
            # Everybody has read the round before this one, or would not be in this one.
            with contextlib.suppress(RuntimeError):
                self._store.delete_key(f"{number - 1}/{self.rank}")
        return given


class Apart:
    """A rank that reads by itself: the others are not doing the same."""

    world_size = 1

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def exchange(self, own: bytes) -> list[bytes]:
        return [own]


class _Numbers:
    """Tell apart what goes on at a time, and are the same on all ranks, which call in the same order.

    They begin anew with each store: a rank that is forked anew shares another one with those that go on, and knows
    nothing of what these have saved before.
    """

    def __init__(self) -> None:
        self._store: Store | None = None
        self._next = itertools.count()

    def next(self, store: Store) -> int:
        if store is not self._store:
            self._store, self._next = store, itertools.count()
        return next(self._next)


_numbers = _Numbers()


def peers() -> Peers:
    """The ranks of the default process group, where there is one. To be called in the same order on all of them."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return Together()
    return Alone()


def readers() -> Peers:
    """The ranks that load together: those of `peers`, unless this one was forked anew while the others go on.

    Such a rank runs its script from the beginning, by itself: the store of its group is its own, until it meets them.
    """
    group = peers()
    if isinstance(group, Together) and isinstance(_innermost(dist.distributed_c10d._get_default_store()), HashStore):
        return Apart(group.rank)
    return group


def _innermost(store: Store) -> Store:
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store


@contextlib.contextmanager
def together(group: Peers, what: str) -> Iterator[None]:
    """What all ranks do, each its part: on the way out it has gone well everywhere, or fails everywhere.

    Raises the rank's own error, or a `StorageError` that names the first rank that failed and why.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is, the others must not wait for this rank
        own = error
    said = _FINE if own is None else _FAILED + str(own).encode()
    results = group.exchange(said) if group.world_size > 1 else [said]
    if own is not None:
        raise own
    for rank, result in enumerate(results):
        if result != _FINE:
            raise StorageError(f"{what} failed on rank {rank}: {result[1:].decode(errors='replace')}")
