"""Peer copies between the ends of real agents, over TLS: what comes, what is given back, and what is refused."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import msgspec
import pytest

from ftrain import _native
from ftrain.agent import copies, peer_wire
from ftrain.agent.peer_sender import Rank
from ftrain.agent.peers import FETCHED_SLOT, Peers
from ftrain.agent.workers import RankMemory
from ftrain.checkpoint.staging.arena import Arena
from ftrain.control.secret import Secret
from ftrain.core import messages as m
from ftrain.core.node import Keeps, Sent
from ftrain.errors import PeerLost

SECRET, OTHER_SECRET = Secret.create(), Secret.create()
SIX, NINE = m.Attempt(1, 6, 1), m.Attempt(1, 9, 2)
IMAGE = os.urandom(3 * peer_wire.CHUNK_BYTES - 4096)
INDEX = b"what is in it" * 1000
ADDRESS = "127.0.0.1"


async def until(condition: Callable[[], object]) -> None:
    """The wait is for an event; the bound only turns a hang into a failure."""
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110  # what is waited for is in other tasks' state
            await asyncio.sleep(0.005)


class Node:
    """The peers' part of an agent, with its ranks as they are said to be."""

    def __init__(self, name: str, secret: Secret = SECRET, run_id: str = "run") -> None:
        self.name = name
        self.ranks: list[Rank] = []
        self.held: Mapping[int, m.Attempt] = {}
        self.kept: dict[int, m.Kept] = {}
        self.sent: list[float] = []  # what each snapshot took of a processor
        self.peers = Peers(run_id, name, secret, lambda: self.ranks, lambda: self.held, self._post)
        self.port = self.peers.open((ADDRESS,))

    def _post(self, event: Keeps | Sent) -> None:
        if isinstance(event, Keeps):
            self.kept = {one.rank: one for one in event.kept}
        else:
            self.sent.append(event.seconds)

    @property
    def peer(self) -> m.Peer:
        return m.Peer(self.name, ADDRESS, self.port)

    def steps(self, rank: int) -> tuple[int, ...]:
        return self.kept[rank].boundaries if rank in self.kept else ()

    def attempts(self, rank: int) -> tuple[m.Attempt, ...]:
        return self.kept[rank].attempts if rank in self.kept else ()

    def at(self, step: int, *ranks: int) -> None:
        """These ranks have come to the boundary."""
        known = {one.rank: one.memory for one in self.ranks}
        self.ranks = []
        for rank in ranks:
            memory = known.get(rank) or RankMemory(rank)
            memory.box.write(step, private(rank, step))
            self.ranks.append(Rank(rank, step, True, "all", True, memory))

    def seal(self, slot: int, attempt: m.Attempt) -> None:
        """All ranks have sealed this snapshot."""
        for one in self.ranks:
            arena = one.memory.arena
            arena.reserve(2, len(IMAGE), len(INDEX), 0)
            arena.clear_index(slot)
            arena.view(slot, 0, len(IMAGE))[:] = IMAGE
            arena.write_index(slot, INDEX + str(attempt).encode())
        self.held = {**self.held, slot: attempt}


def private(rank: int, step: int) -> bytes:
    return f"rank {rank} at {step}".encode() * 100


def start(generation: int, keeper: Node | None = None, line: m.Line | None = None, *fetched: int) -> m.Start:
    base = m.Start(1, generation, 0, 2, 0, 2, "a", ADDRESS, 1, 0, 0, None, line)
    fetch = m.Fetch(keeper.peer, fetched) if keeper is not None and fetched else None
    return msgspec.structs.replace(base, keeper=keeper.peer if keeper is not None else None, fetch=fetch)


@asynccontextmanager
async def nodes(*names: str) -> AsyncIterator[list[Node]]:
    made = [Node(name) for name in names]
    try:
        yield made
    finally:
        for node in made:
            await node.peers.close()


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Node, Node]]:
    """A node with ranks 2 and 3 in their loops, and its keeper, in generation 1."""
    async with nodes("own", "keeper") as (own, keeper):
        own.at(7, 2, 3)
        own.at(8, 2, 3)
        keeper.peers.begin(start(1))
        own.peers.begin(start(1, keeper))
        yield own, keeper


