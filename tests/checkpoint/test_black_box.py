"""The black box: the two newest boundaries, whole, also when its writer is killed in the middle of a write."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from ftrain import _native
from ftrain.checkpoint.staging import black_box
from ftrain.checkpoint.staging.black_box import BlackBox
from ftrain.errors import OutOfMemory

LARGE_BYTES = 24 << 20
FORKS = multiprocessing.get_context("fork")


@pytest.fixture
def fd() -> Iterator[int]:
    made = _native.memory_file("test-black-box")
    yield made
    os.close(made)


def pattern(step: int) -> bytes:
    return step.to_bytes(4, "little") * (LARGE_BYTES // 4)


def test_new_file_holds_nothing(fd: int) -> None:
    box = BlackBox(fd)
    assert box.steps() == ()
    assert box.read(0) is None


def test_two_newest_steps_are_kept_whatever_their_sizes(fd: int) -> None:
    box = BlackBox(fd)
    for step, size in enumerate([10, 0, 3 << 20, 5, 70_000]):
        box.write(step, bytes([step]) * size)
    assert box.steps() == (3, 4)
    assert [box.read(step) for step in (2, 3, 4)] == [None, b"\x03" * 5, b"\x04" * 70_000]


def test_another_who_opens_it_sees_the_same_and_goes_on(fd: int) -> None:
    BlackBox(fd).write(7, b"seven")
    BlackBox(fd).write(8, b"eight")
    successor = BlackBox(fd)
    assert successor.steps() == (7, 8)
    successor.write(9, b"nine")
    assert successor.steps() == BlackBox(fd).steps() == (8, 9)


def test_step_written_again_drops_the_future_that_was_given_up(fd: int) -> None:
    box = BlackBox(fd)
    box.write(4, b"four")
    box.write(5, b"five")
    box.write(5, b"five again")
    assert (box.read(4), box.read(5)) == (b"four", b"five again")
    box.write(2, b"two")
    assert box.steps() == (2,)
    box.write(3, b"three")
    box.forget_after(2)
    assert box.steps() == (2,)


def test_torn_or_damaged_place_is_not_there(fd: int) -> None:
    box = BlackBox(fd)
    box.write(1, b"one" * 5000)
    box.write(2, b"two" * 5000)
    whole = BlackBox(fd)
    for offset in (9000, 3, 20):  # data, magic, checksum of the place of step 1
        before = os.pread(fd, 1, offset)
        os.pwrite(fd, bytes([before[0] ^ 1]), offset)
        assert whole.steps() == (2,)
        assert whole.read(1) is None
        os.pwrite(fd, before, offset)
        assert whole.steps() == (1, 2)


def test_more_than_fits_is_refused_with_the_step_before_still_there(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(black_box, "DATA_BYTES_MAX", 100)
    box = BlackBox(fd)
    box.write(1, b"one")
    with pytest.raises(OutOfMemory, match="101 bytes at step 2"):
        box.write(2, b"x" * 101)
    assert box.steps() == (1,)


def write_for_ever(fd: int, told: Connection) -> None:
    box = BlackBox(fd)
    step = max(box.steps(), default=0)
    while True:
        step += 1
        data = pattern(step)
        told.send(step)  # the write begins
        box.write(step, data)


def test_writer_killed_in_the_middle_leaves_the_older_one_whole(fd: int) -> None:
    torn = 0
    for _ in range(12):
        hear, told = FORKS.Pipe(duplex=False)
        writer = FORKS.Process(target=write_for_ever, args=(fd, told))
        writer.start()
        told.close()
        begun = max(hear.recv() for _ in range(3))
        while not any(os.pread(fd, 8, place + 8) == begun.to_bytes(8, "little") for place in black_box._PLACES):
            assert writer.is_alive()  # the head comes first: once it is there the data is being written
        writer.kill()
        writer.join()
        hear.close()
        box = BlackBox(fd)
        steps = box.steps()
        torn += begun not in steps
        assert begun - 1 in steps
        assert all(box.read(step) == pattern(step) for step in steps)
    assert torn, "no kill came during a write"


def test_agent_reads_it_without_torch() -> None:
    program = "import sys, ftrain.checkpoint.staging.black_box; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
