"""The groups of this process over the generations: revoked when a peer is lost, made anew under the same objects.

    connected ──revoke──► lost ──reform──► connected
                           └─rehearse─► local ──reform──┘

A process that is started in the middle of a run begins as local. A revoke is remembered by its generation, so it does
not matter whether it comes before, in, or after the reform that it concerns.
"""

from __future__ import annotations

import threading
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, Store

from ftrain.errors import PeerLost, Unrecoverable, UsageError
from ftrain.worker import gloo_sockets
from ftrain.worker.local_group import LocalGroup
from ftrain.worker.ordinary_group import PatientStore, beside, nccl_of, ordinary_group
from ftrain.worker.swappable_group import Inner, SwappableGroup, Watcher, live_groups

ABORT_SECONDS = 10.0  # for NCCL to give up what is in flight; it takes well under one unless the device hangs
LET_GO_SECONDS = 1.0  # for destructors of gloo, which join threads; their collectives have failed by then


def begin(generation: int, loopback: bool, watcher: Watcher | None, alone: bool) -> None:
    """What holds for all groups made from now on in this process: alone, they need no peers until `reform`."""
    with _lock:
        _now.generation = _now.newest = generation
        _now.loopback = loopback
        _now.watcher = watcher
        _now.local = alone


def make(options: Any) -> SwappableGroup:
    """A new group, as torch asks a backend for one. Raises `PeerLost` if the generation is revoked meanwhile."""
    rank, size, name, timeout = options.group_rank, options.group_size, options.group_id, options.timeout
    ranks = list(options.global_ranks_in_group) or list(range(size))
    generation = _now.generation
    with _lock:
        if _now.local:
            return SwappableGroup(LocalGroup(rank, size, name), name, ranks, timeout, _now.watcher)

    def check() -> None:
        _check(generation)

    store = PrefixStore(f"generation-{generation}", options.store)
    inner = beside(lambda: ordinary_group(store, rank, size, timeout, name, _now.loopback, check), check)
    with _lock:
        _check(generation)
        return SwappableGroup(inner, name, ranks, timeout, _now.watcher)


def is_local() -> bool:
    """Whether collectives need no peers: this process is rehearsing."""
    return _now.local


def is_revoked() -> bool:
    """Whether the generation that the groups are connected in was revoked: what a collective raised came of that."""
    return not _now.local and _now.generation <= _now.revoked


def revoke(generation: int) -> None:
    """Let nothing of this generation or an earlier one go on. Any thread may call it; returns at once.

    Every collective in flight raises within milliseconds, here and, because its sockets close, at its peers; later ones
    raise `PeerLost` until `reform`. A `reform` to such a generation raises `PeerLost`, under way or still to come.
    """
    with _lock:
        _now.revoked = max(_now.revoked, generation)
        if generation < _now.newest:
            return  # what is connected, or about to be, is of a later one
        groups = [] if _now.local else live_groups()
        for group in groups:
            group.lose(_now.generation)
        gloo_sockets.shut_down()  # before `reform` makes the next generation's
    for group in groups:
        if (nccl := nccl_of(group.inner)) is not None:
            # It may hang, so it is not waited for here; `reform` waits, with a bound.
            thread = threading.Thread(target=nccl.abort, name="ftrain-abort", daemon=True)
            _now.aborting.append(thread)
            thread.start()


def wake(generation: int) -> None:
    """After `revoke`: wake whoever was about to wait for a peer then, and has begun to since."""
    with _lock:
        if generation >= _now.newest and not _now.local:
            gloo_sockets.shut_down()


def rehearse() -> None:
    """Let all groups be local until `reform`: collectives need no peers. Nothing may be under way in them."""
    with _lock:
        _now.local = True
        before = [group.swap(_local(group)) for group in live_groups()]
    _let_go(before)


