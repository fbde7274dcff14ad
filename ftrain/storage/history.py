"""A run's journal, read from storage."""

from __future__ import annotations

from ftrain.core import journal
from ftrain.core.journal import History
from ftrain.errors import NotFound
from ftrain.storage.base import Storage


def read_history(storage: Storage) -> tuple[History, bytes]:
    """What the journal says, and its newest record's file (empty where there is no journal).

    The newest record may not be durable yet: who acts on it has to `confirm` it first. Raises `CorruptCheckpoint`.
    """
    history, newest = History(), b""
    while True:
        path = journal.path_of(history.head.sequence + 1)
        try:
            data = storage.read(path)
        except NotFound:
            return history, newest
        history, newest = history.after(journal.decode(data, path), journal.digest(data)), data
