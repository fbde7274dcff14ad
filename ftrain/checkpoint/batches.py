"""What is carried out in batches, so that it takes no more memory than it should."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_T = TypeVar("_T")


def batches(items: Iterable[_T], nbytes: Callable[[_T], int], nbytes_max: int) -> Iterator[list[_T]]:
    """The items in order, in runs of `nbytes_max` together at most; one that is larger has a run of its own."""
    batch: list[_T] = []
    total = 0
    for item in items:
        size = nbytes(item)
        if batch and total + size > nbytes_max:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size
    if batch:
        yield batch
