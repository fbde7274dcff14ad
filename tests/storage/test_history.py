"""A long journal is read in order, whatever else lies beside its records, and up to the first that is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftrain.core import journal
from ftrain.core.journal import Record
from ftrain.core.messages import Attempt
from ftrain.errors import CorruptCheckpoint
from ftrain.storage import PosixStorage
from ftrain.storage.history import READS_IN_FLIGHT, read_history


def write(storage: PosixStorage, count: int) -> list[bytes]:
    found: list[bytes] = []
    before = ""
    for sequence in range(1, count + 1):
        body = journal.CommitBody(Attempt(1, sequence, 1), 1, "0" * 64, 1)
        found.append(journal.encode(Record(sequence, before, "writer", 1.0, body)))
        before = journal.digest(found[-1])
        storage.create(journal.path_of(sequence), found[-1])
    return found


@pytest.mark.parametrize("count", [0, 1, READS_IN_FLIGHT, READS_IN_FLIGHT * 3])
def test_all_records_are_read_in_order(tmp_path: Path, count: int) -> None:
    storage = PosixStorage(tmp_path)
    written = write(storage, count)
    history, newest = read_history(storage)
    assert [commit.attempt.step for _, commit in history.commits] == list(range(1, count + 1))
    assert newest == (written[-1] if written else b"")


def test_other_names_among_the_records_are_passed_over(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path)
    write(storage, READS_IN_FLIGHT + 1)
    storage.create("journal/notes.txt", b"somebody's")
    assert read_history(storage)[0].head.sequence == READS_IN_FLIGHT + 1


def test_a_damaged_record_among_many_is_named(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path)
    write(storage, READS_IN_FLIGHT * 2)
    path = tmp_path / journal.path_of(7)
    path.write_bytes(path.read_bytes().replace(b"writer", b"waiter"))
    with pytest.raises(CorruptCheckpoint, match=journal.path_of(7)):
        read_history(storage)
