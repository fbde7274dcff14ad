"""Files of `torch.save`, read without executing anything.

A zip archive, nothing in it compressed: `NAME/data.pkl` with the structure, `NAME/data/0`, … with the storages' bytes.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrain.checkpoint.foreign.mapped import Extent, Files, MappedSource, Part, checked_shape, local_path, one_part
from ftrain.checkpoint.foreign.pickled import Global, Made, Persistent, read_pickle
from ftrain.checkpoint.state.source import TensorInfo
from ftrain.core.layout import ITEM_BYTES
from ftrain.errors import CorruptCheckpoint

DEPTH_MAX = 64
VALUES_MAX = 10_000_000

STORAGES: Mapping[str, str] = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128",
}
UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage")
TENSOR, TENSOR_WITH_DTYPE = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
_PARAMETER = "torch._utils._rebuild_parameter"
_DTYPES = {f"torch.{name}" for name in ITEM_BYTES}
# Numbers of NumPy and bytes are often among the values beside the tensors, which are left out.
_LEFT_OUT = {
    "__builtin__.bytes",
    "_codecs.encode",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "torch.device",
}
_ALLOWED = {*STORAGES, *UNTYPED, *_DTYPES, TENSOR, TENSOR_WITH_DTYPE, _PARAMETER, "torch.Size", *_LEFT_OUT}


def is_torch_file(path: Path) -> bool:
    """A zip archive, or a name that promises one."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04" or path.suffix in (".pt", ".pth", ".bin", ".ckpt")


def open_torch_file(path: str | Path) -> MappedSource:
    """Nested dicts and lists become keys with dots; what is no tensor is left out. Raises `CorruptCheckpoint`."""
    place = local_path(path)
    files = Files(place.parent)
    archive = Archive(files.bytes(place.name), place.name, 0, str(place))
    tensors: dict[str, TensorInfo] = {}
    parts: dict[str, list[Part]] = {}
    skipped = 0
    for key, value in _leaves(archive.root, str(place)):
        tensor = archive.tensor(value, key)
        if tensor is None:
            skipped += 1
            continue
        if key in tensors:
            raise CorruptCheckpoint(f"{place}: two tensors come to have the key {key[:200]}")
        info, extent = tensor
        tensors[key] = info
        parts[key] = one_part(info.shape, extent)
    return MappedSource(str(place), files, tensors, parts, names=_names(archive.root), skipped=skipped)


@dataclass(frozen=True, slots=True)
class _Storage:
    offset: int  # of its bytes in the file
    nbytes: int


