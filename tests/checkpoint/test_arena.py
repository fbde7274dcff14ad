from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ftrain import _native
from ftrain.checkpoint.staging import arena as arena_module
from ftrain.checkpoint.staging.arena import Arena
from ftrain.errors import CorruptCheckpoint, OutOfMemory


@pytest.fixture
def fd() -> Iterator[int]:
    descriptor = _native.memory_file("test-arena")
    yield descriptor
    os.close(descriptor)


def test_what_the_worker_seals_the_agent_reads(fd: int) -> None:
    worker, agent = Arena(fd), Arena(fd)
    assert agent.slots == 0
    worker.reserve(2, 5000, 100, 0)
    worker.view(1, 4096, 4)[:] = b"data"
    worker.write_index(1, b"index")
    agent.attach()
    assert agent.slots == 2
    assert agent.read_index(1) == b"index"
    assert bytes(agent.view(1, 4096, 4)) == b"data"
    assert agent.address(0) % 4096 == agent.address(1) % 4096 == 0


def test_a_slot_that_is_not_sealed_is_refused(fd: int) -> None:
    arena = Arena(fd)
    arena.reserve(2, 1, 1, 0)
    with pytest.raises(CorruptCheckpoint, match="no sealed snapshot"):
        arena.read_index(0)
    arena.write_index(0, b"index")
    arena.clear_index(0)
    with pytest.raises(CorruptCheckpoint, match="no sealed snapshot"):
        arena.read_index(0)


def test_a_damaged_index_is_refused(fd: int) -> None:
    arena = Arena(fd)
    arena.reserve(1, 1, 1, 0)
    arena.write_index(0, b"index")
    where = os.pread(fd, os.fstat(fd).st_size, 0).index(b"index")
    os.pwrite(fd, b"I", where)
    with pytest.raises(CorruptCheckpoint, match="checksum"):
        arena.read_index(0)


def test_reserving_what_is_there_changes_nothing(fd: int) -> None:
    arena = Arena(fd)
    arena.reserve(2, 9000, 100, 0)
    before = arena.address(1), os.fstat(fd).st_size
    arena.reserve(2, 9000, 50, 0)
    arena.reserve(1, 100, 50, 0)
    assert (arena.address(1), os.fstat(fd).st_size) == before


def test_a_sealed_slot_stays_while_others_grow(fd: int) -> None:
    worker, agent = Arena(fd), Arena(fd)
    worker.reserve(2, 4096, 100, 0)
    worker.view(0, 0, 4)[:] = b"keep"
    worker.write_index(0, b"sealed")
    agent.attach()
    image = agent.image(0)
    worker.reserve(2, 1 << 20, 5000, 0)
    worker.grow(1, 2 << 20, 5000, 0)
    agent.attach()
    assert agent.read_index(0) == b"sealed"
    assert bytes(agent.view(0, 0, 4)) == b"keep"
    assert bytes(image.mapping.view()[4096:4100]) == b"keep"
    assert (agent.image_bytes(0), agent.image_bytes(1)) == (4096, 2 << 20)


def test_a_grown_slot_gives_its_old_memory_back(fd: int) -> None:
    arena = Arena(fd)
    arena.reserve(1, 8 << 20, 100, 0)
    arena.grow(0, 16 << 20, 100, 0)
    assert os.fstat(fd).st_size > 24 << 20
    assert os.fstat(fd).st_blocks * 512 < 20 << 20


def test_more_than_the_bound_is_refused_with_both_figures(fd: int) -> None:
    arena = Arena(fd)
    with pytest.raises(OutOfMemory, match=r"need 2105344 bytes .* bound of 1048576"):
        arena.reserve(2, 1 << 20, 4096 - 12, 1 << 20)
    assert arena.slots == 0


def test_more_than_the_host_has_is_refused_before_it_is_taken(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "available_bytes", lambda: 1000)
    with pytest.raises(OutOfMemory, match=r"needs 16384 more bytes of memory, and 1000 are available"):
        Arena(fd).reserve(2, 4096, 1, 0)
    assert os.fstat(fd).st_blocks == 0


@pytest.mark.parametrize("damage", [b"", b"something else" * 1000])
def test_file_without_a_header_holds_nothing_and_is_made_anew(fd: int, damage: bytes) -> None:
    os.posix_fallocate(fd, 0, 1 << 16)  # a worker that died while it made room leaves this
    os.pwrite(fd, damage, 0)
    arena = Arena(fd)
    assert arena.slots == 0
    arena.reserve(2, 4096, 10, 0)
    arena.write_index(1, b"index")
    assert Arena(fd).read_index(1) == b"index"


def test_a_damaged_header_holds_nothing(fd: int) -> None:
    arena = Arena(fd)
    arena.reserve(2, 4096, 1, 0)
    os.pwrite(fd, b"\xff", 17)
    arena.attach()
    with pytest.raises(CorruptCheckpoint, match="its header is gone"):
        arena.read_index(0)
    assert Arena(fd).slots == 0


def test_the_file_cannot_shrink_under_its_readers(fd: int) -> None:
    Arena(fd).reserve(1, 4096, 1, 0)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)


def test_a_snapshot_outlives_the_process_that_sealed_it(fd: int) -> None:
    code = (
        "import os, signal; from ftrain.checkpoint.staging.arena import Arena\n"
        f"arena = Arena({fd}); arena.reserve(2, 4096, 10, 0)\n"
        "arena.view(0, 0, 4)[:] = b'last'; arena.write_index(0, b'i')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], pass_fds=[fd], check=False).returncode == -9
    arena = Arena(fd)
    assert arena.read_index(0) == b"i"
    assert bytes(arena.view(0, 0, 4)) == b"last"
