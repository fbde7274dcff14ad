"""Packs on real files: every byte, every checksum, and what becomes of a write that cannot go on."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain._native import Pack, memory_file
from tests.native.engine import (
    PAGE_BYTES,
    Layout,
    Memory,
    each_backend,
    opened,
    opened_direct,
    random_bytes,
    random_layout,
    threads,
    words,
)

EDGES = [0, 1, 4095, 4096, 1, 0, 8192, 12288, 3, 4090, 20000, 0]  # of boxes, in pages of 4096
MIXED = Layout(
    random_layout(1, EDGES, [0, 0, 1, 64, 4096, 9000]).boxes,
    chunks=24,
    chunk_bytes=PAGE_BYTES,
    ending=random_bytes(9, 999),
)
CLOSED = 1 << 19  # as a descriptor: so high that nothing opened meanwhile gets its number
MEMORY = Memory(MIXED.image_bytes)  # a pack knows addresses only: somebody must hold what lies there
in_both_places = pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "gathered"])
directly_or_not = pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])


class Stopped(Exception):
    pass


def check_file(path: Path, layout: Layout, found: tuple[list[int], list[int]]) -> None:
    assert path.read_bytes() == layout.image()
    assert found == layout.sums()


@each_backend
@in_both_places
@directly_or_not
@pytest.mark.parametrize(("count", "depth"), [(1, 1), (1, 8), (3, 2)])
def test_boxes_at_every_edge_are_written_and_summed(
    tmp_path: Path, backend: str, in_place: bool, direct: bool, count: int, depth: int
) -> None:
    pack = MIXED.pack(MEMORY, in_place=in_place)
    path = tmp_path / "pack"
    with (opened_direct if direct else opened)(path, os.O_WRONLY | os.O_CREAT) as descriptor:
        found = pack.write(descriptor, threads=count, depth=depth, backend=backend)
    check_file(path, MIXED, found)
    assert pack.nbytes == path.stat().st_size == MIXED.image_bytes


@each_backend
@in_both_places
@given(
    boxes=st.lists(st.tuples(st.integers(0, 9000), st.sampled_from([0, 0, 1, 5, 64, 4095, 4096, 7000])), max_size=12),
    chunk_pages=st.integers(1, 3),
    depth=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_any_layout_is_written_and_summed(
    tmp_path_factory: pytest.TempPathFactory,
    backend: str,
    in_place: bool,
    boxes: list[tuple[int, int]],
    chunk_pages: int,
    depth: int,
) -> None:
    layout = random_layout(3, [size for size, _ in boxes], [gap for _, gap in boxes] or [0], chunk_pages * PAGE_BYTES)
    memory = Memory(layout.image_bytes)
    path = tmp_path_factory.mktemp("any") / "pack"
    with opened(path, os.O_WRONLY | os.O_CREAT) as descriptor:
        found = layout.pack(memory, in_place=in_place).write(descriptor, depth=depth, backend=backend)
    check_file(path, layout, found)


@in_both_places
def test_many_small_boxes_in_large_chunks_are_written_and_summed(tmp_path: Path, in_place: bool) -> None:
    layout = random_layout(4, [1000, 3, 48, 0, 700] * 2000, [24, 0, 61], 1 << 20)
    memory = Memory(layout.image_bytes)
    with opened(tmp_path / "pack", os.O_WRONLY | os.O_CREAT) as descriptor:
        found = layout.pack(memory, in_place=in_place).write(descriptor, threads=2)
    check_file(tmp_path / "pack", layout, found)


def test_pack_without_boxes_is_its_ending(tmp_path: Path) -> None:
    layout = Layout((), chunks=0)
    with opened(tmp_path / "pack", os.O_WRONLY | os.O_CREAT) as descriptor:
        assert Pack(words(), words(), words(), 0, 4096, layout.image_bytes, layout.ending).write(descriptor) == ([], [])
    assert (tmp_path / "pack").read_bytes() == layout.image()


def test_pack_of_nothing_writes_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "pack", os.O_WRONLY | os.O_CREAT) as descriptor:
        assert Pack(words(), words(), words(), 0, 4096, 0, b"").write(descriptor) == ([], [])
    assert (tmp_path / "pack").stat().st_size == 0


def test_pack_is_written_again_from_what_is_there_then(tmp_path: Path) -> None:
    memory = Memory(8192)
    for seed in (1, 2):
        layout = Layout(((0, random_bytes(seed, 8192)),), chunks=2)
        pack = layout.pack(memory, in_place=False)
        with opened(tmp_path / str(seed), os.O_WRONLY | os.O_CREAT) as descriptor:
            check_file(tmp_path / str(seed), layout, pack.write(descriptor))


@pytest.mark.parametrize(
    ("offsets", "addresses", "sizes", "geometry", "ending", "image", "reason"),
    [
        (words(0, 9), words(1, 1), words(10, 1), (4096, 4096, 4096), b"", 0, "overlap"),
        (words(4090), words(1), words(7), (4096, 4096, 4096), b"", 0, "beyond"),
        (words(0), words(1), words(2**64 - 1), (4096, 4096, 4096), b"", 0, "beyond"),
        (words(2**64 - 1), words(1), words(1), (4096, 4096, 4096), b"", 0, "beyond"),
        (words(0), words(0), words(1), (4096, 4096, 4096), b"", 0, "null address"),
        (words(), words(), words(), (4096, 4095, 4096), b"", 0, "whole pages"),
        (words(), words(), words(), (4096, 0, 4096), b"", 0, "whole pages"),
        (words(), words(), words(), (4096, 4096, 4097), b"", 0, "whole pages"),
        (words(), words(), words(), (4096, 8192, 8192), b"", 0, "whole chunks"),
        (words(), words(), words(), (8192, 4096, 4096), b"", 0, "whole chunks"),
        (words(), words(), words(), (4096, 4096, 4096), b"x", 0, "no room"),
        (words(), words(), words(), (0, 4096, 4096), bytes(4097), 0, "no room"),
        (words(), words(), words(), (4096, 4096, 4096), b"", 4095, "begin with a page"),
        (words(), words(), words(), (0, 4096, 2**63), b"", 0, "larger than a file"),
        (words(0), words(), words(), (4096, 4096, 4096), b"", 0, "differ in length"),
    ],
)
def test_pack_that_does_not_fit_together_is_refused(
    offsets: object,
    addresses: object,
    sizes: object,
    geometry: tuple[int, int, int],
    ending: bytes,
    image: int,
    reason: str,
) -> None:
    with pytest.raises(ValueError, match=reason):
        Pack(offsets, addresses, sizes, *geometry, ending, image)  # type: ignore[arg-type]


def test_columns_of_other_words_are_refused() -> None:
    with pytest.raises(ValueError, match="64-bit"):
        Pack(bytes(8), words(1), words(1), 4096, 4096, 4096, b"")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"threads": 0}, "at least 1"),
        ({"depth": 0}, "at least 1"),
        ({"depth": 5000}, "depth"),
        ({"backend": "tape"}, "tape"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, options: dict[str, int | str], reason: str) -> None:
    with opened(tmp_path / "pack", os.O_WRONLY | os.O_CREAT) as descriptor, pytest.raises(ValueError, match=reason):
        MIXED.pack(MEMORY, in_place=True).write(descriptor, **options)  # type: ignore[arg-type]


@each_backend
def test_closed_descriptor_raises_os_error(backend: str) -> None:
    pack = MIXED.pack(MEMORY, in_place=True)
    with pytest.raises(OSError, match=f"fd {CLOSED}") as caught:
        pack.write(CLOSED, backend=backend)
    assert caught.value.errno == errno.EBADF


@each_backend
@in_both_places
@pytest.mark.parametrize("count", [1, 3])
def test_write_that_fails_raises_its_errno_and_ends_all_threads(backend: str, in_place: bool, count: int) -> None:
    before = threads()
    descriptor = memory_file("sealed")
    try:
        os.ftruncate(descriptor, MIXED.image_bytes)  # room is there, so that it is the write which fails
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        pack = MIXED.pack(MEMORY, in_place=in_place)
        with pytest.raises(OSError, match=f"write of .* of fd {descriptor}") as caught:
            pack.write(descriptor, threads=count, backend=backend)
        assert caught.value.errno == errno.EPERM
    finally:
        os.close(descriptor)
    assert threads() <= before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    where = tmp_path / "small"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(where)], check=False, capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    yield where
    subprocess.run(["umount", str(where)], check=True)


@each_backend
def test_full_disk_raises_before_anything_is_written(small_disk: Path, backend: str) -> None:
    pack = MIXED.pack(MEMORY, in_place=True)
    with opened(small_disk / "pack", os.O_RDWR | os.O_CREAT) as descriptor:
        with pytest.raises(OSError, match="reserving") as caught:
            pack.write(descriptor, backend=backend)
        assert caught.value.errno == errno.ENOSPC
        assert not os.pread(descriptor, MIXED.image_bytes, 0).strip(b"\0")


@each_backend
def test_tmpfs_holds_a_pack_or_refuses_direct_io_when_opened(backend: str) -> None:
    path = Path("/dev/shm") / f"ftrain-test-{os.getpid()}"
    try:
        with opened_direct(path, os.O_WRONLY | os.O_CREAT) as descriptor:
            found = MIXED.pack(MEMORY, in_place=False).write(descriptor, backend=backend)
        check_file(path, MIXED, found)
    finally:
        path.unlink(missing_ok=True)


@each_backend
@in_both_places
def test_bound_rate_holds_back_what_is_not_due(tmp_path: Path, backend: str, in_place: bool) -> None:
    """A byte a second: the first chunk is due at once, the second after an hour."""
    image = MIXED.image()
    path = tmp_path / "pack"
    before = threads()

    def stop_once_first_is_there() -> None:
        if path.read_bytes()[:PAGE_BYTES] == image[:PAGE_BYTES]:
            raise Stopped

    with opened(path, os.O_WRONLY | os.O_CREAT) as descriptor, pytest.raises(Stopped):
        MIXED.pack(MEMORY, in_place=in_place).write(
            descriptor, threads=2, bytes_per_second_max=1, backend=backend, on_idle=stop_once_first_is_there
        )
    assert threads() <= before  # so nothing is written from here
    assert path.read_bytes() == image[:PAGE_BYTES] + bytes(MIXED.image_bytes - PAGE_BYTES)


def test_bound_rate_that_is_not_reached_changes_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "pack", os.O_WRONLY | os.O_CREAT) as descriptor:
        found = MIXED.pack(MEMORY, in_place=True).write(descriptor, bytes_per_second_max=1 << 40)
    check_file(tmp_path / "pack", MIXED, found)


def test_niceness_is_that_of_the_writing_threads_alone(tmp_path: Path) -> None:
    before = threads()
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    seen: set[int] = set()

    def look() -> None:
        seen.update(os.getpriority(os.PRIO_PROCESS, thread) for thread in threads() - before)
        raise Stopped

    with opened(tmp_path / "pack", os.O_WRONLY | os.O_CREAT) as descriptor, pytest.raises(Stopped):
        MIXED.pack(MEMORY, in_place=True).write(
            descriptor, threads=2, nice=5, bytes_per_second_max=1, backend="threads", on_idle=look
        )
    assert seen == {min(19, mine + 5)}
    assert os.getpriority(os.PRIO_PROCESS, 0) == mine


@contextmanager
def contended_processor() -> Iterator[None]:
    """This thread and those that it makes have one processor, and share it with a process that never rests."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
            try:
                yield
            finally:
                other.kill()
    finally:
        os.sched_setaffinity(0, before)


