"""The keeper: takes copies from the agent before it in the ring, and gives them to the successor of a lost one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from ftrain.agent import peer_wire as wire
from ftrain.agent.copies import Copies, Copy
from ftrain.agent.peer_wire import Wire
from ftrain.control.door import Door, address_text
from ftrain.control.refusals import Refusals
from ftrain.control.secret import Secret
from ftrain.core import messages as m
from ftrain.errors import CorruptCheckpoint, OutOfMemory, ProtocolError

log = logging.getLogger("ftrain.peers")
CONNECTIONS_MAX = 64


class Keeper:
    """Serves `copies` to holders of the run's secret until `close`. Lives in one event loop."""

    def __init__(self, run_id: str, secret: Secret, copies: Copies) -> None:
        self._run_id = run_id
        self._copies = copies
        self._refusals = Refusals()
        self._door = Door(secret.server_context(), self._protocol, self._refusals)
        self._visits: set[asyncio.Task[None]] = set()

    def open(self, hosts: Sequence[str]) -> int:
        """Listen on a free port of each of `hosts`, and return it. Raises `Unavailable`."""
        return self._door.open(hosts, 0)

    async def close(self) -> None:
        await self._door.close()
        for task in self._visits:
            task.cancel()
        await asyncio.gather(*self._visits, return_exceptions=True)
        self._refusals.close()

    def _protocol(self) -> Wire:
        def connected(peer: Wire, transport: asyncio.Transport) -> None:
            peer.where = f"the agent at {address_text(transport.get_extra_info('peername'))}"
            task = asyncio.get_running_loop().create_task(self._serve(peer))
            self._visits.add(task)
            task.add_done_callback(self._visits.discard)

        return Wire(connected)

    async def _serve(self, peer: Wire) -> None:
        opening = self._door.opening(peer)
        visit = _Visit(self._copies, peer)
        try:
            if (first := await peer.receive()) is None:
                return
            if not isinstance(first[0], wire.Greet) or first[0].run_id != self._run_id:
                raise ProtocolError(f"{peer.where} is not of run {self._run_id!r}")
            if len(self._visits) > CONNECTIONS_MAX:
                raise ProtocolError(f"{peer.where} is one too many: {CONNECTIONS_MAX} are here")
            if opening is not None:
                opening.over()
            while (received := await peer.receive(visit.place)) is not None:
                await visit.heard(*received)
        except ProtocolError as error:
            self._refusals.add(f"refused peer copies: {error}")
        except OSError as error:
            log.debug("%s hung up: %s", peer.where, error)
        except Exception:  # a connection's edge: a bug here must end it, not what else this agent does
            log.exception("serving %s failed", peer.where)
        finally:
            visit.over()
            if opening is not None:
                opening.over()
            peer.abort()


class _Visit:
    """One connection after its greeting."""

    def __init__(self, copies: Copies, peer: Wire) -> None:
        self._copies = copies
        self._peer = peer
        self._coming: Copy | None = None
        self._generation = 0  # in which that is sent
        self._unwanted = False  # chunks that come are of a snapshot that is not taken

    def place(self, message: wire.Message, nbytes: int) -> memoryview | None:
        """Where the bytes of a message belong."""
        if self._coming is None or not isinstance(message, wire.Chunk):
            return None
        return self._coming.content.place(message.offset, nbytes)

    async def heard(self, message: wire.Message, data: wire.Data) -> None:
        """Answer one message. Raises `ProtocolError` for one that has no place here."""
        match message:
            case wire.Boundary():
                self._copies.take_boundary(message, data)
            case wire.Snapshot():
                await self._begin(message)
            case wire.Chunk(offset=offset, crc32c=checksum):
                self._chunk(offset, data, checksum)
            case wire.WantBoundaries(rank):
                for found, private in self._copies.boundaries(rank):
                    await self._peer.send(found, private)
                await self._peer.send(wire.Done())
            case wire.WantSnapshot(rank, attempt):
                await self._give(rank, attempt)
            case _:
                raise ProtocolError(f"{self._peer.where} sent {type(message).__name__}, which is a keeper's to say")

    def over(self) -> None:
        if self._coming is not None:
            self._copies.give_up(self._coming)
            self._coming = None

    async def _begin(self, message: wire.Snapshot) -> None:
        self.over()
        self._generation = message.generation
        self._unwanted = True
        try:
            self._coming = await self._copies.begin_snapshot(message)
            self._unwanted = self._coming is None
        except OutOfMemory as error:
            await self._peer.send(wire.NoRoom(str(error)))

    def _chunk(self, offset: int, data: wire.Data, checksum: int) -> None:
        if self._unwanted:
            return
        copy = self._coming
        if copy is None or not copy.content.follows(offset, len(data)):
            raise ProtocolError(f"{self._peer.where} sent a chunk that does not follow")
        copy.take(data, checksum)
        if copy.content.is_whole:
            self._coming = None
            self._copies.take_snapshot(copy, self._generation)

    async def _give(self, rank: int, attempt: m.Attempt) -> None:
        try:
            with self._copies.snapshot(rank, attempt) as copy:
                content = copy.content
                announced = wire.Snapshot(attempt.generation, rank, attempt, content.image_bytes, content.index_bytes)
                await self._peer.send(announced)
                for number, checksum in enumerate(copy.checksums):
                    await self._peer.send(wire.Chunk(number * wire.CHUNK_BYTES, checksum), copy.chunk(number))
        except CorruptCheckpoint as error:
            await self._peer.send(wire.Gone(str(error)))
        else:
            await self._peer.send(wire.Done())
