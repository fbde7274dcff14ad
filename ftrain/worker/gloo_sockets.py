"""gloo's own sockets, found in the kernel's list of what its event loops watch, and shut down to wake who waits.

A collective of gloo that waits for a peer ends early only when its socket does; `abort` does not wake it. gloo keeps
its sockets to itself, but a device registers each with its epoll descriptor, and `/proc/self/fdinfo` lists them with
their inode. They are never closed here: gloo owns them.

Who waits for a message of which a part has arrived or left is not even told of the socket's end, nor of its peer's:
such waits are ended by `_native.end_gloo_waits`.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroupGloo

from ftrain import _native

LOOPBACK_INTERFACE = "lo"
_WATCHED = re.compile(r"^tfd:\s*(\d+) .*\bino:([0-9a-f]+)", re.MULTILINE)


def devices(loopback: bool) -> list[Any]:
    """The gloo devices of this process, made when first asked for: all its groups share them, and one event loop each.

    They listen on the interfaces that GLOO_SOCKET_IFNAME names, else on the loopback interface or on the host's own.
    """
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME", LOOPBACK_INTERFACE if loopback else "")
    with _lock:
        _native.list_gloo_waits()
        if interfaces not in _devices:
            before = set(_event_loops())
            if interfaces:
                made = [ProcessGroupGloo.create_device(interface=one) for one in interfaces.split(",")]
            else:
                made = [ProcessGroupGloo.create_default_device()]
            new = set(_event_loops()) - before
            _loops.extend(loop for loop in new if any(_listens(*one) for one in _watched(loop)))
            _devices[interfaces] = made
        return _devices[interfaces]


def shut_down() -> int:
    """Shut down every connection of gloo in this process, idle or not. Returns how many.

    Whoever waits on one, here or at its other end, is woken and raises. New groups can be made at once.
    """
    count = sum(shut_down_socket(*found) for loop in _loops for found in _watched(loop))
    _native.end_gloo_waits("gloo: a wait for a peer was ended, because all connections were shut down")
    return count


def shut_down_socket(fd: int, inode: int) -> bool:
    """Shut a connection down, unless the descriptor is closed or another file's than that of the inode by now."""
    with _held(fd, inode) as found:
        if found is None or found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return False
        with contextlib.suppress(OSError):  # the peer was faster
            found.shutdown(socket.SHUT_RDWR)
        return True


_lock = threading.Lock()
_devices: dict[str, list[Any]] = {}
_loops: list[int] = []  # epoll descriptors of the devices, which live as long as the process


def _event_loops() -> Iterator[int]:
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if str(entry.readlink()) == "anon_inode:[eventpoll]":
                yield int(entry.name)


def _watched(loop: int) -> list[tuple[int, int]]:
    """(descriptor, inode) of all that an epoll descriptor watches."""
    try:
        text = Path(f"/proc/self/fdinfo/{loop}").read_text()
    except FileNotFoundError:
        return []
    return [(int(fd), int(inode, 16)) for fd, inode in _WATCHED.findall(text)]


@contextlib.contextmanager
def _held(fd: int, inode: int) -> Iterator[socket.socket | None]:
    """The socket of that number, kept from being closed meanwhile; None if the number is another file's by now."""
    try:
        copy = os.dup(fd)
    except OSError:
        yield None
        return
    found = os.fstat(copy)
    if found.st_ino != inode or not stat.S_ISSOCK(found.st_mode):
        os.close(copy)
        yield None
        return
    with socket.socket(fileno=copy) as held:
        yield held


def _listens(fd: int, inode: int) -> bool:
    with _held(fd, inode) as found:
        return found is not None and bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