@asynccontextmanager
async def conversation(keeper: Node, greeting: peer_wire.Greet | None = None) -> AsyncIterator[peer_wire.Wire]:
    """A holder of the secret that can say what it likes."""
    greet = greeting or peer_wire.Greet("run", "else")
    async with peer_wire.connect(SECRET.client_context(), keeper.peer, greet) as wire:
        yield wire


def snapshot(nbytes: int, generation: int = 1) -> peer_wire.Snapshot:
    return peer_wire.Snapshot(generation, 2, SIX, nbytes, len(INDEX))


async def send_chunks(wire: peer_wire.Wire, data: bytes) -> None:
    for offset in range(0, len(data), peer_wire.CHUNK_BYTES):
        chunk = data[offset : offset + peer_wire.CHUNK_BYTES]
        await wire.send(peer_wire.Chunk(offset, _native.crc32c(chunk)), chunk)


async def test_private_state_of_a_lost_node_comes_to_its_successor_as_it_was() -> None:
    async with pair() as (own, keeper), nodes("new") as (new,):
        await until(lambda: keeper.steps(2) == keeper.steps(3) == (7, 8))
        assert keeper.kept[3] == m.Kept(3, (7, 8), (), "all", True)
        own.at(9, 2, 3)
        await until(lambda: keeper.steps(2) == keeper.steps(3) == (8, 9))
        memory = {rank: RankMemory(rank) for rank in (2, 3)}
        await new.peers.fetch(start(2, keeper, m.Line(9, m.Tier.LIVE), 2, 3), memory, lambda: True)
        for rank in (2, 3):
            assert [memory[rank].box.read(step) for step in (8, 9)] == [private(rank, 8), private(rank, 9)]


async def test_snapshot_of_a_lost_node_comes_into_the_arena_of_its_successor() -> None:
    async with pair() as (own, keeper), nodes("new") as (new,):
        own.seal(1, SIX)
        await until(lambda: keeper.attempts(2) == keeper.attempts(3) == (SIX,))
        own.seal(0, NINE)
        await until(lambda: keeper.attempts(2) == keeper.attempts(3) == (SIX, NINE))
        memory = {rank: RankMemory(rank) for rank in (2, 3)}
        line = m.Line(9, m.Tier.ARENA, NINE)
        await new.peers.fetch(start(2, keeper, line, 2, 3), memory, lambda: True)
        for rank in (2, 3):
            arena = Arena(memory[rank].arena_fd)  # as the new rank sees it
            assert arena.read_index(FETCHED_SLOT) == INDEX + str(NINE).encode()
            assert bytes(arena.view(FETCHED_SLOT, 0, len(IMAGE))) == IMAGE
            arena.reserve(2, len(IMAGE), len(INDEX) + 1000, 0)  # its own snapshots have room beside
            assert arena.slots == 2
            assert arena.is_sealed(FETCHED_SLOT)
            assert not arena.is_sealed(1 - FETCHED_SLOT)


async def test_rank_that_is_not_in_its_loop_yet_is_not_copied_for_its_box_is_of_another_past() -> None:
    async with nodes("own", "keeper") as (own, keeper):
        own.at(8, 2, 3)
        own.ranks = [own.ranks[0], Rank(3, 8, False, "all", True, own.ranks[1].memory)]
        own.peers.begin(start(1, keeper))
        await until(lambda: keeper.steps(2) == (8,))
        own.at(9, 2)
        await until(lambda: keeper.steps(2) == (8, 9))
        assert keeper.steps(3) == ()


async def test_next_generation_is_sent_all_anew_and_what_it_gave_up_is_not_kept() -> None:
    async with pair() as (own, keeper):
        await until(lambda: keeper.steps(2) == keeper.steps(3) == (7, 8))
        line = m.Line(7, m.Tier.LIVE)
        keeper.peers.begin(start(2, None, line))
        assert keeper.steps(2) == (7,)
        own.at(7, 2, 3)  # they came to the line, and what was after it is dropped
        own.peers.begin(start(2, keeper, line))
        own.at(8, 2, 3)
        await until(lambda: keeper.steps(2) == keeper.steps(3) == (7, 8))
        keeper.peers.begin(start(3))
        assert keeper.kept == {}


