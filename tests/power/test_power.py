"""A small sample of what `python -m tests.power` does: real file systems on a disk that is written down."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from ftrain.core.messages import Attempt
from tests.power.bugs import FOUND
from tests.power.cuts import Cut, Disk, cuts_at, expected_at, flush_points
from tests.power.file_system import FILE_SYSTEMS, FileSystem, mounted, unavailable
from tests.power.recorder import Entry, Kind, read_log, recording
from tests.power.run import Recording, record
from tests.power.search import Search

SECTOR_BYTES = 512


@pytest.fixture(params=FILE_SYSTEMS)
def file_system(request: pytest.FixtureRequest) -> FileSystem:
    kind = FILE_SYSTEMS[request.param]
    if why := unavailable(kind):
        pytest.skip(f"the power cannot be cut here: {why}")
    return kind


def test_after_a_power_cut_on_a_real_file_system_every_told_commit_is_there(
    file_system: FileSystem, tmp_path: Path
) -> None:
    recording = record(file_system, tmp_path, commits=2)
    (tmp_path / "judge").mkdir()
    report = Search(recording, tmp_path / "judge").run(points_max=8, resumes=1, second_points=2)
    assert report.losses == []
    assert (report.points, report.cuts, report.second_cuts, report.resumed) == (8, 24, 6, 1)
    assert report.commits > 0


def test_a_sync_that_is_left_out_is_found(tmp_path: Path) -> None:
    if why := unavailable(FILE_SYSTEMS["ext4"]):
        pytest.skip(f"the power cannot be cut here: {why}")
    recording = record(FILE_SYSTEMS["ext4"], tmp_path, commits=2, bug=FOUND[0])
    (tmp_path / "judge").mkdir()
    assert Search(recording, tmp_path / "judge").run(first_loss=True).losses


def test_what_is_written_and_synced_stands_in_the_log_in_its_order(file_system: FileSystem, tmp_path: Path) -> None:
    image, log = tmp_path / "image", tmp_path / "log"
    file_system.format(image)
    with recording(image, log, tmp_path / "fuse") as recorder:
        with mounted(file_system, recorder.disk, tmp_path / "disk") as disk:
            descriptor = os.open(disk / "file", os.O_WRONLY | os.O_CREAT)
            os.write(descriptor, b"known " * 1000)
            os.fsync(descriptor)
            os.close(descriptor)
            recorder.marks.write_bytes(b"synced")
        entries = read_log(log)
    mark = next(place for place, entry in enumerate(entries) if entry.kind is Kind.MARK)
    write = next(place for place, entry in enumerate(entries) if b"known known" in bytes(entry.data))
    assert bytes(entries[mark].data) == b"synced"
    assert any(entry.kind is Kind.FLUSH for entry in entries[write:mark])


def test_a_cut_keeps_what_was_flushed_and_any_part_of_the_rest(tmp_path: Path) -> None:
    def write(sector: int, text: bytes) -> Entry:
        return Entry(Kind.WRITE, sector * SECTOR_BYTES, memoryview(text * SECTOR_BYTES))

    flush = Entry(Kind.FLUSH, 0, memoryview(b""))
    entries = [write(0, b"a"), flush, write(1, b"b"), write(2, b"cd"), flush]
    assert flush_points(entries) == [(0, 1), (2, 4), (5, 5)]
    left = set()
    for seed in range(600):
        dice = random.Random(seed)
        (tmp_path / "begin").write_bytes(bytes(5 * SECTOR_BYTES))
        disk = Disk(tmp_path / "begin", entries, SECTOR_BYTES)
        for cut in cuts_at((2, 4), dice):
            disk.after(cut, tmp_path / "left", dice)
            data = (tmp_path / "left").read_bytes()
            first = "".join(chr(data[at] or ord("-")) for at in range(0, len(data), SECTOR_BYTES))
            assert {"nothing": first == "a----", "all": first == "abcc-", "some": first[0] == "a"}[cut.how]
            left.add(first)
    assert {"a----", "ab---", "a-cc-", "a-c--", "a--c-", "abcc-"} <= left


def test_what_was_said_before_a_cut_is_what_is_expected_after_it(tmp_path: Path) -> None:
    attempt = Attempt(1, 5, 2)

    def mark(what: str) -> Entry:
        text = f'{{"what":"{what}","attempt":{{"generation":1,"step":5,"number":2}}}}'
        return Entry(Kind.MARK, 0, memoryview(text.encode()))

    entries = [mark("submitted"), mark("acked"), mark("retiring")]
    known = Recording(FILE_SYSTEMS["ext4"], tmp_path, entries, {})
    assert [len(expected_at(known, end).acked) for end in range(4)] == [0, 0, 1, 1]
    assert expected_at(known, 3).retiring == {attempt} and not expected_at(known, 2).retiring
    assert str(Cut(0, 3, "nothing"))
