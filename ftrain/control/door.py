"""The listening port: what happens to a connection until it has proved that it belongs here.

A connection has OPENING_SECONDS in all, from its acceptance on, for the TLS handshake, its request and, where it is an
agent's, its Hello; then it is cut, whatever it is waiting for. At most OPENINGS_MAX are in that state. When all of
these are taken, new ones wait in the kernel, and one that has been opening for longer than CROWDED_SECONDS gives way:
agents need milliseconds, so a crowd of silent strangers delays them and does not keep them out.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress

from ftrain.control.refusals import Refusals
from ftrain.control.silence import bound_silence
from ftrain.errors import Unavailable

OPENING_SECONDS = 5.0
OPENINGS_MAX = 256
CROWDED_SECONDS = 2.0
SHUTDOWN_SECONDS = 1.0
BACKLOG = 1024
PAUSE_SECONDS = 0.1  # after accept failed for want of descriptors or memory

# What OpenSSL calls the common ways in which somebody is not one of us.
_REASONS = {
    "HTTP_REQUEST": "it speaks HTTP without TLS",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it showed no secret",
    "CERTIFICATE_VERIFY_FAILED": "it showed another secret",
    "UNSUPPORTED_PROTOCOL": "it does not speak TLS 1.3",
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
    "RECORD_LAYER_FAILURE": "it does not speak TLS",
    "UNEXPECTED_MESSAGE": "it does not speak TLS",
    "NO_PROTOCOLS_AVAILABLE": "it does not speak TLS 1.3",
}


class Opening:
    """A connection that has not proved yet that it belongs here."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._over = asyncio.Event()

    def over(self) -> None:
        """It proved it, or it was refused: the door need not watch it any more."""
        self._over.set()

    async def wait(self) -> None:
        await self._over.wait()


