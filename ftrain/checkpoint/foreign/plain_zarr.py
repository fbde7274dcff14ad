"""Writes a plain zarr v3 group: an array for each tensor, to be opened by any zarr, on any machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import zarr

from ftrain.checkpoint.foreign.outgoing import Outgoing, Piece, new_directory
from ftrain.checkpoint.state.items import torch_dtype
from ftrain.checkpoint.state.source import TensorInfo
from ftrain.checkpoint.tools.stream import boxes
from ftrain.storage.zarr_view import array_name

CHUNK_BYTES = 16 << 20
_WITHOUT = {"bfloat16": "uint16", "complex32": "uint32"}  # and float8: types that zarr-python lacks


def write_zarr(directory: Path, outgoing: Sequence[Outgoing], pieces: Iterator[Piece], step: int) -> list[Path]:
    """Names and attributes are as in a checkpoint's own reference view: docs/format.md."""
    with new_directory(directory) as building:
        root = zarr.create_group(store=building, zarr_format=3, attributes={"step": step})
        waiting = iter(outgoing)
        array: Any = None
        current = ""
        for piece in pieces:
            while current != piece.key:
                one = next(waiting)
                array, current = _create(root, one), one.key
            numbers = piece.tensor.view(torch_dtype(_stand_in(_name(piece)))).numpy()
            if piece.box.shape:
                array[tuple(map(_slice, piece.box.offset, piece.box.shape))] = numbers
            else:
                array[...] = numbers
        for one in waiting:  # those without an element have no pieces
            _create(root, one)
    return [directory]


def _create(root: zarr.Group, one: Outgoing) -> Any:
    first = next(boxes(TensorInfo(one.dtype, one.shape), one.name, CHUNK_BYTES), None)
    return root.create_array(
        array_name(one.name),
        shape=one.shape,
        chunks=first.shape if first is not None else tuple(max(1, size) for size in one.shape),
        dtype=_stand_in(one.dtype),
        compressors=None,
        attributes={"key": one.name, "dtype": one.dtype},
    )


def _name(piece: Piece) -> str:
    return str(piece.tensor.dtype).removeprefix("torch.")


def _stand_in(dtype: str) -> str:
    return "uint8" if dtype.startswith("float8") else _WITHOUT.get(dtype, dtype)


def _slice(begin: int, count: int) -> slice:
    return slice(begin, begin + count)
