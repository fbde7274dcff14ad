"""safetensors, as Hugging Face lays checkpoints out: one file, or several with an index. Source: its README, § Format.

8 bytes: length of the header, little-endian | header: JSON | the tensors, without holes
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ftrain.checkpoint.foreign.mapped import Files, MappedSource, Part, checked_shape, contiguous, local_path, one_part
from ftrain.checkpoint.foreign.outgoing import Outgoing, Piece, data_of, new_directory, new_file
from ftrain.checkpoint.state.source import TensorInfo
from ftrain.core.layout import ITEM_BYTES
from ftrain.errors import CorruptCheckpoint, UnsupportedTensor

HEADER_BYTES_MAX = 100_000_000  # as the reference implementation has it
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
STEP = "ftrain.step"

_DTYPES: Mapping[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
_NAMES = {ours: theirs for theirs, ours in _DTYPES.items()}

_Offset = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class _Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[_Offset, ...]
    data_offsets: tuple[_Offset, _Offset]


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]
    metadata: dict[str, Any] = {}


_INDEX = msgspec.json.Decoder(_Index)


def is_safetensors(path: Path) -> bool:
    if path.is_dir():
        return any((path / name).is_file() for name in (SINGLE, INDEX))
    return path.name.endswith((".safetensors", ".safetensors.index.json"))


def open_safetensors(path: str | Path) -> MappedSource:
    """A file, an index, or a directory with `model.safetensors` or its index. Raises `CorruptCheckpoint`."""
    place = local_path(path)
    if place.is_dir():
        place = place / (INDEX if (place / INDEX).is_file() else SINGLE)
    files = Files(place.parent)
    tensors: dict[str, TensorInfo] = {}
    parts: dict[str, Sequence[Part]] = {}
    if place.name.endswith(".json"):
        metadata = _read_sharded(files, place.name, tensors, parts)
    else:
        metadata = _read_file(files, place.name, tensors, parts)
    step = str(metadata.get(STEP, "0"))
    return MappedSource(str(place), files, tensors, parts, step=int(step) if step.isdigit() and len(step) < 19 else 0)


def write_safetensors(
    directory: Path, outgoing: Sequence[Outgoing], pieces: Iterator[Piece], step: int, shard_bytes: int
) -> list[Path]:
    """Write `model.safetensors`, or several files of at most `shard_bytes` each and the index, into a new directory.

    A name that ends with `.safetensors` is that of one file.
    Raises `UnsupportedTensor` for a dtype that safetensors does not have, before anything is written.
    """
    for one in outgoing:
        if one.dtype not in _NAMES:
            raise UnsupportedTensor(f"{one.name}: safetensors has no dtype {one.dtype}; convert it with --dtype")
    if directory.suffix == ".safetensors":
        _write_file(directory, outgoing, pieces, step)
        return [directory]
    shards = _shards(outgoing, shard_bytes)
    several = len(shards) > 1
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" if several else SINGLE for n in range(len(shards))]
    written = []
    with new_directory(directory) as building:
        for name, shard in zip(names, shards, strict=True):
            _write_file(building / name, shard, pieces, step)
            written.append(directory / name)
        if several:
            places = {one.name: name for name, shard in zip(names, shards, strict=True) for one in shard}
            total = sum(one.nbytes for one in outgoing)
            index = {"metadata": {"total_size": total, STEP: str(step)}, "weight_map": places}
            with new_file(building / INDEX) as file:
                file.write(msgspec.json.format(msgspec.json.encode(index), indent=2))
            written.append(directory / INDEX)
    return written


def _shards(outgoing: Sequence[Outgoing], shard_bytes: int) -> list[list[Outgoing]]:
    shards: list[list[Outgoing]] = [[]]
    filled = 0
    for one in outgoing:
        if shards[-1] and filled + one.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(one)
        filled += one.nbytes
    return shards


def _write_file(path: Path, outgoing: Sequence[Outgoing], pieces: Iterator[Piece], step: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", STEP: str(step)}}
    end = 0
    for one in outgoing:
        begin, end = end, end + one.nbytes
        header[one.name] = {"dtype": _NAMES[one.dtype], "shape": one.shape, "data_offsets": [begin, end]}
    encoded = msgspec.json.encode(header)
    encoded += b" " * (-len(encoded) % 8)
    with new_file(path) as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for one in outgoing:
            for data in data_of(one, pieces):
                file.write(data)


def _read_sharded(
    files: Files, name: str, tensors: dict[str, TensorInfo], parts: dict[str, Sequence[Part]]
) -> Mapping[str, Any]:
    where = str(files.path(name))
    try:
        if files.path(name).stat().st_size > HEADER_BYTES_MAX:
            raise CorruptCheckpoint(f"{where}: an index of more than {HEADER_BYTES_MAX} bytes")
        index = _INDEX.decode(bytes(files.bytes(name)))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise CorruptCheckpoint(f"{where}: not an index of safetensors: {error}") from None
    for file in dict.fromkeys(index.weight_map.values()):
        _read_file(files, file, tensors, parts)
    missing = [key for key in index.weight_map if key not in tensors]
    if missing:
        raise CorruptCheckpoint(f"{where}: names {missing[0][:200]}, which is in none of its files")
    return index.metadata


def _read_file(
    files: Files, name: str, tensors: dict[str, TensorInfo], parts: dict[str, Sequence[Part]]
) -> Mapping[str, str]:
    """Add the tensors of one file. Returns its metadata."""
    data, where = files.bytes(name), str(files.path(name))
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > HEADER_BYTES_MAX or 8 + length > len(data):
        raise CorruptCheckpoint(f"{where}: not a safetensors file, or cut short: {len(data)} bytes, header of {length}")
    begin = 8 + length
    try:
        header = msgspec.json.decode(bytes(data[8:begin]), type=dict[str, msgspec.Raw])
        raw = header.pop("__metadata__", None)
        metadata = msgspec.json.decode(raw, type=dict[str, str]) if raw is not None else {}
        found = {key: msgspec.json.decode(one, type=_Tensor) for key, one in header.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{where}: not a header of safetensors: {error}") from None
    at = 0
    for key, one in sorted(found.items(), key=lambda item: item[1].data_offsets):
        dtype = _DTYPES.get(one.dtype)
        if dtype is None:
            raise CorruptCheckpoint(f"{where}: tensor {key[:200]} has the dtype {one.dtype[:40]}, which ftrain lacks")
        if key in tensors or not key:
            raise CorruptCheckpoint(f"{where}: tensor {key[:200]!r} is there twice, or has no name")
        shape = checked_shape(one.shape, key, where)
        info = TensorInfo(dtype, shape)
        if one.data_offsets != (at, at + _nbytes(info)):
            raise CorruptCheckpoint(
                f"{where}: tensor {key[:200]} is at {list(one.data_offsets)}, not at {[at, at + _nbytes(info)]}"
            )
        tensors[key] = info
        parts[key] = one_part(shape, contiguous(shape, name, begin + at))
        at = one.data_offsets[1]
    if begin + at != len(data):
        raise CorruptCheckpoint(f"{where}: has {len(data)} bytes, and its header tells of {begin + at}")
    return metadata


def _nbytes(info: TensorInfo) -> int:
    count = ITEM_BYTES[info.dtype]
    for size in info.shape:
        count *= size
    return count
