"""The `ftrain` backend of torch.distributed. docs/worker.md has what it cannot do.

Its groups are `SwappableGroup`s: what is inside each may be exchanged while everything built on it stays (`groups`).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import threading
from typing import Any

import torch.distributed as dist

from ftrain.errors import UsageError
from ftrain.worker import gloo_sockets, groups
from ftrain.worker.swappable_group import BACKEND, SwappableGroup, Watcher, live_groups

__all__ = ["BACKEND", "destroy_at_exit", "register"]

LEAVE_SECONDS = 1.0  # for the groups' destruction at the end; it takes milliseconds unless a collective is stuck


def register(generation: int, loopback: bool, watcher: Watcher | None, alone: bool = False) -> None:
    """Make `ftrain` a backend of torch.distributed in this process.

    Groups meet under the generation's prefix. Those made alone need no peers until `groups.reform`.
    """

    def create(options: Any, backend_options: Any) -> SwappableGroup:
        if backend_options is not None:
            raise UsageError("the ftrain backend takes no pg_options: leave them out")
        return groups.make(options)

    groups.begin(generation, loopback, watcher, alone)
    dist.Backend.register_backend(BACKEND, create, extended_api=True, devices=["cpu", "cuda"])


def destroy_at_exit() -> None:
    """Destroy the groups at the end of the process, but do not wait for a peer that died or hangs.

    The destructor of a gloo group joins threads that may be inside a collective. They have to be gone before Python is,
    for they may hold tensors; so that is tried for a moment, by a thread of its own. Where it comes to no end,
    a collective is stuck, and its sockets are shut down. Where that does not help either, the groups are kept from
    their destructors, and the kernel closes the sockets.
    """
    ending = threading.Event()

    def destroy() -> None:
        ending.wait()
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError, ValueError):  # a peer that left first
                dist.destroy_process_group()

    # Started now: at the end of the process Python starts no threads any more.
    thread = threading.Thread(target=destroy, name="ftrain-leave", daemon=True)
    thread.start()

    def leave() -> None:
        ending.set()
        thread.join(LEAVE_SECONDS)
        if thread.is_alive():
            gloo_sockets.shut_down()
            thread.join(LEAVE_SECONDS)
        if thread.is_alive():
            for group in live_groups():
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(group.inner))

    atexit.register(leave)
