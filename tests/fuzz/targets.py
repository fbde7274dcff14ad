"""The parsers that read what others wrote. Each takes bytes, and either returns or raises one of ftrain's errors."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable

import msgspec

from ftrain.agent import peer_wire
from ftrain.checkpoint.writing.pack_plan import PackPlan
from ftrain.control.channel import decode_from_agent, decode_from_coordinator
from ftrain.core import journal, manifest, plain
from ftrain.core import messages as m
from ftrain.core.frames import Frames
from ftrain.core.layout import TensorSpec
from ftrain.core.write_plan import write_plan
from ftrain.errors import FtrainError
from tests.fuzz.messages import ATTEMPT, EARLIER, FROM_AGENT, FROM_COORDINATOR, FROM_PEER, ORIGIN

REFUSAL_CHARS_MAX = (2000, 100_000)  # that of an index may name its tensor and its shape


def _envelope(name: str, raw: bytes) -> bytes:
    sha256 = hashlib.sha256(raw).hexdigest()
    return b'{"sha256":"' + sha256.encode() + b'","' + name.encode() + b'":' + raw + b"}\n"


def _journal(data: bytes) -> None:
    journal.decode(data, "journal/1.json")


def _record(data: bytes) -> None:
    """With a checksum that is right, so that the record itself is looked at, and taken into a history."""
    record = journal.decode(_envelope("record", data), "journal/1.json")
    journal.History().after(record, "")


def _manifest(data: bytes) -> None:
    manifest.decode_manifest(_envelope("manifest", data), "manifest.json")


def _index(data: bytes) -> None:
    index = manifest.decode_index(data, "index.json")
    manifest.check_coverage([index], "here")
    for value in index.plain.values():
        plain.decode(value)


def _plain(data: bytes) -> None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return
    plain.decode(value)


def _peer(data: bytes) -> None:
    while data:
        frame = peer_wire.Frame("a peer")
        while data and not frame.is_whole:
            room = frame.room()
            part = data[: len(room)]
            room[: len(part)] = part
            frame.came(len(part))
            data = data[len(part) :]


def _peer_message(data: bytes) -> None:
    """In a frame that is right, so that the message itself is looked at."""
    _peer(struct.pack("<II", len(data), 0) + data)


TARGETS: dict[str, Callable[[bytes], object]] = {
    "journal": _journal,
    "record": _record,
    "manifest": _manifest,
    "index": _index,
    "plain": _plain,
    "agent": lambda data: decode_from_agent(data, "an agent"),
    "coordinator": lambda data: decode_from_coordinator(data, "a coordinator"),
    "peer": _peer,
    "peer-message": _peer_message,
}


def execute(target: str, data: bytes) -> bool:
    """Whether it was taken. What is raised, other than ftrain's errors, is a finding."""
    try:
        TARGETS[target](data)
    except FtrainError as error:
        if len(str(error)) > REFUSAL_CHARS_MAX[target == "index"]:
            raise AssertionError("a refusal repeats what was sent") from error
        return False
    return True


def _sample_index() -> bytes:
    specs = [TensorSpec("w", "float32", (4, 3)), TensorSpec("own", "int64", (2,), private=True)]
    pack = PackPlan(0, 1, write_plan([specs])[0])
    tracked = plain.encode({"a": (1, b"x", 1 << 70, float("nan")), 1: None}, "plain")
    chunks = pack.layout.payload_bytes // pack.layout.chunk_bytes
    return manifest.encode_index(pack.index(ATTEMPT, {"tracked": tracked}, [0] * len(pack.boxes), [0] * chunks))


def _sample_compressed_index() -> bytes:
    specs = [TensorSpec("w", "float32", (3000, 2)), TensorSpec("own", "int64", (2,), private=True)]
    pack = PackPlan(0, 1, write_plan([specs])[0])
    chunks = pack.layout.payload_bytes // pack.layout.chunk_bytes
    index = pack.index(ATTEMPT, {}, [0, 0], [0] * chunks)
    frames = (Frames((2000, 2), (90, 80), (0, 1)), None)
    codec = {"format": manifest.FORMAT_COMPRESSED, "codec": "zstd:3", "frames": frames}
    return manifest.encode_index(msgspec.structs.replace(index, **codec))


def _sample_manifest() -> bytes:
    packs = tuple(
        m.PackRecord(rank, manifest.pack_path(rank), manifest.index_path(rank), "0" * 64, 4096, 8192, 1)
        for rank in range(2)
    )
    return msgspec.json.encode(manifest.Manifest(manifest.FORMAT, "0.1", ATTEMPT, 2, "writer", packs))


def _sample_records() -> list[journal.Record]:
    bodies: list[journal.Body] = [
        journal.RunBody("run", "job", "version"),
        journal.GenerationBody(1, 2, (journal.MemberRecord("n", 0, 0, 2, "host"),), ATTEMPT, "why", 20),
        journal.CommitBody(ATTEMPT, 2, "0" * 64, 4096),
        journal.CommitBody(ATTEMPT, 2, "0" * 64, 4096, ORIGIN, (EARLIER,), {"loss": m.Logged(20, 1.5)}),
        journal.RetireBody(ATTEMPT),
        journal.FinishBody(0, 20, "done"),
    ]
    return [journal.Record(1, "", f"w:{number}", 1.5, body) for number, body in enumerate(bodies)]


def _sample_frames() -> bytes:
    heads = [msgspec.json.encode(message) for message in FROM_PEER]
    return b"".join(struct.pack("<II", len(head), 0) + head for head in heads)


def samples(target: str) -> list[bytes]:
    """Good inputs, to begin with."""
    records = _sample_records()
    match target:
        case "journal":
            return [journal.encode(record) for record in records]
        case "record":
            return [msgspec.json.encode(record) for record in records]
        case "manifest":
            return [_sample_manifest()]
        case "index":
            return [_sample_index(), _sample_compressed_index()]
        case "plain":
            values = [{"a": [1, (2, b"3")], "$": float("inf")}, {1: {2: 3}}, [1 << 80, "text", None, True]]
            return [msgspec.json.encode(plain.encode(value, "plain")) for value in values]
        case "agent":
            return [msgspec.json.encode(message) for message in FROM_AGENT]
        case "coordinator":
            return [msgspec.json.encode(message) for message in FROM_COORDINATOR]
        case "peer-message":
            return [msgspec.json.encode(message) for message in FROM_PEER]
        case _:
            return [_sample_frames()]
