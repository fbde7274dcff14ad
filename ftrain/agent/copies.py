"""The memory that a keeper has of another node's ranks: private state as bytes, each snapshot in an arena of its own.

What is kept is decided by `core.keeping`; here are the bytes to it. They are checked again when they are given back:
what turns out to be damaged is let go, and is not reported as kept any more.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ftrain import _native
from ftrain.agent import peer_wire as wire
from ftrain.agent.arriving import Arriving
from ftrain.checkpoint.staging.arena import Arena
from ftrain.checkpoint.staging.memory import available_bytes
from ftrain.core import keeping
from ftrain.core import messages as m
from ftrain.core.keeping import Kept
from ftrain.core.manifest import INDEX_BYTES_MAX
from ftrain.errors import CorruptCheckpoint, OutOfMemory

log = logging.getLogger("ftrain.peers")
MEMORY_SHARE = 2  # a copy may take one part in so many of the memory that is available


@dataclass(slots=True)
class Copy:
    """One rank's snapshot, whole or on its way: its image, then its index, in chunks."""

    rank: int
    attempt: m.Attempt
    fd: int
    content: Arriving
    checksums: list[int] = field(default_factory=list)
    readers: int = 0

    def take(self, data: wire.Data, checksum: int) -> None:
        """The next chunk, which lies where `content.place` said."""
        self.content.take(data)
        self.checksums.append(checksum)

    def chunk(self, number: int) -> wire.Data:
        """A chunk as it came, for now. Raises `CorruptCheckpoint` where it is not any more."""
        image = self.content.arena.view(0, 0, self.content.image_bytes)
        data = wire.chunk_of(image, self.content.index, number * wire.CHUNK_BYTES)
        if _native.crc32c(data) != self.checksums[number]:
            raise CorruptCheckpoint(f"the copy of rank {self.rank}'s snapshot of {self.attempt} is damaged")
        return data

    def close(self) -> None:
        self.content.arena.close()
        os.close(self.fd)


