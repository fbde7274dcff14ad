"""The agent's side of the control plane: one connection to the coordinator, made again whenever it is lost.

A connection that fails says why in its type. Unavailable: nobody listens there, or it went silent; it may come.
Refused: who listens there does not hold our secret, or does not accept it. ProtocolError: something else than ftrain
listens there, or it sent what the protocol does not allow.
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import aiohttp
import msgspec

from ftrain.control.channel import FRAME_BYTES_LIMIT, Channel, decode_from_coordinator, encode
from ftrain.control.refusals import printable
from ftrain.control.secret import Secret
from ftrain.control.silence import bound_silence
from ftrain.core.messages import FromAgent, FromCoordinator, Hello
from ftrain.errors import FtrainError, ProtocolError, Refused, Unavailable, UsageError

CONNECT_SECONDS = 5.0  # for name, TCP, TLS and WebSocket together
CLOSE_SECONDS = 1.0
BACKOFF_SECONDS_MIN = 0.05
BACKOFF_SECONDS_MAX = 1.0
STATUS_BYTES_MAX = 64 << 20

_HOST = re.compile(r"[A-Za-z0-9_.:%-]+")
_NOT_TLS = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNEXPECTED_MESSAGE", "TLSV1_ALERT_PROTOCOL_VERSION"}


class Client:
    """Keeps an agent connected to the coordinator at `endpoint` ("host:port"). Lives in one event loop.

    Raises UsageError for an endpoint that is none.
    """

    def __init__(self, endpoint: str, secret: Secret) -> None:
        self._host, self._port = parse_endpoint(endpoint)
        self._secret = secret
        self._channel: Channel | None = None
        self._stopped = asyncio.Event()

    @property
    def connected(self) -> bool:
        """Whether there is a channel on which our Hello was sent."""
        return self._channel is not None

    async def run(
        self,
        make_hello: Callable[[], Hello],
        on_message: Callable[[FromCoordinator], None],
        on_state: Callable[[FtrainError | None], None],
    ) -> None:
        """Connect, deliver messages in order, connect again; until `stop`.

        `make_hello` is called for every connection. `on_state` gets None when the Hello is on its way, and an error
        (Unavailable, Refused or ProtocolError) for each attempt that failed and each connection that ended. Every
        kind is tried again, after a jittered pause: whoever takes one for final calls `stop`.
        """
        clock = asyncio.get_running_loop().time
        pause = BACKOFF_SECONDS_MIN
        while not self._stopped.is_set():
            began = clock()
            try:
                await self._converse(make_hello, on_message, on_state)
            except (Unavailable, Refused, ProtocolError) as error:
                if not self._stopped.is_set():
                    on_state(error)
            if clock() - began > BACKOFF_SECONDS_MAX:
                pause = BACKOFF_SECONDS_MIN
            with suppress(TimeoutError):
                # At random in the upper half, so that agents that lost the same coordinator spread out.
                async with asyncio.timeout(pause * random.uniform(0.5, 1.0)):
                    await self._stopped.wait()
            pause = min(2 * pause, BACKOFF_SECONDS_MAX)

    def send(self, message: FromAgent) -> bool:
        """Queue a message without waiting. False, and the message dropped, where there is no connection.

        Raises ProtocolError if the message is larger than a message may be.
        """
        data = encode(message)
        return self._channel is not None and self._channel.send(data)

    def reconnect(self) -> None:
        """Give the present connection up as dead and let `run` make another. Without effect where there is none."""
        if self._channel is not None:
            self._channel.cut(f"{self._channel.where} is silent.")

    def stop(self) -> None:
        """Send what is queued and close; `run` returns within about CLOSE_SECONDS. Returns at once."""
        self._stopped.set()
        if self._channel is not None:
            self._channel.close("the agent is ending")

    async def _converse(
        self,
        make_hello: Callable[[], Hello],
        on_message: Callable[[FromCoordinator], None],
        on_state: Callable[[FtrainError | None], None],
    ) -> None:
        """One connection, from its making to its end, which is always an error."""
        async with _session(self._secret) as session:
            channel = await self._open(session)
            try:
                channel.send(encode(make_hello()))
                self._channel = channel
                on_state(None)
                while (data := await channel.receive()) is not None:
                    on_message(decode_from_coordinator(data, channel.where))
                raise Unavailable(channel.reason or f"{channel.where} closed the connection.")
            finally:
                self._channel = None
                await channel.finish()

    async def _open(self, session: aiohttp.ClientSession) -> Channel:
        where = f"The coordinator at {endpoint_text(self._host, self._port)}"
        opening = asyncio.ensure_future(
            session.ws_connect(
                _url(self._host, self._port, "/agent"),
                timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_SECONDS),
                max_msg_size=FRAME_BYTES_LIMIT,
                compress=0,
            )
        )
        stopped = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait((opening, stopped), timeout=CONNECT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if self._stopped.is_set() or not opening.done():
                raise Unavailable(f"{where} did not answer within {CONNECT_SECONDS:g} seconds.")
            with _classified(where):
                websocket = opening.result()
        finally:
            for future in (opening, stopped):
                future.cancel()
            await asyncio.gather(opening, stopped, return_exceptions=True)
        raw = websocket.get_extra_info("socket")
        bound_silence(raw)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Channel(websocket, where, lambda: _shut(raw))


async def fetch_status(endpoint: str, secret: Secret) -> dict[str, Any]:
    """What the coordinator at `endpoint` says about its run. Raises Unavailable, Refused, ProtocolError, UsageError."""
    host, port = parse_endpoint(endpoint)
    where = f"The coordinator at {endpoint_text(host, port)}"
    try:
        async with asyncio.timeout(CONNECT_SECONDS), _session(secret) as session:
            with _classified(where):
                async with session.get(_url(host, port, "/status"), allow_redirects=False) as response:
                    if response.status != 200:
                        raise ProtocolError(f"{where} answered {response.status} when asked for its status.")
                    body = bytearray()
                    async for chunk in response.content.iter_any():
                        body += chunk
                        if len(body) > STATUS_BYTES_MAX:
                            raise ProtocolError(f"{where} sent a status of more than {STATUS_BYTES_MAX} bytes.")
        return msgspec.json.decode(bytes(body), type=dict[str, Any])
    except TimeoutError:
        raise Unavailable(f"{where} did not answer within {CONNECT_SECONDS:g} seconds.") from None
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"{where} sent a status that is none.") from error


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of "host:port", "[IPv6]:port". Raises UsageError."""
    host, _, digits = endpoint.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not _HOST.fullmatch(host) or not (digits.isascii() and digits.isdigit() and 0 < int(digits[:6]) < 65536):
        raise UsageError(f"{endpoint!r} is not an endpoint: give HOST:PORT, as in 10.0.0.1:29400 or [fd00::1]:29400.")
    return host, int(digits)