class Archive:
    """One zip archive of `torch.save`: all of `data`, which begins at `offset` of the file `name`."""

    def __init__(self, data: memoryview, name: str, offset: int, where: str) -> None:
        self._data = data
        self._name = name
        self._offset = offset
        self._where = where
        self._storages: dict[str, _Storage] = {}
        self.root = self._read()

    def tensor(self, value: Any, key: str) -> tuple[TensorInfo, Extent] | None:
        """Where a tensor lies; None for what is none."""
        if isinstance(value, Made) and value.name == _PARAMETER and value.arguments:
            value = value.arguments[0]
        if not isinstance(value, Made) or value.name not in (TENSOR, TENSOR_WITH_DTYPE):
            return None
        arguments = value.arguments
        where = f"{self._where}: tensor {key[:200]}"
        if len(arguments) < 4 or not isinstance(arguments[0], Persistent):
            raise CorruptCheckpoint(f"{where} is not described as torch does it")
        storage, dtype = self._storage(arguments[0].key, where)
        if value.name == TENSOR_WITH_DTYPE:
            dtype = _dtype_named(arguments[6] if len(arguments) > 6 else None)
        if dtype is None:
            raise CorruptCheckpoint(f"{where} has a dtype that ftrain lacks")
        shape = checked_shape(_tuple(arguments[2]), key, self._where)
        steps = checked_shape(_tuple(arguments[3]), key, self._where) if 0 not in shape else (0,) * len(shape)
        first = arguments[1]
        if type(first) is not int or first < 0 or len(steps) != len(shape):
            raise CorruptCheckpoint(f"{where} is not described as torch does it")
        item = ITEM_BYTES[dtype]
        count = 1 + sum((size - 1) * step for size, step in zip(shape, steps, strict=True)) if 0 not in shape else 0
        if (first + count) * item > storage.nbytes:
            raise CorruptCheckpoint(f"{where} reaches beyond its storage of {storage.nbytes} bytes")
        return TensorInfo(dtype, shape), Extent(self._name, self._offset + storage.offset + first * item, steps)

    def _read(self) -> Any:
        try:
            archive = zipfile.ZipFile(_Reader(self._data))
            entries = archive.infolist()
            root = next((one.filename for one in entries if one.filename.endswith("/data.pkl")), None)
            if root is None or root.count("/") != 1:
                raise CorruptCheckpoint(
                    f"{self._where}: not a file of torch.save (it has no data.pkl); TorchScript and files older than "
                    "torch 1.6 are not read"
                )
            folder = root.removesuffix("data.pkl")
            for entry in entries:
                if entry.filename.startswith(f"{folder}data/"):
                    self._storages[entry.filename.removeprefix(f"{folder}data/")] = self._place(entry)
            byteorder = f"{folder}byteorder"
            if any(entry.filename == byteorder for entry in entries) and self._content(archive, byteorder) != b"little":
                raise CorruptCheckpoint(f"{self._where}: was written on a big-endian machine, which ftrain cannot read")
            return read_pickle(self._content(archive, root), _ALLOWED, f"{self._where}: {root}")
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OSError, KeyError) as error:
            raise CorruptCheckpoint(f"{self._where}: not a file of torch.save, or cut short: {error}") from None

    def _content(self, archive: zipfile.ZipFile, name: str) -> bytes:
        entry = archive.getinfo(name)
        self._place(entry)
        if entry.file_size > len(self._data):
            raise CorruptCheckpoint(f"{self._where}: {name} is said to be larger than the file")
        return archive.read(entry)  # proves its CRC-32

    def _place(self, entry: zipfile.ZipInfo) -> _Storage:
        """Where an entry's bytes are: nothing is compressed, and its own header says how long that is."""
        at = entry.header_offset
        header = self._data[at : at + 30]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
            raise CorruptCheckpoint(f"{self._where}: {entry.filename[:200]} is compressed, which torch.save never does")
        if len(header) < 30 or bytes(header[:4]) != b"PK\x03\x04":
            raise CorruptCheckpoint(f"{self._where}: {entry.filename[:200]} is not where the archive says")
        begin = at + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        if begin + entry.file_size > len(self._data):
            raise CorruptCheckpoint(f"{self._where}: {entry.filename[:200]} reaches beyond the end of the file")
        return _Storage(begin, entry.file_size)

    def _storage(self, key: Any, where: str) -> tuple[_Storage, str | None]:
        """("storage", class, key, device, elements): where it is, and the dtype that its class tells."""
        if not (isinstance(key, tuple) and len(key) == 5 and key[0] == "storage" and isinstance(key[1], Global)):
            raise CorruptCheckpoint(f"{where} is not described as torch does it")
        storage = self._storages.get(key[2]) if isinstance(key[2], str) else None
        if storage is None:
            raise CorruptCheckpoint(f"{where} is in the storage {str(key[2])[:40]!r}, which the file does not have")
        return storage, STORAGES.get(key[1].name)


class _Reader(io.RawIOBase):
    """A memoryview as a file, without copying all of it."""

    def __init__(self, data: memoryview) -> None:
        self._view = data
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, len(self._view))[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = len(self._view) if size is None or size < 0 else self._at + size
        data = bytes(self._view[self._at : end])
        self._at += len(data)
        return data


def _leaves(root: Any, where: str) -> Iterator[tuple[str, Any]]:
    """(key, value) of everything that is no dict, list or tuple. Bounded, for one may hold another many times."""
    stack: list[tuple[str, Any, int]] = [("", root, 0)]
    seen = 0
    while stack:
        key, value, depth = stack.pop()
        seen += 1
        if depth > DEPTH_MAX or seen > VALUES_MAX:
            raise CorruptCheckpoint(f"{where}: nested deeper than {DEPTH_MAX}, or of more than {VALUES_MAX} values")
        if isinstance(value, dict):
            inner = [(str(name), one) for name, one in value.items()]
        elif isinstance(value, list | tuple):
            inner = [(str(place), one) for place, one in enumerate(value)]
        else:
            yield key or "tensor", value
            continue
        stack += [(f"{key}.{name}" if key else name, one, depth + 1) for name, one in reversed(inner)]


def _names(root: Any) -> list[str] | None:
    """The names of the objects in a file such as {"model": …, "optimizer": …}; None for a state dict by itself."""
    if not isinstance(root, dict) or any(isinstance(value, Made) for value in root.values()):
        return None
    return [str(name) for name, value in root.items() if isinstance(value, dict | list)] or None


def _tuple(value: Any) -> Any:
    """What a torch.Size was made of."""
    if isinstance(value, Made) and value.name == "torch.Size" and value.arguments:
        return value.arguments[0]
    return value


def _dtype_named(value: Any) -> str | None:
    return value.name.removeprefix("torch.") if isinstance(value, Global) and value.name in _DTYPES else None
