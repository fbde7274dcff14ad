"""Ranges of real files: what arrives, what is found damaged, and what becomes of a read that cannot go on."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain._native import cached_share, fetch
from tests.native.engine import PAGE_BYTES, Memory, each_backend, opened, opened_direct, random_bytes, threads, words

BLOCK_BYTES = 512 << 10  # the smallest that there may be
FILE_BYTES = 4 * BLOCK_BYTES
CLOSED = 1 << 19  # as a descriptor: so high that nothing opened meanwhile gets its number
DATA = (random_bytes(1, FILE_BYTES), random_bytes(2, FILE_BYTES))

directly_or_not = pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])


@dataclass(frozen=True)
class Range:
    file: int
    offset: int
    nbytes: int
    proved_only: bool = False


class Stopped(Exception):
    pass


def fetched(
    files: Sequence[tuple[int, bool]], ranges: Sequence[Range], sums: Sequence[int], **options: object
) -> tuple[list[int], list[bytes]]:
    """The places of damage, and what arrived, of which the byte on either side was checked to be left alone."""
    targets = [Memory(b"\xa5" * (0 if one.proved_only else one.nbytes + 2)) for one in ranges]
    damaged = fetch(
        files,
        words(*(one.file for one in ranges)),
        words(*sums),
        words(*(one.offset for one in ranges)),
        words(*(one.nbytes for one in ranges)),
        words(*(0 if one.proved_only else target.address + 1 for one, target in zip(ranges, targets, strict=True))),
        **options,  # type: ignore[arg-type]
    )
    arrived = [target.bytes() for target in targets]
    assert all(not data or (data[0], data[-1]) == (0xA5, 0xA5) for data in arrived)
    return damaged, [data[1:-1] for data in arrived]


def part(one: Range) -> bytes:
    return DATA[one.file][one.offset : one.offset + one.nbytes]


def sums_of(ranges: Sequence[Range]) -> list[int]:
    return [google_crc32c.value(part(one)) for one in ranges]


def check_all_arrive(files: Sequence[tuple[int, bool]], ranges: Sequence[Range], **options: object) -> None:
    damaged, arrived = fetched(files, ranges, sums_of(ranges), **options)
    assert damaged == []
    assert arrived == [b"" if one.proved_only else part(one) for one in ranges]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("fetch")
    made = []
    for number, data in enumerate(DATA):
        made.append(folder / str(number))
        made[-1].write_bytes(data)
    return made


def open_all(stack: ExitStack, paths: Sequence[Path], direct: Sequence[bool]) -> list[tuple[int, bool]]:
    return [
        (stack.enter_context((opened_direct if one else opened)(path, os.O_RDONLY)), one)
        for path, one in zip(paths, direct, strict=True)
    ]


AT_EDGES = [
    Range(0, 0, FILE_BYTES),
    Range(0, 0, 0),
    Range(0, FILE_BYTES, 0),
    Range(0, BLOCK_BYTES - 1, 2),
    Range(0, BLOCK_BYTES, BLOCK_BYTES),
    Range(1, FILE_BYTES - 1, 1),
    Range(1, 1, 4095),
    Range(1, 4096, 1),
    Range(1, 2 * BLOCK_BYTES - 5, BLOCK_BYTES + 10, proved_only=True),
]


@each_backend
@pytest.mark.parametrize("direct", [(True, True), (False, False), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize(("count", "depth"), [(1, 1), (1, 2), (2, 8)])
def test_ranges_at_every_edge_arrive(
    paths: list[Path], backend: str, direct: tuple[bool, bool], count: int, depth: int
) -> None:
    with ExitStack() as stack:
        files = open_all(stack, paths, direct)
        check_all_arrive(files, AT_EDGES, threads=count, depth=depth, block_bytes=BLOCK_BYTES, backend=backend)


@directly_or_not
def test_same_ranges_of_several_blocks_arrive_each_time(paths: list[Path], direct: bool) -> None:
    with ExitStack() as stack:
        files = open_all(stack, paths[:1], [direct])
        ranges = [Range(0, 0, 3 * BLOCK_BYTES)] * 3 + [Range(0, 7, 3 * BLOCK_BYTES)]
        check_all_arrive(files, ranges, threads=1, depth=1, block_bytes=BLOCK_BYTES)


@each_backend
def test_range_only_proved_disturbs_no_transfer_of_another_file(paths: list[Path], backend: str) -> None:
    """Direct transfers are in flight while bytes of the page cache need a place to be proved in."""
    with ExitStack() as stack:
        files = open_all(stack, paths, [True, False])
        ranges = [
            *(Range(0, start, BLOCK_BYTES) for start in range(0, FILE_BYTES, BLOCK_BYTES)),
            Range(1, 0, FILE_BYTES, proved_only=True),
        ]
        check_all_arrive(files, ranges, threads=1, depth=8, block_bytes=BLOCK_BYTES, backend=backend)


RANGES = st.builds(
    lambda file, offset, nbytes, proved_only: Range(file, offset, min(nbytes, FILE_BYTES - offset), proved_only),
    st.integers(0, 1),
    st.integers(0, FILE_BYTES) | st.sampled_from([0, 4096, BLOCK_BYTES - 1, BLOCK_BYTES, FILE_BYTES - 1]),
    st.sampled_from([0, 1, 100, 4096, 70_000, BLOCK_BYTES, 3 * BLOCK_BYTES]),
    st.booleans(),
)


@each_backend
@given(
    ranges=st.lists(RANGES, max_size=12),
    direct=st.tuples(st.booleans(), st.booleans()),
    count=st.integers(1, 3),
    depth=st.integers(1, 3),
    bad=st.sets(st.integers(0, 11), max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_any_ranges_arrive_and_wrong_sums_are_named(
    paths: list[Path],
    backend: str,
    ranges: list[Range],
    direct: tuple[bool, bool],
    count: int,
    depth: int,
    bad: set[int],
) -> None:
    sums = [total ^ (1 if place in bad else 0) for place, total in enumerate(sums_of(ranges))]
    with ExitStack() as stack:
        files = open_all(stack, paths, direct)
        damaged, arrived = fetched(
            files, ranges, sums, threads=count, depth=depth, block_bytes=BLOCK_BYTES, backend=backend
        )
    assert damaged == sorted(place for place in bad if place < len(ranges))
    assert arrived == [b"" if one.proved_only else part(one) for one in ranges]


@each_backend
@directly_or_not
def test_one_changed_byte_names_the_ranges_that_hold_it(tmp_path: Path, backend: str, direct: bool) -> None:
    path = tmp_path / "pack"
    changed = BLOCK_BYTES + 17
    path.write_bytes(DATA[0][:changed] + bytes([DATA[0][changed] ^ 0x40]) + DATA[0][changed + 1 :])
    ranges = [
        Range(0, changed - 100, 100),
        Range(0, changed, 1),
        Range(0, changed + 1, 100),
        Range(0, 0, FILE_BYTES),
        Range(0, changed - 5, 10, proved_only=True),
    ]
    with ExitStack() as stack:
        files = open_all(stack, [path], [direct])
        damaged, _ = fetched(files, ranges, sums_of(ranges), block_bytes=BLOCK_BYTES, backend=backend)
    assert damaged == [1, 3, 4]


@each_backend
@directly_or_not
def test_many_small_ranges_arrive(paths: list[Path], backend: str, direct: bool) -> None:
    ranges = [Range(number % 2, number * 401, 350) for number in range(5000)]
    with ExitStack() as stack:
        check_all_arrive(open_all(stack, paths, [direct, direct]), ranges, backend=backend)


def test_nothing_wanted_is_nothing_damaged(paths: list[Path]) -> None:
    assert fetched([], [], []) == ([], [])


@each_backend
@directly_or_not
@pytest.mark.parametrize("nbytes", [8192, 0])
def test_file_that_ends_early_raises_eof_error(tmp_path: Path, backend: str, direct: bool, nbytes: int) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(nbytes))
    before = threads()
    with ExitStack() as stack:
        files = open_all(stack, [path], [direct])
        with pytest.raises(EOFError, match=f"fd {files[0][0]}"):
            fetched(files, [Range(0, 4096, 100), Range(0, 6000, 4096)], [0, 0], backend=backend)
    assert threads() <= before


@each_backend
@directly_or_not
def test_closed_descriptor_raises_os_error(paths: list[Path], backend: str, direct: bool) -> None:
    with pytest.raises(OSError, match=f"fd {CLOSED}") as caught:
        fetched([(CLOSED, direct)], [Range(0, 0, FILE_BYTES)], [0], backend=backend)
    assert caught.value.errno == errno.EBADF


@each_backend
def test_one_bad_file_among_good_ones_ends_the_fetch(paths: list[Path], backend: str) -> None:
    with ExitStack() as stack:
        (good, _), (bad, _) = open_all(stack, paths, [False, False])
        stack.enter_context(opened(paths[0], os.O_WRONLY))
        write_only = stack.enter_context(opened(paths[1], os.O_WRONLY))
        ranges = [Range(0, 0, FILE_BYTES), Range(1, 0, FILE_BYTES)]
        with pytest.raises(OSError, match=f"fd {write_only}") as caught:
            fetched(
                [(good, True), (write_only, True)], ranges, sums_of(ranges), block_bytes=BLOCK_BYTES, backend=backend
            )
        assert caught.value.errno == errno.EBADF
        assert bad != write_only


@pytest.mark.parametrize(
    ("ranges", "sums", "reason"),
    [
        ([Range(1, 0, 1)], [0], "not given"),
        ([Range(2**32, 0, 1)], [0], "32 bits"),
        ([Range(0, 0, 1)], [2**32], "32 bits"),
        ([Range(0, 2**64 - 4096, 4096, proved_only=True)], [0], "beyond"),
        ([Range(0, 0, 2**64 - 1, proved_only=True)], [0], "beyond"),
    ],
)
def test_ranges_that_cannot_be_are_refused(
    paths: list[Path], ranges: list[Range], sums: list[int], reason: str
) -> None:
    with opened(paths[0], os.O_RDONLY) as descriptor, pytest.raises(ValueError, match=reason):
        fetched([(descriptor, False)], ranges, sums)


@pytest.mark.parametrize(
    "options",
    [{"threads": 0}, {"depth": 0}, {"block_bytes": 4096}, {"block_bytes": (1 << 20) + 1}, {"backend": "tape"}],
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"fetch needs|backend must be"):
        fetched([], [], [], **options)


# The same file over and over, so that there is time to be interrupted in.
AGAIN = [Range(0, 0, FILE_BYTES, proved_only=True)] * 4000


@each_backend
@directly_or_not
def test_on_idle_that_raises_ends_the_fetch(paths: list[Path], backend: str, direct: bool) -> None:
    def stop() -> None:
        raise Stopped

    before = threads()
    with ExitStack() as stack:
        files = open_all(stack, paths[:1], [direct])
        with pytest.raises(Stopped):
            fetched(files, AGAIN, sums_of(AGAIN[:1]) * len(AGAIN), backend=backend, on_idle=stop)
    assert threads() <= before


LONG_FETCH = """
import os, sys, time
from array import array
from ftrain._native import fetch