def endpoint_text(host: str, port: int) -> str:
    """`host:port`, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _url(host: str, port: int, path: str) -> str:
    return f"https://{endpoint_text(host, port)}{path}"


def _session(secret: Secret) -> aiohttp.ClientSession:
    # No cache of names: a coordinator that comes back elsewhere must be found there.
    connector = aiohttp.TCPConnector(ssl=secret.client_context(), use_dns_cache=False, force_close=True)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None), trust_env=False)


def _shut(raw: Any) -> None:
    """End the connection of asyncio's view of a socket, whatever the other side does."""
    with suppress(OSError):
        raw.shutdown(socket.SHUT_RDWR)


@contextmanager
def _classified(where: str) -> Iterator[None]:
    """Turn what goes wrong before the other side has answered into an error that says whose matter it is."""
    try:
        yield
    except aiohttp.ClientConnectorDNSError as error:
        raise Unavailable(
            printable(f"{where} cannot be found: {error.os_error.strerror or error.os_error}.")
        ) from error
    except aiohttp.ClientResponseError as error:
        raise ProtocolError(printable(f"{where} answered {error.status} {error.message}: it is not ftrain.")) from error
    except (OSError, aiohttp.ClientError) as error:
        raise _classify(where, _cause(error)) from error


def _classify(where: str, cause: BaseException) -> FtrainError:
    reason = (cause.reason or "") if isinstance(cause, ssl.SSLError) else ""
    if isinstance(cause, ssl.SSLCertVerificationError):
        return Refused(f"{where} does not hold this run's secret: give both sides the same file with --secret.")
    if reason in _NOT_TLS:
        return ProtocolError(f"{where} is not ftrain: something else listens there.")
    if "ALERT" in reason:
        return Refused(f"{where} does not accept this run's secret ({reason}): compare the clocks of both machines.")
    if isinstance(cause, ConnectionRefusedError):
        return Unavailable(f"{where} is not there: nobody listens at that address.")
    if isinstance(cause, ssl.SSLError | ConnectionError | aiohttp.ServerDisconnectedError):
        # A coordinator that is ending does this, and so does one whose clock says that our secret has expired.
        return Unavailable(f"{where} hung up before it answered.")
    text = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    return Unavailable(printable(f"{where} cannot be reached: {text}."))


def _cause(error: BaseException) -> BaseException:
    """The operating system's or OpenSSL's own error, out of aiohttp's wrapping."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return error.certificate_error
    if isinstance(error, aiohttp.ClientConnectorError):
        return error.os_error
    return error.__cause__ if isinstance(error.__cause__, OSError) else error
