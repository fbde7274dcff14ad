"""What an object store's trouble may do to us, and what not: a proxy before a real server makes the trouble."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ftrain._native import crc32c
from ftrain.errors import AlreadyExists, ExitCode, NotFound, StorageError, UnknownOutcome, UsageError
from ftrain.storage.bucket import StoreBucket
from ftrain.storage.object_store import ObjectStorage, Patience
from ftrain.storage.uploads import S3Uploads
from tests.storage.proxy import (
    CUT_REPLY,
    LOSE_REPLY,
    LOSE_REQUEST,
    PASS,
    STRIP_CONDITION,
    Proxy,
    Request,
    proxy_of,
)
from tests.storage.servers import BUCKET, set_environment
from tests.storage.test_conformance import EASY, MIB, Memory, pack_of, range_of

QUICK = Patience(tries=4, wait_seconds=0.01, wait_seconds_max=0.02)
NUMBERS = itertools.count()


@pytest.fixture(params=["moto", "azurite", "gcs"])
def proxy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with proxy_of(request.getfixturevalue(request.param)) as found:
        set_environment(found.server, monkeypatch)
        yield found


ON_S3 = pytest.mark.parametrize("proxy", ["moto"], indirect=True)


@pytest.fixture
def url(proxy: Proxy) -> str:
    return f"{proxy.server.scheme}://{BUCKET}/run-{next(NUMBERS)}"


@pytest.fixture
def storage(url: str) -> ObjectStorage:
    return storage_at(url)


def storage_at(url: str, patience: Patience = QUICK) -> ObjectStorage:
    return ObjectStorage(StoreBucket(url[:2], BUCKET, url.rpartition("/")[2]), patience=patience)


@pytest.mark.parametrize("trouble", [LOSE_REPLY, LOSE_REQUEST, "500", "503", "409", "429"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_create_whose_reply_does_not_come_is_done_once_and_known_as_ones_own(
    proxy: Proxy, storage: ObjectStorage, trouble: str, times: int
) -> None:
    proxy.once("PutObject", trouble, times)
    storage.create("journal/1.json", b"mine")
    assert storage.read("journal/1.json") == b"mine"
    assert all(request.conditional for request in proxy.requests if request.kind == "PutObject")
    with pytest.raises(AlreadyExists):
        storage.create("journal/1.json", b"mine")


@pytest.mark.parametrize("trouble", [LOSE_REQUEST, LOSE_REPLY])
def test_a_lost_reply_does_not_make_anothers_record_ones_own_even_with_the_same_bytes(
    proxy: Proxy, storage: ObjectStorage, url: str, trouble: str
) -> None:
    storage_at(url).create("journal/1.json", b"the same")
    proxy.once("PutObject", trouble)
    with pytest.raises(AlreadyExists):
        storage.create("journal/1.json", b"the same")


def test_when_no_reply_ever_comes_the_outcome_is_unknown_until_it_is_read_back(
    proxy: Proxy, storage: ObjectStorage
) -> None:
    proxy.rule = lambda request: LOSE_REPLY if request.kind == "PutObject" else "403"
    with pytest.raises(UnknownOutcome, match=r"journal/1\.json"):
        storage.create("journal/1.json", b"mine")
    proxy.always(PASS)
    assert storage.confirm("journal/1.json", b"mine")
    assert not storage.confirm("journal/1.json", b"yours")


def test_when_no_request_arrives_the_outcome_is_unknown(proxy: Proxy, storage: ObjectStorage) -> None:
    proxy.rule = lambda request: LOSE_REQUEST if request.kind == "PutObject" else PASS
    with pytest.raises(UnknownOutcome):
        storage.create("x", b"mine")
    proxy.always(PASS)
    assert not storage.exists("x")


@pytest.mark.parametrize("status", ["400", "403", "501"])
def test_a_refusal_says_that_it_was_not_done(proxy: Proxy, storage: ObjectStorage, url: str, status: str) -> None:
    proxy.once("PutObject", status)
    with pytest.raises(StorageError, match=f"cannot write {url}/x: {status}") as caught:
        storage.create("x", b"mine")
    assert type(caught.value) is StorageError
    assert not storage.exists("x")


def test_of_racing_writers_whose_replies_are_lost_exactly_one_wins(proxy: Proxy, url: str) -> None:
    chances = random.Random(7)
    lock = threading.Lock()

    def rule(request: Request) -> str:
        with lock:
            return chances.choice([PASS, LOSE_REPLY, LOSE_REQUEST, "503"]) if request.kind == "PutObject" else PASS

    proxy.rule = rule

    def create(path: str, number: int) -> str:
        try:
            storage_at(url, Patience(12, 0.001, 0.002)).create(path, b"record")
        except AlreadyExists:
            return "lost"
        return f"won {number}"

    for turn in range(8):
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(create, [f"journal/{turn}.json"] * 4, range(4)))
        assert len([one for one in found if one.startswith("won")]) == 1, found


@pytest.mark.parametrize(
    ("kind", "trouble"),
    [
        ("CreateMultipartUpload", "503"),
        ("UploadPart", "503"),
        ("UploadPart", LOSE_REPLY),
        ("UploadPart", LOSE_REQUEST),
        ("CompleteMultipartUpload", "503"),
        ("CompleteMultipartUpload", LOSE_REPLY),
        ("CompleteMultipartUpload", LOSE_REQUEST),
        ("PutObject", LOSE_REPLY),  # of the claim
    ],
)
def test_a_large_pack_arrives_whole_through_trouble(
    proxy: Proxy, storage: ObjectStorage, kind: str, trouble: str
) -> None:
    data = random.Random(1).randbytes(17 * MIB)
    memory = Memory(len(data), data)
    proxy.once(kind, trouble)
    sums, _ = storage.write_pack("packs/0", pack_of(memory, len(data)), EASY, should_stop=lambda: False)
    assert proxy.count("UploadPart") >= 3
    assert storage.read("packs/0") == data
    assert sums == [crc32c(data)]


def test_an_upload_that_is_refused_leaves_nothing_and_may_be_tried_again(
    proxy: Proxy, storage: ObjectStorage, url: str
) -> None:
    memory = Memory(9 * MIB)
    pack = pack_of(memory, 9 * MIB)
    proxy.rule = lambda request: "403" if request.kind == "UploadPart" else PASS
    with pytest.raises(StorageError) as caught:
        storage.write_pack("packs/0", pack, EASY, should_stop=lambda: False)
    assert type(caught.value) is StorageError
    proxy.always(PASS)
    assert unfinished(proxy, url) == []
    storage.write_pack("packs/0", pack, EASY, should_stop=lambda: False)
    assert storage.size("packs/0") == 9 * MIB


@ON_S3
def test_an_upload_that_was_given_up_by_who_removed_its_tree_fails_and_leaves_nothing(
    proxy: Proxy, storage: ObjectStorage, url: str
) -> None:
    memory = Memory(9 * MIB)

    def remove_meanwhile(request: Request) -> str:
        if request.kind == "CompleteMultipartUpload":
            proxy.always(PASS)
            storage_at(url).remove_tree("attempt")
        return PASS

    proxy.rule = remove_meanwhile
    with pytest.raises(StorageError, match="404 Not Found"):
        storage.write_pack("attempt/packs/0", pack_of(memory, 9 * MIB), EASY, should_stop=lambda: False)
    assert not storage.exists("attempt")
    assert unfinished(proxy, url) == []


def test_a_removal_whose_reply_is_lost_is_done_although_nothing_is_there_any_more(
    proxy: Proxy, storage: ObjectStorage
) -> None:
    for number in range(3):
        storage.create(f"attempt/{number}", b"x")
    proxy.once("DeleteObject" if proxy.server.scheme == "gs" else "DeleteObjects", LOSE_REPLY)
    storage.remove_tree("attempt")
    assert not storage.exists("attempt")


@pytest.mark.parametrize("trouble", [CUT_REPLY, LOSE_REPLY, "500", "503"])
def test_what_is_read_is_whole_or_an_error(proxy: Proxy, storage: ObjectStorage, trouble: str) -> None:
    data = random.Random(2).randbytes(3 * MIB)
    storage.create("x", data)
    proxy.once("GetObject", trouble)
    assert storage.read("x") == data
    memory = Memory(3 * MIB)
    proxy.once("GetObject", trouble)
    assert storage.read_ranges(range_of("x", 0, len(data), memory, data)) == []
    assert memory.bytes() == data


def test_near_ranges_are_asked_for_together_and_large_ones_in_pieces(proxy: Proxy, storage: ObjectStorage) -> None:
    data = random.Random(3).randbytes(20 * MIB)
    storage.create("x", data)
    memory = Memory(len(data))
    ranges = range_of("x", 0, 100, memory, data[:100])
    for at in range(4096, 1 << 20, 4096):
        ranges.add(0, crc32c(data[at : at + 100]), at, 100, memory.address + at)
    proxy.requests.clear()
    assert storage.read_ranges(ranges) == []
    assert proxy.count("GetObject") == 1
    assert memory.bytes()[4096:4196] == data[4096:4196]
    proxy.requests.clear()
    assert storage.read_ranges(range_of("x", 1, len(data) - 1, memory, data[1:])) == []
    assert proxy.count("GetObject") == 3


@ON_S3  # what Azure is asked is signed with the condition
def test_a_store_that_does_not_honour_conditional_creates_is_refused(proxy: Proxy, storage: ObjectStorage) -> None:
    proxy.always(STRIP_CONDITION)
    with pytest.raises(UsageError, match="overwrites objects although it is asked not to") as caught:
        storage.check()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == ExitCode.USAGE
    proxy.always(PASS)
    assert storage.list("") == []


def test_a_store_that_does_not_answer_is_not_a_wrong_use(proxy: Proxy, storage: ObjectStorage) -> None:
    proxy.always("503")
    with pytest.raises(StorageError, match=r"does not answer: .*503") as caught:
        storage.check()
    assert caught.value.exit_code == ExitCode.STORAGE


@pytest.mark.parametrize("status", ["403", "404"])
def test_a_store_that_refuses_us_is_told_in_one_line(proxy: Proxy, storage: ObjectStorage, status: str) -> None:
    proxy.always(status)
    with pytest.raises(UsageError, match=f"cannot be used: .*{status}") as caught:
        storage.check()
    assert "\n" not in str(caught.value)


UPLOADER = """
import sys
from tests.storage.test_conformance import EASY, MIB, Memory, pack_of
from tests.storage.test_lost_replies import storage_at
memory = Memory(24 * MIB)
storage_at(sys.argv[1]).write_pack("attempt/packs/0", pack_of(memory, 24 * MIB), EASY, should_stop=lambda: False)
"""


def test_the_upload_of_a_killed_writer_is_given_up_with_its_tree(
    proxy: Proxy, storage: ObjectStorage, url: str
) -> None:
    storage.create("attempt/packs/zarr.json", b"{}")
    storage.create("attempts of others", b"stay")
    killed = threading.Event()

    def kill_in_the_second_part(request: Request) -> str:
        if proxy.count("UploadPart") < 2:
            return PASS
        process.send_signal(signal.SIGKILL)
        killed.set()
        return LOSE_REQUEST

    proxy.rule = kill_in_the_second_part
    process = subprocess.Popen(
        [sys.executable, "-c", UPLOADER, url], cwd=Path(__file__).parents[2], env=dict(os.environ)
    )
    assert process.wait(60) == -signal.SIGKILL
    assert killed.is_set()
    proxy.always(PASS)
    assert [f"s3://{BUCKET}/{key}" for key in unfinished(proxy, url)] == [f"{url}/attempt/packs/0"] * (url[:2] == "s3")
    with pytest.raises(NotFound):
        storage.read("attempt/packs/0")
    storage.remove_tree("attempt")
    assert unfinished(proxy, url) == []
    assert not storage.exists("attempt")
    assert storage.list("") == ["attempts of others"]
    memory = Memory(24 * MIB, b"of another")
    storage.write_pack("attempt/packs/0", pack_of(memory, 24 * MIB), EASY, should_stop=lambda: False)
    assert storage.read("attempt/packs/0") == memory.bytes()


def unfinished(proxy: Proxy, url: str) -> list[str]:
    """The keys of uploads that are not over. Nobody can ask Azure for its own."""
    if proxy.server.scheme != "s3":
        return []
    uploads = S3Uploads(proxy.server.endpoint, "us-east-1", BUCKET, "", "key", "secret", "")
    return [key for key, _ in uploads.find(url.rpartition("/")[2] + "/")]
