"""A state that is to be saved, as tensors and plain data."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch

from ftrain.checkpoint.agreement import encode_plain
from ftrain.checkpoint.garbage import no_collection
from ftrain.checkpoint.pack_plan import PackPlan
from ftrain.checkpoint.tracked import Tracked

State = MutableMapping[str, Any]


class Job:
    """A state as it is when it is saved."""

    def __init__(self, state: State) -> None:
        tracked = Tracked()
        tracked.add_state(state)
        with no_collection():
            part = tracked.collect()
        self.items = part.items
        self.plain = encode_plain({"tracked": part.plain})
        self.specs = [item.spec for item in part.items]

    def tensors(self, pack: PackPlan) -> list[torch.Tensor]:
        """What the pack's boxes hold, in their order."""
        return [self.items[place].local for place in self._places(pack)]

    def late(self, pack: PackPlan) -> list[bool]:
        return [self.items[place].late for place in self._places(pack)]

    def _places(self, pack: PackPlan) -> range | list[int]:
        if len(pack.writes) == len(self.items):
            return range(len(self.items))
        by_name = {(spec.key, spec.private): place for place, spec in enumerate(self.specs)}
        return [by_name[write.spec.key, write.spec.private] for write in pack.writes]
