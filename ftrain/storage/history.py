"""A run's journal, read from storage."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from ftrain.core import journal
from ftrain.core.journal import History
from ftrain.errors import NotFound, StorageError
from ftrain.storage.base import Storage

READS_IN_FLIGHT = 16


def read_history(storage: Storage) -> tuple[History, bytes]:
    """What the journal says, and its newest record's file (empty where there is no journal).

    The newest record may not be durable yet: who acts on it has to `confirm` it first. Raises `CorruptCheckpoint`.
    """
    history, newest = History(), b""
    for data in _records(storage):
        path = journal.path_of(history.head.sequence + 1)
        history, newest = history.after(journal.decode(data, path), journal.digest(data)), data
    return history, newest


def durable_history(storage: Storage) -> History:
    """The journal from its beginning, made durable. Raises `CorruptCheckpoint` naming the first bad record."""
    found, newest = read_history(storage)
    if newest:
        make_durable(storage, found, newest)
    return found


def make_durable(storage: Storage, history: History, newest: bytes) -> None:
    """The newest record's writer may have died before it was durable, and it is about to be acted upon."""
    if not storage.confirm(journal.path_of(history.head.sequence), newest):
        raise StorageError(f"{storage.url}: the newest journal record cannot be made durable; mend the storage first")


def _records(storage: Storage) -> Iterator[bytes]:
    """From the first to where there is no next."""
    count = len(storage.list(journal.DIRECTORY))
    try:
        if count > READS_IN_FLIGHT:
            yield from _read_many(storage, count)
        else:
            count = 0
        while True:
            count += 1
            yield storage.read(journal.path_of(count))
    except NotFound:  # also where something else lies among the records
        return


def _read_many(storage: Storage, count: int) -> Iterator[bytes]:
    with ThreadPoolExecutor(READS_IN_FLIGHT, "ftrain-history") as pool:
        try:
            yield from pool.map(storage.read, map(journal.path_of, range(1, count + 1)))
        finally:
            pool.shutdown(cancel_futures=True)