size, count = os.path.getsize(sys.argv[1]), 100_000
alone = len(os.listdir("/proc/self/task"))
said = []

def say_once():
    if not said:
        said.append(True)
        print("reading", flush=True)

none = array("Q", [0]) * count
try:
    file = os.open(sys.argv[1], os.O_RDONLY)
    fetch([(file, False)], none, none, none, array("Q", [size]) * count, none, on_idle=say_once)
except KeyboardInterrupt:
    until = time.monotonic() + 10  # one that has ended is listed there for a moment
    while len(os.listdir("/proc/self/task")) != alone and time.monotonic() < until:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/task")) == alone
    print("interrupted", flush=True)
"""


def test_interrupt_during_a_long_fetch_raises_keyboard_interrupt(paths: list[Path]) -> None:
    command = [sys.executable, "-c", LONG_FETCH, str(paths[0])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "reading\n"
            child.send_signal(signal.SIGINT)
            assert child.stdout.readline() == "interrupted\n"
            assert child.wait(60) == 0
        finally:
            child.kill()


def test_file_just_read_is_cached_and_an_empty_or_bad_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "read"
    path.write_bytes(bytes(10 * PAGE_BYTES + 1))
    path.read_bytes()
    with opened(path, os.O_RDONLY) as descriptor:
        assert cached_share(descriptor) == 1.0
    assert cached_share(descriptor) == 0.0
    (tmp_path / "empty").touch()
    with opened(tmp_path / "empty", os.O_RDONLY) as descriptor:
        assert cached_share(descriptor) == 0.0
