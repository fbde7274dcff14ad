"""What one rank writes, and where each box lies in its pack: worked out once for all saves of the same tensors."""

from __future__ import annotations

from array import array
from collections import abc
from collections.abc import Sequence
from typing import Any

import msgspec

from ftrain._native import Mapping
from ftrain.checkpoint.staging.arena import Arena, Image
from ftrain.core.manifest import FORMAT, BoxRecord, PackIndex, encode_boxes, encode_index
from ftrain.core.messages import Attempt
from ftrain.core.write_plan import SlotLayout, WriteItem, slot_layout


class CleanSlots:
    """Gives slots of an arena to packs, with zeros wherever a pack has no tensor, also after another pack was there."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._clean: dict[int, tuple[PackPlan, Mapping]] = {}  # by slot, the pack whose gaps are zero, and where

    def image(self, slot: int, pack: PackPlan) -> Image:
        """The slot's image, which is large enough for the pack."""
        image = self._arena.image(slot)
        last, mapping = self._clean.get(slot, (None, None))
        if last is not pack or mapping is not image.mapping:
            for offset, nbytes in pack.gaps():
                self._arena.zero(slot, offset, nbytes)
            self._clean[slot] = (pack, image.mapping)
        return image


class PackPlan:
    """The pack of `rank`: its boxes in order of their offsets, and its geometry."""

    def __init__(self, rank: int, world_size: int, writes: Sequence[WriteItem]) -> None:
        self.rank = rank
        self.world_size = world_size
        self.writes = tuple(writes)
        self.layout: SlotLayout = slot_layout(self.writes)
        self.offsets = array("Q", self.layout.offsets)
        self.sizes = array("Q", [write.nbytes for write in self.writes])
        self.boxes = tuple(
            BoxRecord(
                key=write.spec.key,
                dtype=write.spec.dtype,
                shape=write.spec.shape,
                box_offset=write.box.offset,
                box_shape=write.box.shape,
                private=write.spec.private,
                offset=offset,
                nbytes=write.nbytes,
            )
            for offset, write in zip(self.layout.offsets, self.writes, strict=True)
        )
        self.has_parts = any(write.offset is not None for write in self.writes)  # of what the rank holds of a tensor
        self._encoded: msgspec.Raw | None = None

    @property
    def payload_bytes(self) -> int:
        """Of the tensors alone, without what lies between them."""
        return sum(self.sizes)

    def index(
        self,
        attempt: Attempt,
        plain: abc.Mapping[str, Any],
        box_crc32c: Sequence[int] = (),
        chunk_crc32c: Sequence[int] = (),
    ) -> PackIndex:
        """The pack's index. `plain` is encoded already; without checksums it is that of a sealed slot."""
        return PackIndex(
            format=FORMAT,
            attempt=attempt,
            rank=self.rank,
            world_size=self.world_size,
            payload_bytes=self.layout.payload_bytes,
            chunk_bytes=self.layout.chunk_bytes,
            image_bytes=self.layout.image_bytes,
            boxes=self.boxes,
            box_crc32c=tuple(box_crc32c),
            chunk_crc32c=tuple(chunk_crc32c),
            plain=dict(plain),
        )

    def encode(self, index: PackIndex) -> bytes:
        """As `encode_index`, without encoding the boxes again."""
        if self._encoded is None:
            self._encoded = encode_boxes(self.boxes)
        return encode_index(index, self._encoded)

    def gaps(self) -> list[tuple[int, int]]:
        """(offset, bytes) of what lies between the boxes and after the last, to the end of the image: zeros."""
        found, end = [], 0
        for offset, nbytes in zip(self.offsets, self.sizes, strict=True):
            if offset > end:
                found.append((end, offset - end))
            end = offset + nbytes
        return [*found, (end, self.layout.image_bytes - end)]
