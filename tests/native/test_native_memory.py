"""Shared memory and copies."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ftrain._native import Mapping, copy_batch, memory_file

NBYTES = 3 << 20

REVERSE = """
import sys
from ftrain._native import Mapping
view = Mapping(int(sys.argv[1]), int(sys.argv[2])).view()
view[:] = bytes(view)[::-1]
"""


@pytest.fixture
def memory_fd() -> Iterator[int]:
    fd = memory_file("test-memory")
    os.ftruncate(fd, NBYTES)
    yield fd
    os.close(fd)


def test_memory_file_is_empty_named_and_close_on_exec() -> None:
    fd = memory_file("arena-of-rank-3")
    assert os.fstat(fd).st_size == 0
    assert not os.get_inheritable(fd)
    assert "arena-of-rank-3" in str(Path(f"/proc/self/fd/{fd}").readlink())
    os.close(fd)


def test_name_too_long_raises_os_error() -> None:
    with pytest.raises(OSError, match="memfd_create") as caught:
        memory_file("x" * 300)
    assert caught.value.errno == 22


def test_mapping_is_shared_between_two_processes(memory_fd: int) -> None:
    data = random.Random(1).randbytes(NBYTES)
    mapping = Mapping(memory_fd, NBYTES)
    mapping.view()[:] = data
    subprocess.run(
        [sys.executable, "-c", REVERSE, str(memory_fd), str(NBYTES)], pass_fds=[memory_fd], check=True, timeout=60
    )
    assert bytes(mapping.view()) == data[::-1]
    assert mapping.nbytes == NBYTES


def test_mapping_outlives_its_descriptor() -> None:
    fd = memory_file("short-lived")
    os.ftruncate(fd, 4096)
    mapping = Mapping(fd, 4096)
    os.close(fd)
    mapping.view()[5] = 9
    assert mapping.view()[5] == 9


def test_view_keeps_memory_mapped_until_released(memory_fd: int) -> None:
    view = Mapping(memory_fd, NBYTES).view()
    view[0] = 1
    mapping = view.obj
    assert isinstance(mapping, Mapping)
    with pytest.raises(BufferError, match="in use"):
        mapping.close()
    view.release()
    mapping.close()
    mapping.close()
    with pytest.raises(ValueError, match="closed"):
        mapping.view()
    with pytest.raises(ValueError, match="closed"):
        _ = mapping.address


def test_view_is_writable_bytes(memory_fd: int) -> None:
    view = Mapping(memory_fd, 100).view()
    assert (view.readonly, view.format, view.nbytes) == (False, "B", 100)


@pytest.mark.parametrize(("nbytes", "reason"), [(NBYTES + 1, "os.ftruncate"), (0, "at least one byte")])
def test_mapping_of_impossible_size_is_refused(memory_fd: int, nbytes: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Mapping(memory_fd, nbytes)


def test_mapping_of_bad_descriptor_raises_os_error() -> None:
    with pytest.raises(OSError, match="fd -1") as caught:
        Mapping(-1, 4096)
    assert caught.value.errno == 9


@pytest.mark.parametrize("threads", [1, 2, 5, 64])
def test_copies_of_all_sizes_arrive_whole(threads: int) -> None:
    sizes = [0, 1, 7, 64, 4096, 1_000_003, 3 << 20, 13]
    sources = [np.frombuffer(random.Random(n).randbytes(n), dtype=np.uint8) for n in sizes]
    targets = [np.zeros(n + 2, dtype=np.uint8) for n in sizes]
    pairs = [(t.ctypes.data + 1, s.ctypes.data, s.nbytes) for t, s in zip(targets, sources, strict=True)]
    copy_batch(pairs, threads)
    for target, source in zip(targets, sources, strict=True):
        assert target[0] == target[-1] == 0
        assert np.array_equal(target[1:-1], source)


def test_empty_batch_does_nothing() -> None:
    copy_batch([])


def test_wrong_copies_are_refused() -> None:
    with pytest.raises(ValueError, match="null address"):
        copy_batch([(0, 1, 8)])
    with pytest.raises(ValueError, match="thread"):
        copy_batch([], 0)
    with pytest.raises(TypeError):
        copy_batch([(1, 2, -3)])
