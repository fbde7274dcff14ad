"""Figures of a tensor that tell whether it is sick: NaNs, infinities, norm, largest value."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ftrain.checkpoint.state.source import TensorSource
from ftrain.checkpoint.tools.stream import pieces

SLICE_ELEMENTS = 1 << 22  # converted at a time


@dataclass(slots=True)
class Statistics:
    """Of one tensor. Norm, largest value and mean are of its finite elements; complex ones count as two."""

    elements: int = 0
    nans: int = 0
    infs: int = 0
    zeros: int = 0
    total: float = 0.0
    squares: float = 0.0
    max_abs: float = 0.0

    @property
    def norm(self) -> float:
        """Euclidean."""
        return math.sqrt(self.squares)

    @property
    def mean(self) -> float:
        finite = self.elements - self.nans - self.infs
        return self.total / finite if finite else math.nan

    @property
    def is_finite(self) -> bool:
        return not self.nans and not self.infs

    def add(self, tensor: torch.Tensor) -> None:
        """More elements of the tensor."""
        for values in slices(tensor):
            nans, infs = int(values.isnan().sum()), int(values.isinf().sum())
            if nans or infs:
                values = values[values.isfinite()]
            self.elements += len(values) + nans + infs
            self.nans += nans
            self.infs += infs
            self.zeros += len(values) - int(values.count_nonzero())
            self.total += float(values.sum())
            self.squares += float(values.dot(values))
            self.max_abs = max(self.max_abs, float(values.abs().max())) if len(values) else self.max_abs


def statistics(source: TensorSource, keys: Sequence[str]) -> dict[str, Statistics]:
    """Of each tensor. Reads all of them, in bounded memory. Raises `CorruptCheckpoint`."""
    found = {key: Statistics() for key in keys}
    for piece in pieces(source, keys):
        found[piece.key].add(piece.tensor)
    return found


def slices(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The elements as float64, some at a time."""
    flat = tensor.detach().reshape(-1)
    for begin in range(0, len(flat), SLICE_ELEMENTS):
        part = flat[begin : begin + SLICE_ELEMENTS]
        if part.is_complex():
            part = torch.view_as_real(part.to(torch.complex128)).reshape(-1)
        yield part.to(torch.float64)
