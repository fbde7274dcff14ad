"""Processes that are forked before they are needed, and memory that is touched before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOM = """
import ctypes, resource, sys
from ftrain.agent.heap import HeapRoom

library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.malloc.argtypes = [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]

def faults_of_so_many(blocks):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    found = [library.malloc(1 << 20) for _ in range(blocks)]
    for block in found:
        ctypes.memset(block, 1, 1 << 20)
    for block in found:
        library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

room = HeapRoom(int(sys.argv[1]) << 20)
while room.touch(4 << 20):
    pass
print([faults_of_so_many(96), faults_of_so_many(96)])
"""
PAGES = 96 << 8  # of 4 KiB in 96 MiB


def faults(room_megabytes: int) -> list[int]:
    heap = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=67108864"  # small pages, to be counted
    done = subprocess.run(
        [sys.executable, "-c", ROOM, str(room_megabytes)],
        env={**os.environ, "GLIBC_TUNABLES": heap},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    found: list[int] = json.loads(done.stdout)
    return found


def test_memory_that_was_touched_ahead_is_what_malloc_gives_out_and_it_is_kept() -> None:
    assert max(faults(128)) < PAGES // 10
    assert faults(0)[0] > PAGES // 3, "without room each block is touched for the first time"


def scene(name: str, directory: Path) -> list[object]:
    """Played by a process of its own: one that closes its nursery ends whatever is below itself."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.agent.spare_scenes", name, str(directory)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found: list[object] = json.loads(done.stdout)
    return found


def test_rank_and_store_are_the_processes_that_were_forked_ahead_and_do_their_own_jobs(tmp_path: Path) -> None:
    assert scene("used", tmp_path) == ["a rank's", "a store's", "another"]


def test_spare_that_was_killed_is_not_missed_and_not_taken_for_a_rank(tmp_path: Path) -> None:
    assert scene("killed", tmp_path) == ["another", []]


def test_what_is_swept_up_are_not_the_spares_and_one_of_each_is_enough(tmp_path: Path) -> None:
    assert scene("swept", tmp_path) == ["a rank's", 2]


def test_node_that_waits_to_replace_another_has_a_spare_for_its_first_rank(tmp_path: Path) -> None:
    assert scene("waited", tmp_path) == ["a rank's"]


def test_a_spare_knows_nothing_of_the_run_and_gets_what_a_fork_would_get(tmp_path: Path) -> None:
    """Its environment and directory, and descriptors; none of the nursery's own."""
    (spare, forked) = scene("compared", tmp_path)
    assert spare == forked
