"""Typed messages over one WebSocket: the only way in which agents and the coordinator talk.

A message is one text frame with one JSON object. Everything else is refused: other frames, more than
`MESSAGE_BYTES_MAX` bytes, more nesting than any message has, unknown kinds and fields, wrong types. A refusal is a
ProtocolError of one line; it ends the connection and changes nothing else. docs/protocol.md has the messages.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TypeVar

import msgspec
from aiohttp import ClientError, WSMessage, WSMsgType

from ftrain.control.refusals import printable
from ftrain.core.messages import MESSAGE_BYTES_MAX, FromAgent, FromCoordinator
from ftrain.errors import ProtocolError

# The WebSocket layer refuses a payload of this many bytes or more, from its header, before it holds them.
FRAME_BYTES_LIMIT = MESSAGE_BYTES_MAX + 1
NESTING_MAX = 16  # the deepest message that there is nests 5
QUEUE_BYTES_MAX = 2 * MESSAGE_BYTES_MAX  # a peer that leaves more than this unread is cut
QUEUE_MESSAGES_MAX = 1024
CLOSE_SECONDS = 1.0  # what is queued has this long to leave when a channel is closed

M = TypeVar("M")

_encoder = msgspec.json.Encoder()
_from_agent: msgspec.json.Decoder[FromAgent] = msgspec.json.Decoder(FromAgent)
_from_coordinator: msgspec.json.Decoder[FromCoordinator] = msgspec.json.Decoder(FromCoordinator)

# Possessive, and without a need for the closing quote: linear in the length of whatever is sent.
_string = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_one_kind_of_bracket = bytes.maketrans(b"{}", b"[]")
_not_brackets = bytes(byte for byte in range(256) if byte not in b"[]{}")


def encode(message: FromAgent | FromCoordinator) -> bytes:
    """The message as one JSON object. Raises ProtocolError if the other side would refuse its size."""
    data = _encoder.encode(message)
    if len(data) > MESSAGE_BYTES_MAX:
        raise ProtocolError(
            f"A {type(message).__name__} of {len(data)} bytes is more than a message may have ({MESSAGE_BYTES_MAX})."
        )
    return data


def decode_from_agent(data: bytes, where: str) -> FromAgent:
    """One message of an agent. Anything else raises a ProtocolError that names `where`."""
    return _decode(_from_agent, data, where)


def decode_from_coordinator(data: bytes, where: str) -> FromCoordinator:
    """One message of a coordinator. Anything else raises a ProtocolError that names `where`."""
    return _decode(_from_coordinator, data, where)


class Socket(Protocol):
    """What aiohttp's two kinds of WebSocket have in common."""

    async def receive(self) -> WSMessage: ...

    async def send_frame(self, message: bytes, opcode: WSMsgType) -> None: ...

    async def close(self) -> bool: ...


class Channel:
    """One open connection: `receive` for one reader, `send` for anybody in this event loop.

    `where` is the other side in words, for messages. `abort` must end the connection at once, whatever the other side
    does. The owner awaits `finish` in the end.
    """

    def __init__(self, socket: Socket, where: str, abort: Callable[[], None]) -> None:
        self.where = where
        self.reason = ""  # why this side closed; empty while it did not
        self._fault = ""  # what the other side did to be cut
        self._socket = socket
        self._abort = abort
        self._queue: deque[bytes] = deque()
        self._queue_bytes = 0
        self._wake = asyncio.Event()
        self._deadline: asyncio.TimerHandle | None = None
        self._writer = asyncio.get_running_loop().create_task(self._write(), name=f"to {where}")

    def send(self, data: bytes) -> bool:
        """Queue one encoded message without waiting. False if the channel is closed.

        A peer whose queue is full does not read: it is cut.
        """
        if self.reason or self._writer.done():
            return False
        if len(self._queue) >= QUEUE_MESSAGES_MAX or self._queue_bytes + len(data) > QUEUE_BYTES_MAX:
            self._fault = f"{self.where} does not read what it is sent: it is cut."
            self.cut(self._fault)
            return False
        self._queue.append(data)
        self._queue_bytes += len(data)
        self._wake.set()
        return True

    def close(self, reason: str) -> None:
        """End the channel once what is queued has left, but within CLOSE_SECONDS. Does not wait."""
        if not self.reason:
            self.reason = reason
            self._wake.set()
            self._deadline = asyncio.get_running_loop().call_later(CLOSE_SECONDS, self._abort)

    def cut(self, reason: str) -> None:
        """End the channel now, without a word to the other side, which may be unreachable."""
        self.reason = self.reason or reason
        self._wake.set()
        self._abort()

    async def receive(self) -> bytes | None:
        """The next message, encoded, or None when the connection has ended. Nothing comes any more after `close`.

        Raises ProtocolError for what is no message, and when the other side was cut because it does not read.
        """
        message = await self._socket.receive()
        while self.reason and message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
            message = await self._socket.receive()
        if message.type is WSMsgType.TEXT:
            return message.data.encode() if isinstance(message.data, str) else bytes(message.data)
        if message.type is WSMsgType.BINARY:
            raise ProtocolError(f"{self.where} sent a binary frame, and messages are text.")
        if message.type is WSMsgType.ERROR and not isinstance(message.data, OSError | ClientError):
            raise ProtocolError(printable(f"{self.where} broke the WebSocket protocol: {message.data}."))
        if self._fault:
            raise ProtocolError(self._fault)
        return None

    async def finish(self) -> None:
        """Wait until what is queued has left, but within CLOSE_SECONDS, and end the connection."""
        self.reason = self.reason or "the connection ended"
        self._wake.set()
        try:
            await asyncio.wait((self._writer,), timeout=CLOSE_SECONDS)
        finally:
            self._writer.cancel()
            self._abort()
            if self._deadline is not None:
                self._deadline.cancel()

    async def _write(self) -> None:
        """Send what is queued, one after the other, until the channel is closed and the queue empty."""
        with suppress(OSError, ClientError):
            while True:
                while self._queue:
                    data = self._queue.popleft()
                    self._queue_bytes -= len(data)
                    await self._socket.send_frame(data, WSMsgType.TEXT)
                if self.reason:
                    break
                self._wake.clear()
                await self._wake.wait()
            await self._socket.close()


def _decode(decoder: msgspec.json.Decoder[M], data: bytes, where: str) -> M:
    if not _is_flat_enough(data):
        raise ProtocolError(f"{where} sent brackets that nest over {NESTING_MAX} levels or do not close.")
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(printable(f"{where} sent what is not a message: {error}.")) from error


def _is_flat_enough(data: bytes) -> bool:
    """Whether `data` nests at most NESTING_MAX levels. Takes time linear in its length, and no recursion."""
    if data.count(b"[") + data.count(b"{") <= NESTING_MAX:
        return True
    brackets = _string.sub(b"", data).translate(_one_kind_of_bracket, _not_brackets)
    for _ in range(NESTING_MAX):
        length = len(brackets)
        brackets = brackets.replace(b"[]", b"")  # takes the innermost level away
        if len(brackets) == length:
            break
    return not brackets