def reform(store: Store, generation: int) -> None:
    """Connect all groups of this process with those of its peers, under the generation's prefix in the store.

    To be called by the training thread of every rank. Groups of the same name meet; groups made later meet in the
    store too. Raises `PeerLost` when the generation is revoked meanwhile, after which it can be called again with a
    later one; `Unrecoverable` where the peers' scripts have made other groups than this one.
    """
    if not dist.is_initialized():
        raise UsageError(f"there are no groups to connect in generation {generation}: make the default group first")

    def check() -> None:
        _check(generation)

    with _lock:
        _check(generation)
        lost_generation, _now.newest = _now.generation, generation
        groups = live_groups()
        before = [group.swap(_local(group)) for group in groups]
        for group in groups:
            group.lose(lost_generation)
        _now.local = False
    _end_aborts(generation)
    _let_go(before)
    prefixed = PrefixStore(f"generation-{generation}", store)
    made, group_count = beside(lambda: _connect(prefixed, groups, generation), check)
    with _lock:
        _check(generation)
        for group, inner in zip(groups, made, strict=True):
            group.swap(inner)
        _now.generation = generation
        _keep_in_torch(store, groups, group_count)


class _Now:
    """Where this process stands. Changed under the lock, for `revoke` comes from another thread."""

    generation = 0  # the one that groups were connected in last
    newest = 0  # the one that they are in or being connected to
    revoked = -1  # this one and all before it are
    local = False
    loopback = False
    watcher: Watcher | None = None

    def __init__(self) -> None:
        self.aborting: list[threading.Thread] = []


_now = _Now()
_lock = threading.Lock()


def _check(generation: int) -> None:
    if generation <= _now.revoked:
        raise PeerLost(
            f"generation {generation} was revoked while its groups were made, because a rank was lost; "
            "they are made again in the next generation"
        )


def _local(group: SwappableGroup) -> LocalGroup:
    return LocalGroup(group.rank(), group.size(), group.getGroupName())


def _connect(store: Store, groups: list[SwappableGroup], generation: int) -> tuple[list[ProcessGroup], int]:
    """A new inner group for each of the groups, and the number that the next group will have at all ranks."""

    def check() -> None:
        _check(generation)

    rank = dist.get_rank()
    patient = PatientStore(store, groups[0].timeout, check, ranks=dist.get_world_size())
    names = [group.getGroupName() for group in groups]
    patient.set(f"groups/{rank}", "\n".join([str(dist.distributed_c10d._world.group_count), *names]))
    told = patient.multi_get([f"groups/{one}" for one in range(dist.get_world_size())])
    counts, peers = zip(*((int(count), set(others)) for count, *others in map(_lines, told)), strict=True)
    for group, name in zip(groups, names, strict=True):
        for one in group.ranks:
            if name not in peers[one]:
                raise Unrecoverable(
                    f"rank {one} has no group {name!r} of ranks {group.ranks} in generation {generation}, rank {rank} "
                    "has: they have run different parts of the script; make all groups before the training loop"
                )
    made = []
    for group, name in zip(groups, names, strict=True):
        place = PrefixStore(f"inner/{name}", store)
        made.append(ordinary_group(place, group.rank(), group.size(), group.timeout, name, _now.loopback, check))
    return made, max(counts)


def _lines(told: bytes) -> list[str]:
    return told.decode().split("\n")


def _keep_in_torch(store: Store, groups: list[SwappableGroup], group_count: int) -> None:
    """Let `new_group` use this store and this number next, as it does at every peer."""
    world = dist.distributed_c10d._world
    world.group_count = group_count
    for group in groups:
        backend, _ = world.pg_map[group]
        name = group.getGroupName()
        world.pg_map[group] = (backend, PrefixStore(f"{name}/", store))


def _end_aborts(generation: int) -> None:
    for thread in _now.aborting:
        thread.join(ABORT_SECONDS)
        if thread.is_alive():
            raise Unrecoverable(
                f"NCCL did not give up its collectives within {ABORT_SECONDS:.0f} s before generation {generation}: "
                "start this rank anew"
            )
    _now.aborting.clear()


def _let_go(groups: list[Inner]) -> None:
    """Empty the list, by a thread that is left behind where a destructor hangs of what nothing else refers to."""
    last = groups.copy()
    groups.clear()
    thread = threading.Thread(target=last.clear, name="ftrain-let-go", daemon=True)
    thread.start()
    thread.join(LET_GO_SECONDS)
