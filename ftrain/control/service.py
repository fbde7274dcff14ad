"""The coordinator's server: agents connect here, and people ask here for status and metrics.

One port, one secret: `/agent` is the WebSocket of the agents, `/status` is JSON, `/metrics` is Prometheus text, and all
of it is behind mutual TLS. What a peer does wrong ends its own connection, with one line in the log, and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
from aiohttp import web
from aiohttp.http import HttpProcessingError

from ftrain.control.channel import FRAME_BYTES_LIMIT, Channel, decode_from_agent, encode
from ftrain.control.door import Door, Opening
from ftrain.control.refusals import Refusals, logger, printable
from ftrain.control.secret import Secret
from ftrain.core.messages import FromAgent, FromCoordinator, Hello
from ftrain.errors import ProtocolError

LOOPBACK = ("127.0.0.1",)
EVERYWHERE = ("0.0.0.0", "::")
CLOSE_SECONDS = 2.0


class Owner(Protocol):
    """What a service serves. Everything is called in its event loop, in order, and must neither block nor raise.

    What it raises all the same is logged with its traceback and ends the connection that it was called for.
    """

    def on_open(self, peer: Peer) -> None:
        """An agent has connected; `peer.hello` is what it said."""

    def on_message(self, peer: Peer, message: FromAgent) -> None:
        """An agent says something. Its Hello is delivered too, first."""

    def on_close(self, peer: Peer, reason: str) -> None:
        """The connection is over; called exactly once after `on_open`."""

    def status(self) -> Any:
        """The run's state for `/status`: anything that msgspec can write as JSON."""

    def metrics(self) -> str:
        """The run's metrics for `/metrics`, in Prometheus' text format."""


class Peer:
    """An agent that is connected."""

    def __init__(self, hello: Hello, address: str, channel: Channel) -> None:
        self.hello = hello
        self.address = address
        self._channel = channel

    def send(self, message: FromCoordinator) -> None:
        """Queue a message and return at once. Without effect once the connection is over.

        Raises ProtocolError if the message is larger than a message may be.
        """
        self._channel.send(encode(message))

    def close(self, reason: str) -> None:
        """Send what is queued, then end the connection. Returns at once; `on_close` gets the reason."""
        self._channel.close(reason)


class Service:
    """Serves one owner on `port` (0: a free one) of `hosts`, to holders of `secret`."""

    def __init__(self, owner: Owner, secret: Secret, hosts: Sequence[str] = LOOPBACK, port: int = 0) -> None:
        self._owner = owner
        self._secret = secret
        self._hosts = hosts
        self._port = port
        self._strangers = Refusals()
        self._members = Refusals()  # apart, so that a flood of strangers hides no agent's mistake
        self._channels: set[Channel] = set()
        self._server: web.Server | None = None
        self._door: Door | None = None

    async def start(self) -> int:
        """Listen, and return the port. Raises Unavailable."""
        server = web.Server(self._handle, access_log=None, logger=_line_logger(self._members), lingering_time=0.0)
        door = Door(self._secret.server_context(), server, self._strangers)
        port = door.open(self._hosts, self._port)
        self._server, self._door = server, door
        return port

    async def close(self) -> None:
        """Stop listening, send what is queued, end every connection. Takes CLOSE_SECONDS or a little more at most."""
        if self._door is None or self._server is None:
            return
        await self._door.close()
        for channel in self._channels:
            channel.close("the coordinator is ending")
        await self._server.shutdown(CLOSE_SECONDS)
        self._strangers.close()
        self._members.close()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        opening = self._door.opening(request.protocol) if self._door is not None else None
        if opening is None:
            return _text(404, b"One request for each connection.")
        try:
            response = await self._answer(request, opening)
            # Here and not in aiohttp, so that the door still watches over who does not read the answer.
            await response.prepare(request)
            await response.write_eof()
        finally:
            opening.over()
        return response

    async def _answer(self, request: web.BaseRequest, opening: Opening) -> web.StreamResponse:
        match request.method, request.path:
            case "GET", "/agent":
                return await self._agent(request, opening)
            case "GET", "/status":
                return _text(200, msgspec.json.encode(self._owner.status()), "application/json")
            case "GET", "/metrics":
                return _text(200, self._owner.metrics().encode(), "text/plain; version=0.0.4; charset=utf-8")
            case _:
                self._members.add(f"refused {opening.address}: there is no {request.method} {request.path} here")
                return _text(404, b"There is /agent, /status and /metrics.")

    async def _agent(self, request: web.BaseRequest, opening: Opening) -> web.StreamResponse:
        transport = request.transport
        socket = web.WebSocketResponse(timeout=CLOSE_SECONDS / 2, compress=False, max_msg_size=FRAME_BYTES_LIMIT)
        if transport is None or not socket.can_prepare(request):
            self._members.add(f"refused {opening.address}: /agent is for WebSockets")
            return _text(426, b"/agent is for agents.")
        await socket.prepare(request)
        channel = Channel(socket, f"the agent at {opening.address}", transport.abort)
        self._channels.add(channel)
        try:
            await self._serve(channel, opening)
        except ProtocolError as error:
            self._members.add(str(error))
            channel.close(str(error))
        finally:
            await channel.finish()
            self._channels.discard(channel)
        return socket

    async def _serve(self, channel: Channel, opening: Opening) -> None:
        data = await channel.receive()
        if data is None:
            return
        hello = decode_from_agent(data, channel.where)
        if not isinstance(hello, Hello):
            raise ProtocolError(f"{channel.where} said {type(hello).__name__} before Hello.")
        opening.over()
        channel.where = f"node {printable(hello.node)} at {opening.address}"
        peer = Peer(hello, opening.address, channel)
        reason = "the coordinator made a mistake, which is in its log"
        self._owner.on_open(peer)
        try:
            self._owner.on_message(peer, hello)
            while (data := await channel.receive()) is not None:
                self._owner.on_message(peer, decode_from_agent(data, channel.where))
            reason = channel.reason or "it hung up"
        except ProtocolError as error:
            reason = str(error)
            raise
        finally:
            self._owner.on_close(peer, reason)


def _text(status: int, body: bytes, content_type: str = "text/plain; charset=utf-8") -> web.Response:
    response = web.Response(status=status, body=body, headers={"Content-Type": content_type})
    response.force_close()
    return response


class _LineHandler(logging.Handler):
    """Turns what aiohttp logs about a peer's mistakes, tracebacks and all, into refusals of one line.

    Everything else that it logs is a mistake of ours and keeps its traceback.
    """

    def __init__(self, refusals: Refusals) -> None:
        super().__init__(logging.WARNING)
        self._refusals = refusals

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError | OSError):
            self._refusals.add(f"{record.getMessage()}: {error!r}")
        else:
            logger.error("%s", record.getMessage(), exc_info=record.exc_info)


def _line_logger(refusals: Refusals) -> logging.Logger:
    quiet = logging.Logger("ftrain.control.http", logging.WARNING)  # of this service alone: in no logger's tree
    quiet.addHandler(_LineHandler(refusals))
    return quiet