async def test_slot_that_is_wanted_again_ends_its_copy_and_the_next_one_is_taken() -> None:
    async with pair() as (own, keeper):
        asked = 0

        class Wanted(dict[int, m.Attempt]):
            def get(self, key: int, default: object = None) -> m.Attempt | None:  # type: ignore[override]
                del key, default
                nonlocal asked
                asked += 1
                return SIX if asked < 3 else None

        own.seal(0, SIX)
        own.held = Wanted(own.held)
        await until(lambda: asked == 3)
        own.held = {}
        own.seal(1, NINE)
        await until(lambda: keeper.attempts(2) == keeper.attempts(3) == (NINE,))
        assert asked == 3
        await until(lambda: own.sent)
        assert len(own.sent) == 1, "what half a copy takes says nothing of a whole one"


async def test_snapshot_whose_connection_was_cut_is_not_kept_and_can_come_again() -> None:
    async with nodes("keeper") as (keeper,):
        async with conversation(keeper) as wire:
            await wire.send(snapshot(len(IMAGE)))
            await send_chunks(wire, IMAGE)  # but not its index
        async with conversation(keeper) as wire:
            await wire.send(peer_wire.WantSnapshot(2, SIX))
            answer = await wire.receive()
            assert answer is not None
            assert isinstance(answer[0], peer_wire.Gone)
            assert keeper.attempts(2) == ()
            await wire.send(snapshot(len(IMAGE)))
            await send_chunks(wire, IMAGE + INDEX)
            await until(lambda: keeper.attempts(2) == (SIX,))


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (lambda: (peer_wire.Boundary(1, 2, 8, "all", True, 1), b"damaged"), "do not match their checksum"),
        (lambda: (peer_wire.Chunk(0, _native.crc32c(b"x")), b"x"), "a chunk that does not follow"),
        (lambda: (peer_wire.WantBoundaries(2), b"more"), "with a message that has none"),
        (lambda: (peer_wire.Done(), b""), "which is a keeper's to say"),
    ],
)
async def test_what_has_no_place_ends_its_connection_with_one_line(
    frame: Callable[[], tuple[peer_wire.Message, bytes]], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with pair() as (own, keeper):
        await until(lambda: keeper.steps(2) == keeper.steps(3) == (7, 8))
        async with conversation(keeper) as wire:
            await wire.send(*frame())
            assert await wire.receive() is None
        (record,) = [one for one in caplog.records if "refused" in one.message]
        assert said in record.message
        own.at(9, 2, 3)  # others are not touched by it
        await until(lambda: keeper.steps(2) == keeper.steps(3) == (8, 9))


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"\xff\xff\xff\xff\x00\x00\x00\x00", "more than one has"),
        (b"\x02\x00\x00\x00\xff\xff\xff\xff{}", "more than one has"),
        (b"\x09\x00\x00\x00\x00\x00\x00\x00{'kind':}", "what is not a message"),
    ],
)
async def test_frame_that_is_none_is_refused_before_it_is_read(
    sent: bytes, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes("keeper") as (keeper,):
        reader, writer = await asyncio.open_connection(ADDRESS, keeper.port, ssl=SECRET.client_context())
        writer.write(sent)
        assert await reader.read() == b""
        writer.close()
        assert [one.message for one in caplog.records if said in one.message]


async def test_agent_of_another_run_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    async with nodes("keeper") as (keeper,), conversation(keeper, peer_wire.Greet("other", "x")) as wire:
        assert await wire.receive() is None
        assert "is not of run 'run'" in caplog.text


async def test_stranger_is_refused_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    async with nodes("keeper") as (keeper,):
        caplog.set_level(logging.WARNING)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            async with peer_wire.connect(OTHER_SECRET.client_context(), keeper.peer, peer_wire.Greet("run", "x")) as w:
                await w.receive()
        await until(lambda: "refused" in caplog.text)
        assert len(caplog.records) == 1
        assert keeper.kept == {}


async def test_copy_that_was_damaged_where_it_is_kept_is_not_given_and_not_reported_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with pair() as (own, keeper), nodes("new") as (new,):
        own.seal(0, SIX)
        await until(lambda: keeper.attempts(2) == keeper.attempts(3) == (SIX,))
        await until(lambda: keeper.steps(2) == keeper.steps(3) == (7, 8))
        kept = keeper.peers._copies
        kept._snapshots[3, SIX].content.arena.view(0, 5000, 1)[0] ^= 1
        data, checksum = kept._boundaries[3, 8]
        monkeypatch.setitem(kept._boundaries, (3, 8), (b"x" + data[1:], checksum))
        memory = {rank: RankMemory(rank) for rank in (2, 3)}
        for line, why in ((m.Line(6, m.Tier.ARENA, SIX), "damaged"), (m.Line(8, m.Tier.LIVE), "at step 8 any more")):
            with pytest.raises(PeerLost, match=why):
                await new.peers.fetch(start(2, keeper, line, 2, 3), memory, lambda: True)
        assert not Arena(memory[3].arena_fd).is_sealed(FETCHED_SLOT)
        assert keeper.attempts(3) == ()
        assert keeper.steps(3) == (7,)
        assert keeper.attempts(2) == (SIX,)


async def test_keeper_without_memory_says_so_once_and_takes_no_more_snapshots(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(copies, "available_bytes", lambda: len(IMAGE))
    async with pair() as (own, keeper):
        own.seal(0, SIX)
        await until(lambda: "takes no copies of snapshots" in caplog.text)
        own.seal(1, NINE)
        own.at(9, 2, 3)
        await until(lambda: keeper.steps(2) == keeper.steps(3) == (8, 9))
        assert keeper.attempts(2) == keeper.attempts(3) == ()
        assert caplog.text.count("storage has to serve") == 1
        assert caplog.text.count("takes no copies of snapshots") == 1


async def test_who_sends_notices_a_reset_at_once_and_writes_nothing_after_it(caplog: pytest.LogCaptureFixture) -> None:
    """Though the loop has had no turn yet to tell of the connection's end."""
    accepted: list[asyncio.Transport] = []

    def protocol() -> peer_wire.Wire:
        return peer_wire.Wire(lambda _wire, transport: accepted.append(transport))

    server = await asyncio.get_running_loop().create_server(protocol, ADDRESS, 0, ssl=SECRET.server_context())
    peer = m.Peer("keeper", ADDRESS, server.sockets[0].getsockname()[1])
    async with server, peer_wire.connect(SECRET.client_context(), peer, peer_wire.Greet("run", "own")) as wire:
        await until(lambda: accepted)
        reset(accepted[0].get_extra_info("socket"))
        with pytest.raises(ConnectionResetError):
            await send_chunks(wire, IMAGE[: peer_wire.CHUNK_BYTES] * 10)
        accepted[0].abort()
    assert not [record for record in caplog.records if record.name == "asyncio"]


def reset(connection: socket.socket) -> None:
    """Have the kernel end it, as when its process is killed."""
    nowhere = struct.pack("=H14x", socket.AF_UNSPEC)
    assert ctypes.CDLL(None).connect(connection.fileno(), nowhere, len(nowhere)) == 0


async def test_keeper_that_is_gone_cannot_be_fetched_from() -> None:
    async with nodes("new", "keeper") as (new, keeper):
        await keeper.peers.close()
        with pytest.raises(PeerLost, match="cannot be had of the agent at 127"):
            await new.peers.fetch(start(2, keeper, m.Line(8, m.Tier.LIVE), 2), {2: RankMemory(2)}, lambda: True)


async def test_fetching_ends_with_the_generation_that_it_was_for() -> None:
    async with pair() as (own, keeper), nodes("new") as (new,):
        own.seal(0, SIX)
        await until(lambda: keeper.attempts(2) == (SIX,))
        line = m.Line(6, m.Tier.ARENA, SIX)
        with pytest.raises(PeerLost, match="is over"):
            await new.peers.fetch(start(2, keeper, line, 2), {2: RankMemory(2)}, lambda: False)
