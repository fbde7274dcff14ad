"""Writes what `torch.save` would: without holding it all in memory, and without pickling anything but tensors.

`torch.save` needs every tensor at once. The structure of the file is small and always the same, so it is put together
here, instruction by instruction; the storages follow it one after the other.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ftrain.checkpoint.foreign.outgoing import Outgoing, Piece, data_of, new_file
from ftrain.checkpoint.foreign.torch_file import STORAGES, TENSOR, TENSOR_WITH_DTYPE
from ftrain.core.layout import Box, strides
from ftrain.errors import UnsupportedTensor

ALIGNMENT_BYTES = 64  # of storages in the file, so that torch can map them
_FOLDER = "archive"
_CLASSES = {dtype: name for name, dtype in STORAGES.items()}
_LOCAL_HEADER_BYTES, _ZIP64_BYTES, _EXTRA_BYTES = 30, 20, 4
_DATE = (1980, 1, 1, 0, 0, 0)  # the same state gives the same file


def write_torch_file(
    path: Path, outgoing: Sequence[Outgoing], pieces: Iterator[Piece], step: int, names: Sequence[str]
) -> list[Path]:
    """A dict of tensors; with `names` a dict of such dicts, one for each, and `step`.

    Raises `UnsupportedTensor` for a dtype that torch does not read back, before anything is written.
    """
    for one in outgoing:
        if one.dtype == "complex32":
            raise UnsupportedTensor(
                f"{one.name}: torch.load(weights_only=True) refuses complex32; use --dtype or --only"
            )
    with new_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "data.pkl", [_structure(outgoing, step, names)])
        _add(archive, "byteorder", [b"little"])
        for number, one in enumerate(outgoing):
            _add(archive, f"data/{number}", data_of(one, pieces))
        _add(archive, "version", [b"3\n"])
    return [path]


def _add(archive: zipfile.ZipFile, name: str, content: Iterator[memoryview] | Sequence[bytes]) -> None:
    info = zipfile.ZipInfo(f"{_FOLDER}/{name}", _DATE)
    begin = archive.start_dir + _LOCAL_HEADER_BYTES + len(info.filename) + _ZIP64_BYTES + _EXTRA_BYTES
    padding = -begin % ALIGNMENT_BYTES
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=True) as entry:
        for data in content:
            entry.write(data)


def _structure(outgoing: Sequence[Outgoing], step: int, names: Sequence[str]) -> bytes:
    """The pickle, of protocol 2."""
    places = {one.name: place for place, one in enumerate(outgoing)}
    if not names:
        body = _dict({one.name: _tensor(one, places[one.name]) for one in outgoing})
        return b"\x80\x02" + body + b"."
    objects: dict[str, dict[str, bytes]] = {name: {} for name in names if name}
    values: dict[str, bytes] = {}
    for one in outgoing:
        owner, _, rest = one.name.partition(".")
        tensor = _tensor(one, places[one.name])
        if rest and owner in objects:
            objects[owner][rest] = tensor
        else:
            values[one.name] = tensor
    inner = {name: _dict(tensors) for name, tensors in objects.items() if tensors}
    return b"\x80\x02" + _dict({**inner, **values, "step": _integer(step)}) + b"."


def _tensor(one: Outgoing, number: int) -> bytes:
    storage_class = _CLASSES.get(one.dtype)
    count = one.nbytes
    for_dtype = b""
    if storage_class is None:
        storage_class, rebuild, for_dtype = (
            "torch.storage.UntypedStorage",
            TENSOR_WITH_DTYPE,
            _name(f"torch.{one.dtype}"),
        )
    else:
        rebuild = TENSOR
        count = 1
        for size in one.shape:
            count *= size
    storage = [_string("storage"), _name(storage_class), _string(str(number)), _string("cpu"), _integer(count)]
    steps = strides(Box((0,) * len(one.shape), one.shape))
    hooks = _name("collections.OrderedDict") + b")R"
    arguments = [
        _tuple(storage) + b"Q",  # a reference to what is beside the pickle
        _integer(0),
        _tuple([_integer(size) for size in one.shape]),
        _tuple([_integer(step) for step in steps]),
        b"\x89",  # needs no gradient
        hooks,
        for_dtype,
    ]
    return _name(rebuild) + _tuple([one for one in arguments if one]) + b"R"


def _dict(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(_string(key) + value for key, value in items.items()) + b"u"


def _tuple(items: Sequence[bytes]) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _string(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(number: int) -> bytes:
    if 0 <= number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + struct.pack("<B", len(data)) + data


def _name(dotted: str) -> bytes:
    module, _, name = dotted.rpartition(".")
    return f"c{module}\n{name}\n".encode()