LARGE = Layout(((0, random_bytes(5, 64 << 20)),), chunks=64, chunk_bytes=1 << 20)  # some milliseconds of a processor


def test_write_beside_others_takes_no_more_of_the_processor_than_it_may(tmp_path: Path) -> None:
    """A millionth of a processor: once it had to wait, the next millisecond is due after a quarter of an hour."""
    looks = 0

    def stop_after_a_second() -> None:
        nonlocal looks
        looks += 1
        if looks == 50:
            raise Stopped

    memory = Memory(LARGE.image_bytes)
    pack = LARGE.pack(memory, in_place=True)
    with contended_processor(), opened(tmp_path / "pack", os.O_WRONLY | os.O_CREAT) as descriptor:
        pack.write(descriptor, nice=10)  # it is not the processor that is too slow
        with pytest.raises(Stopped):
            pack.write(descriptor, nice=10, processors_max=1e-6, on_idle=stop_after_a_second)


def test_write_that_never_waits_for_a_processor_takes_all_that_it_can_use(tmp_path: Path) -> None:
    """Where it had to wait once, for a hypervisor or the kernel, it is as good as over: so it may be tried again."""
    memory = Memory(LARGE.image_bytes)
    pack = LARGE.pack(memory, in_place=True)

    def is_done(number: int) -> bool:
        looks = itertools.count()

        def stop_after_five_seconds() -> None:
            if next(looks) == 250:
                raise Stopped

        path = tmp_path / f"pack-{number}"
        with suppress(Stopped), opened(path, os.O_WRONLY | os.O_CREAT) as descriptor:
            check_file(path, LARGE, pack.write(descriptor, processors_max=1e-6, on_idle=stop_after_five_seconds))
            return True
        return False

    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # nobody else is let in before it
    except PermissionError:
        pytest.skip("real-time scheduling is not allowed here")
    try:
        assert any(is_done(number) for number in range(10))
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


