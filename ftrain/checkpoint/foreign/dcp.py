"""torch.distributed.checkpoint, as its FileSystemWriter lays it out: `.metadata`, and files with one `torch.save` each
for every shard. Read without executing anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ftrain.checkpoint.foreign.mapped import Extent, Files, MappedSource, Part, checked_shape, local_path
from ftrain.checkpoint.foreign.pickled import Global, Made, read_pickle
from ftrain.checkpoint.foreign.torch_file import Archive
from ftrain.checkpoint.state.source import TensorInfo
from ftrain.core.layout import ITEM_BYTES, Box, uncovered
from ftrain.errors import CorruptCheckpoint

METADATA = ".metadata"
_DCP = "torch.distributed.checkpoint.metadata"
_TENSOR, _INFO = f"{_DCP}.TensorStorageMetadata", "torch.distributed.checkpoint.filesystem._StorageInfo"
_ALLOWED = {
    *(f"torch.{name}" for name in ITEM_BYTES),
    *(
        f"{_DCP}.{name}"
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    _TENSOR,
    _INFO,
    "torch.Size",
    "torch.serialization._get_layout",
    "pathlib.PosixPath",
    "pathlib.Path",
    "pathlib._local.PosixPath",
}


def is_dcp(path: Path) -> bool:
    return (path / METADATA).is_file()


def open_dcp(path: str | Path) -> MappedSource:
    """Keys are those of DCP; what is no tensor is left out. Raises `CorruptCheckpoint`."""
    place = local_path(path)
    files = Files(place)
    where = str(place / METADATA)
    root = read_pickle(bytes(files.bytes(METADATA)), _ALLOWED, where)
    fields = _fields(root, f"{_DCP}.Metadata", where)
    places = _places(fields.get("storage_data"), where)
    tensors: dict[str, TensorInfo] = {}
    parts: dict[str, list[Part]] = {}
    skipped = 0
    described = fields.get("state_dict_metadata")
    if not isinstance(described, dict):
        raise CorruptCheckpoint(f"{where}: has no description of a state")
    for key, value in described.items():
        if not isinstance(key, str) or not isinstance(value, Made) or value.name != _TENSOR:
            skipped += 1
            continue
        info, boxes = _described(_fields(value, _TENSOR, where), key, where)
        problem = uncovered(info.shape, boxes)
        if problem:
            raise CorruptCheckpoint(f"{where}: {key[:200]} is not covered exactly once: {problem}")
        tensors[key] = info
        parts[key] = [_part(files, place, info, key, box, places) for box in boxes if box.volume]
    return MappedSource(str(place), files, tensors, parts, names=_names(fields.get("planner_data")), skipped=skipped)


_Places = Mapping[tuple[str, tuple[int, ...]], tuple[str, int, int]]  # (key, offset of a box) -> file, offset, bytes


def _places(data: Any, where: str) -> _Places:
    if not isinstance(data, dict):
        raise CorruptCheckpoint(f"{where}: does not say where anything is")
    found = {}
    for index, info in data.items():
        named, at = _fields(index, f"{_DCP}.MetadataIndex", where), _fields(info, _INFO, where)
        if named.get("offset") is None:
            continue  # no tensor
        if at.get("transform_descriptors"):
            raise CorruptCheckpoint(f"{where}: {str(named.get('fqn'))[:200]} is compressed, which ftrain does not read")
        offset = checked_shape(_size(named["offset"]), str(named.get("fqn")), where)
        file, begin, length = at.get("relative_path"), at.get("offset"), at.get("length")
        if not (isinstance(file, str) and type(begin) is int and type(length) is int and begin >= 0 and length >= 0):
            raise CorruptCheckpoint(f"{where}: does not say where {str(named.get('fqn'))[:200]} is")
        found[str(named.get("fqn")), offset] = (file, begin, length)
    return found


def _described(fields: Mapping[str, Any], key: str, where: str) -> tuple[TensorInfo, list[Box]]:
    properties = fields.get("properties")
    state = properties.state if isinstance(properties, Made) else None
    dtype = state[0] if isinstance(state, tuple) and state else state.get("dtype") if isinstance(state, dict) else None
    name = dtype.name.removeprefix("torch.") if isinstance(dtype, Global) else ""
    if name not in ITEM_BYTES:
        raise CorruptCheckpoint(f"{where}: tensor {key[:200]} has a dtype that ftrain lacks")
    shape = checked_shape(_size(fields.get("size")), key, where)
    chunks = fields.get("chunks")
    if not isinstance(chunks, list):
        raise CorruptCheckpoint(f"{where}: tensor {key[:200]} has no chunks")
    boxes = []
    for chunk in chunks:
        given = _fields(chunk, f"{_DCP}.ChunkStorageMetadata", where)
        offset, size = (checked_shape(_size(given.get(one)), key, where) for one in ("offsets", "sizes"))
        if not len(offset) == len(size) == len(shape):
            raise CorruptCheckpoint(f"{where}: tensor {key[:200]} has a chunk of another number of dimensions")
        boxes.append(Box(offset, size))
    return TensorInfo(name, shape), boxes


def _part(files: Files, place: Path, info: TensorInfo, key: str, box: Box, places: _Places) -> Part:
    if (key, box.offset) not in places:
        raise CorruptCheckpoint(f"{place / METADATA}: does not say where {key[:200]} at {list(box.offset)} is")
    return Part(box, _finder(files, info, key, box, *places[key, box.offset]))


def _finder(
    files: Files, info: TensorInfo, key: str, box: Box, file: str, begin: int, length: int
) -> Callable[[], Extent]:
    path = files.path(file)  # looked at now: a name that leads elsewhere is refused before anything is read

    def find() -> Extent:
        data = files.bytes(file)
        where = f"{path}, offset {begin}"
        if begin + length > len(data):
            raise CorruptCheckpoint(f"{where}: {key[:200]} reaches beyond the end of the file")
        archive = Archive(data[begin : begin + length], file, begin, where)
        tensor = archive.tensor(archive.root, key)
        if tensor is None or tensor[0].shape != box.shape or tensor[0].dtype != info.dtype:
            raise CorruptCheckpoint(f"{where}: is not the box of {key[:200]} that the metadata tells of")
        return tensor[1]

    return find


def _fields(value: Any, name: str, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Made) or value.name != name or not isinstance(value.state, dict):
        raise CorruptCheckpoint(
            f"{where}: not the metadata that torch.distributed.checkpoint writes ({name} is missing)"
        )
    return value.state


def _size(value: Any) -> Any:
    if isinstance(value, Made) and value.name == "torch.Size" and value.arguments:
        return value.arguments[0]
    return value


def _names(planner_data: Any) -> list[str] | None:
    """The names on top of a nested state; None where that has tensors on top, too."""
    if not isinstance(planner_data, dict):
        return None
    paths = [path for path in planner_data.values() if isinstance(path, tuple) and path]
    deep = [str(path[0]) for path in paths if len(path) > 1]
    return list(dict.fromkeys(deep)) if deep else None
