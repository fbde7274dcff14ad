"""What agents say to each other about peer copies: frames over TLS, each a small JSON object and the bytes it is of.

A frame is two 32-bit lengths, the object and the bytes. One that is too large, is no known message, or whose bytes do
not match their checksum is a `ProtocolError`, and the end of its connection. docs/protocol.md has the conversation.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
from collections.abc import AsyncIterator, Callable
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
CONNECT_SECONDS = 5.0
_LENGTHS = struct.Struct("<II")

Data = bytes | bytearray | memoryview
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


Place = Callable[[Message, int], memoryview | None]  # where so many bytes of a message belong; None: anywhere


def anywhere(_message: Message, _nbytes: int) -> None:
    """The `Place` of bytes that belong nowhere yet."""


@contextlib.asynccontextmanager
async def connect(context: ssl.SSLContext, peer: Peer, greeting: Greet) -> AsyncIterator[Wire]:
    """A connection to a keeper, on which we have greeted. Raises `OSError`, `TimeoutError` where there is none."""
    wire = Wire()
    async with asyncio.timeout(CONNECT_SECONDS):
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(lambda: wire, peer.address, peer.port, ssl=context)
    bound_silence(transport.get_extra_info("socket"))
    wire.where = f"the agent at {endpoint_text(peer.address, peer.port)}"
    try:
        await wire.send(greeting)
        yield wire
    finally:
        wire.abort()


def chunk_of(image: memoryview, index: bytes | bytearray, offset: int) -> Data:
    """The chunk at `offset` of the image followed by the index: the image's own memory where it is of that alone."""
    part, beyond = image[offset : offset + CHUNK_BYTES], offset - len(image)
    rest = index[max(0, beyond) : max(0, beyond + CHUNK_BYTES)]
    return bytes(part) + bytes(rest) if rest else part


class Frame:
    """One frame as it comes: its next bytes belong into `room`, and `came` says how many are there."""

    def __init__(self, where: str, place: Place = anywhere) -> None:
        self.message: Message | None = None
        self.data: Data = b""
        self.is_whole = False
        self._where = where
        self._place = place
        self._data_bytes: int | None = None
        self._begin(memoryview(bytearray(_LENGTHS.size)))

    def room(self) -> memoryview:
        """Never empty before the frame is whole."""
        return self._room[self._came :]

    def came(self, nbytes: int) -> None:
        """Raises `ProtocolError` where this cannot become a frame."""
        self._came += nbytes
        if self._came < len(self._room):
            return
        if self._data_bytes is None:
            self._lengths()
        elif self.message is None:
            self._header(self._data_bytes)
        else:
            self._finish(self._room)

    def _begin(self, room: memoryview) -> None:
        self._room, self._came = room, 0

    def _lengths(self) -> None:
        header_bytes, data_bytes = _LENGTHS.unpack(self._room)
        if header_bytes > HEADER_BYTES_MAX or data_bytes > BOUNDARY_BYTES_MAX:
            raise ProtocolError(f"{self._where} sent a frame of {header_bytes} + {data_bytes} bytes, more than one has")
        self._data_bytes = data_bytes
        self._begin(memoryview(bytearray(header_bytes)))
        if not header_bytes:
            self._header(data_bytes)

    def _header(self, data_bytes: int) -> None:
        try:
            self.message = _DECODER.decode(self._room)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ProtocolError(printable(f"{self._where} sent what is not a message: {error}")) from None
        if data_bytes and not isinstance(self.message, Boundary | Chunk):
            raise ProtocolError(f"{self._where} sent {data_bytes} bytes with a message that has none")
        if not data_bytes:
            self._finish(memoryview(b""))
            return
        placed = self._place(self.message, data_bytes)
        self._begin(memoryview(bytearray(data_bytes)) if placed is None else placed)

    def _finish(self, data: memoryview) -> None:
        if isinstance(self.message, Boundary | Chunk) and _native.crc32c(data) != self.message.crc32c:
            raise ProtocolError(f"{self._where} sent bytes that do not match their checksum")
        self.data, self.is_whole = data, True


class Wire(asyncio.BufferedProtocol):
    """One connection, for one reader and one writer. `where` is the other side in words.

    Nothing is read but the frame that is waited for, and its bytes go from TLS to where they belong. `connected` is
    called once the connection is there.
    """

    def __init__(self, connected: Callable[[Wire, asyncio.Transport], None] | None = None) -> None:
        self.where = ""
        self._connected = connected
        self._frame: Frame | None = None
        self._arrives: asyncio.Future[None] | None = None  # the frame is whole, or never will be
        self._ended: Exception | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    @property
    def own_address(self) -> str:
        """This side's, as the other one sees it."""
        return str(self._transport.get_extra_info("sockname")[0])

    async def send(self, message: Message, data: Data = b"") -> None:
        """Send one frame, and wait while the other side is behind. Raises `OSError`.

        The bytes are taken before this waits for anything.
        """
        header = msgspec.json.encode(message)
        self._check_writable()
        self._transport.writelines([_LENGTHS.pack(len(header), len(data)) + header, data])
        await self._writable.wait()
        self._check_writable()

    async def receive(self, place: Place = anywhere) -> tuple[Message, Data] | None:
        """The next message and its bytes; None when the connection has ended. Raises `ProtocolError`, `OSError`.

        `place` is asked where the bytes belong when the message is there. After a receive that was cancelled nothing
        more can be received.
        """
        frame = self._frame = Frame(self.where, place)
        self._arrives = asyncio.get_running_loop().create_future()
        try:
            if self._ended is None:
                self._transport.resume_reading()
                await self._arrives
            if frame.is_whole:
                assert frame.message is not None
                return frame.message, frame.data
        finally:
            self._frame = self._arrives = None
            self._pause()
        assert self._ended is not None
        if isinstance(self._ended, EOFError):
            return None
        raise self._ended

    def abort(self) -> None:
        """End the connection now."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.pause_reading()
        if self._connected is not None:
            self._connected(self, transport)

    def get_buffer(self, _sizehint: int) -> memoryview:
        assert self._frame is not None, "reading is paused while no frame is waited for"
        return self._frame.room()

    def buffer_updated(self, nbytes: int) -> None:
        assert self._frame is not None
        try:
            self._frame.came(nbytes)
        except ProtocolError as error:
            self._end(error)
        else:
            if self._frame.is_whole:
                self._wake()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def eof_received(self) -> None:
        self._end(EOFError())

    def connection_lost(self, error: Exception | None) -> None:
        self._end(error or EOFError())
        self._writable.set()

    def _end(self, error: Exception) -> None:
        self._ended = self._ended or error
        self._wake()

    def _wake(self) -> None:
        self._pause()
        if self._arrives is not None and not self._arrives.done():
            self._arrives.set_result(None)

    def _pause(self) -> None:
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def _check_writable(self) -> None:
        error = self._ended
        if error is None:
            try:
                self._transport.get_extra_info("socket").getpeername()  # the loop tells of the end some turns later
                return
            except OSError as reset:
                error = reset
        raise ConnectionResetError(f"{self.where} hung up") from error
