"""A rank's shared state straight from the memory of a living replica."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import torch

from ftrain.checkpoint.exchange import encode_plain
from ftrain.checkpoint.state.items import TensorItem
from ftrain.checkpoint.state.source import TensorInfo
from ftrain.checkpoint.state.tracked import Tracked
from ftrain.checkpoint.wire import Checksum, Wire, as_bytes, fill_from_bytes, runs
from ftrain.core import plain as plain_data
from ftrain.core.layout import Shard, local_shard
from ftrain.errors import CorruptCheckpoint, FtrainError, MismatchedState

AHEAD_BYTES = 64 << 20  # sent and received while what came before them is checked; and one run in any case


def shard_of(items: Sequence[TensorItem], rank: int) -> str:
    """A digest of what this rank holds of what ranks share: equal on two ranks exactly if they are replicas."""
    held = sorted(msgspec.json.encode(one) for one in _offered(items, rank))
    return hashlib.sha256(b"\n".join(held)).hexdigest()[:32]


def copy_live(tracked: Tracked, rank: int, pairs: Sequence[tuple[int, int]]) -> None:
    """Copy the shared state over each (from, to) of `pairs`, which is the same on all ranks of the default group.

    Only the ranks that are named take part. No rank receives twice, or receives and sends. What is a rank's alone
    stays as it is; a buffer that the sender has changed for itself is not sent. Raises `MismatchedState` on both where
    the two are no replicas, with nothing changed, and `CorruptCheckpoint` on the receiver where bytes were damaged on
    the way.
    """
    targets = [target for _, target in pairs]
    assert len(set(targets)) == len(targets), f"somebody would receive twice: {pairs}"
    assert not set(targets) & {source for source, _ in pairs}, f"somebody would send what it receives: {pairs}"
    for source, target in pairs:
        if rank == source:
            _send(tracked, rank, target, Wire(target))
        elif rank == target:
            _receive(tracked, rank, source, Wire(source))


class _Offered(msgspec.Struct, frozen=True):
    """One tensor that a rank holds, and which boxes of it."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    shard: Shard
    nbytes: int


class _Offer(msgspec.Struct, frozen=True):
    """What a sender is about to send, in this order. With an `error` it sends nothing."""

    error: str = ""
    tensors: tuple[_Offered, ...] = ()
    on_device: tuple[bool, ...] = ()
    tracked: dict[str, Any] = {}  # plain data by name, encoded


class _Moving(msgspec.Struct, frozen=True):
    """A local tensor that is being sent or filled."""

    local: torch.Tensor
    nbytes: int
    on_device: bool


_OFFER = msgspec.json.Decoder(_Offer)


def _offered(items: Sequence[TensorItem], rank: int) -> list[_Offered]:
    held = [(item, local_shard(item.spec, rank)) for item in items if not item.spec.private]
    return [
        _Offered(item.spec.key, item.spec.dtype, item.spec.shape, shard, item.local.nbytes)
        for item, shard in held
        if shard is not None
    ]


def _moving(items: Sequence[TensorItem]) -> list[_Moving]:
    return [_Moving(item.local, item.local.nbytes, item.local.device.type != "cpu") for item in items]


def _offer(tracked: Tracked, rank: int) -> tuple[_Offer, list[_Moving]]:
    part = tracked.collect()
    private = {item.spec.key for item in part.items if item.spec.private}
    shared = [item for item in part.items if item.spec.key not in private]
    items = [item for item in shared if local_shard(item.spec, rank) is not None]
    moving = _moving(items)
    on_device = tuple(one.on_device for one in moving)
    return _Offer("", tuple(_offered(items, rank)), on_device, encode_plain(part.plain)), moving


def _send(tracked: Tracked, rank: int, target: int, wire: Wire) -> None:
    try:
        offer, moving = _offer(tracked, rank)
    except FtrainError as error:
        wire.send_bytes(msgspec.json.encode(_Offer(f"{type(error).__name__}: {error}")))
        raise
    wire.send_bytes(msgspec.json.encode(offer))
    refusal = wire.receive_bytes()
    if refusal:
        raise MismatchedState(f"rank {target} cannot take over the state of rank {rank}: {refusal.decode()}")
    _send_tensors(moving, wire)


def _send_tensors(moving: Sequence[_Moving], wire: Wire) -> None:
    checksum, under_way = Checksum(), _UnderWay()
    for run in runs(moving):
        parts = [as_bytes(one.local) for one in run]
        data = parts[0] if len(parts) == 1 else torch.cat(parts)
        under_way.add(wire.begin_send(data).wait, data.nbytes)
        checksum.add(data)  # while it goes
    under_way.finish()
    wire.send_bytes(str(checksum.value).encode())


