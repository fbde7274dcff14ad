"""Sends copies of what this node's ranks go on from to its keeper, in the background and at a bounded rate."""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ftrain import _native
from ftrain.agent import peer_wire as wire
from ftrain.agent.interface import interface_of, is_loopback, link_bytes_per_second
from ftrain.agent.peer_wire import Wire
from ftrain.agent.workers import RankMemory
from ftrain.control.client import endpoint_text
from ftrain.core import keeping
from ftrain.core import messages as m
from ftrain.errors import FtrainError

log = logging.getLogger("ftrain.peers")
LOOK_SECONDS = 0.025
LINK_SHARE = 4  # one part in so many of the link is for copies, the rest for what ranks send each other
BYTES_PER_SECOND = 256 << 20  # where it is not known how fast the link is
BYTES_PER_SECOND_HERE = 1 << 30  # to a keeper on the same host: no link is shared
BACKOFF_SECONDS = (0.1, 2.0)
PATIENCE_SECONDS = 15.0  # with a keeper that cannot be reached


def rate(own_address: str) -> int:
    """Bytes a second that may go out from this address of ours."""
    if is_loopback(own_address):
        return BYTES_PER_SECOND_HERE
    return link_bytes_per_second(interface_of(own_address)) // LINK_SHARE or BYTES_PER_SECOND


@dataclass(frozen=True, slots=True)
class Rank:
    """A rank of this node, as the sender sees it."""

    rank: int
    step: int  # that its control page says it has finished
    looping: bool  # it has come into its loop in the present generation, so what its box holds is of that
    shard: str
    replays: bool
    memory: RankMemory


@dataclass(slots=True)
class _Sent:
    """What went over one connection."""

    looped: set[int] = field(default_factory=set)
    steps: dict[int, int] = field(default_factory=dict)  # rank -> the newest
    snapshot: m.Attempt | None = None
    looked_at: float = 0.0


class Sender:
    """One for each agent; `ranks` and `held` (slot -> snapshot) say what there is. Lives in one event loop.

    `tell_cost` gets of each snapshot that was sent what that took of a processor that others wanted, in seconds.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        greeting: wire.Greet,
        ranks: Callable[[], list[Rank]],
        held: Callable[[], Mapping[int, m.Attempt]],
        tell_cost: Callable[[float], None],
    ) -> None:
        self._context = context
        self._greeting = greeting
        self._ranks = ranks
        self._held = held
        self._tell_cost = tell_cost
        self._tasks: set[asyncio.Task[None]] = set()
        self._generation = 0
        self._no_room = False  # the keeper has none for snapshots
        self._warned: set[str] = set()
        self._free_at = 0.0  # when the next bytes may go
        self._bytes_per_second = BYTES_PER_SECOND

    def begin(self, generation: int, keeper: m.Peer | None) -> None:
        """From now on this is who keeps our copies: it is sent all there is anew."""
        for task in self._tasks:
            task.cancel()
        self._generation, self._no_room = generation, False
        self._warned.clear()
        if keeper is not None:
            task = asyncio.get_running_loop().create_task(self._run(keeper))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, keeper: m.Peer) -> None:
        clock = asyncio.get_running_loop().time
        pause, there_at = BACKOFF_SECONDS[0], clock()
        while True:
            try:
                async with wire.connect(self._context, keeper, self._greeting) as peer:
                    pause = BACKOFF_SECONDS[0]
                    self._bytes_per_second = rate(peer.own_address)
                    try:
                        await self._converse(peer)
                    finally:
                        there_at = clock()
            except (OSError, FtrainError) as error:
                if clock() - there_at > PATIENCE_SECONDS:  # a node that was lost, or has left, is soon known to be
                    where = endpoint_text(keeper.address, keeper.port)
                    self._warn(f"none can be sent to {where}, trying again: {str(error) or 'no answer'}")
            except Exception:  # a task's edge: training goes on without copies
                log.exception("peer copies are not sent any more")
                return
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, BACKOFF_SECONDS[1])

    async def _converse(self, peer: Wire) -> None:
        """Send and listen until the connection ends, which is always an error."""
        both = {asyncio.ensure_future(one) for one in (self._send(peer), self._listen(peer))}
        try:
            done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
        for task in done:
            task.result()

    async def _listen(self, peer: Wire) -> None:
        while (received := await peer.receive()) is not None:
            if isinstance(received[0], wire.NoRoom) and not self._no_room:
                self._no_room = True
                self._warn(f"{peer.where} takes no copies of snapshots: {received[0].why}")
        raise ConnectionResetError(f"{peer.where} hung up")

    async def _send(self, peer: Wire) -> None:
        sent = _Sent()
        while True:
            await self._send_boundaries(peer, sent)
            due = keeping.snapshot_due(sent.snapshot, self._held())
            if due is not None and not self._no_room:
                sent.snapshot = due[1]
                taken = _native.Taken()  # of this whole loop, which meanwhile receives copies as well
                if await self._send_snapshot(peer, sent, *due):
                    self._tell_cost(taken.seconds())
            await asyncio.sleep(LOOK_SECONDS)

    async def _send_boundaries(self, peer: Wire, sent: _Sent) -> None:
        sent.looked_at = asyncio.get_running_loop().time()
        for one in self._ranks():
            if one.looping:
                sent.looped.add(one.rank)
            newest = sent.steps.get(one.rank, -1)
            if one.rank not in sent.looped or one.step <= newest:
                continue
            steps = one.memory.box.steps()
            sent.steps[one.rank] = max(one.step, *steps, newest)
            for step in keeping.boundaries_due(newest, steps):
                data = one.memory.box.read(step)
                if data is None:
                    continue  # written over since
                if len(data) > wire.BOUNDARY_BYTES_MAX:
                    self._warn(f"the private state of rank {one.rank} has {len(data)} bytes, too many to copy")
                    continue
                checksum = _native.crc32c(data)
                message = wire.Boundary(self._generation, one.rank, step, one.shard, one.replays, checksum)
                await self._paced(peer, message, data)

    async def _send_snapshot(self, peer: Wire, sent: _Sent, slot: int, attempt: m.Attempt) -> bool:
        """Whether all of it was sent."""
        for one in self._ranks():
            arena = one.memory.arena
            arena.attach()
            index = arena.read_index(slot)
            image = arena.view(slot, 0, arena.image_bytes(slot))
            held = tuple(self._held().values())
            await peer.send(wire.Snapshot(self._generation, one.rank, attempt, len(image), len(index), held))
            for offset in range(0, len(image) + len(index), wire.CHUNK_BYTES):
                # Looked at and taken without a wait in between: nobody arms the slot meanwhile.
                if self._held().get(slot) != attempt:
                    return False  # it is wanted again
                data = wire.chunk_of(image, index, offset)
                await self._paced(peer, wire.Chunk(offset, _native.crc32c(data)), data)
                if asyncio.get_running_loop().time() - sent.looked_at >= LOOK_SECONDS:
                    await self._send_boundaries(peer, sent)
                    if self._no_room:
                        return False
        return True

    async def _paced(self, peer: Wire, message: wire.Message, data: wire.Data) -> None:
        now = asyncio.get_running_loop().time()
        await peer.send(message, data)
        self._free_at = max(self._free_at, now) + len(data) / self._bytes_per_second
        if self._free_at - now > 0.001:  # what a loop can sleep
            await asyncio.sleep(self._free_at - now)

    def _warn(self, problem: str) -> None:
        if problem not in self._warned:
            log.warning("peer copies: %s", problem)
        self._warned.add(problem)
