"""A rank's shared state straight from the memory of a living replica."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from ftrain.checkpoint.agreement import encode_plain
from ftrain.checkpoint.items import TensorItem
from ftrain.checkpoint.restore import TensorInfo
from ftrain.checkpoint.tracked import Tracked
from ftrain.checkpoint.wire import Checksum, as_bytes, fill_from_bytes, receive_bytes, runs, send_bytes
from ftrain.core import plain as plain_data
from ftrain.core.layout import local_box
from ftrain.errors import CorruptCheckpoint, FtrainError, MismatchedState


def shard_of(items: Sequence[TensorItem], rank: int) -> str:
    """A digest of what this rank holds of what ranks share: equal on two ranks exactly if they are replicas."""
    held = sorted(msgspec.json.encode(one) for one in _offered(items, rank))
    return hashlib.sha256(b"\n".join(held)).hexdigest()[:32]


def copy_live(tracked: Tracked, rank: int, pairs: Sequence[tuple[int, int]]) -> None:
    """Copy the shared state over each (from, to) of `pairs`, which is the same on all ranks of the default group.

    Only the ranks that are named take part. No rank receives twice, or receives and sends. What is a rank's alone
    stays as it is; a buffer that the sender has changed for itself is not sent. Raises `MismatchedState` on both where
    the two are no replicas, with nothing changed but new optimizer state made, and `CorruptCheckpoint` on the receiver
    where bytes were damaged on the way.
    """
    targets = [target for _, target in pairs]
    assert len(set(targets)) == len(targets), f"somebody would receive twice: {pairs}"
    assert not set(targets) & {source for source, _ in pairs}, f"somebody would send what it receives: {pairs}"
    for source, target in pairs:
        if rank == source:
            _send(tracked, rank, target)
        elif rank == target:
            _receive(tracked, rank, source)


class _Offered(msgspec.Struct, frozen=True):
    """One tensor that a rank holds: of which box of the whole, and where it lies."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    box_offset: tuple[int, ...]
    box_shape: tuple[int, ...]


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
    boxes = [(item.spec, local_box(item.spec, rank)) for item in items if not item.spec.private]
    return [_Offered(spec.key, spec.dtype, spec.shape, box.offset, box.shape) for spec, box in boxes if box is not None]


def _moving(items: Sequence[TensorItem]) -> list[_Moving]:
    return [_Moving(item.local, item.local.nbytes, item.local.device.type != "cpu") for item in items]


def _send(tracked: Tracked, rank: int, target: int) -> None:
    items: list[TensorItem] = []
    try:
        part = tracked.collect()
        private = {item.spec.key for item in part.items if item.spec.private}
        items = [item for item in part.items if item.spec.key not in private and local_box(item.spec, rank) is not None]
        moving = _moving(items)
        on_device = tuple(one.on_device for one in moving)
        offer = _Offer("", tuple(_offered(items, rank)), on_device, encode_plain(part.plain))
    except FtrainError as error:
        send_bytes(msgspec.json.encode(_Offer(f"{type(error).__name__}: {error}")), target)
        raise
    send_bytes(msgspec.json.encode(offer), target)
    refusal = receive_bytes(target)
    if refusal:
        raise MismatchedState(f"rank {target} cannot take over the state of rank {rank}: {refusal.decode()}")
    checksum = Checksum()
    for run in runs(moving):
        parts = [as_bytes(one.local) for one in run]
        data = parts[0] if len(parts) == 1 else torch.cat(parts)
        checksum.add(data)
        dist.send(data, target)
    send_bytes(str(checksum.value).encode(), target)


def _receive(tracked: Tracked, rank: int, source: int) -> None:
    offer = _OFFER.decode(receive_bytes(source))
    if offer.error:
        raise MismatchedState(f"rank {source} cannot give its state to rank {rank}: {offer.error}")
    replica = _Replica(offer, source)
    try:
        items = tracked.prepare(replica, source)
        replica.expect(items, rank)
    except FtrainError as error:
        send_bytes(str(error).encode(), source)
        raise
    send_bytes(b"", source)
    tracked.fill(replica, rank, source, items)


class _Replica:
    """The living rank `source` as `Tracked` restores from it."""

    def __init__(self, offer: _Offer, source: int) -> None:
        self._offer = offer
        self._source = source
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

    def expect(self, items: Sequence[TensorItem], rank: int) -> None:
        """Find a place for each tensor. Raises `MismatchedState` where they are not the same here and there."""
        here = dict(zip(_offered(items, rank), [i for i in items if local_box(i.spec, rank) is not None], strict=True))
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
        """Receive what `expect` found places for, which are those of `items`."""
        del items, elsewhere
        checksum = Checksum()
        for run in runs(self._moving):
            _receive_run(run, self._source, checksum)
        if int(receive_bytes(self._source)) != checksum.value:
            raise CorruptCheckpoint(
                f"what rank {rank} received from rank {self._source} does not match its checksum: the network "
                "or a memory damages data"
            )


def _receive_run(run: Sequence[_Moving], source: int, checksum: Checksum) -> None:
    first = run[0].local.detach()
    if len(run) == 1 and first.is_contiguous():
        data = first.reshape(-1).view(torch.uint8)
        dist.recv(data, source)
        checksum.add(data)
        return
    data = torch.empty(sum(one.nbytes for one in run), dtype=torch.uint8, device=first.device)
    dist.recv(data, source)
    checksum.add(data)
    for one, part in zip(run, torch.split(data, [one.nbytes for one in run]), strict=True):
        fill_from_bytes(one.local, part)
