"""Checkpoints as zarr sees them: the metadata of each pack, and a reference view of the tensors in all of them.

Reading needs zarr and fsspec, nothing of ours; writing needs neither. Sources: zarr v3 core specification, the
sharding codec (version 1.0), fsspec's reference specification (version 1). docs/format.md says how tensors map to
arrays.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import msgspec

from ftrain import _native
from ftrain.core.layout import ITEM_BYTES, Box
from ftrain.core.manifest import BoxRecord, PackIndex, data_path, pack_path
from ftrain.storage.zarr_frames import CompressedBox, chunks_of, codec_metadata, grid_of

CONSOLIDATED_MAX = 4096  # nodes, beyond which saying everything twice costs more than it saves
# What URLs begin with, and its value where the reader is in the checkpoint's directory. In an object store there is no
# such place, nor an `..`: readers put URLs in their place, by fsspec's `template_overrides`.
_HERE, _RUN = "{{here}}", "{{run}}"
_TEMPLATES: Mapping[str, str] = {"here": "", "run": "../../../"}
CHUNKS_MAX = 1 << 20  # of one array, beyond which its boxes are shown one by one

# What zarr-python has no type for is shown as unsigned integers of the same size; the attribute `dtype` has the name.
_ZARR_TYPES: Mapping[str, str] = {
    name: name
    if name.startswith(("bool", "int", "uint", "float16", "float32", "float64", "complex64", "complex128"))
    else f"uint{8 * size}"
    for name, size in ITEM_BYTES.items()
}
_RESERVED = re.compile(r"^(\.|__|rank-|zarr\.json$)")


def pack_metadata(payload_bytes: int, chunk_bytes: int) -> bytes:
    """`zarr.json` of a pack: one shard, the whole array."""
    return _json(
        _array(
            (payload_bytes,),
            (payload_bytes,),
            "uint8",
            {},
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [chunk_bytes],
                    "codecs": [{"name": "bytes"}],
                    "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
                    "index_location": "end",
                },
            },
        )
    )


def shard_index(payload_bytes: int, chunk_bytes: int) -> bytes:
    """The last bytes of a pack: where each inner chunk is, and the crc32c of that list."""
    pairs = b"".join(struct.pack("<QQ", start, chunk_bytes) for start in range(0, payload_bytes, chunk_bytes))
    return pairs + struct.pack("<I", _native.crc32c(pairs))


def references(indexes: Sequence[PackIndex]) -> bytes:
    """`refs.json`: every tensor as a zarr v3 array, its chunks byte ranges of packs of the first index's attempt.

    Those of other attempts are beside it, in the same run. The same bytes wherever the checkpoint is.
    """
    attempt = indexes[0].attempt
    view = _View()
    shared: dict[str, list[_Part]] = {}
    for index in sorted(indexes, key=lambda index: index.rank):
        own = f"rank-{index.rank:05d}"
        place = _HERE if index.attempt == attempt else f"{_RUN}{index.attempt.path}/"
        url = f"{place}{data_path(pack_path(index.rank))}"
        for record, frames in zip(index.boxes, index.frames_of_boxes, strict=True):
            compressed = None if frames is None else CompressedBox(record, url, index.codec, frames)
            part = _Part(record, url, index.image_bytes, compressed)
            if record.private:
                view.nodes[own] = _group({"rank": index.rank})
                _add(view, f"{own}/{array_name(record.key)}", [part])
            else:
                shared.setdefault(record.key, []).append(part)
    for key, parts in shared.items():
        _add(view, array_name(key), parts)
    # With the metadata of all nodes in the root's, a reader lists and opens them without asking storage for each.
    root = _group({"ftrain_format": max(index.format for index in indexes)})
    if len(view.nodes) <= CONSOLIDATED_MAX:
        root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": view.nodes}
    nodes = {"": root, **view.nodes}
    metadata = {f"{name}/zarr.json".lstrip("/"): _json(node).decode() for name, node in nodes.items()}
    is_alone = all(index.attempt == attempt for index in indexes)
    templates = {name: value for name, value in _TEMPLATES.items() if name == "here" or not is_alone}
    return _json({"version": 1, "templates": templates, "refs": {**metadata, **view.chunks}})


def array_name(key: str) -> str:
    """The array of the tensor `key`: the key itself, with what zarr would take for something else as %XX.

    One name, never a path: a key may be the beginning of another, which groups and arrays cannot.
    """
    name = re.sub(r"[%/\\\x00-\x1f]", lambda match: f"%{ord(match.group()):02X}", key)
    return f"%{ord(name[0]):02X}{name[1:]}" if _RESERVED.match(name) else name


@dataclass(frozen=True, slots=True)
class _Part:
    record: BoxRecord
    url: str
    file_bytes: int
    compressed: CompressedBox | None


@dataclass(frozen=True, slots=True)
class _View:
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)  # metadata by path
    chunks: dict[str, list[Any]] = field(default_factory=dict)  # [file, offset, length] by path


def _add(view: _View, name: str, parts: Sequence[_Part]) -> None:
    first = parts[0].record
    compressed = [part.compressed for part in parts if part.compressed is not None]
    chunk = grid_of(compressed, len(parts)) if compressed else _chunk_shape(first.shape, parts)
    attributes: dict[str, Any] = {"key": first.key, "dtype": first.dtype}
    if chunk is not None:
        view.nodes[name] = _metadata(first.shape, chunk, first.dtype, attributes, parts[0].compressed)
        for part in parts:
            view.chunks.update(_chunks(name, part, part.record.box, chunk))
        return
    # No regular grid holds these boxes: show each as an array of its own.
    view.nodes[name] = _group({**attributes, "shape": list(first.shape), "boxes": len(parts)})
    for number, part in enumerate(parts):
        box, own = part.record.box, f"{name}/box-{number:05d}"
        place = {**attributes, "offset": list(box.offset), "tensor_shape": list(first.shape)}
        chunk = part.compressed.frames.shape if part.compressed else box.shape
        view.nodes[own] = _metadata(box.shape, chunk, first.dtype, place, part.compressed)
        view.chunks.update(_chunks(own, part, Box((0,) * len(box.shape), box.shape), chunk))


def _chunk_shape(shape: tuple[int, ...], parts: Sequence[_Part]) -> tuple[int, ...] | None:
    """A regular grid of which every chunk is a run of bytes in one box, or None."""
    boxes = [part.record.box for part in parts if part.record.box.volume]
    if not boxes:
        return tuple(max(1, size) for size in shape)
    if not shape:
        return ()
    inner = boxes[0].shape[1:]
    for box in boxes:
        if box.shape[1:] != inner or any(at % size for at, size in zip(box.offset[1:], inner, strict=True)):
            return None
    if any(total % size for total, size in zip(shape[1:], inner, strict=True)):
        return None
    rows = max(box.shape[0] for box in boxes)
    if not all(_fits(part, rows, inner) for part in parts):
        rows = gcd(*(box.shape[0] for box in boxes), *(box.offset[0] for box in boxes))
    across = 1
    for total, size in zip(shape[1:], inner, strict=True):
        across *= total // size
    return (rows, *inner) if -(-shape[0] // rows) * across <= CHUNKS_MAX else None


def _fits(part: _Part, rows: int, inner: tuple[int, ...]) -> bool:
    """Chunks of so many rows cut this box well: only its last may be short, at the tensor's own end, where zarr
    does not look.

    zarr wants that chunk in full length all the same, so the file has to go on that far.
    """
    record = part.record
    at, count = record.box_offset[0], record.box_shape[0]
    if at % rows:
        return count == 0
    if count % rows == 0:
        return True
    row_bytes = ITEM_BYTES[record.dtype]
    for size in inner:
        row_bytes *= size
    end = record.offset + -(-count // rows) * rows * row_bytes
    return at + count == record.shape[0] and end <= part.file_bytes


def _chunks(name: str, part: _Part, box: Box, chunk: tuple[int, ...]) -> Iterable[tuple[str, list[Any]]]:
    """The box's chunks as references. `box` is the part's place in the array `name`."""
    if part.compressed is not None:
        yield from chunks_of(part.compressed, name, box.offset)
        return
    if box.volume == 0:
        return
    if not chunk:
        yield f"{name}/c", [part.url, part.record.offset, part.record.nbytes]
        return
    nbytes = ITEM_BYTES[part.record.dtype]
    for size in chunk:
        nbytes *= size
    rest = "".join(f"/{at // size}" for at, size in zip(box.offset[1:], chunk[1:], strict=True))
    for number in range(-(-box.shape[0] // chunk[0])):
        where = f"{name}/c/{box.offset[0] // chunk[0] + number}{rest}"
        yield where, [part.url, part.record.offset + number * nbytes, nbytes]


def _metadata(
    shape: Sequence[int],
    chunk: Sequence[int],
    dtype: str,
    attributes: Mapping[str, Any],
    compressed: CompressedBox | None,
) -> dict[str, Any]:
    zarr_type = _ZARR_TYPES[dtype]
    codec: dict[str, Any] = {"name": "bytes"}
    if zarr_type not in ("bool", "int8", "uint8"):
        codec["configuration"] = {"endian": "little"}
    chunk = [max(1, size) for size in chunk]
    return _array(shape, chunk, zarr_type, attributes, codec, *codec_metadata(compressed))


def _array(
    shape: Sequence[int],
    chunk: Sequence[int],
    zarr_type: str,
    attributes: Mapping[str, Any],
    *codecs: Mapping[str, Any],
) -> dict[str, Any]:
    zero: Any = False if zarr_type == "bool" else [0.0, 0.0] if zarr_type.startswith("complex") else 0
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": zarr_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": zero,
        "codecs": list(codecs),
        "attributes": dict(attributes),
    }


def _group(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def _json(value: object) -> bytes:
    return msgspec.json.encode(value)
