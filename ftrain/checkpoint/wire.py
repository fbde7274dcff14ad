"""Bytes and tensors between ranks, over the default process group: never pickled, always as bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import Work

from ftrain import _native

LARGE_BYTES = 1 << 20  # from here on a tensor travels by itself, straight from memory to memory
BUFFER_BYTES = 64 << 20  # for all others, together
_TAG = 0


class Parcel(Protocol):
    """What a run is made of."""

    @property
    def nbytes(self) -> int: ...

    @property
    def on_device(self) -> bool: ...


P = TypeVar("P", bound=Parcel)


class Wire:
    """A way to one peer, which has another one to us: what one sends the other receives, in the same order.

    `peer` is its rank in the default group. Both ends raise what the group raises.
    """

    def __init__(self, peer: int) -> None:
        self._group = dist.distributed_c10d._get_default_group()
        self.peer = peer

    def send(self, data: torch.Tensor) -> None:
        self.begin_send(data).wait()

    def receive(self, data: torch.Tensor) -> None:
        """Fill the tensor, which is as long as what was sent."""
        self.begin_receive(data).wait()

    def begin_send(self, data: torch.Tensor) -> Work:
        """What is begun goes out in that order, and must not be changed until the work was waited for."""
        return self._group.send([data], self.peer, _TAG)

    def begin_receive(self, data: torch.Tensor) -> Work:
        """What is begun is filled in that order."""
        return self._group.recv([data], self.peer, _TAG)

    def send_bytes(self, data: bytes) -> None:
        """Send bytes of any length, as `receive_bytes` expects them."""
        self.send(torch.tensor([len(data)]))
        if data:
            self.send(_tensor(data))

    def receive_bytes(self) -> bytes:
        length = torch.zeros(1, dtype=torch.int64)
        self.receive(length)
        data = torch.empty(int(length), dtype=torch.uint8)
        if len(data):
            self.receive(data)
        return data.numpy().tobytes()


def gather_bytes(own: bytes) -> list[bytes]:
    """What each rank gave, by rank. A collective of all ranks."""
    world_size = dist.get_world_size()
    lengths = torch.zeros(world_size, dtype=torch.int64)
    dist.all_gather_into_tensor(lengths, torch.tensor([len(own)]))
    longest = int(lengths.max())
    if longest == 0:
        return [b""] * world_size
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(own)] = _tensor(own)
    found = torch.empty(world_size * longest, dtype=torch.uint8)
    dist.all_gather_into_tensor(found, padded)
    rows = found.view(world_size, longest)
    return [rows[rank, : int(length)].numpy().tobytes() for rank, length in enumerate(lengths)]


def as_bytes(local: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes in C order: itself where it lies so, a copy of it elsewhere."""
    return local.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def fill_from_bytes(local: torch.Tensor, data: torch.Tensor) -> None:
    """The other way round, in place."""
    target = local.detach()
    if target.is_contiguous():
        target.reshape(-1).view(torch.uint8).copy_(data)
    else:
        target.copy_(data.to(target.device, copy=True).view(target.dtype).view(target.shape))


def runs(parcels: Sequence[P]) -> Iterator[list[P]]:
    """What travels together: large ones alone, others up to BUFFER_BYTES at a time, those on devices by themselves."""
    for on_device in (False, True):
        batch: list[P] = []
        nbytes = 0
        for parcel in parcels:
            if parcel.on_device != on_device or not parcel.nbytes:
                continue
            if parcel.nbytes >= LARGE_BYTES:
                yield [parcel]
                continue
            if nbytes + parcel.nbytes > BUFFER_BYTES:
                yield batch
                batch, nbytes = [], 0
            batch.append(parcel)
            nbytes += parcel.nbytes
        if batch:
            yield batch


class Checksum:
    """The crc32c of all that went by in host memory. (What goes from device to device is checked by its own link.)"""

    def __init__(self) -> None:
        self.value = 0

    def add(self, data: torch.Tensor) -> None:
        if data.device.type == "cpu":
            self.value = _native.crc32c_address(data.data_ptr(), data.nbytes, self.value)


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
