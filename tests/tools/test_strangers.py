"""Files of strangers: nothing in them is executed, and what is not as it should be is refused in one sentence."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.checkpoint.foreign.opening import open_foreign
from ftrain.checkpoint.foreign.pickled import read_pickle
from ftrain.checkpoint.tools.stream import pieces
from ftrain.errors import CorruptCheckpoint


class Evil:
    """What a pickle may bring."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def read_all(path: Path) -> None:
    source = open_foreign(path)
    assert source is not None
    for _ in pieces(source, list(source.tensors)):
        pass


# ---------------------------------------------------------------------------------------------------------- safetensors


def header(path: Path, fields: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    file = path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return file


def one(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


SAFETENSORS: dict[str, Callable[[Path], Path]] = {
    "no json": lambda path: header(path, b"nonsense"),
    "header beyond the end": lambda path: header(path, one(), b"12345678", 1 << 40),
    "header of 2^63": lambda path: header(path, one(), b"12345678", (1 << 63) + 5),
    "shorter than a header's length": lambda path: _written(path / "x.safetensors", b"123"),
    "cut short": lambda path: header(path, one(), b"1234567"),
    "more than it tells of": lambda path: header(path, one(), b"123456789"),
    "overlap": lambda path: header(path, {**one(), "y": one()["x"]}, b"12345678"),
    "hole": lambda path: header(path, one(data_offsets=[8, 16]), b"1" * 16),
    "wrong size": lambda path: header(path, one(shape=[3]), b"12345678"),
    "huge shape": lambda path: header(path, one(shape=[1 << 61, 1 << 61]), b"12345678"),
    "negative": lambda path: header(path, one(shape=[-2]), b"12345678"),
    "unknown dtype": lambda path: header(path, one(dtype="F7"), b"12345678"),
    "unknown field": lambda path: header(path, one(more=1), b"12345678"),
    "deep": lambda path: header(path, b'{"x":' + b"[" * 100_000),
    "index that leads out": lambda path: _index(path, "../../etc/passwd"),
    "index to an absolute path": lambda path: _index(path, "/etc/passwd"),
    "index to what is not there": lambda path: _index(path, "gone.safetensors"),
}


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _index(path: Path, file: str) -> Path:
    return _written(path / "model.safetensors.index.json", json.dumps({"weight_map": {"x": file}}).encode())


@pytest.mark.parametrize("attack", SAFETENSORS)
def test_safetensors_of_a_stranger_are_refused(tmp_path: Path, attack: str) -> None:
    with pytest.raises(CorruptCheckpoint):
        read_all(SAFETENSORS[attack](tmp_path))


# ---------------------------------------------------------------------------------------------------------- torch files


def archive(path: Path, **entries: bytes) -> Path:
    with zipfile.ZipFile(path / "x.pt", "w") as made:
        for name, data in entries.items():
            made.writestr(f"x/{name.replace('__', '/')}", data)
    return path / "x.pt"


def of_tensor(**changes: Any) -> bytes:
    """The pickle of a tensor of 4 floats, with other figures."""
    given = {"offset": 0, "shape": (4,), "strides": (1,), "key": "0", "count": 4, **changes}

    class Storage:
        pass

    class Tensor:
        def __reduce__(self) -> tuple[Any, ...]:
            import collections

            arguments = (Storage(), given["offset"], given["shape"], given["strides"], False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    class Pickler(pickle.Pickler):
        def persistent_id(self, found: Any) -> Any:
            if isinstance(found, Storage):
                return ("storage", torch.FloatStorage, given["key"], "cpu", given["count"])
            return None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"x": Tensor()})
    return buffer.getvalue()


def compressed(path: Path) -> Path:
    with zipfile.ZipFile(path / "x.pt", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("x/data.pkl", of_tensor())
        made.writestr("x/data/0", bytes(16))
    return path / "x.pt"


def nested() -> bytes:
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    return pickle.dumps(deep, 2)


def bomb() -> bytes:
    """2^64 values in a few hundred bytes."""
    found: list[Any] = [torch.float32]
    for _ in range(60):
        found = [found, found]
    return pickle.dumps(found, 2)


TORCH: dict[str, Callable[[Path], Path]] = {
    "code": lambda path: archive(path, **{"data.pkl": pickle.dumps(Evil(), 2)}),
    "code, newer pickle": lambda path: archive(path, **{"data.pkl": pickle.dumps({"x": Evil()}, 5)}),
    "code instead of a zip": lambda path: _written(path / "x.pt", pickle.dumps(Evil(), 2)),
    "a builtin": lambda path: archive(path, **{"data.pkl": b"cbuiltins\neval\n(X\x01\x00\x00\x001tR."}),
    "a part of an allowed name": lambda path: archive(path, **{"data.pkl": b"\x80\x04\x8c\x05torch\x8c\x04load\x93."}),
    "no end": lambda path: archive(path, **{"data.pkl": b"\x80\x02}"}),
    "empty pickle": lambda path: archive(path, **{"data.pkl": b""}),
    "empty stack": lambda path: archive(path, **{"data.pkl": b"\x80\x02."}),
    "two values": lambda path: archive(path, **{"data.pkl": b"\x80\x02}}."}),
    "unhashable key": lambda path: archive(path, **{"data.pkl": b"\x80\x02}(]]u."}),
    "memo that is not there": lambda path: archive(path, **{"data.pkl": b"\x80\x02h\x07."}),
    "deep": lambda path: archive(path, **{"data.pkl": nested()}),
    "bomb": lambda path: archive(path, **{"data.pkl": bomb()}),
    "no data.pkl": lambda path: archive(path, **{"constants.pkl": b"."}),
    "storage that is not there": lambda path: archive(path, **{"data.pkl": of_tensor()}),
    "beyond its storage": lambda path: archive(path, **{"data.pkl": of_tensor(), "data__0": bytes(15)}),
    "beyond by its offset": lambda path: archive(path, **{"data.pkl": of_tensor(offset=1), "data__0": bytes(16)}),
    "beyond by strides": lambda path: archive(path, **{"data.pkl": of_tensor(strides=(9,)), "data__0": bytes(16)}),
    "negative offset": lambda path: archive(path, **{"data.pkl": of_tensor(offset=-1), "data__0": bytes(16)}),
    "negative strides": lambda path: archive(path, **{"data.pkl": of_tensor(strides=(-1,)), "data__0": bytes(16)}),
    "huge": lambda path: archive(path, **{"data.pkl": of_tensor(shape=(1 << 50,)), "data__0": bytes(16)}),
    "other dimensions": lambda path: archive(path, **{"data.pkl": of_tensor(strides=(1, 1)), "data__0": bytes(16)}),
    "no numbers": lambda path: archive(path, **{"data.pkl": of_tensor(shape=("4",)), "data__0": bytes(16)}),
    "name that leads out": lambda path: archive(path, **{"data.pkl": of_tensor(key="../x"), "data__0": bytes(16)}),
    "big-endian": lambda path: archive(path, **{"data.pkl": of_tensor(), "data__0": bytes(16), "byteorder": b"big"}),
    "compressed": compressed,
}


@pytest.mark.parametrize("attack", TORCH)
def test_a_torch_file_of_a_stranger_is_refused(tmp_path: Path, attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorruptCheckpoint):
        read_all(TORCH[attack](tmp_path))
    assert not (tmp_path / "executed").exists()


def test_the_file_that_the_attacks_change_is_read_without_the_change(tmp_path: Path) -> None:
    read_all(archive(tmp_path, **{"data.pkl": of_tensor(), "data__0": bytes(16)}))
    read_all(header(tmp_path, one(), b"12345678"))


# ------------------------------------------------------------------------------------------------------------------ dcp


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"x": torch.arange(12.0).reshape(3, 4)}, checkpoint_id=tmp_path / "d", no_dist=True)
    read_all(tmp_path / "d")
    return tmp_path / "d"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"__0_0.distcp", b"../../.bashr"),
        (b"__0_0.distcp", b"/etc/passwd\n"),
        (b"__0_0.distcp", b"__0_1.distcp"),
        (b"float32", b"float3X"),
        (b"TensorStorageMetadata", b"TensorStorageMetadatX"),
        (b"PosixPath", b"WindowsPa"),
        (b"K\x03K\x04\x86", b"K\x03K\x05\x86"),
    ],
)
def test_dcp_metadata_of_a_stranger_is_refused(theirs: Path, old: bytes, new: bytes) -> None:
    metadata = theirs / ".metadata"
    found = metadata.read_bytes()
    assert old in found
    metadata.write_bytes(found.replace(old, new))
    with pytest.raises(CorruptCheckpoint):
        read_all(theirs)


def test_dcp_metadata_with_code_is_refused(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(theirs)
    (theirs / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CorruptCheckpoint, match=r"posix\.system|nt\.system"):
        read_all(theirs)
    assert not (theirs / "executed").exists()


def test_dcp_with_a_file_cut_short_is_refused(theirs: Path) -> None:
    file = theirs / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(CorruptCheckpoint):
        read_all(theirs)


# ------------------------------------------------------------------------------------------------------------ any bytes


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(plain, st.integers(3, 5))
@settings(max_examples=200, deadline=None)
def test_plain_data_comes_out_of_a_pickle_as_it_was(value: Any, protocol: int) -> None:
    assert read_pickle(pickle.dumps(value, protocol), (), "here") == value


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_pickle_or_refused(data: st.DataObject) -> None:
    found = bytearray(of_tensor())
    for _ in range(data.draw(st.integers(0, 6))):
        found[data.draw(st.integers(0, len(found) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CorruptCheckpoint):
        read_pickle(bytes(found[: data.draw(st.integers(0, len(found)))]), {"torch._utils._rebuild_tensor_v2"}, "here")
