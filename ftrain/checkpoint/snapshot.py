"""One rank's part of a consistent capture: plan once with all ranks, then copy to the arena at each armed boundary."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from ftrain.checkpoint.arena import Arena
from ftrain.checkpoint.items import TensorItem
from ftrain.checkpoint.stage import stage
from ftrain.core import plain as plain_data
from ftrain.core.layout import SlotLayout, TensorSpec, WriteItem, describe, image_of, slot_layout, whole, write_plan
from ftrain.core.manifest import FORMAT, BoxRecord, PackIndex, encode_index
from ftrain.core.messages import Attempt
from ftrain.errors import MismatchedState, ProtocolError

SLOTS = 2  # one sealed and being persisted, one being filled
INDEX_SLACK_BYTES = 256 << 10
PRIVATE_SLACK_BYTES = 256 << 10

_SPECS = msgspec.json.Decoder(list[TensorSpec])


class Snapshotter:
    """Fills slots of this rank's arena. `exchange` gives every rank the bytes that each gave, by rank: a collective.

    `bytes_max` bounds the arena (0: by the host's memory only); `threads` copy at a time.
    """

    def __init__(
        self,
        arena: Arena,
        rank: int,
        world_size: int,
        exchange: Callable[[bytes], list[bytes]],
        bytes_max: int,
        threads: int = 1,
    ) -> None:
        self._arena = arena
        self._rank = rank
        self._world_size = world_size
        self._exchange = exchange
        self._bytes_max = bytes_max
        self._threads = threads
        self._shared: Mapping[str, TensorSpec] | None = None
        self._written: tuple[WriteItem, ...] = ()

    def plan(self, items: Sequence[TensorItem], plain: Mapping[str, object] | None = None) -> None:
        """Agree with all ranks on who writes what, and reserve the arena. A collective: all ranks call it together.

        To be called again when tensors that ranks share came, went or changed shape. Raises `MismatchedState` on
        every rank where ranks disagree; `NotPlainData` and `OutOfMemory` as they apply here.
        """
        specs = [item.spec for item in items if not item.spec.private]
        _refuse_twice(items)
        everybody = _exchange_specs(specs, self._exchange, self._rank)
        self._written = write_plan(everybody)[self._rank]
        self._shared = {spec.key: spec for spec in specs}
        writes = self._writes(items)
        layout = slot_layout(writes)
        index = self._index(Attempt(0, 0, 0), writes, layout, _encode_plain(plain or {}))
        private = sum(item.nbytes for item in writes if item.spec.private)
        room = image_of(layout.payload_bytes + private // 4 + PRIVATE_SLACK_BYTES)[-1]
        self._arena.reserve(SLOTS, room, _with_slack(index), self._bytes_max)

    def take(self, slot: int, attempt: Attempt, items: Sequence[TensorItem], plain: Mapping[str, object]) -> None:
        """Copy what this rank writes into `slot` and seal it. Local: no other rank is waited for.

        Private tensors and plain data may differ from one time to the next, in number and size. Raises
        `MismatchedState` when shared tensors are not those of `plan`, and then, as after any other error, the slot
        is not sealed.
        """
        self._check_unchanged(items)
        writes = self._writes(items)
        layout = slot_layout(writes)
        index = self._index(attempt, writes, layout, _encode_plain(plain))
        if slot >= self._arena.slots:
            raise ProtocolError(f"slot {slot} was asked for, but the arena has {self._arena.slots}")
        self._arena.grow(slot, layout.image_bytes, len(index), self._bytes_max)
        self._arena.clear_index(slot)
        self._clear_gaps(slot, writes, layout)
        tensors = {(item.spec.key, item.spec.private): item.local for item in items}
        copies = [
            (offset, tensors[write.spec.key, write.spec.private])
            for offset, write in zip(layout.offsets, writes, strict=True)
        ]
        stage(copies, self._arena, slot, self._threads)
        self._arena.write_index(slot, index)

    def _writes(self, items: Sequence[TensorItem]) -> tuple[WriteItem, ...]:
        own = (WriteItem(item.spec, whole(item.spec.shape), item.spec.nbytes) for item in items if item.spec.private)
        return (*self._written, *own)

    def _index(self, attempt: Attempt, writes: Sequence[WriteItem], layout: SlotLayout, plain: dict[str, Any]) -> bytes:
        boxes = tuple(
            BoxRecord(
                key=write.spec.key,
                dtype=write.spec.dtype,
                shape=write.spec.shape,
                box_offset=write.box.offset,
                box_shape=write.box.shape,
                private=write.spec.private,
                offset=offset,
                nbytes=write.nbytes,
                crc32c=0,
            )
            for offset, write in zip(layout.offsets, writes, strict=True)
        )
        return encode_index(
            PackIndex(
                format=FORMAT,
                attempt=attempt,
                rank=self._rank,
                world_size=self._world_size,
                payload_bytes=layout.payload_bytes,
                chunk_bytes=layout.chunk_bytes,
                image_bytes=layout.image_bytes,
                boxes=boxes,
                chunk_crc32c=(),
                plain=plain,
            )
        )

    def _clear_gaps(self, slot: int, writes: Sequence[WriteItem], layout: SlotLayout) -> None:
        """What an earlier snapshot left between boxes must not get into this one's pack."""
        end = 0
        for offset, write in zip(layout.offsets, writes, strict=True):
            if offset > end:
                self._arena.zero(slot, end, offset - end)
            end = offset + write.nbytes
        self._arena.zero(slot, end, layout.image_bytes - end)

    def _check_unchanged(self, items: Sequence[TensorItem]) -> None:
        _refuse_twice(items)
        planned = self._shared
        if planned is None:
            raise ProtocolError("a snapshot was asked for before it was planned")
        now = {item.spec.key: item.spec for item in items if not item.spec.private}
        if now == planned:
            return
        gone = [f"{key} is gone" for key in planned if key not in now]
        new = [f"{key} is new" for key in now if key not in planned]
        other = [
            f"{key} was {describe(planned[key])} and is {describe(spec)}"
            for key, spec in now.items()
            if key in planned and planned[key] != spec
        ]
        raise MismatchedState(
            f"the tracked tensors changed since they were planned: {'; '.join((gone + new + other)[:5])}"
        )


def _refuse_twice(items: Sequence[TensorItem]) -> None:
    seen: set[tuple[str, bool]] = set()
    for item in items:
        name = (item.spec.key, item.spec.private)
        if name in seen:
            raise MismatchedState(f"{item.spec.key}: two tensors are tracked under this key")
        seen.add(name)


def _encode_plain(plain: Mapping[str, object]) -> dict[str, Any]:
    return {name: plain_data.encode(value, name) for name, value in plain.items()}


def _with_slack(index: bytes) -> int:
    return len(index) + len(index) // 4 + INDEX_SLACK_BYTES


def _exchange_specs(
    specs: list[TensorSpec], exchange: Callable[[bytes], list[bytes]], rank: int
) -> list[list[TensorSpec]]:
    """Everybody's specs. Digests go first: usually all are equal, and then nothing else needs to travel."""
    own = msgspec.json.encode(specs)
    digests = exchange(hashlib.sha256(own).digest())
    known: dict[bytes, list[TensorSpec]] = {digests[rank]: specs}
    if len(set(digests)) > 1:
        first = digests.index(digests[rank]) == rank
        contents = exchange(own if first else b"")
        for digest, content in zip(digests, contents, strict=True):
            if content and digest not in known:
                known[digest] = _SPECS.decode(content)
    return [known[digest] for digest in digests]
