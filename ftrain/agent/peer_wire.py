"""What agents say to each other about peer copies: frames over TLS, each a small JSON object and the bytes it is of.

A frame is two 32-bit lengths, the object and the bytes. One that is too large, is no known message, or whose bytes do
not match their checksum is a `ProtocolError`, and the end of its connection. docs/protocol.md has the conversation.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
from collections.abc import AsyncIterator
from typing import Annotated

import msgspec

from ftrain import _native
from ftrain.control.client import endpoint_text
from ftrain.control.refusals import printable
from ftrain.control.silence import bound_silence
from ftrain.core.messages import RANKS_PER_NODE_MAX, Attempt, Count, Name, Peer, Text
from ftrain.errors import ProtocolError

HEADER_BYTES_MAX = 64 << 10
CHUNK_BYTES = 256 << 10
BOUNDARY_BYTES_MAX = 16 << 20  # private state that is larger is not copied
BUFFER_BYTES = 1 << 20  # of one connection, before the other side has to wait
CONNECT_SECONDS = 5.0
_LENGTHS = struct.Struct("<II")

Crc32c = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]


class Greet(msgspec.Struct, frozen=True, tag="greet", tag_field="kind", forbid_unknown_fields=True):
    run_id: Name
    node: Name


class Boundary(msgspec.Struct, frozen=True, tag="boundary", tag_field="kind", forbid_unknown_fields=True):
    """A rank's private state at the end of a step: these bytes."""

    generation: Count
    rank: Count
    step: Count
    shard: Name
    replays: bool
    crc32c: Crc32c


class Snapshot(msgspec.Struct, frozen=True, tag="snapshot", tag_field="kind", forbid_unknown_fields=True):
    """A rank's snapshot follows in chunks: its image, then its index. `held` is all that its node holds."""

    generation: Count
    rank: Count
    attempt: Attempt
    image_bytes: Count
    index_bytes: Annotated[int, msgspec.Meta(ge=1)]
    held: Annotated[tuple[Attempt, ...], msgspec.Meta(max_length=RANKS_PER_NODE_MAX)] = ()


class Chunk(msgspec.Struct, frozen=True, tag="chunk", tag_field="kind", forbid_unknown_fields=True):
    """The next bytes of the snapshot that was announced last."""

    offset: Count
    crc32c: Crc32c


class NoRoom(msgspec.Struct, frozen=True, tag="no_room", tag_field="kind", forbid_unknown_fields=True):
    """The keeper has no memory for snapshots: it needs to be sent no more of them."""

    why: Text


class WantBoundaries(msgspec.Struct, frozen=True, tag="want_boundaries", tag_field="kind", forbid_unknown_fields=True):
    """Answered by what there is of the rank, the oldest first, and `Done`."""

    rank: Count


class WantSnapshot(msgspec.Struct, frozen=True, tag="want_snapshot", tag_field="kind", forbid_unknown_fields=True):
    """Answered by that snapshot and `Done`, or by `Gone`."""

    rank: Count
    attempt: Attempt


class Done(msgspec.Struct, frozen=True, tag="done", tag_field="kind", forbid_unknown_fields=True):
    pass


class Gone(msgspec.Struct, frozen=True, tag="gone", tag_field="kind", forbid_unknown_fields=True):
    why: Text


Message = Greet | Boundary | Snapshot | Chunk | NoRoom | WantBoundaries | WantSnapshot | Done | Gone
_DECODER: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


@contextlib.asynccontextmanager
async def connect(context: ssl.SSLContext, peer: Peer, greeting: Greet) -> AsyncIterator[Wire]:
    """A connection to a keeper, on which we have greeted. Raises `OSError`, `TimeoutError` where there is none."""
    async with asyncio.timeout(CONNECT_SECONDS):
        reader, writer = await asyncio.open_connection(peer.address, peer.port, ssl=context, limit=BUFFER_BYTES)
    bound_silence(writer.get_extra_info("socket"))
    wire = Wire(reader, writer, f"the agent at {endpoint_text(peer.address, peer.port)}")
    try:
        await wire.send(greeting)
        yield wire
    finally:
        wire.abort()


def chunk_of(image: memoryview, index: bytes | bytearray, offset: int) -> bytes:
    """The chunk at `offset` of the image followed by the index."""
    beyond = offset - len(image)
    return bytes(image[offset : offset + CHUNK_BYTES]) + bytes(index[max(0, beyond) : max(0, beyond + CHUNK_BYTES)])


class Wire:
    """One connection, for one reader and one writer. `where` is the other side in words."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, where: str) -> None:
        self.where = where
        self._reader = reader
        self._writer = writer

    async def send(self, message: Message, data: bytes = b"") -> None:
        """Send one frame, and wait while the other side is behind. Raises `OSError`."""
        header = msgspec.json.encode(message)
        self._writer.write(_LENGTHS.pack(len(header), len(data)) + header + data)
        await self._writer.drain()

    async def receive(self) -> tuple[Message, bytes] | None:
        """The next message and its bytes; None when the connection has ended. Raises `ProtocolError`, `OSError`."""
        try:
            lengths = await self._reader.readexactly(_LENGTHS.size)
        except asyncio.IncompleteReadError:
            return None
        header_bytes, data_bytes = _LENGTHS.unpack(lengths)
        if header_bytes > HEADER_BYTES_MAX or data_bytes > BOUNDARY_BYTES_MAX:
            raise ProtocolError(f"{self.where} sent a frame of {header_bytes} + {data_bytes} bytes, more than one has")
        try:
            message = _DECODER.decode(await self._reader.readexactly(header_bytes))
            data = await self._reader.readexactly(data_bytes)
        except asyncio.IncompleteReadError:
            return None
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ProtocolError(printable(f"{self.where} sent what is not a message: {error}")) from None
        if isinstance(message, Boundary | Chunk):
            if _native.crc32c(data) != message.crc32c:
                raise ProtocolError(f"{self.where} sent bytes that do not match their checksum")
        elif data:
            raise ProtocolError(f"{self.where} sent {data_bytes} bytes with a message that has none")
        return message, data

    def abort(self) -> None:
        """End the connection now."""
        self._writer.transport.abort()
