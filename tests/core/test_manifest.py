from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftrain.core.manifest import (
    BoxRecord,
    Manifest,
    PackIndex,
    check_coverage,
    decode_index,
    decode_manifest,
    encode_index,
    encode_manifest,
)
from ftrain.core.messages import Attempt, PackRecord
from ftrain.errors import CorruptCheckpoint


def record(rank: int) -> PackRecord:
    return PackRecord(rank, f"packs/{rank:05d}", f"packs/{rank:05d}.index.json", "a" * 64, 100, 8192, 1)


def manifest() -> Manifest:
    return Manifest(1, "0.1.0", Attempt(1, 10, 2), 2, "writer", (record(0), record(1)))


def box(key: str = "w", offset: int = 0, begin: int = 0, private: bool = False) -> BoxRecord:
    return BoxRecord(key, "float32", (4,) if not private else (2,), (begin,), (2,), private, offset, 8)


def index(rank: int = 0, boxes: tuple[BoxRecord, ...] | None = None) -> PackIndex:
    if boxes is None:
        boxes = (box(), box("own", 4096, private=True))
    return PackIndex(1, Attempt(1, 10, 2), rank, 2, 8192, 8192, 12288, boxes, (7,) * len(boxes), (5,), {"a": 1})


def signed(body: bytes) -> bytes:
    return b'{"sha256":"%s","manifest":%s}\n' % (hashlib.sha256(body).hexdigest().encode(), body)


def test_a_manifest_comes_back() -> None:
    assert decode_manifest(encode_manifest(manifest()), "m") == manifest()


@given(st.data())
def test_a_manifest_with_any_byte_changed_is_refused(data: st.DataObject) -> None:
    good = encode_manifest(manifest())
    at = data.draw(st.integers(0, len(good) - 2))  # the last byte is the newline at its end
    value = data.draw(st.integers(0, 255).filter(lambda value: value != good[at]))
    changed = good[:at] + bytes([value]) + good[at + 1 :]
    with pytest.raises(CorruptCheckpoint, match=r"^there/manifest\.json: "):
        decode_manifest(changed, "there/manifest.json")


@given(st.integers(0, 400))
def test_a_manifest_that_was_cut_is_refused(length: int) -> None:
    good = encode_manifest(manifest())
    with pytest.raises(CorruptCheckpoint):
        decode_manifest(good[: min(length, len(good) - 3)], "m")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda body: body.update(format=3), "format 3, but this version reads formats 1 and 2"),
        (lambda body: body.update(more=1), "unknown field"),
        (lambda body: body["packs"].pop(), "one for each of 2 ranks"),
        (lambda body: body["packs"].reverse(), "one for each of 2 ranks"),
        (lambda body: body["packs"][0].update(path="../../other"), "other"),
        (lambda body: body["packs"][0].update(index_sha256="x"), "index_sha256"),
        (lambda body: body.update(world_size=-1), "world_size"),
    ],
)
def test_a_manifest_that_nobody_writes_is_refused(change: Callable[[Any], None], problem: str) -> None:
    body = json.loads(encode_manifest(manifest()))["manifest"]
    change(body)
    with pytest.raises(CorruptCheckpoint, match=problem):
        decode_manifest(signed(json.dumps(body).encode()), "m")


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"\xff", b"{}", b"[" * 100_000, b'{"sha256":"' + b"0" * 64 + b'","manifest":1}']
)
def test_bytes_that_are_no_record_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptCheckpoint, match="there"):
        decode_manifest(data, "there")
    with pytest.raises(CorruptCheckpoint, match="there"):
        decode_index(data, "there")


def test_an_index_comes_back() -> None:
    assert decode_index(encode_index(index()), "i") == index()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda body: body.update(format=0), "format 0"),
        (lambda body: body.update(rank=2), "rank 2 in a world of 2"),
        (lambda body: body.update(payload_bytes=4096), "whole chunks"),
        (lambda body: body.update(payload_bytes=0), "whole chunks"),
        (lambda body: body.update(chunk_bytes=4095), "chunk_bytes"),
        (lambda body: body.update(chunk_bytes=8191, payload_bytes=8191), "whole pages"),
        (lambda body: body.update(image_bytes=8192), "no room"),
        (lambda body: body.update(chunk_crc32c=[]), "0 chunk checksums for 1"),
        (lambda body: body["boxes"][0].update(dtype="float12"), "unknown dtype"),
        (lambda body: body["boxes"][0].update(box_offset=[3]), "does not fit"),
        (lambda body: body["boxes"][0].update(box_offset=[]), "does not fit"),
        (lambda body: body["boxes"][0].update(box_shape=[-1]), "box_shape"),
        (lambda body: body["boxes"][1].update(shape=[3]), "does not fit"),
        (lambda body: body["boxes"][0].update(nbytes=4), "4 bytes instead of 8"),
        (lambda body: body["boxes"][0].update(offset=1), "within a page"),
        (lambda body: body["boxes"][1].update(offset=0), "overlaps"),
        (lambda body: body["boxes"][1].update(offset=8192), "beyond the payload"),
        (lambda body: body.update(box_crc32c=[7]), "1 box checksums for 2"),
        (lambda body: body.update(box_crc32c=[7, 1 << 32]), "box_crc32c"),
        (lambda body: body.update(box_crc32c=[7, 1.5]), "box_crc32c"),
        (lambda body: body["boxes"].append({**body["boxes"][0], "offset": 4096 + 8}), "2 box checksums for 3"),
        (lambda body: body["boxes"][1].update(key="w", private=False, shape=[4]), "there twice"),
    ],
)
def test_an_index_that_nobody_writes_is_refused(change: Callable[[Any], None], problem: str) -> None:
    body = json.loads(encode_index(index()))
    change(body)
    with pytest.raises(CorruptCheckpoint, match=f"^there: .*{problem}"):
        decode_index(json.dumps(body).encode(), "there")


def test_a_sealed_index_has_no_checksums_yet() -> None:
    sealed = PackIndex(1, Attempt(1, 10, 2), 0, 2, 8192, 8192, 12288, (box(),), (), (), {})
    assert decode_index(encode_index(sealed), "slot", sealed=True) == sealed
    with pytest.raises(CorruptCheckpoint):
        decode_index(encode_index(sealed), "slot")


def test_coverage_is_checked_over_all_packs() -> None:
    check_coverage([index(0), index(1, (box(begin=2),))], "here")
    with pytest.raises(CorruptCheckpoint, match=r"here: w is not covered exactly once: 2 of 4"):
        check_coverage([index(0)], "here")
    with pytest.raises(CorruptCheckpoint, match="there twice"):
        check_coverage([index(0), index(1)], "here")
    whole = BoxRecord("w", "float32", (4,), (0,), (4,), False, 0, 16)
    check_coverage([index(0, (whole,))], "here")
    for others in ((whole,), (box(),)):
        with pytest.raises(CorruptCheckpoint, match="w is not covered exactly once"):
            check_coverage([index(0, (whole,)), index(1, others)], "here")
    other = BoxRecord("w", "int32", (4,), (2,), (2,), False, 0, 8)
    with pytest.raises(CorruptCheckpoint, match=r"w is float32\[4\] in the pack of rank 0, int32\[4\]"):
        check_coverage([index(0), index(1, (other,))], "here")
