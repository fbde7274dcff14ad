"""How zarr sees boxes that are stored in frames: each frame is a chunk, and its codec one that zarr has by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ftrain.core.codec import Codec
from ftrain.core.frames import Frames
from ftrain.core.layout import ITEM_BYTES
from ftrain.core.manifest import BoxRecord


@dataclass(frozen=True, slots=True)
class CompressedBox:
    """A box in frames, and the file that they are in."""

    record: BoxRecord
    url: str
    codec: str
    frames: Frames


def grid_of(boxes: Sequence[CompressedBox], count: int) -> tuple[int, ...] | None:
    """The chunk shape of a regular grid of which every chunk is a frame, or None; `count` boxes make the tensor."""
    first = boxes[0]
    chunk, shape = first.frames.shape, first.record.shape
    if len(boxes) < count:
        return None
    for one in boxes:
        if (one.codec, one.frames.shape) != (first.codec, chunk):
            return None
        for total, at, rows, height in zip(shape, one.record.box_offset, one.record.box_shape, chunk, strict=True):
            # Zeros that fill up a frame are at the tensor's own end alone, where zarr does not look.
            if at % height or (rows % height and at + rows != total):
                return None
    return chunk


def chunks_of(box: CompressedBox, name: str, offset: Sequence[int]) -> Iterator[tuple[str, list[Any]]]:
    """The frames as chunks of the array `name`, in which the box is at `offset`."""
    heights = box.frames.shape
    sizes = zip(box.record.box_shape, heights, strict=True)
    first = [at // height for at, height in zip(offset, heights, strict=True)]
    at = box.record.offset
    for place, nbytes in zip(
        product(*(range(-(-rows // height)) for rows, height in sizes)), box.frames.nbytes, strict=True
    ):
        key = "/".join(str(begin + number) for begin, number in zip(first, place, strict=True))
        yield f"{name}/c/{key}", [box.url, at, nbytes]
        at += nbytes


def codec_metadata(box: CompressedBox | None) -> list[dict[str, Any]]:
    """What follows the codec `bytes` in the metadata of an array; nothing for one that is stored as it is."""
    if box is None:
        return []
    codec = Codec.parse(box.codec)
    if codec.name == "zstd":
        return [{"name": "zstd", "configuration": {"level": codec.level, "checksum": False}}]
    configuration = {
        "typesize": ITEM_BYTES[box.record.dtype],
        "cname": codec.name.removeprefix("blosc-"),
        "clevel": codec.level,
        "shuffle": "bitshuffle",
        "blocksize": 0,
    }
    return [{"name": "blosc", "configuration": configuration}]
