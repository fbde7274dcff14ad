"""A checkpoint's tensors one after the other, in pieces: a checkpoint may be larger than memory, and a tensor, too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ftrain.checkpoint.batches import batches
from ftrain.checkpoint.state.items import torch_dtype
from ftrain.checkpoint.state.source import TensorInfo, TensorSource, Wanted
from ftrain.core.layout import Box, item_bytes

PIECE_BYTES = 64 << 20
BATCH_BYTES = 256 << 20  # that are read together: each read looks through all of the checkpoint's boxes


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor, C-contiguous in host memory."""

    key: str
    box: Box
    tensor: torch.Tensor


def pieces(source: TensorSource, keys: Sequence[str]) -> Iterator[Piece]:
    """The tensors of `keys` in this order, each in one piece or more, in C order. Empty ones have none.

    Raises `CorruptCheckpoint` where bytes are damaged.
    """
    return (piece for (piece,) in _read((source,), keys))


def pairs(one: TensorSource, other: TensorSource, keys: Sequence[str]) -> Iterator[tuple[Piece, Piece]]:
    """The tensors of `keys`, which are in both and of one shape, side by side. Raises as `pieces`."""
    return ((first, second) for first, second in _read((one, other), keys))


def boxes(info: TensorInfo, key: str, nbytes_max: int = PIECE_BYTES) -> Iterator[Box]:
    """The tensor cut into boxes of so many bytes at most, each a run in C order; none for a tensor without elements."""
    if 0 in info.shape:
        return
    row = item_bytes(info.dtype, key)
    steps = list(info.shape)  # of a box, by dimension
    for dim in range(len(info.shape) - 1, -1, -1):
        size = info.shape[dim]
        if row * size > nbytes_max:
            steps[dim] = max(1, nbytes_max // row)
            steps[:dim] = [1] * dim
            break
        row *= size
    starts = [range(0, size, step) for size, step in zip(info.shape, steps, strict=True)]
    for offset in itertools.product(*starts):
        shape = tuple(min(step, size - at) for step, size, at in zip(steps, info.shape, offset, strict=True))
        yield Box(offset, shape)


def _read(sources: Sequence[TensorSource], keys: Sequence[str]) -> Iterator[list[Piece]]:
    """Each tensor's pieces, of all sources side by side."""
    for batch in batches(_empty(sources, keys), _nbytes, BATCH_BYTES):
        for number, source in enumerate(sources):
            source.read([Wanted(piece.key, piece.box, piece.tensor) for piece in (side[number] for side in batch)])
        yield from batch
        del batch  # before the next one takes as much memory


def _empty(sources: Sequence[TensorSource], keys: Sequence[str]) -> Iterator[list[Piece]]:
    for key in keys:
        infos = [source.tensors[key] for source in sources]
        for box in boxes(max(infos, key=lambda info: item_bytes(info.dtype, key)), key):
            yield [Piece(key, box, torch.empty(box.shape, dtype=torch_dtype(info.dtype))) for info in infos]


def _nbytes(side: Sequence[Piece]) -> int:
    return sum(piece.tensor.nbytes for piece in side)
