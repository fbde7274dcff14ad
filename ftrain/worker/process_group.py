"""The `ftrain` backend: a process group that forwards to an ordinary one, and can be given another in its place.

DDP, FSDP2, DTensor and `DeviceMesh` hold on to the group they were made with. This one keeps its identity while the
group that does the work is swapped, so that they need not be built again when the membership changes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, ProcessGroupGloo, Store
from torch.distributed.distributed_c10d import GroupName

from ftrain.core.page import Collective

BACKEND = "ftrain"
LOOPBACK_INTERFACE = "lo"

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

Watcher = Callable[[Collective], None]


def _forwarded(name: str, kind: Collective) -> Callable[..., Any]:
    def call(self: SwappableGroup, *args: Any, **kwargs: Any) -> Any:
        self.entered(kind)
        return getattr(self.inner, name)(*args, **kwargs)

    call.__name__ = name
    return call


class SwappableGroup(ProcessGroup):
    """Forwards all collectives to `inner`, an ordinary ProcessGroup of the same rank and size."""

    def __init__(self, inner: ProcessGroup, name: str, watcher: Watcher | None) -> None:
        super().__init__(inner.rank(), inner.size())  # type: ignore[call-arg]  # torch's stub lacks this overload
        self.inner = inner
        self._name = name
        self._watcher = watcher

    def entered(self, kind: Collective) -> None:
        if self._watcher is not None:
            self._watcher(kind)

    def swap(self, inner: ProcessGroup) -> None:
        """Let another group do the work from the next collective on. It must have the same rank and size."""
        if (inner.rank(), inner.size()) != (self.inner.rank(), self.inner.size()):
            raise ValueError(
                f"group {self._name} is rank {self.inner.rank()} of {self.inner.size()}, "
                f"the one to swap in is rank {inner.rank()} of {inner.size()}"
            )
        self.inner = inner

    # What torch asks the group itself; the inner one has a name of its own.

    def getBackendName(self) -> str:  # noqa: N802 (torch's name)
        return BACKEND

    def getGroupName(self) -> str:  # noqa: N802
        return self._name

    def setGroupName(self, name: str) -> None:  # noqa: N802
        self._name = name

    @property
    def group_name(self) -> GroupName:
        return GroupName(self._name)

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def size(self) -> int:
        return int(self.inner.size())

    def rank(self) -> int:
        return int(self.inner.rank())

    def _get_backend(self, device: torch.device) -> Any:
        return self.inner._get_backend(device)

    for _name, _kind in COLLECTIVES.items():
        if hasattr(ProcessGroup, _name):  # older versions of torch lack the newest names
            locals()[_name] = _forwarded(_name, _kind)
    del _name, _kind


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

    def create(options: Any, _: Any) -> SwappableGroup:
        store = PrefixStore(f"generation-{generation}", options.store)
        rank, size, name = options.group_rank, options.group_size, options.group_id
        inner = ordinary_group(store, rank, size, options.timeout, name, loopback)
        # Only the default group tells the page: sub-groups' collectives are part of the same steps.
        return SwappableGroup(inner, name, watcher)

    dist.Backend.register_backend(BACKEND, create, extended_api=True, devices=["cpu", "cuda"])
