"""A process group that forwards to an ordinary one, and can be given another in its place.

DDP, FSDP2, DTensor and `DeviceMesh` hold on to the group they were made with. This one keeps its identity while the
group that does the work is swapped, so that they need not be built again when the membership changes.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import GroupName

from ftrain.core.page import Collective
from ftrain.errors import PeerLost
from ftrain.worker.local_group import LocalGroup

BACKEND = "ftrain"

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
Inner = ProcessGroup | LocalGroup


def live_groups() -> list[SwappableGroup]:
    """The groups of this process that were not destroyed, in the order in which they were made."""
    return sorted((group for group in _live if not group.destroyed), key=lambda group: group.order)


def _collective(name: str, kind: Collective) -> Callable[..., Any]:
    def call(self: SwappableGroup, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.enter(kind), name)(*args, **kwargs)

    call.__name__ = name
    # A compiled step calls it from C++, with the compiler listening: it must not be compiled too.
    hidden: Callable[..., Any] = torch._disable_dynamo(call)
    return hidden


def _forwarded(name: str) -> Callable[..., Any]:
    def call(self: SwappableGroup, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.inner, name)(*args, **kwargs)

    call.__name__ = name
    return call


class SwappableGroup(ProcessGroup):
    """Forwards all collectives to an inner, ordinary ProcessGroup of the same rank and size.

    `ranks` are the global ranks of its members, `timeout` that of its collectives. The watcher hears of every
    collective that involves peers.
    """

    def __init__(self, inner: Inner, name: str, ranks: list[int], timeout: timedelta, watcher: Watcher | None) -> None:
        super().__init__(inner.rank(), inner.size())  # type: ignore[call-arg]  # torch's stub lacks this overload
        self._inner: Inner | None = inner
        self._lost_generation: int | None = None
        self._name = name
        self._description = "undefined"
        self._watcher = watcher
        self.ranks = ranks
        self.timeout = timeout
        self.order = next(_orders)
        _live.add(self)

    @property
    def inner(self) -> Inner:
        if self._inner is None:
            raise RuntimeError(f"the process group {self._name!r} was destroyed")
        return self._inner

    @property
    def destroyed(self) -> bool:
        return self._inner is None

    def swap(self, inner: Inner) -> Inner:
        """Forward to `inner` from now on. Returns the one before, in which nothing may be under way."""
        assert (inner.rank(), inner.size()) == (self.rank(), self.size()), "another rank or size is another group"
        before = self.inner
        self._inner = inner
        self._lost_generation = None
        return before

    def lose(self, generation: int) -> None:
        """Let every collective raise `PeerLost`, which names the generation, until the next `swap`."""
        self._lost_generation = generation

    def enter(self, kind: Collective) -> Inner:
        """The group to carry a collective out. Raises `PeerLost` after `lose`."""
        if self._lost_generation is not None:
            raise PeerLost(
                f"generation {self._lost_generation} was revoked because a rank was lost: rank {self.rank()} cannot "
                f"begin {kind.name.lower()} in group {self._name!r}; the step is done again in the next generation"
            )
        inner = self.inner
        if self._watcher is not None and not isinstance(inner, LocalGroup):
            self._watcher(kind)
        return inner

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
            locals()[_method] = _collective(_method, _kind)
    for _method in FORWARDED:
        if hasattr(ProcessGroup, _method):
            locals()[_method] = _forwarded(_method)
    del _method, _kind


_live: weakref.WeakSet[SwappableGroup] = weakref.WeakSet()
_orders = itertools.count()