class Door:
    """Accepts connections, completes their TLS handshakes, and cuts the ones that do not come to the point.

    `make_protocol` returns what takes a connection over after its handshake.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        make_protocol: Callable[[], asyncio.BaseProtocol],
        refusals: Refusals,
    ) -> None:
        self._context = context
        self._make_protocol = make_protocol
        self._refusals = refusals
        self._sockets: list[socket.socket] = []
        self._acceptors: list[asyncio.Task[None]] = []
        self._openings: dict[asyncio.Task[None], float] = {}  # when each came, oldest first
        self._by_protocol: dict[asyncio.BaseProtocol, Opening] = {}
        self._changed = asyncio.Event()  # an opening is over
        self._closing = False

    def open(self, hosts: Sequence[str], port: int) -> int:
        """Listen on `port` (0: a free one) of each of `hosts`, and return the port. Raises Unavailable."""
        self._sockets = bind(hosts, port)
        loop = asyncio.get_running_loop()
        self._acceptors = [loop.create_task(self._accept(listener)) for listener in self._sockets]
        return int(self._sockets[0].getsockname()[1])

    def opening(self, protocol: asyncio.BaseProtocol) -> Opening | None:
        """The opening that `protocol` has taken over, or None when it is over."""
        return self._by_protocol.get(protocol)

    async def close(self) -> None:
        """Stop listening, and cut every connection that is still opening."""
        self._closing = True
        tasks = [*self._acceptors, *self._openings]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listener in self._sockets:
            listener.close()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._room()
            try:
                connection, name = await loop.sock_accept(listener)
            except ConnectionAbortedError:
                continue
            except OSError as error:
                self._refusals.add(f"cannot accept connections for the moment: {error.strerror}")
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            task = loop.create_task(self._admit(connection, Opening(address_text(name))))
            self._openings[task] = loop.time()
            task.add_done_callback(self._forget)

    async def _room(self) -> None:
        """Wait until fewer than OPENINGS_MAX connections are opening, and see to it that this comes about."""
        loop = asyncio.get_running_loop()
        while len(self._openings) >= OPENINGS_MAX:
            oldest, since = next(iter(self._openings.items()))
            patience = since + CROWDED_SECONDS - loop.time()
            if patience <= 0:
                oldest.cancel()
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(max(patience, PAUSE_SECONDS)):
                    await self._changed.wait()

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._openings.pop(task, None)
        self._changed.set()
        if not task.cancelled() and (error := task.exception()):
            asyncio.get_running_loop().call_exception_handler(
                {"message": "ftrain could not open a connection", "exception": error, "task": task}
            )

    async def _admit(self, connection: socket.socket, opening: Opening) -> None:
        loop = asyncio.get_running_loop()
        transport: asyncio.Transport | None = None
        protocol = self._make_protocol()
        self._by_protocol[protocol] = opening
        try:
            async with asyncio.timeout(OPENING_SECONDS):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                bound_silence(connection)
                transport, _ = await loop.connect_accepted_socket(
                    lambda: protocol,
                    connection,
                    ssl=self._context,
                    # The timeout around this is the one that counts.
                    ssl_handshake_timeout=2 * OPENING_SECONDS,
                    ssl_shutdown_timeout=SHUTDOWN_SECONDS,
                )
                await opening.wait()
        except TimeoutError:
            what = "did not finish the TLS handshake" if transport is None else "did not say what it wants"
            self._refuse(opening, f"it {what} within {OPENING_SECONDS:g} seconds")
            _end(transport, connection)
        except asyncio.CancelledError:
            if not self._closing:
                self._refuse(opening, "it took too long while others wait")
            _end(transport, connection)
            raise
        except OSError as error:
            self._refuse(opening, _explain(error))
            _end(transport, connection)
        finally:
            del self._by_protocol[protocol]

    def _refuse(self, opening: Opening, why: str) -> None:
        self._refusals.add(f"refused a connection from {opening.address}: {why}")


def bind(hosts: Sequence[str], port: int) -> list[socket.socket]:
    """Sockets that listen on one port of each host. Raises Unavailable in one sentence.

    An address family that this machine lacks is passed over while another one is there.
    """
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for host in hosts:
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            except socket.gaierror as error:
                raise Unavailable(f"Cannot listen on {host}: {error.strerror}. Name one of its addresses.") from error
            for family, _, _, _, name in found:
                try:
                    sockets.append(_listen(family, (name[0], port, *name[2:])))
                except OSError as error:
                    if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                        raise Unavailable(_explain_bind(host, port, error)) from error
                    missing = error
                if sockets and port == 0:
                    port = int(sockets[0].getsockname()[1])
        if not sockets:
            raise Unavailable(_explain_bind(", ".join(hosts), port, missing))
    except BaseException:
        for listener in sockets:
            listener.close()
        raise
    return sockets


def address_text(name: object) -> str:
    """A socket's name as `host:port`, IPv6 in brackets."""
    if not isinstance(name, tuple) or len(name) < 2:
        return "an unknown address"
    host = f"[{name[0]}]" if ":" in str(name[0]) else str(name[0])
    return f"{host}:{name[1]}"


def _listen(family: int, name: tuple[str | int, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(name)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _end(transport: asyncio.Transport | None, connection: socket.socket) -> None:
    if transport is not None:
        transport.abort()
        return
    # The event loop may still have the descriptor: it closes it when it finds the connection ended.
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _explain(error: OSError) -> str:
    """Why a handshake failed, in words."""
    if isinstance(error, ssl.SSLCertVerificationError) and "expired" in str(error):
        return "by this machine's clock its secret has expired"
    if isinstance(error, ssl.SSLError):
        return _REASONS.get(error.reason or "", f"its TLS handshake failed ({error.reason or error})")
    return "it hung up during the TLS handshake, as one with another secret does"


def _explain_bind(host: str, port: int, error: OSError | None) -> str:
    where = f"Cannot listen on {host} port {port}"
    if error is None:
        return f"{where}: no address to listen on was given."
    if error.errno == errno.EADDRINUSE:
        return f"{where}: another process has it. Stop that one, or choose another port."
    if error.errno == errno.EACCES:
        return f"{where}: ports below 1024 need privileges. Choose a higher one."
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{where}: this host has no such address. Name one of its own."
    return f"{where}: {error.strerror}."