class Copies:
    """What one keeper has. `changed` is told what is kept whenever that is something else. Lives in one event loop."""

    def __init__(self, changed: Callable[[tuple[m.Kept, ...]], None]) -> None:
        self._changed = changed
        self._kept = Kept()
        self._boundaries: dict[tuple[int, int], tuple[bytes, int]] = {}  # (rank, step) -> bytes, checksum
        self._snapshots: dict[tuple[int, m.Attempt], Copy] = {}
        self._spare: dict[int, Copy] = {}  # by rank: memory to be used again
        self._warned = False

    def began(self, generation: int, line: m.Line | None) -> None:
        """This node takes part in a generation that goes on from `line`; None where all of its ranks are new."""
        self._become(keeping.began(self._kept, generation, line))

    def is_past(self, generation: int) -> bool:
        """What is sent in this generation is of no use any more."""
        return generation < self._kept.generation

    def take_boundary(self, message: wire.Boundary, data: wire.Data) -> None:
        if self.is_past(message.generation) or not self._knows_or_may(message.rank):
            return
        if len(data) > wire.CHUNK_BYTES and len(data) > available_bytes() // MEMORY_SHARE:
            self._warn(f"the private state of rank {message.rank} has {len(data)} bytes, which are not available here")
            return
        self._boundaries[message.rank, message.step] = (bytes(data), message.crc32c)
        kept = self._kept
        self._become(
            keeping.took_boundary(kept, message.generation, message.rank, message.step, message.shard, message.replays)
        )

    async def begin_snapshot(self, message: wire.Snapshot) -> Copy | None:
        """Memory for a snapshot that comes; None where it is of no use any more. Raises `OutOfMemory`."""
        if self.is_past(message.generation) or not self._knows_or_may(message.rank):
            return None
        self._become(keeping.makes_room(self._kept, message.rank, message.attempt, message.held))
        copy = self._spare.pop(message.rank, None)
        if copy is None:
            fd = _native.memory_file(f"ftrain-peer-{message.rank}")
            copy = Copy(message.rank, message.attempt, fd, Arriving(Arena(fd), 0, 0, 0))
        arena = copy.content.arena
        try:
            lacking = message.image_bytes + message.index_bytes - arena.nbytes
            available = available_bytes()
            if lacking > available // MEMORY_SHARE or message.index_bytes > INDEX_BYTES_MAX:
                raise OutOfMemory(
                    f"a copy of rank {message.rank}'s snapshot needs {lacking} bytes of memory more, "
                    f"and {available} are available"
                )
            if arena.slots:
                arena.clear_index(0)
            # Taking and touching memory takes its time.
            taking = asyncio.ensure_future(
                asyncio.to_thread(arena.reserve, 1, message.image_bytes, message.index_bytes, 0)
            )
            try:
                await asyncio.shield(taking)
            finally:
                await asyncio.wait({taking})  # the file is not to be closed under it
        except BaseException as error:
            copy.close()
            if isinstance(error, OutOfMemory):
                self._warn(str(error))
            raise
        copy.attempt, copy.checksums = message.attempt, []
        copy.content = Arriving(arena, 0, message.image_bytes, message.index_bytes)
        return copy

    def take_snapshot(self, copy: Copy, generation: int) -> None:
        """It has come whole."""
        if self.is_past(generation):
            self.give_up(copy)
            return
        former = self._snapshots.pop((copy.rank, copy.attempt), None)
        self._snapshots[copy.rank, copy.attempt] = copy
        if former is not None:
            self._let_go(former)
        else:
            self._become(keeping.took_snapshot(self._kept, copy.rank, copy.attempt))

    def give_up(self, copy: Copy) -> None:
        """The rest of it does not come."""
        self._let_go(copy)

    def boundaries(self, rank: int) -> list[tuple[wire.Boundary, bytes]]:
        """What there is of the rank, the oldest first, as it came."""
        copies = self._kept.ranks.get(rank, keeping.Copies())
        found: list[tuple[wire.Boundary, bytes]] = []
        for step, generation in copies.boundaries:
            data, checksum = self._boundaries[rank, step]
            if _native.crc32c(data) == checksum:
                found.append((wire.Boundary(generation, rank, step, copies.shard, copies.replays, checksum), data))
            else:
                log.error("the copy of rank %d's private state at step %d is damaged: it is let go", rank, step)
                self._become(keeping.lost(self._kept, rank, step))
        return found

    @contextmanager
    def snapshot(self, rank: int, attempt: m.Attempt) -> Iterator[Copy]:
        """That snapshot, for as long as it is read. One that turns out damaged is let go. Raises `CorruptCheckpoint`"""
        copy = self._snapshots.get((rank, attempt))
        if copy is None:
            raise CorruptCheckpoint(f"no copy of rank {rank}'s snapshot of {attempt} is here")
        copy.readers += 1
        try:
            yield copy
        except CorruptCheckpoint as error:
            log.error("%s: it is let go", error)
            self._become(keeping.lost(self._kept, rank, attempt=attempt))
            raise
        finally:
            copy.readers -= 1
            if not copy.readers and self._snapshots.get((rank, attempt)) is not copy:
                copy.close()

    def close(self) -> None:
        for copy in (*self._snapshots.values(), *self._spare.values()):
            copy.close()
        self._snapshots, self._spare, self._boundaries = {}, {}, {}

    def _knows_or_may(self, rank: int) -> bool:
        return rank in self._kept.ranks or len(self._kept.ranks) < m.RANKS_PER_NODE_MAX

    def _become(self, kept: Kept) -> None:
        """Let go of the bytes that are not kept any more, and tell."""
        self._kept = kept
        steps = {(rank, step) for rank, copies in kept.ranks.items() for step in copies.steps}
        self._boundaries = {key: found for key, found in self._boundaries.items() if key in steps}
        attempts = {(rank, attempt) for rank, copies in kept.ranks.items() for attempt in copies.snapshots}
        for key in [key for key in self._snapshots if key not in attempts]:
            self._let_go(self._snapshots.pop(key))
        self._changed(keeping.report(kept))

    def _let_go(self, copy: Copy) -> None:
        if copy.readers:
            return  # whoever reads it last closes it
        if copy.rank in self._spare or copy.rank not in self._kept.ranks:
            copy.close()
        else:
            self._spare[copy.rank] = copy

    def _warn(self, problem: str) -> None:
        if not self._warned:
            log.warning("peer copies: %s; should that node be lost, storage has to serve", problem)
        self._warned = True
