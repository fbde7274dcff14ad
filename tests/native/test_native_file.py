"""Whole reads and writes: buffered, direct, short, full and failing."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftrain._native import Mapping, memory_file, read_into, write_from

NBYTES = 1 << 20


@pytest.fixture
def memory() -> Iterator[Mapping]:
    """Page-aligned memory with random content."""
    fd = memory_file("io")
    os.ftruncate(fd, NBYTES)
    mapping = Mapping(fd, NBYTES)
    os.close(fd)
    mapping.view()[:] = random.Random(2).randbytes(NBYTES)
    yield mapping
    mapping.close()


def test_written_bytes_are_read_back_at_their_offset(memory: Mapping, tmp_path: Path) -> None:
    content = bytes(memory.view())
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600)
    write_from(fd, memory.address + 3, 1000, 77)
    assert (tmp_path / "file").read_bytes() == bytes(77) + content[3:1003]
    read_into(fd, memory.address, 500, 177)
    assert bytes(memory.view()) == content[103:603] + content[500:]
    os.close(fd)


def test_direct_write_and_read_go_past_the_page_cache(memory: Mapping, tmp_path: Path) -> None:
    content = bytes(memory.view())
    try:
        fd = os.open(tmp_path / "direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    except OSError as error:
        pytest.skip(f"no direct I/O on this file system: {error}")
    write_from(fd, memory.address, NBYTES, 4096)
    memory.view()[:] = bytes(NBYTES)
    read_into(fd, memory.address, NBYTES, 4096)
    assert bytes(memory.view()) == content
    assert (tmp_path / "direct").read_bytes() == bytes(4096) + content
    os.close(fd)


def test_nothing_to_do_touches_nothing() -> None:
    write_from(-1, 0, 0, 0)
    read_into(-1, 0, 0, 0)


def test_file_that_ends_early_raises_eof_error_with_progress(memory: Mapping, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x" * 1000)
    fd = os.open(tmp_path / "short", os.O_RDONLY)
    with pytest.raises(EOFError, match=f"read of 2000 bytes at offset 10 of fd {fd}, after 990 bytes"):
        read_into(fd, memory.address, 2000, 10)
    os.close(fd)


def test_wrong_descriptors_raise_os_error_with_errno(memory: Mapping, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    with pytest.raises(OSError, match=f"write of 10 bytes at offset 5 of fd {fd}") as read_only:
        write_from(fd, memory.address, 10, 5)
    assert read_only.value.errno == errno.EBADF
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor") as closed:
        read_into(-1, memory.address, 10, 0)
    assert closed.value.errno == errno.EBADF


def test_unreadable_memory_raises_os_error_instead_of_crashing(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600)
    with pytest.raises(OSError, match="Bad address") as caught:
        write_from(fd, 8, 4096, 0)
    assert caught.value.errno == errno.EFAULT
    os.close(fd)


def test_pipe_raises_the_subclass_of_its_errno(memory: Mapping) -> None:
    reader, writer = os.pipe()
    with pytest.raises(OSError, match="Illegal seek") as caught:
        write_from(writer, memory.address, 10, 0)
    assert caught.value.errno == errno.ESPIPE
    os.close(reader)
    os.close(writer)


def test_range_beyond_any_file_is_refused(memory: Mapping) -> None:
    with pytest.raises(ValueError, match="beyond"):
        write_from(1, memory.address, 10, 2**63 - 1)
    with pytest.raises(TypeError):
        write_from(1, memory.address, 10, -1)


def test_full_device_raises_no_space(memory: Mapping) -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match="after 0 bytes") as caught:
        write_from(fd, memory.address, 4096, 0)
    assert caught.value.errno == errno.ENOSPC
    os.close(fd)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system is not allowed here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_disk_that_fills_up_raises_no_space_after_what_it_took(memory: Mapping, small_disk: Path) -> None:
    fd = os.open(small_disk / "file", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        with pytest.raises(OSError, match="after 262144 bytes") as caught:
            write_from(fd, memory.address, NBYTES, 0)
        assert caught.value.errno == errno.ENOSPC
    finally:
        os.close(fd)


def test_other_threads_write_elsewhere_in_the_same_file(memory: Mapping, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "shared", os.O_RDWR | os.O_CREAT, 0o600)
    part = NBYTES // 4
    writers = [
        threading.Thread(target=write_from, args=(fd, memory.address + i * part, part, i * part)) for i in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert (tmp_path / "shared").read_bytes() == bytes(memory.view())
    os.close(fd)