def _check(checksum: Checksum, wire: Wire) -> None:
    if int(wire.receive_bytes()) != checksum.value:
        raise CorruptCheckpoint(
            f"the state that came from the memory of rank {wire.peer} does not match its checksum: the network or "
            "a memory damages data"
        )


def _receive(tracked: Tracked, rank: int, source: int, wire: Wire) -> None:
    offer = _OFFER.decode(wire.receive_bytes())
    if offer.error:
        raise MismatchedState(f"rank {source} cannot give its state to rank {rank}: {offer.error}")
    replica = _Replica(offer, source, wire)
    try:
        items = tracked.prepare(replica, source)
        replica.expect(items, rank)
    except FtrainError as error:
        wire.send_bytes(str(error).encode())
        raise
    wire.send_bytes(b"")
    tracked.fill(replica, rank, source, items)


class _Replica:
    """The living rank `source` as `Tracked` restores from it."""

    def __init__(self, offer: _Offer, source: int, wire: Wire) -> None:
        self._offer = offer
        self._source = source
        self._wire = wire
        self._moving: list[_Moving] = []

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {one.key: TensorInfo(one.dtype, one.shape, private=False) for one in self._offer.tensors}

    def private_tensors(self, rank: int) -> None:
        """None: what a rank has for itself, another one does not have."""
        del rank

    def plain(self, rank: int) -> dict[str, object]:
        assert rank == self._source
        return {"tracked": {name: plain_data.decode(value) for name, value in self._offer.tracked.items()}}

    def others(self, rank: int) -> tuple[()]:
        """None: a replica has all that its replicas need."""
        assert rank == self._source
        return ()

    def expect(self, items: Sequence[TensorItem], rank: int) -> None:
        """Find a place for each tensor. Raises `MismatchedState` where they are not the same here and there."""
        held = [item for item in items if local_shard(item.spec, rank) is not None]
        here = dict(zip(_offered(held, rank), held, strict=True))
        there = set(self._offer.tensors)
        odd = [one.key for one in self._offer.tensors if one not in here] + [o.key for o in here if o not in there]
        if odd:
            raise MismatchedState(
                f"ranks {self._source} and {rank} are no replicas of each other: {', '.join(odd[:5])} differ in shape, "
                "dtype or placement, or are on one of them only"
            )
        self._moving = _moving([here[one] for one in self._offer.tensors])
        if tuple(one.on_device for one in self._moving) != self._offer.on_device:
            raise MismatchedState(f"ranks {self._source} and {rank} hold tensors on different kinds of devices")

    def read_into(self, items: Sequence[TensorItem], rank: int, *, elsewhere: Collection[str] = ()) -> None:
        """Fill what `expect` found places for, which are those of `items`."""
        del items, rank, elsewhere
        checksum, under_way = Checksum(), _UnderWay()
        for run in runs(self._moving):
            one = _Receiving(run, self._wire)
            under_way.add(partial(one.finish, checksum), one.nbytes)
        under_way.finish()
        _check(checksum, self._wire)


class _UnderWay:
    """What was begun, oldest first: `add` finishes what is too much at a time."""

    def __init__(self) -> None:
        self._begun: deque[tuple[Callable[[], object], int]] = deque()
        self._nbytes = 0

    def add(self, finish: Callable[[], object], nbytes: int) -> None:
        self._begun.append((finish, nbytes))
        self._nbytes += nbytes
        while self._nbytes > AHEAD_BYTES and len(self._begun) > 2:  # one that is finished, one on its way
            self._finish_first()

    def finish(self) -> None:
        while self._begun:
            self._finish_first()

    def _finish_first(self) -> None:
        finish, nbytes = self._begun.popleft()
        self._nbytes -= nbytes
        finish()


class _Receiving:
    """A run on its way in: straight to where it belongs if it is one tensor that lies in one piece."""

    def __init__(self, run: Sequence[_Moving], wire: Wire) -> None:
        first = run[0].local.detach()
        self._run = run
        self._in_place = len(run) == 1 and first.is_contiguous()
        self._data = (
            first.reshape(-1).view(torch.uint8)
            if self._in_place
            else torch.empty(sum(one.nbytes for one in run), dtype=torch.uint8, device=first.device)
        )
        self._work = wire.begin_receive(self._data)

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    def finish(self, checksum: Checksum) -> None:
        self._work.wait()
        checksum.add(self._data)
        if not self._in_place:
            parts = torch.split(self._data, [one.nbytes for one in self._run])
            for one, part in zip(self._run, parts, strict=True):
                fill_from_bytes(one.local, part)
