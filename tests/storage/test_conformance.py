"""What every `Storage` must do: one suite for all of them."""

from __future__ import annotations

import ctypes
import mmap
import random
from array import array
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ftrain._native import crc32c
from ftrain.errors import AlreadyExists, CorruptCheckpoint, NotFound, StorageError, UsageError
from ftrain.storage import PosixStorage, Storage, open_storage
from ftrain.storage.base import Effort, Ranges
from ftrain.storage.pack import Pack
from ftrain.storage.posix import FILES_MAX
from ftrain.storage.spread import SpreadStorage
from tests.storage.servers import set_environment


@pytest.fixture(params=["posix", "spread", "moto", "seaweedfs", "azurite", "gcs"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    if request.param == "posix":
        return PosixStorage(tmp_path / "run")
    if request.param == "spread":
        spread = SpreadStorage(tmp_path / "run", [str(tmp_path / "disk")])
        spread.check()
        return spread
    server = request.getfixturevalue(request.param)
    set_environment(server, monkeypatch)
    return open_storage(server.new_url())


class Memory:
    """Page-aligned memory at an address."""

    def __init__(self, nbytes: int, data: bytes = b"") -> None:
        self.map = mmap.mmap(-1, nbytes)
        self.map[: len(data)] = data
        self.hold = ctypes.c_char.from_buffer(self.map)
        self.address = ctypes.addressof(self.hold)

    def bytes(self) -> bytes:
        return self.map[:]


def pack_of(memory: Memory, nbytes: int, begin: int = 0) -> Pack:
    """A pack of one box, which is `nbytes` of the memory, and zeros up to a whole page."""
    whole = max(4096, -(-nbytes // 4096) * 4096)
    columns = [array("Q", [word]) for word in (0, memory.address + begin, nbytes)]
    return Pack(*columns, payload_bytes=whole, chunk_bytes=4096, image_bytes=whole, ending=b"")


def range_of(path: str, offset: int, nbytes: int, memory: Memory, data: bytes) -> Ranges:
    """The range of one file that is to hold `data`, to the beginning of the memory."""
    ranges = Ranges([path])
    ranges.add(0, crc32c(data), offset, nbytes, memory.address)
    return ranges


EASY = Effort()
FOLDER = "checkpoints/step-000000000001/g0001-a1/packs/00001/c"
PACK = f"{FOLDER}/0"  # where storage has several disks, it is not on the first
MIB = 1 << 20


@pytest.fixture
def never() -> Callable[[], bool]:
    return lambda: False


def test_what_was_created_is_read_back(storage: Storage) -> None:
    storage.create("a/b/c.json", b"data")
    assert storage.read("a/b/c.json") == b"data"
    assert storage.size("a/b/c.json") == 4
    assert storage.exists("a/b/c.json")
    assert storage.exists("a/b")
    assert storage.list("a") == ["b"]
    assert storage.list("a/b") == ["c.json"]
    storage.create("empty", b"")
    assert storage.read("empty") == b""


def test_what_is_absent_is_told_so(storage: Storage) -> None:
    assert not storage.exists("a")
    assert storage.list("a") == []
    for call in (storage.read, storage.size):
        with pytest.raises(NotFound, match="a/b"):
            call("a/b")
    memory = Memory(4096)
    with pytest.raises(NotFound):
        storage.read_ranges(range_of("a/b", 0, 1, memory, b"x"))
    storage.remove_tree("a")


def test_a_taken_name_is_refused_and_keeps_its_content(storage: Storage, never: Callable[[], bool]) -> None:
    storage.create("dir/name", b"first")
    with pytest.raises(AlreadyExists, match="dir/name"):
        storage.create("dir/name", b"second")
    memory = Memory(4096, b"third")
    with pytest.raises(AlreadyExists):
        storage.write_pack("dir/name", pack_of(memory, 4096), EASY, should_stop=never)
    storage.create(PACK, b"first")
    with pytest.raises(AlreadyExists, match=PACK):
        storage.write_pack(PACK, pack_of(memory, 4096), EASY, should_stop=never)
    assert storage.read(PACK) == b"first"
    assert storage.read("dir/name") == b"first"
    assert storage.list("dir") == ["name"]


def test_of_many_creators_exactly_one_wins(storage: Storage) -> None:
    def create(number: int) -> int | None:
        try:
            storage.create("journal/1.json", b"%d" % number * 1000)
        except AlreadyExists:
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        winners = [number for number in pool.map(create, range(8)) if number is not None]
    assert len(winners) == 1
    assert storage.read("journal/1.json") == b"%d" % winners[0] * 1000


def test_confirm_tells_ones_own_from_anothers(storage: Storage) -> None:
    assert not storage.confirm("x/y", b"mine")
    storage.create("x/y", b"mine")
    assert storage.confirm("x/y", b"mine")
    assert not storage.confirm("x/y", b"yours")


@pytest.mark.parametrize(("begin", "nbytes"), [(0, 8192), (0, 100), (5, 4096), (0, 0)])
def test_a_pack_is_written_and_read_back_from_any_alignment(
    storage: Storage, never: Callable[[], bool], begin: int, nbytes: int
) -> None:
    data = bytes(range(256)) * 64
    source = Memory(len(data), data)
    box_sums, chunk_sums = storage.write_pack(PACK, pack_of(source, nbytes, begin), EASY, should_stop=never)
    found = storage.read(PACK)
    assert found[:nbytes] == data[begin : begin + nbytes]
    assert not any(found[nbytes:])
    assert box_sums == [crc32c(data[begin : begin + nbytes])]
    assert chunk_sums == [crc32c(found[at : at + 4096]) for at in range(0, len(found), 4096)]
    if nbytes > 10:
        target = Memory(16384)
        wanted = data[begin + 3 : begin + nbytes]
        assert storage.read_ranges(range_of(PACK, 3, nbytes - 3, target, wanted)) == []
        assert target.bytes()[: nbytes - 3] == wanted


@pytest.mark.parametrize("with_image", [False, True])
def test_a_large_pack_of_many_boxes_is_written_whole_with_its_sums(
    storage: Storage, never: Callable[[], bool], with_image: bool
) -> None:
    payload, ending = 20 * MIB, b"the end"
    data = bytearray(payload)
    boxes = [(0, 5 * MIB + 1), (8 * MIB - 3, 6), (9 * MIB, 0), (9 * MIB + 4096, 10 * MIB)]
    for offset, nbytes in boxes:
        data[offset : offset + nbytes] = random.Random(offset).randbytes(nbytes)
    source = Memory(payload + 4096, bytes(data))
    columns = [
        array("Q", words) for words in zip(*((at, source.address + at, size) for at, size in boxes), strict=True)
    ]
    image = source.address if with_image else 0
    pack = Pack(*columns, payload, 4 * MIB, payload + 4096, ending, image)
    sums, chunks = storage.write_pack(PACK, pack, EASY, should_stop=never)
    assert sums == [crc32c(data[at : at + size]) for at, size in boxes]
    assert chunks == [crc32c(data[at : at + 4 * MIB]) for at in range(0, payload, 4 * MIB)]
    assert storage.size(PACK) == payload + 4096
    found = storage.read(PACK)
    assert found[:payload] == data and found.endswith(bytes(4096 - len(ending)) + ending)
    ranges, target = Ranges([PACK]), Memory(payload)
    for (at, size), crc in zip(boxes, sums, strict=True):
        ranges.add(0, crc, at, size, target.address + at)
        ranges.add(0, crc, at, size, 0)
    ranges.add(0, 1, boxes[3][0], boxes[3][1], 0)
    assert storage.read_ranges(ranges) == [8]
    assert target.bytes() == data
    with pytest.raises(AlreadyExists):
        storage.write_pack(PACK, pack, EASY, should_stop=never)


def test_a_large_write_that_is_told_to_stop_in_the_middle_leaves_nothing(storage: Storage) -> None:
    memory = Memory(32 * MIB)
    asked = iter([False, False])
    with pytest.raises(StorageError, match="stopped"):
        storage.write_pack(
            PACK,
            pack_of(memory, 32 * MIB),
            Effort(bytes_per_second_max=MIB),
            should_stop=lambda: next(asked, True),
        )
    assert storage.list(FOLDER) == []
    storage.write_pack(PACK, pack_of(memory, 32 * MIB), EASY, should_stop=lambda: False)
    assert storage.size(PACK) == 32 * MIB


class Zeros:
    """A stream of so many parts of 4 MiB, each with its number in all bytes, made in the same memory."""

    def __init__(self, parts: int, wrong: int = -1) -> None:
        self.nbytes_max = parts * 5 * MIB
        self.parts = parts
        self.wrong = wrong
        self.closed = 0

    def __iter__(self) -> Generator[memoryview]:
        memory = mmap.mmap(-1, 4 * MIB)
        try:
            for number in range(self.parts):
                if number == self.wrong:
                    raise CorruptCheckpoint("a part that cannot be made")
                memory[:] = bytes([number]) * (4 * MIB)
                yield memoryview(memory)
        finally:
            self.closed += 1


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_a_stream_is_written_whole_whatever_becomes_of_the_memory_of_its_parts(
    storage: Storage, never: Callable[[], bool], parts: int
) -> None:
    storage.write_stream("packs/0/c/0", Zeros(parts), EASY, should_stop=never)
    assert storage.read("packs/0/c/0") == b"".join(bytes([number]) * (4 * MIB) for number in range(parts))
    with pytest.raises(AlreadyExists):
        storage.write_stream("packs/0/c/0", Zeros(parts), EASY, should_stop=never)


def test_a_stream_that_fails_or_is_told_to_stop_leaves_nothing_and_is_closed(storage: Storage) -> None:
    broken, stopped, asked = Zeros(6, wrong=5), Zeros(6), iter([False] * 3)
    with pytest.raises(CorruptCheckpoint, match="cannot be made"):
        storage.write_stream("packs/0", broken, EASY, should_stop=lambda: False)
    with pytest.raises(StorageError, match="stopped"):
        storage.write_stream("packs/0", stopped, EASY, should_stop=lambda: next(asked, True))
    assert broken.closed == stopped.closed == 1
    assert storage.list("packs") == []
    storage.write_stream("packs/0", Zeros(6), EASY, should_stop=lambda: False)
    assert storage.size("packs/0") == 24 * MIB


def test_a_good_storage_passes_its_check_and_nothing_is_left(storage: Storage) -> None:
    there = storage.list("")
    storage.check()
    assert storage.list("") == there
    assert not storage.exists("a")


def test_a_range_that_does_not_match_its_checksum_is_named(storage: Storage) -> None:
    storage.create("file", b"x" * 8192)
    memory = Memory(4096)
    ranges = Ranges(["file"])
    for offset, told in ((0, b"x"), (100, b"y"), (200, b"x")):
        ranges.add(0, crc32c(told * 50), offset, 50, memory.address + offset)
    assert storage.read_ranges(ranges) == [1]


def test_ranges_of_more_files_than_may_be_open_at_a_time_are_read(storage: Storage) -> None:
    count = FILES_MAX + 3
    memory = Memory(4096 * 2)
    ranges = Ranges([f"many/{number}" for number in range(count)])
    for number in reversed(range(count)):
        storage.create(f"many/{number}", b"%08d" % number)
        said = number if number != FILES_MAX + 1 else 0
        ranges.add(number, crc32c(b"%08d" % said), 0, 8, memory.address + 8 * number)
    assert storage.read_ranges(ranges) == [count - 1 - (FILES_MAX + 1)]
    assert memory.bytes()[: 8 * count] == b"".join(b"%08d" % number for number in range(count))


def test_a_range_beyond_the_end_is_corrupt(storage: Storage) -> None:
    storage.create("short", b"12345")
    memory = Memory(4096)
    with pytest.raises(CorruptCheckpoint, match="short"):
        storage.read_ranges(range_of("short", 3, 3, memory, b"45?"))


def test_a_write_that_is_told_to_stop_leaves_nothing(storage: Storage) -> None:
    memory = Memory(4096)
    with pytest.raises(StorageError, match="stopped"):
        storage.write_pack(PACK, pack_of(memory, 4096), EASY, should_stop=lambda: True)
    assert storage.list(FOLDER) == []


def test_a_removed_tree_is_gone_with_the_directories_that_it_emptied(storage: Storage) -> None:
    storage.create("checkpoints/step-1/a1/manifest.json", b"1")
    storage.create("checkpoints/step-1/a1/packs/0/c/0", b"1")
    storage.create("checkpoints/step-1/a2/manifest.json", b"1")
    storage.remove_tree("checkpoints/step-1/a1")
    assert storage.list("checkpoints/step-1") == ["a2"]
    storage.remove_tree("checkpoints/step-1/a2")
    assert storage.list("checkpoints") == []
    storage.create("checkpoints/step-1/a3/manifest.json", b"1")
    assert storage.read("checkpoints/step-1/a3/manifest.json") == b"1"


@pytest.mark.parametrize("path", ["../x", "/x", "a//b", "a/./b", "a/../../b"])
def test_a_path_that_leaves_the_root_is_refused(storage: Storage, path: str) -> None:
    with pytest.raises(StorageError, match="not a path inside"):
        storage.create(path, b"")


def test_urls_and_paths_open_the_same_storage(tmp_path: Path) -> None:
    open_storage(str(tmp_path / "a b")).create("x", b"1")
    assert open_storage(f"file://{tmp_path}/a%20b").read("x") == b"1"


@pytest.mark.parametrize("url", ["ftp://bucket/run", "file://host/run", "s3://", "s3:///run", "s3://bucket/../run", ""])
def test_a_storage_that_there_is_not_is_a_wrong_use(url: str) -> None:
    with pytest.raises(UsageError):
        open_storage(url)


def test_a_file_in_place_of_the_directory_is_a_wrong_use(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="not a directory"):
        open_storage(str(tmp_path / "file"))
