"""Connections over a link that is cut: nothing tells their ends, so the kernel is asked to try, and to give up."""

from __future__ import annotations

import socket
from typing import Protocol

SILENT_SECONDS = 30  # without an answer to anything, data or probe: then the connection has failed
PROBE_SECONDS = 5


class Settable(Protocol):
    """A socket, or asyncio's view of one."""

    def setsockopt(self, level: int, option: int, value: int, /) -> None: ...


def bound_silence(connection: Settable) -> None:
    """Let a TCP connection fail with `TimeoutError` when its other end was not reached for SILENT_SECONDS."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, SILENT_SECONDS // PROBE_SECONDS - 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_SECONDS * 1000)
