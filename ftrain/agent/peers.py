"""Peer copies, as one agent takes part in them: keeper of another's, sender of its own, and fetcher of a lost one's.

All of it happens beside training, in the background. A rank does not know of it: its agent looks at the black box and
the arena that it owns itself. A snapshot whose slot is wanted again is given up half sent: a commit never waits for a
copy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from ftrain.agent import peer_wire as wire
from ftrain.agent.arriving import Arriving
from ftrain.agent.copies import Copies
from ftrain.agent.keeper import Keeper
from ftrain.agent.peer_sender import Rank, Sender
from ftrain.agent.peer_wire import Wire
from ftrain.agent.workers import RankMemory
from ftrain.checkpoint.staging.arena import with_slack
from ftrain.checkpoint.staging.black_box import BlackBox
from ftrain.control.secret import Secret
from ftrain.core import messages as m
from ftrain.core.manifest import INDEX_BYTES_MAX
from ftrain.core.node import Keeps, Sent
from ftrain.errors import OutOfMemory, PeerLost, ProtocolError

SILENCE_SECONDS = 10.0  # of a keeper that was asked for something
FETCHED_SLOT = 0  # where a fetched snapshot lies


class Peers:
    """One for each agent of a run of several nodes. Lives in one event loop.

    `ranks` and `held` are asked for what there is to be copied, `post` takes what the node is to know of it.
    """

    def __init__(
        self,
        run_id: str,
        node: str,
        secret: Secret,
        ranks: Callable[[], list[Rank]],
        held: Callable[[], Mapping[int, m.Attempt]],
        post: Callable[[Keeps | Sent], None],
    ) -> None:
        self._greeting = wire.Greet(run_id, node)
        self._context = secret.client_context()
        self._copies = Copies(lambda kept: post(Keeps(kept)))
        self._keeper = Keeper(run_id, secret, self._copies)
        self._sender = Sender(self._context, self._greeting, ranks, held, lambda seconds: post(Sent(seconds)))
        self._generation = 0

    def open(self, hosts: Sequence[str]) -> int:
        """Take copies at a free port of each of `hosts`: returns it. Raises `Unavailable`."""
        return self._keeper.open(hosts)

    def begin(self, start: m.Start) -> None:
        """This node takes part in a generation. To be called before anything of it happens; again without effect."""
        if start.generation > self._generation:
            self._generation = start.generation
            self._copies.began(start.generation, start.line)
            self._sender.begin(start.generation, start.keeper)

    async def fetch(self, start: m.Start, memory: Mapping[int, RankMemory], wanted: Callable[[], bool]) -> None:
        """Bring what the ranks of `start.fetch` go on from into their memory, which is by rank.

        A snapshot comes into FETCHED_SLOT, of an arena that is new. Raises `PeerLost` where it cannot be had, and
        once `wanted` says False.
        """
        assert start.fetch is not None and start.line is not None
        peer = start.fetch.peer
        try:
            async with wire.connect(self._context, peer, self._greeting) as keeper:
                for rank in start.fetch.ranks:
                    if start.line.attempt is not None:
                        await _fetch_snapshot(keeper, rank, start.line.attempt, memory[rank], wanted)
                    else:
                        await _fetch_boundaries(keeper, rank, start.line, memory[rank])
        except (OSError, OutOfMemory, ProtocolError) as error:
            what = str(error) or "it did not answer in time"
            raise PeerLost(f"what it goes on from cannot be had of the agent at {peer.address}: {what}") from error

    async def close(self) -> None:
        await self._sender.close()
        await self._keeper.close()
        self._copies.close()


async def _fetch_boundaries(keeper: Wire, rank: int, line: m.Line, memory: RankMemory) -> None:
    await keeper.send(wire.WantBoundaries(rank))
    box = BlackBox(memory.box_fd)  # the agent's own view of it remembers what it was
    while not isinstance((answer := await _answer(keeper))[0], wire.Done):
        message, data = answer
        if not isinstance(message, wire.Boundary) or message.rank != rank:
            raise ProtocolError(f"{keeper.where} answered with {type(message).__name__}")
        box.write(message.step, bytes(data))
    needed = line.step - 1 if rank in line.replay else line.step
    if box.read(needed) is None:
        raise PeerLost(f"{keeper.where} has no private state of rank {rank} at step {needed} any more")


async def _fetch_snapshot(
    keeper: Wire, rank: int, attempt: m.Attempt, memory: RankMemory, wanted: Callable[[], bool]
) -> None:
    await keeper.send(wire.WantSnapshot(rank, attempt))
    announced, _ = await _answer(keeper)
    if not isinstance(announced, wire.Snapshot) or (announced.rank, announced.attempt) != (rank, attempt):
        raise ProtocolError(f"{keeper.where} announced {type(announced).__name__} instead of that snapshot")
    if announced.index_bytes > INDEX_BYTES_MAX:
        raise ProtocolError(f"{keeper.where} announced an index of {announced.index_bytes} bytes")
    arena = memory.arena
    # Taking and touching memory takes its time, and the rank waits: it reserves other slots itself, while it trains.
    await asyncio.to_thread(
        arena.reserve, FETCHED_SLOT + 1, announced.image_bytes, with_slack(announced.index_bytes), 0
    )
    coming = Arriving(arena, FETCHED_SLOT, announced.image_bytes, announced.index_bytes)

    def place(message: wire.Message, nbytes: int) -> memoryview | None:
        return coming.place(message.offset, nbytes) if isinstance(message, wire.Chunk) else None

    while not isinstance((answer := await _answer(keeper, place))[0], wire.Done):
        message, data = answer
        if not isinstance(message, wire.Chunk) or not coming.follows(message.offset, len(data)):
            raise ProtocolError(f"{keeper.where} sent a chunk that does not follow")
        if not wanted():
            raise PeerLost("the generation that it was for is over")
        coming.take(data)
    if not coming.is_whole:
        raise ProtocolError(f"{keeper.where} sent {coming.arrived_bytes} bytes of a larger snapshot")
    arena.write_index(FETCHED_SLOT, bytes(coming.index))


async def _answer(keeper: Wire, place: wire.Place = wire.anywhere) -> tuple[wire.Message, wire.Data]:
    async with asyncio.timeout(SILENCE_SECONDS):
        received = await keeper.receive(place)
    if received is None:
        raise ConnectionResetError(f"{keeper.where} hung up")
    if isinstance(received[0], wire.Gone):
        raise PeerLost(received[0].why)
    return received
