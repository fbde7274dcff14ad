"""A source that holds tensors and nothing else, as `Tracked` restores from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ftrain.checkpoint.state.items import TensorItem
from ftrain.checkpoint.state.source import TensorInfo, TensorSource
from ftrain.checkpoint.state.wanted import wanted_boxes


class Bare:
    """What is a rank's alone, and everything that is no tensor, it does not have."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._source.tensors

    def private_tensors(self, rank: int) -> None:
        del rank

    def plain(self, rank: int) -> dict[str, object]:
        del rank
        return {"tracked": {}}

    def others(self, rank: int) -> tuple[()]:
        del rank
        return ()

    def read_into(self, items: Sequence[TensorItem], rank: int, *, elsewhere: Collection[str] = ()) -> None:
        """Fill local tensors, of which `Selection` has found each to be there."""
        del elsewhere
        self._source.read(wanted_boxes(items, rank))
