"""From what a rank holds of tensors to the boxes that fill it."""

from __future__ import annotations

from collections.abc import Sequence

from ftrain.checkpoint.state.items import TensorItem, part_of
from ftrain.checkpoint.state.source import Wanted
from ftrain.core.layout import local_shard


def wanted_boxes(items: Sequence[TensorItem], rank: int) -> list[Wanted]:
    """The boxes of local tensors; none of an empty shard, or of a tensor whose mesh this rank is not in."""
    wanted = []
    for item in items:
        shard, local = local_shard(item.spec, rank), item.local
        if shard is None:
            continue
        assert tuple(local.shape) == shard.shape, f"{item.spec.key}: {tuple(local.shape)} for a shard of {shard.shape}"
        for box, offset in zip(shard.boxes, shard.offsets, strict=True):
            into = local if box.shape == shard.shape else part_of(local, offset, box.shape)
            wanted.append(Wanted(item.spec.key, box, into))
    return wanted
