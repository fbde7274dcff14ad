"""Bugs to plant: mistakes that one could make in storage, or in what decides over it. None of them is in ftrain/."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ftrain.agent.coordinator_host import _discard
from ftrain.core import journal
from ftrain.errors import UnknownOutcome
from ftrain.storage import posix
from ftrain.storage.object_store import ObjectStorage
from ftrain.storage.posix import PosixStorage
from tests.crash.life import Life, Stopped


@contextmanager
def planted(name: str) -> Iterator[None]:
    """With this bug in place; restores everything afterwards."""
    with BUGS[name][0]():
        yield


def _write(temporary: Path, flags: int, write: Callable[[int], Any]) -> Any:
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o644)
    try:
        return write(descriptor)
    finally:
        os.close(descriptor)


def _file_not_synced() -> Any:
    return patch.object(posix, "_write_synced", _write)


def _directory_not_synced() -> Any:
    return patch.object(posix, "_sync", lambda _: None)


def _parents_not_synced() -> Any:
    return patch.object(PosixStorage, "_sync_directories", lambda *_: None)


def _renamed_before_the_sync() -> Any:
    def create(storage: Any, path: str, nbytes: int, flags: int, write: Callable[[int], Any]) -> Any:
        target = storage._path(path)
        temporary = target.parent / f".{target.name}.{posix.uuid.uuid4().hex}.tmp"
        storage._make_directories(target.parent)
        result = _write(temporary, flags, write)
        temporary.rename(target)
        posix._sync(target)
        posix._sync(target.parent)
        return result

    return patch.object(PosixStorage, "_create", create)


def _sync_tried_again() -> Any:
    """The error was passing, surely."""

    def write_synced(temporary: Path, flags: int, write: Callable[[int], Any]) -> Any:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o644)
        try:
            result = write(descriptor)
            try:
                os.fsync(descriptor)
            except OSError:
                os.fsync(descriptor)
            return result
        finally:
            os.close(descriptor)

    return patch.object(posix, "_write_synced", write_synced)


def _deleted_on_doubt() -> Any:
    """The record could not be written, so its checkpoint is garbage."""
    real = Life._append

    def append(life: Life, body: journal.Body) -> None:
        try:
            real(life, body)
        except Stopped:
            if isinstance(body, journal.CommitBody):
                _discard(life._storage, (body.attempt.path,))
            raise

    return patch.object(Life, "_append", append)


def _fence_left_out() -> Any:
    """The name is taken: that will be our own record."""
    real = journal._created

    def created(state: Any, outcome: journal.Outcome, cause: str, now: float, wall: float) -> Any:
        return real(state, journal.Outcome.CREATED if outcome is journal.Outcome.EXISTS else outcome, cause, now, wall)

    return patch.object(journal, "_created", created)


def _record_overwritten() -> Any:
    return patch.object(posix, "_link", os.rename)


def _confirmed_without_its_directory() -> Any:
    def confirm(storage: Any, path: str, data: bytes) -> bool:
        target = storage._path(path)
        if not target.exists() or target.read_bytes() != data:
            return False
        posix._sync(target)
        storage._sync_directories(target.parent)
        return True

    return patch.object(PosixStorage, "confirm", confirm)


def _412_taken_for_a_loss() -> Any:
    """The name is taken, so another writer was faster."""

    def create(storage: Any, key: str, data: bytes) -> None:
        for wait in storage._patience.waits():
            time.sleep(wait)
            try:
                storage._bucket.put_new(key, data, "")
            except UnknownOutcome as error:
                lost = error
            else:
                return
        raise lost

    return patch.object(ObjectStorage, "_create", create)


def _referred_files_swept() -> Any:
    """Only what a commit wrote itself is its own."""
    return patch.object(
        journal.History, "needed", property(lambda history: frozenset(body.attempt for _, body in history.commits))
    )


# Each with the class of faults that shows it.
BUGS: dict[str, tuple[Callable[[], Any], str]] = {
    "the file is not synced": (_file_not_synced, "crash"),
    "the directory is not synced": (_directory_not_synced, "crash"),
    "directories above are not synced": (_parents_not_synced, "crash"),
    "renamed before it is synced": (_renamed_before_the_sync, "crash"),
    "a failed sync is tried again": (_sync_tried_again, "fsync file"),
    "deleted on doubt": (_deleted_on_doubt, "fsync directory"),
    "the fence is left out": (_fence_left_out, "overtaken"),
    "a record is overwritten": (_record_overwritten, "overtaken"),
    "a record is acted upon before its name is durable": (_confirmed_without_its_directory, "killed"),
    "what is referred to is swept": (_referred_files_swept, "referred"),
    "412 is taken for a loss": (_412_taken_for_a_loss, "store"),
}
