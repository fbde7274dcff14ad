"""Ranks of one node that read the same: it leaves the disk once. What each reads for itself is not cached."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ftrain._native import cached_share, crc32c
from ftrain.storage import PosixStorage
from ftrain.storage.neighbours import Neighbours
from tests.storage.test_conformance import EASY, Memory, pack_of

NBYTES = 16 << 20
RANKS = 2

READER = """
import sys
from ftrain.storage import PosixStorage
from ftrain.storage.base import Ranges
from tests.storage.test_conformance import Memory

root, rank, share, crc, nbytes = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
memory = Memory(nbytes)
ranges = Ranges(["same"] if share == "same" else ["0", "1"])
ranges.add(0 if share == "same" else rank, crc, 0, nbytes, memory.address)
storage = PosixStorage(root)

def read_bytes():
    return next(int(line.split()[1]) for line in open("/proc/self/io") if line.startswith("read_bytes"))

print("ready", flush=True)
sys.stdin.readline()
before = read_bytes()
assert storage.read_ranges(ranges) == []
print(read_bytes() - before, flush=True)
"""


def write(root: Path, name: str, data: bytes) -> None:
    memory = Memory(len(data), data)
    PosixStorage(root).write_pack(name, pack_of(memory, len(data)), EASY, should_stop=lambda: False)
    with (root / name).open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes(root: Path, share: str, data: bytes) -> list[int]:
    """What each of RANKS processes had from the disk, who read at the same time."""
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(root), str(rank), share, str(crc32c(data)), str(len(data))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "LOCAL_WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)},
        )
        for rank in range(RANKS)
    ]
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
    for reader in readers:
        assert reader.stdin is not None
        reader.stdin.write("go\n")
        reader.stdin.flush()
    return [int(reader.communicate(timeout=60)[0]) for reader in readers]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder on a disk: what a file system in memory gives is not counted."""
    write(tmp_path, "probe", os.urandom(1 << 20))
    with (tmp_path / "probe").open("rb") as file:
        before = _counted()
        file.read()
        if _counted() == before:
            pytest.skip(f"reading from {tmp_path} is not counted as reading from a disk")
    return tmp_path


def _counted() -> int:
    return next(
        int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes")
    )


def test_what_all_ranks_of_a_node_read_leaves_the_disk_once(disk: Path) -> None:
    data = os.urandom(NBYTES)
    write(disk, "same", data)
    found = read_bytes(disk, "same", data)
    assert NBYTES <= sum(found) <= NBYTES + (1 << 20), found


def test_what_each_rank_reads_for_itself_goes_past_the_page_cache(disk: Path) -> None:
    data = os.urandom(NBYTES)
    for rank in range(RANKS):
        write(disk, str(rank), data)
    found = read_bytes(disk, "own", data)
    assert all(NBYTES <= one <= NBYTES + (1 << 20) for one in found), found
    for rank in range(RANKS):
        with (disk / str(rank)).open("rb") as file:
            assert cached_share(file.fileno()) == 0


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "3"}, Neighbours(8, 3)),
        ({"LOCAL_WORLD_SIZE": "8"}, Neighbours()),
        ({"LOCAL_WORLD_SIZE": "many", "LOCAL_RANK": "3"}, Neighbours()),
        ({"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "2"}, Neighbours()),
        ({}, Neighbours()),
    ],
)
def test_neighbours_are_those_of_the_environment(
    told: dict[str, str], expected: Neighbours, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert Neighbours.of_environment() == expected


def test_shares_are_all_of_it_once() -> None:
    for ranks in (1, 2, 3, 8):
        end = 0
        for rank in range(ranks):
            offset, nbytes = Neighbours(ranks, rank).share(1001)
            assert offset == end
            end += nbytes
        assert end == 1001


def test_ranks_read_twice_where_together_they_want_more_than_is_there() -> None:
    assert Neighbours(2, 0).read_twice(60, 100)
    assert not Neighbours(2, 0).read_twice(50, 100)  # each its own half
    assert not Neighbours(1, 0).read_twice(100, 100)
