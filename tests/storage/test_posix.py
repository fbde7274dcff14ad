"""Durability on a POSIX file system: the order of system calls, and what a failing or full disk does."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ftrain.errors import AlreadyExists, StorageError, UnknownOutcome
from ftrain.storage import PosixStorage
from tests.storage.test_conformance import EASY, Memory, pack_of

Calls = list[tuple[str, str]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Which files and directories are synced and linked, in order. The calls themselves are made."""
    seen: Calls = []
    real_fsync, real_link = os.fsync, os.link

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        kind = "directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        seen.append((f"sync {kind}", path.name if kind == "directory" else "data"))
        real_fsync(descriptor)

    def link(source: Any, target: Any) -> None:
        seen.append(("link", Path(target).name))
        real_link(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    return seen


def test_a_file_is_synced_then_linked_then_its_directory_synced(tmp_path: Path, calls: Calls) -> None:
    PosixStorage(tmp_path / "run").create("journal/1.json", b"x")
    assert calls == [
        ("sync directory", tmp_path.name),  # holds the new name "run"
        ("sync directory", "run"),  # holds the new name "journal"
        ("sync file", "data"),
        ("link", "1.json"),
        ("sync directory", "journal"),
    ]


def test_a_pack_is_synced_with_every_new_directory_above_it(tmp_path: Path, calls: Calls) -> None:
    storage = PosixStorage(tmp_path)
    memory = Memory(8192)
    storage.write_pack("a/b/0", pack_of(memory, 8192), EASY, should_stop=lambda: False)
    assert calls[-5:] == [
        ("sync directory", tmp_path.name),
        ("sync directory", "a"),
        ("sync file", "data"),
        ("link", "0"),
        ("sync directory", "b"),
    ]


def test_many_directories_are_not_all_remembered_and_forgotten_ones_are_synced_again(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftrain.storage.posix.SYNCED_KEPT", 8)
    storage = PosixStorage(tmp_path)
    for number in range(20):
        storage.create(f"{number}/x", b"")
        assert len(storage._synced) <= 8
    calls.clear()
    storage.create("0/y", b"")
    assert ("sync directory", tmp_path.name) in calls  # holds the name "0"


def test_a_directory_that_another_process_made_is_synced_too(tmp_path: Path, calls: Calls) -> None:
    (tmp_path / "a").mkdir()  # by somebody who crashed before the sync, for all we know
    PosixStorage(tmp_path).create("a/x", b"")
    assert ("sync directory", tmp_path.name) in calls


def fail_sync(monkeypatch: pytest.MonkeyPatch, of_directory: str) -> list[str]:
    """From now on syncs of that directory fail, or of files where it is empty."""
    real, tried = os.fsync, []

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.name == of_directory if of_directory else path.is_file():
            tried.append(str(path))
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return tried


def test_a_failed_sync_of_the_file_leaves_no_name_and_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = PosixStorage(tmp_path)
    tried = fail_sync(monkeypatch, "")
    with pytest.raises(StorageError, match=r"journal/1\.json: Input/output error") as caught:
        storage.create("journal/1.json", b"x")
    assert not isinstance(caught.value, UnknownOutcome)
    assert len(tried) == 1
    assert os.listdir(tmp_path / "journal") == []


def test_a_failed_sync_of_the_directory_is_an_unknown_outcome_and_stays_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = PosixStorage(tmp_path)
    tried = fail_sync(monkeypatch, "journal")
    with pytest.raises(UnknownOutcome, match=r"journal/1\.json"):
        storage.create("journal/1.json", b"x")
    with pytest.raises(UnknownOutcome):
        storage.confirm("journal/1.json", b"x")
    with pytest.raises(UnknownOutcome):
        storage.read("journal/1.json")
    assert len(tried) == 1


def test_a_reply_of_link_that_was_lost_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def link(source: Any, target: Any) -> None:
        real(source, target)
        raise FileExistsError(errno.EEXIST, "asked for twice")  # as an NFS client sees it

    monkeypatch.setattr(os, "link", link)
    storage = PosixStorage(tmp_path)
    storage.create("x", b"1")
    assert storage.read("x") == b"1"
    monkeypatch.setattr(os, "link", real)
    with pytest.raises(AlreadyExists):
        storage.create("x", b"2")


def test_an_emptied_directory_that_somebody_removes_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = PosixStorage(tmp_path)
    storage.create("steps/1/a", b"")
    real, left = Path.mkdir, [2]

    def mkdir(self: Path, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        if left[0] and self.name == "2":
            left[0] -= 1
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    storage.create("steps/2/b", b"")
    assert left == [0]
    assert storage.list("steps") == ["1", "2"]


def test_a_file_system_without_direct_io_is_written_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open
    refused = []

    def open_(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", open_)
    memory = Memory(4096, b"data")
    storage = PosixStorage(tmp_path)
    storage.write_pack("p", pack_of(memory, 4096), EASY, should_stop=lambda: False)
    assert len(refused) == 1
    assert storage.read("p")[:4] == b"data"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("write", ["create", "write_pack"])
def test_a_full_disk_says_so_and_what_was_there_stands(small_disk: Path, write: str) -> None:
    storage = PosixStorage(small_disk)
    storage.create("first", b"x" * 4096)
    memory = Memory(2 << 20)
    pack = pack_of(memory, 2 << 20)
    attempt: dict[str, Callable[[], object]] = {
        "create": lambda: storage.create("second", bytes(2 << 20)),
        "write_pack": lambda: storage.write_pack("second", pack, EASY, should_stop=lambda: False),
    }
    with pytest.raises(
        StorageError, match=rf"disk full: cannot write 2097152 bytes to {small_disk}/second.*MiB are free"
    ):
        attempt[write]()
    assert storage.list("") == ["first"]
    assert os.listdir(small_disk) == ["first"]
    assert storage.read("first") == b"x" * 4096


def test_a_directory_that_cannot_be_written_names_itself(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(StorageError, match=str(tmp_path / "run")):
        PosixStorage(tmp_path / "run").create("journal/1.json", b"")
