"""A run's packs on several disks: where they are, who may touch them, and what a disk that is gone or wrong does."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ftrain.checkpoint.retain import sweep
from ftrain.errors import AlreadyExists, CorruptCheckpoint, NotFound, StorageError, UnknownOutcome, UsageError
from ftrain.storage import PosixStorage, open_run, open_storage
from ftrain.storage.disks import DIRECTORY, MARK_NAME
from ftrain.storage.spread import SpreadStorage
from tests.storage.test_conformance import EASY, Memory, Zeros, pack_of, range_of
from tests.storage.test_posix import Calls, calls, fail_sync, small_disk

__all__ = ["calls", "small_disk"]
ATTEMPT = "checkpoints/step-000000000005/g0001-a1"
DATA = b"what a rank holds".ljust(4096, b".")
HELD = Memory(4096, DATA)


def pack(rank: int, attempt: str = ATTEMPT) -> str:
    return f"{attempt}/packs/{rank:05d}/c/0"


def write(storage: Any, rank: int, attempt: str = ATTEMPT) -> str:
    path = pack(rank, attempt)
    storage.write_pack(path, pack_of(HELD, 4096), EASY, should_stop=lambda: False)
    return path


def is_read(storage: Any, path: str) -> bool:
    """By all that reads, and with its checksum."""
    memory = Memory(4096)
    assert storage.size(path) == 4096 and storage.exists(path) and storage.read(path) == DATA
    return storage.read_ranges(range_of(path, 0, 4096, memory, DATA)) == [] and memory.bytes() == DATA


class Place:
    """A run and its disks, below one directory."""

    def __init__(self, path: Path) -> None:
        self.path, self.run = path, path / "run"
        self.disks = [path / "one", path / "two"]

    def open(self, count: int = 2) -> SpreadStorage:
        storage = SpreadStorage(self.run, [str(disk) for disk in self.disks[:count]])
        storage.check()
        return storage

    def record(self, disk: int) -> Path:
        token = json.loads((self.disks[disk] / MARK_NAME).read_text())["token"]
        return self.run / DIRECTORY / f"{token}.json"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# ------------------------------------------------------------------------------------------------------- where it goes


def test_packs_go_to_the_run_directory_and_its_disks_in_turn_and_all_else_stays_in_the_run(place: Place) -> None:
    storage = place.open()
    paths = [write(storage, rank) for rank in range(6)]
    storage.create(f"{ATTEMPT}/packs/00001/zarr.json", b"{}")
    storage.create(f"{ATTEMPT}/manifest.json", b"{}")
    roots = [place.run, *place.disks]
    for rank, path in enumerate(paths):
        assert (roots[rank % 3] / path).read_bytes() == DATA
        assert (place.run / path).is_symlink() == (rank % 3 > 0)
        assert (place.run / path).read_bytes() == DATA  # for whatever reads files
    assert [file.name for disk in place.disks for file in disk.rglob("*") if file.is_file()].count("0") == 4
    small = [f"{ATTEMPT}/packs/00001/zarr.json", f"{ATTEMPT}/manifest.json"]
    assert [name for name in small if (place.run / name).is_file()] == small
    assert not [name for name in small for disk in place.disks if (disk / name).exists()]
    assert all(is_read(storage, path) for path in paths)


def test_packs_of_unknown_length_go_the_same_ways(place: Place) -> None:
    storage = place.open()
    for rank in range(4):
        storage.write_stream(pack(rank), Zeros(2), EASY, should_stop=lambda: False)
    for rank, home in enumerate((place.run, *place.disks, place.run)):
        assert (home / pack(rank)).is_file() and not (home / pack(rank)).is_symlink()
        assert storage.size(pack(rank)) == (8 << 20)
        assert open_storage(str(place.run)).read(pack(rank)) == storage.read(pack(rank))
    with pytest.raises(AlreadyExists):
        storage.write_stream(pack(1), Zeros(2), EASY, should_stop=lambda: False)


def test_a_run_is_read_without_being_told_its_disks_and_goes_on_with_others(place: Place) -> None:
    first = write(place.open(), 1)
    found = open_storage(str(place.run))
    assert is_read(found, first)
    third = place.path / "three"
    other = SpreadStorage(place.run, [str(third)])
    other.check()
    second = write(other, 1, ATTEMPT.replace("a1", "a2"))
    assert (third / second).is_file() and (place.disks[0] / first).is_file()
    assert is_read(found, second), "a disk that came later was not found"
    alone = open_run(str(place.run))
    last = write(alone, 1, ATTEMPT.replace("a1", "a3"))
    assert not (place.run / last).is_symlink()
    assert all(is_read(storage, path) for storage in (alone, other) for path in (first, second, last))


def test_a_pack_is_durable_before_its_link_and_its_link_before_it_is_done(place: Place, calls: Calls) -> None:
    storage = place.open()
    real, made = Path.symlink_to, []

    def symlink_to(self: Path, *arguments: Any) -> None:
        made.append(len(calls))
        real(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "symlink_to", symlink_to)
        calls.clear()
        write(storage, 1)
    before, after = calls[: made[0]], calls[made[0] :]
    assert before.index(("sync file", "data")) < before.index(("link", "0"))
    assert ("sync directory", "c") in before[before.index(("link", "0")) :]
    assert before[-1] == ("sync directory", "00001"), "the link's directory is not durable when the link is made"
    assert after == [("sync directory", "c")]


@pytest.mark.parametrize("root", ["one", "run"])
def test_a_link_or_a_pack_whose_directory_was_not_synced_is_doubtful(
    place: Place, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = place.open()
    real = os.fsync
    tried = []

    def fsync(descriptor: int) -> None:
        where = Path(f"/proc/self/fd/{descriptor}").readlink()
        if where == place.path / root / pack(1).removesuffix("/0"):
            tried.append(where)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UnknownOutcome, match=f"{place.path / root}/{pack(1)}"):
        write(storage, 1)
    if root == "run":
        for call in (storage.read, lambda path: storage.confirm(path, DATA)):
            with pytest.raises(UnknownOutcome):
                call(pack(1))
    assert len(tried) == 1


def test_a_link_whose_reply_was_lost_is_found_out(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, real = place.open(), Path.symlink_to

    def symlink_to(self: Path, *arguments: Any) -> None:
        real(self, *arguments)
        raise FileExistsError(errno.EEXIST, "asked for twice")

    monkeypatch.setattr(Path, "symlink_to", symlink_to)
    assert is_read(storage, write(storage, 1))


def test_a_failed_sync_on_a_disk_leaves_no_link(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = place.open()
    fail_sync(monkeypatch, "")
    with pytest.raises(StorageError, match=f"{place.disks[0]}/.*Input/output error"):
        write(storage, 1)
    assert not os.path.lexists(place.run / pack(1))


def test_a_full_disk_names_itself(place: Place, small_disk: Path) -> None:
    storage = SpreadStorage(place.run, [str(small_disk)])
    storage.check()
    memory = Memory(2 << 20)
    with pytest.raises(StorageError, match=f"disk full: cannot write 2097152 bytes to {small_disk}/.*are free there"):
        storage.write_pack(pack(1), pack_of(memory, 2 << 20), EASY, should_stop=lambda: False)
    assert not os.path.lexists(place.run / pack(1))
    assert is_read(storage, write(storage, 1))


# ------------------------------------------------------------------------------------------------------------- removal


def test_what_is_removed_is_removed_on_all_disks(place: Place) -> None:
    storage = place.open()
    kept = ATTEMPT.replace("g0001-a1", "g0001-a2")
    for rank in range(3):
        write(storage, rank)
        write(storage, rank, kept)
    open_storage(str(place.run)).remove_tree(ATTEMPT)
    for root in (place.run, *place.disks):
        assert [file.name for file in root.glob("checkpoints/*/*")] == ["g0001-a2"]
    storage.remove_tree(kept)
    assert [list(root.glob("checkpoints/*")) for root in (place.run, *place.disks)] == [[], [], []]


def test_what_is_on_a_disk_alone_is_swept(place: Place) -> None:
    """A removal that was cut off, or a disk that was away meanwhile."""
    storage = place.open()
    live = ATTEMPT.replace("g0001-a1", "g0001-a2")
    write(storage, 1)
    write(storage, 1, live)
    shutil.rmtree(place.run / ATTEMPT)
    found = open_storage(str(place.run))
    assert sweep(found, [live], 2) == [ATTEMPT]
    assert not (place.disks[0] / ATTEMPT).exists() and is_read(found, pack(1, live))


# --------------------------------------------------------------------------------------- disks that are gone, or others


@pytest.fixture(params=["gone", "not mounted"])
def hide(request: pytest.FixtureRequest) -> Iterator[Callable[[Path], Path]]:
    def away(disk: Path) -> Path:
        kept = disk.rename(disk.with_name("away"))
        if request.param == "not mounted":
            disk.mkdir()
        return kept

    return away


def test_a_disk_that_is_gone_is_named_and_serves_again_when_it_is_back(
    place: Place, hide: Callable[[Path], Path]
) -> None:
    storage = place.open()
    old = write(storage, 1)
    assert is_read(storage, old)
    disk, away = place.disks[0], hide(place.disks[0])
    for reader in (open_storage(str(place.run)), open_run(str(place.run))):
        assert not reader.exists(old)
        for call in (reader.size, reader.read):
            with pytest.raises(NotFound, match=f"{place.run}/{old}: {disk}, a disk of this run, is gone"):
                call(old)
    with pytest.raises(NotFound, match=f"{disk}/{old}"):
        storage.size(old)  # it was there a moment ago
    with pytest.raises(StorageError, match=f"{disk}, a disk of this run, is gone.*is it mounted"):
        write(storage, 1, ATTEMPT.replace("a1", "a2"))
    assert not (disk / "checkpoints").exists(), "something was written to the disk below"
    assert is_read(storage, write(storage, 2)) and is_read(storage, write(storage, 0))
    storage.remove_tree(ATTEMPT)
    assert storage.list("checkpoints") == []
    if disk.exists():
        disk.rmdir()
    away.rename(disk)
    assert storage.list("checkpoints") == [ATTEMPT.split("/")[1]]
    storage.remove_tree(ATTEMPT)
    assert not (disk / "checkpoints" / ATTEMPT.split("/")[1]).exists()
    assert is_read(storage, write(storage, 1))


def test_a_run_begins_without_a_former_disk_but_not_with_one_that_is_gone(place: Place) -> None:
    place.open()
    shutil.rmtree(place.disks[0])
    with pytest.raises(
        UsageError, match=f"{place.disks[0]}, a disk of this run, is gone.*remove {place.record(1).parent}"
    ):
        place.open()
    SpreadStorage(place.run, [str(place.disks[1])]).check()
    next(path for path in (place.run / DIRECTORY).iterdir() if path != place.record(1)).unlink()
    assert is_read(place.open(), write(place.open(), 1))


def test_another_disk_in_the_place_of_one_is_refused(place: Place) -> None:
    storage = place.open()
    path = write(storage, 1)
    one, two = place.disks
    one.rename(place.path / "x")
    two.rename(one)
    with pytest.raises(CorruptCheckpoint, match=f"{one} is not the disk that this run means"):
        open_storage(str(place.run)).size(path)
    with pytest.raises(StorageError, match=f"{one} is not the disk"):
        write(storage, 1, ATTEMPT.replace("a1", "a2"))
    with pytest.raises(UsageError, match=f"{one} is the disk that this run knows at {two}"):
        place.open(1)
    storage.remove_tree(ATTEMPT)
    assert (place.path / "x" / path).is_file()


# ------------------------------------------------------------------------------------------------ strangers and copies


def stranger(place: Place, directory: Path, token: str) -> SpreadStorage:
    """What a stranger gives: a run that says that a directory is a disk of it, and links to what is there."""
    run = place.path / "strange"
    (run / DIRECTORY).mkdir(parents=True)
    (run / DIRECTORY / f"{token}.json").write_text(json.dumps({"directory": str(directory)}))
    (run / pack(1)).parent.mkdir(parents=True)
    (run / pack(1)).symlink_to(directory / pack(1))
    storage = open_storage(str(run))
    assert isinstance(storage, SpreadStorage)
    return storage


def test_a_stranger_cannot_name_a_directory_that_is_no_disk(place: Place) -> None:
    foreign = place.path / "foreign"
    write(PosixStorage(foreign), 1)
    storage = stranger(place, foreign, "0" * 32)
    assert not storage.exists(pack(1))
    for call in (storage.read, storage.size):
        with pytest.raises(NotFound, match=f"{foreign}.*there is no {MARK_NAME}"):
            call(pack(1))
    assert storage.list("checkpoints/step-000000000005/g0001-a1/packs") == ["00001"]
    storage.remove_tree(ATTEMPT)
    assert (foreign / pack(1)).read_bytes() == DATA
    assert storage.list("checkpoints") == []


def test_a_stranger_cannot_name_a_disk_whose_token_he_does_not_know(place: Place) -> None:
    write(place.open(), 1)
    storage = stranger(place, place.disks[0], "0" * 32)
    with pytest.raises(CorruptCheckpoint, match="has another token"):
        storage.read(pack(1))
    storage.remove_tree(ATTEMPT)
    assert is_read(place.open(), pack(1))


@pytest.mark.parametrize("way", ["copied", "by its token"])
def test_a_copy_of_a_run_may_read_its_disks_and_change_nothing(place: Place, way: str) -> None:
    path = write(place.open(), 1)
    if way == "copied":
        shutil.copytree(place.run, place.path / "strange", symlinks=True)
        copy = SpreadStorage(place.path / "strange", [str(place.disks[0])])
    else:
        copy = stranger(place, place.disks[0], place.record(0).stem)
    assert is_read(copy, path)
    if way == "copied":
        said = f"{place.disks[0]} is a disk of the run at {place.run}"
        with pytest.raises(StorageError, match=f"{said}, which {place.path}/strange may read but not change"):
            write(copy, 1, ATTEMPT.replace("a1", "a2"))
        with pytest.raises(UsageError, match=f"{said}; give each run directories of its own"):
            copy.check()
    copy.remove_tree(ATTEMPT)
    assert copy.list("checkpoints") == []
    assert is_read(place.open(), path)


def test_a_link_elsewhere_is_not_followed_even_where_there_are_disks(place: Place) -> None:
    storage = place.open()
    write(storage, 1)
    elsewhere = place.path / "elsewhere"
    shutil.copytree(place.disks[0], elsewhere)
    (place.run / pack(1)).unlink()
    for to in (elsewhere / pack(1), place.disks[0] / pack(2), f"{place.disks[0]}/../elsewhere/{pack(1)}"):
        (place.run / pack(1)).symlink_to(to)
        with pytest.raises(CorruptCheckpoint, match="leads through a link"):
            storage.read(pack(1))
        (place.run / pack(1)).unlink()


def test_a_link_out_of_a_disk_is_not_followed(place: Place) -> None:
    storage = place.open()
    path = write(storage, 1)
    (place.path / "secret").write_bytes(DATA)
    (place.disks[0] / path).unlink()
    (place.disks[0] / path).symlink_to(place.path / "secret")
    with pytest.raises(CorruptCheckpoint, match=f"{place.disks[0]}/.*leads through a link"):
        storage.read(path)


@pytest.mark.parametrize("text", ["", "{", '{"directory": "relative"}', '{"directory": "/a", "more": 1}', "x" * 20000])
def test_a_damaged_record_of_a_disk_names_itself(place: Place, text: str) -> None:
    path = write(place.open(), 1)
    place.record(0).write_text(text)
    with pytest.raises(CorruptCheckpoint, match=DIRECTORY):
        open_storage(str(place.run)).read(path)


@pytest.mark.parametrize("kind", ["pipe", "link", "nonsense"])
def test_a_mark_that_is_none_is_refused(place: Place, kind: str) -> None:
    path = write(place.open(), 1)
    mark = place.disks[0] / MARK_NAME
    mark.rename(mark.with_name("kept"))
    {
        "pipe": lambda: os.mkfifo(mark),
        "link": lambda: mark.symlink_to(mark.with_name("kept")),
        "nonsense": lambda: mark.write_bytes(b"\xff{"),
    }[kind]()
    with pytest.raises(StorageError, match=MARK_NAME):
        open_storage(str(place.run)).read(path)


# -------------------------------------------------------------------------------------------------- what is not a disk


@pytest.mark.parametrize(
    ("disks", "said"),
    [
        (["run"], "run is the same as .*run; give directories that are apart from the run's and from each other"),
        (["run/inside"], "run/inside is in .*/run;"),
        (["."], "/run is in /"),
        (["a", "a/b"], "a/b is in .*/a;"),
        (["a/b", "a"], "a/b is in .*/a;"),
        (["a", "link"], "link is the same as .*/a;"),
        (["file"], "cannot be used: File exists"),
        (["file/below"], "cannot be used: Not a directory"),
        (["full"], r"full is not empty \(theirs\); give a directory for this run alone"),
        (["/proc/disk"], "cannot be used"),
        (["others"], "others is a disk of the run at /elsewhere; give each run directories of its own"),
    ],
)
def test_what_cannot_be_a_disk_is_refused_with_what_to_do(place: Place, disks: list[str], said: str) -> None:
    (place.path / "link").symlink_to("a")
    (place.path / "file").touch()
    (place.path / "full").mkdir()
    (place.path / "full" / "theirs").touch()
    (place.path / "others").mkdir()
    (place.path / "others" / MARK_NAME).write_text(json.dumps({"token": "0" * 32, "run": "/elsewhere"}))
    given = [os.path.normpath(place.path / disk) for disk in disks]
    with pytest.raises(UsageError, match=f"^--disks: .*{said}"):
        SpreadStorage(place.run, given).check()


def test_a_disk_on_which_names_are_taken_twice_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def link(source: Any, target: Any) -> None:
        if str(target).startswith(str(place.disks[0])):
            Path(source).rename(target)
        else:
            real(source, target)

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(UsageError, match=f"^{place.disks[0]}: this file system lets a name be taken twice"):
        place.open()


def test_a_run_directory_without_links_has_no_disks(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def symlink_to(*_: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "symlink_to", symlink_to)
    with pytest.raises(UsageError, match=f"{place.run} cannot have links.*keep the run in one directory"):
        place.open()
    open_run(str(place.run)).check()


def test_a_store_has_no_disks() -> None:
    with pytest.raises(UsageError, match="--disks /a: only a run in a directory has disks"):
        open_run("s3://bucket/run", ["/a"])


def test_of_many_nodes_that_take_a_new_disk_all_agree(place: Place) -> None:
    with ThreadPoolExecutor(8) as pool:
        storages = list(pool.map(lambda _: place.open(), range(8)))
    assert len(list((place.run / DIRECTORY).iterdir())) == 2
    for number, storage in enumerate(storages):
        path = write(storage, 1, ATTEMPT.replace("a1", f"a{number}"))
        assert all(is_read(other, path) for other in storages)


def test_a_file_system_as_new_as_it_is_made_is_taken(place: Place) -> None:
    (place.disks[0] / "lost+found").mkdir(parents=True)
    assert is_read(place.open(), write(place.open(), 1))