SLOW_WRITE = """
import os, sys, time
from array import array
from ftrain._native import Mapping, Pack, memory_file

fd = memory_file("source")
os.ftruncate(fd, 1 << 16)
source = Mapping(fd, 1 << 16)
image = source.address if sys.argv[2] == "in-place" else 0
pack = Pack(array("Q", [0]), array("Q", [source.address]), array("Q", [1 << 16]), 1 << 16, 4096, 1 << 16, b"", image)
target = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
alone = len(os.listdir("/proc/self/task"))
said = []

def say_once():
    if not said:
        said.append(True)
        print("writing", flush=True)

try:
    pack.write(target, threads=2, bytes_per_second_max=1, backend=sys.argv[3], on_idle=say_once)
except KeyboardInterrupt:
    until = time.monotonic() + 10  # one that has ended is listed there for a moment
    while len(os.listdir("/proc/self/task")) != alone and time.monotonic() < until:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/task")) == alone
    print("interrupted", flush=True)
"""


@each_backend
@pytest.mark.parametrize("where", ["in-place", "gathered"])
def test_interrupt_during_a_slow_write_raises_keyboard_interrupt(tmp_path: Path, backend: str, where: str) -> None:
    command = [sys.executable, "-c", SLOW_WRITE, str(tmp_path / "pack"), where, backend]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "writing\n"
            child.send_signal(signal.SIGINT)
            assert child.stdout.readline() == "interrupted\n"
            assert child.wait(60) == 0
        finally:
            child.kill()
