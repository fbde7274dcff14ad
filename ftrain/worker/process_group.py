"""The `ftrain` backend: a process group that forwards to an ordinary one, and can be given another in its place.

DDP, FSDP2, DTensor and `DeviceMesh` hold on to the group they were made with. This one keeps its identity while the
group that does the work is swapped, so that they need not be built again when the membership changes. docs/worker.md
has what it cannot do.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, ProcessGroupGloo, Store
from torch.distributed.distributed_c10d import GroupName

from ftrain.core.page import Collective
from ftrain.errors import UsageError

BACKEND = "ftrain"
LOOPBACK_INTERFACE = "lo"
LEAVE_SECONDS = 1.0  # for the groups' destruction at the end; it takes milliseconds unless a collective is stuck

# Every collective that a ProcessGroup has, and what the control page calls it.
COLLECTIVES = {
    "allgather": Collective.ALLGATHER,
    "_allgather_base": Collective.ALLGATHER,
    "all_gather_single": Collective.ALLGATHER,
    "all_gather_single_coalesced": Collective.ALLGATHER,
    "allgather_coalesced": Collective.ALLGATHER,
    "allgather_into_tensor_coalesced": Collective.ALLGATHER,
    "allreduce": Collective.ALLREDUCE,
    "allreduce_coalesced": Collective.ALLREDUCE,
    "alltoall": Collective.ALLTOALL,
    "alltoall_base": Collective.ALLTOALL,
    "all_to_all_single": Collective.ALLTOALL,
    "barrier": Collective.BARRIER,
    "monitored_barrier": Collective.BARRIER,
    "broadcast": Collective.BROADCAST,
    "gather": Collective.GATHER,
    "recv": Collective.RECV,
    "recv_anysource": Collective.RECV,
    "reduce": Collective.REDUCE,
    "reduce_scatter": Collective.REDUCE_SCATTER,
    "_reduce_scatter_base": Collective.REDUCE_SCATTER,
    "reduce_scatter_single": Collective.REDUCE_SCATTER,
    "reduce_scatter_single_coalesced": Collective.REDUCE_SCATTER,
    "reduce_scatter_tensor_coalesced": Collective.REDUCE_SCATTER,
    "scatter": Collective.SCATTER,
    "send": Collective.SEND,
}

# The rest of what an ordinary group answers; the outer one has no backends of its own to ask.
FORWARDED = (
    "_backend_id",
    "_end_coalescing",
    "_get_backend",
    "_get_sequence_number_for_group",
    "_has_hooks",
    "_register_on_completion_hook",
    "_set_sequence_number_for_group",
    "_start_coalescing",
    "_wait_for_pending_works",
    "get_group_store",
    "rank",
    "set_timeout",
    "size",
)

Watcher = Callable[[Collective], None]


def _counted(name: str, kind: Collective) -> Callable[..., Any]:
    def call(self: SwappableGroup, *args: Any, **kwargs: Any) -> Any:
        self.entered(kind)
        return getattr(self.inner, name)(*args, **kwargs)

    call.__name__ = name
    return call


def _forwarded(name: str) -> Callable[..., Any]:
    def call(self: SwappableGroup, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.inner, name)(*args, **kwargs)

    call.__name__ = name
    return call


class SwappableGroup(ProcessGroup):
    """Forwards all collectives to an inner, ordinary ProcessGroup of the same rank and size."""

    def __init__(self, inner: ProcessGroup, name: str, watcher: Watcher | None) -> None:
        super().__init__(inner.rank(), inner.size())  # type: ignore[call-arg]  # torch's stub lacks this overload
        self._inner: ProcessGroup | None = inner
        self._name = name
        self._description = "undefined"
        self._watcher = watcher
        _live.add(self)

    @property
    def inner(self) -> ProcessGroup:
        if self._inner is None:
            raise RuntimeError(f"the process group {self._name!r} was destroyed")
        return self._inner

    def swap(self, inner: ProcessGroup) -> None:
        """Forward to `inner` from now on. Nothing may be under way in the one before, which is let go."""
        assert (inner.rank(), inner.size()) == (self.rank(), self.size()), "another rank or size is another group"
        self._inner = inner

    def entered(self, kind: Collective) -> None:
        if self._watcher is not None:
            self._watcher(kind)

    def abort(self) -> None:
        if self._inner is not None:
            self._inner.abort()

    def shutdown(self) -> None:
        """What `destroy_process_group` calls."""
        if self._inner is not None:
            self._inner.shutdown()
            self._inner = None

    # torch asks under one name from Python and under another from C++.

    def getBackendName(self) -> str:  # noqa: N802
        return BACKEND

    def _get_backend_name(self) -> str:
        return BACKEND

    def name(self) -> str:
        return BACKEND

    def getGroupName(self) -> str:  # noqa: N802
        return self._name

    def setGroupName(self, name: str) -> None:  # noqa: N802
        self._name = name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_name(self) -> GroupName:
        return GroupName(self._name)

    def getGroupDesc(self) -> str:  # noqa: N802
        return self._description

    def setGroupDesc(self, description: str) -> None:  # noqa: N802
        self._description = description

    def _set_group_desc(self, description: str) -> None:
        self._description = description

    @property
    def group_desc(self) -> str:
        return self._description

    @property
    def _device_types(self) -> list[torch.device]:
        return self.inner._device_types

    for _method, _kind in COLLECTIVES.items():
        if hasattr(ProcessGroup, _method):  # older versions of torch lack the newest names
            locals()[_method] = _counted(_method, _kind)
    for _method in FORWARDED:
        if hasattr(ProcessGroup, _method):
            locals()[_method] = _forwarded(_method)
    del _method, _kind


_live: weakref.WeakSet[SwappableGroup] = weakref.WeakSet()


def ordinary_group(store: Store, rank: int, size: int, timeout: timedelta, name: str, loopback: bool) -> ProcessGroup:
    """A plain ProcessGroup: gloo for CPU tensors, and NCCL for CUDA tensors where there is any."""
    group = ProcessGroup(store, rank, size)
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # not in torch's stub
    options._timeout = timeout
    interface = os.environ.get("GLOO_SOCKET_IFNAME", LOOPBACK_INTERFACE if loopback else "")
    if interface:
        options._devices = [ProcessGroupGloo.create_device(interface=one) for one in interface.split(",")]
    else:
        options._devices = [ProcessGroupGloo.create_default_device()]
    gloo = ProcessGroupGloo(PrefixStore("cpu", store), rank, size, options)
    group._set_default_backend(ProcessGroup.BackendType.GLOO)
    group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, gloo)
    if torch.cuda.is_available() and dist.is_nccl_available():
        nccl_options = dist.ProcessGroupNCCL.Options()
        nccl_options._timeout = timeout
        nccl = dist.ProcessGroupNCCL(PrefixStore("cuda", store), rank, size, nccl_options)
        group._set_default_backend(ProcessGroup.BackendType.NCCL)
        group._register_backend(torch.device("cuda"), ProcessGroup.BackendType.NCCL, nccl)
    group._set_group_name(GroupName(f"{name}-inner"))
    return group


def register(generation: int, loopback: bool, watcher: Watcher | None) -> None:
    """Make `ftrain` a backend of torch.distributed in this process. Groups meet under the generation's prefix."""

    def create(options: Any, backend_options: Any) -> SwappableGroup:
        if backend_options is not None:
            raise UsageError("the ftrain backend takes no pg_options: leave them out")
        store = PrefixStore(f"generation-{generation}", options.store)
        rank, size, name = options.group_rank, options.group_size, options.group_id
        inner = ordinary_group(store, rank, size, options.timeout, name, loopback)
        return SwappableGroup(inner, name, watcher)

    dist.Backend.register_backend(BACKEND, create, extended_api=True, devices=["cpu", "cuda"])


def destroy_at_exit() -> None:
    """Destroy the groups at the end of the process, but do not wait for a peer that died or hangs.

    The destructor of a gloo group joins threads that may be inside a collective. They have to be gone before Python is,
    for they may hold tensors; so that is tried for a moment, by a thread of its own. Where it comes to no end,
    a collective is stuck, the groups are kept from their destructors, and the kernel closes the sockets.
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
            for group in list(_live):
                if group._inner is not None:
                    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group._inner))

    atexit.register(leave)
