"""Several ranks in one process: each with its arena, planning and saving as the ranks of a real run do."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import torch

from ftrain import _native
from ftrain.checkpoint.publish import publish
from ftrain.checkpoint.reading.restore import Checkpoint
from ftrain.checkpoint.snapshot import Snapshotter
from ftrain.checkpoint.staging.arena import Arena
from ftrain.checkpoint.state.items import TensorItem
from ftrain.checkpoint.writing.persist import persist_slot
from ftrain.checkpoint.writing.unchanged import Memory
from ftrain.core.codec import Codec
from ftrain.core.layout import Box, Mesh, TensorSpec, local_shard
from ftrain.core.messages import Attempt, PackRecord
from ftrain.core.node_state import SLOTS_MIN
from ftrain.storage.base import Storage

State = Mapping[str, torch.Tensor]


class World:
    """`size` ranks with a Snapshotter each, that exchange through memory."""

    def __init__(self, size: int, bytes_max: int = 0, slots: int = SLOTS_MIN) -> None:
        self.size = size
        self.fds = [_native.memory_file(f"test-arena-{rank}") for rank in range(size)]
        self.arenas = [Arena(fd) for fd in self.fds]
        self._barrier = threading.Barrier(size)
        self._given: list[bytes] = [b""] * size
        self.snapshotters = [
            Snapshotter(arena, rank, size, self._exchange_of(rank), bytes_max, slots)
            for rank, arena in enumerate(self.arenas)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for arena, fd in zip(self.arenas, self.fds, strict=True):
            arena.close()
            os.close(fd)

    def plan(self, items: Callable[[int], Sequence[TensorItem]]) -> None:
        with ThreadPoolExecutor(self.size) as pool:
            list(pool.map(lambda rank: self.snapshotters[rank].plan(items(rank)), range(self.size)))

    def take(
        self,
        attempt: Attempt,
        items: Callable[[int], Sequence[TensorItem]],
        plain: Callable[[int], Mapping[str, object]] = lambda _: {},
        slot: int = 0,
    ) -> None:
        for rank, snapshotter in enumerate(self.snapshotters):
            snapshotter.take(slot, attempt, items(rank), plain(rank))()

    def persist(
        self,
        storage: Storage,
        attempt: Attempt,
        slot: int = 0,
        memory: Memory | None = None,
        base: Attempt | None = None,
        codec: Codec | None = None,
    ) -> list[PackRecord]:
        return [
            persist_slot(storage, attempt, rank, Arena(fd), slot, lambda: False, memory=memory, base=base, codec=codec)
            for rank, fd in enumerate(self.fds)
        ]

    def _exchange_of(self, rank: int) -> Callable[[bytes], list[bytes]]:
        def exchange(data: bytes) -> list[bytes]:
            self._given[rank] = data
            self._barrier.wait()
            everybody = list(self._given)
            self._barrier.wait()
            return everybody

        return exchange


def save(
    storage: Storage,
    attempt: Attempt,
    size: int,
    items: Callable[[int], Sequence[TensorItem]],
    plain: Callable[[int], Mapping[str, object]] = lambda _: {},
    codec: Codec | None = None,
) -> str:
    """One whole checkpoint; the digest of its manifest."""
    with World(size) as world:
        world.plan(items)
        world.take(attempt, items, plain)
        return publish(storage, attempt, size, world.persist(storage, attempt, codec=codec), "test")


def load(checkpoint: Checkpoint, size: int, items: Callable[[int], Sequence[TensorItem]]) -> None:
    for rank in range(size):
        checkpoint.read_into(items(rank), rank)


def sharded(key: str, tensor: torch.Tensor, mesh: Mesh, placements: tuple[str, ...], rank: int) -> TensorItem:
    """The rank's item of a global tensor, cut as the layout says."""
    spec = TensorSpec(key, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), mesh, placements)
    shard = local_shard(spec, rank)
    assert shard is not None
    local = tensor.new_empty(shard.shape)
    for box, offset in zip(shard.boxes, shard.offsets, strict=True):
        part_of(local, Box(offset, box.shape)).copy_(part_of(tensor, box))
    return TensorItem(spec, local)


def part_of(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for dim, (at, count) in enumerate(zip(box.offset, box.shape, strict=True)):
        tensor = tensor.narrow(dim, at, count)
    return tensor


def line(size: int) -> Mesh:
    return Mesh((size,), tuple(range(size)))


def bits(tensor: torch.Tensor) -> bytes:
    """All of the tensor's bytes: equal only if bitwise equal."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
