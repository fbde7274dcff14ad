"""Tensors on CUDA devices to and from host memory, on streams of their own. Importable, and unused, without a GPU."""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, methodcaller
from pathlib import Path

import torch

from ftrain import _native
from ftrain.checkpoint.staging.arena import Image

PLANS_MAX = 4  # kept: one for each slot of the arena, and some for what changes its place
Copies = Sequence[tuple[int, torch.Tensor]]


def find_nvrtc() -> list[str]:
    """Where the compiler of kernels may be, best first: beside torch, then where the loader looks."""
    of_torch = (torch.version.cuda or "13").partition(".")[0]
    majors = sorted(("13", "12"), key=lambda major: major != of_torch)
    beside_torch = Path(torch.__file__).parents[1]
    folders = [
        *(Path(entry) / "nvidia" for entry in dict.fromkeys([str(beside_torch), *sys.path]) if entry),
        beside_torch / "torch" / "lib",
    ]
    found: list[str] = []
    for major in majors:
        name = f"libnvrtc.so.{major}"
        for folder in folders:
            found += [str(path) for path in sorted([*folder.glob(name), *folder.glob(f"*/lib/{name}")])]
        found.append(name)
    return found


def begin_upload(copies: Copies, image: Image | None = None) -> DeviceTicket:
    """Start filling tensors on devices from host addresses, as `DeviceCopies.upload`.

    The image in which the addresses are is pinned first, and stays so: the next snapshots go there.
    """
    uploads = _uploads()
    if image is not None:
        uploads.pin_image(image, {tensor.device for _, tensor in copies})
    return uploads.upload(copies)


class DeviceTicket:
    """Copies between the host and any number of devices, in flight. Dropped, it waits for them."""

    def __init__(self, parts: Sequence[tuple[torch.device, _native.CudaTicket]]) -> None:
        self._parts = parts

    def order(self) -> None:
        """What comes to each device's current stream from now on waits for the copies, on the device."""
        for device, ticket in self._parts:
            ticket.order(_stream(device))

    def done(self) -> bool:
        """Whether all copies are made."""
        return all(ticket.done() for _, ticket in self._parts)

    def wait(self) -> None:
        """Sleep until all copies are made. Raises `CudaFailure` where one of them went wrong."""
        for _, ticket in self._parts:
            ticket.wait()


class DeviceCopies:
    """Makes copies between host addresses and tensors on CUDA devices.

    Copies of (address, tensor) pairs move each tensor's elements in C order, in `tensor.nbytes` bytes at the address.
    The same tensors at the same places are planned once. To be used from one thread.
    """

    def __init__(self) -> None:
        self._devices: dict[int, _Device] = {}
        self._pinned: dict[_Range, Image | None] = {}
        self._plans: OrderedDict[tuple[object, ...], _Plans] = OrderedDict()

    def pin(self, address: int, nbytes: int, devices: Iterable[torch.device]) -> str:
        """Pin host memory, for as long as it is not given back: do it once, for all that will be copied there.

        What can be set up before the first copy is set up here. Returns `hindrances` in one line. Raises `CudaFailure`
        where a device cannot be used.
        """
        self._pinned[address, nbytes] = None
        for device in devices:
            self._device(device).stager.small_copies()  # compiled now, not in the first snapshot
        return "; ".join(self.hindrances())

    def pin_image(self, image: Image, devices: Iterable[torch.device]) -> str:
        """As `pin`, for an image as `begin` takes it, and for as long as `begin` would keep it pinned."""
        self._hold(image)
        for device in devices:
            self._device(device).stager.small_copies()
        return "; ".join(self.hindrances())

    def unpin(self, address: int, nbytes: int) -> None:
        """Wait for copies in flight, and let the memory go. To be called before it is unmapped."""
        self._pinned.pop((address, nbytes), None)
        self._plans.clear()  # they rely on it
        for one in self._devices.values():
            pin = one.pins.pop((address, nbytes), None)
            if pin is not None:
                pin.close()

    def hindrances(self) -> list[str]:
        """What keeps copies from being as fast as they can be: memory that is not pinned, kernels that are missing."""
        found = []
        for one in self._devices.values():
            found += [pin.reason for pin in one.pins.values()]
            found.append(one.stager.small_copies()[1])
        return [reason for reason in dict.fromkeys(found) if reason]

    def begin(self, copies: Copies, image: Image | None = None) -> DeviceTicket:
        """Start copying tensors to the host, as they are once the work on the current streams is done.

        The tensors, and the image in which the addresses are, are kept alive until the ticket is done. An image is
        pinned the first time, and let go when one of another mapping comes: then the arena has moved. The tensors' next
        writer waits: see `DeviceTicket.order`.
        """
        if image is not None:
            self._hold(image)
        copies = list(copies)  # ours to keep
        tensors = [tensor for _, tensor in copies]
        key = _places(copies, tensors)
        plans = self._plans.get(key)
        if plans is not None and all(map(methodcaller("is_contiguous"), tensors)):
            self._plans.move_to_end(key)
            return DeviceTicket([(device, plan.begin(_stream(device), (copies, image))) for device, plan in plans])
        plans, parts = [], []
        for device, group in _by_device(copies).items():
            sources = [(address, _plain(tensor)) for address, tensor in group]
            plan = self._plan(device, sources, upload=False)
            parts.append((device, plan.begin(_stream(device), (sources, image))))
            plans.append((device, plan))
        if all(map(_is_plain, tensors)):
            self._plans[key] = plans
            while len(self._plans) > PLANS_MAX:
                self._plans.popitem(last=False)
        return DeviceTicket(parts)

    def upload(self, copies: Copies) -> DeviceTicket:
        """Start filling tensors from the host, after the work on the current streams. Later work sees them filled.

        The host's memory must stay, and stay the same, until the ticket is done.
        """
        parts = []
        for device, group in _by_device(copies).items():
            landed = [(address, tensor, _landing(tensor)) for address, tensor in group]
            plan = self._plan(device, [(address, place) for address, _, place in landed], upload=True)
            parts.append((device, plan.begin(_stream(device), landed)))
            for _, tensor, place in landed:
                if place is not tensor:
                    tensor.copy_(place)
        return DeviceTicket(parts)

    def _hold(self, image: Image) -> None:
        known = self._pinned.get((image.address, image.nbytes))
        if known is not None and known.mapping is image.mapping:
            return
        for place, other in tuple(self._pinned.items()):
            if other is not None and other.mapping is not image.mapping:
                self.unpin(*place)
        self._pinned[image.address, image.nbytes] = image

    def _device(self, device: torch.device) -> _Device:
        index = _index(device)
        one = self._devices.get(index)
        if one is None:
            one = self._devices[index] = _Device(_native.CudaStager(index, find_nvrtc()))
        for address, nbytes in self._pinned:
            if (address, nbytes) not in one.pins:
                one.pins[address, nbytes] = one.stager.pin(address, nbytes)
        return one

    def _plan(self, device: torch.device, places: Copies, *, upload: bool) -> _native.CudaPlan:
        copies = [(address, tensor.data_ptr(), tensor.nbytes) for address, tensor in places]
        return self._device(device).stager.plan(copies, upload)


@functools.cache
def _uploads() -> DeviceCopies:
    return DeviceCopies()


_Range = tuple[int, int]
_Plans = list[tuple[torch.device, _native.CudaPlan]]


@dataclass(slots=True)
class _Device:
    stager: _native.CudaStager
    pins: dict[_Range, _native.CudaPin] = field(default_factory=dict)


def _places(copies: Copies, tensors: Sequence[torch.Tensor]) -> tuple[object, ...]:
    """From where to where, quickly, for tens of thousands of tensors."""
    seen = (id, methodcaller("data_ptr"), attrgetter("nbytes"))
    return (tuple([address for address, _ in copies]), *(tuple(map(what, tensors)) for what in seen))


def _by_device(copies: Copies) -> dict[torch.device, list[tuple[int, torch.Tensor]]]:
    groups: defaultdict[torch.device, list[tuple[int, torch.Tensor]]] = defaultdict(list)
    for address, tensor in copies:
        if tensor.numel() != 0:
            groups[tensor.device].append((address, tensor.detach()))
    return groups


def _is_plain(tensor: torch.Tensor) -> bool:
    """The tensor's bytes lie in memory just as they are to be on the host."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    # The copy is made on the current stream, after which ours comes; its memory stays ours for as long as it is kept.
    return tensor if _is_plain(tensor) else tensor.resolve_conj().resolve_neg().contiguous()


def _landing(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if _is_plain(tensor) else tensor.new_empty(tensor.shape)


def _index(device: torch.device) -> int:
    index: int | None = device.index
    return torch.cuda.current_device() if index is None else index


def _stream(device: torch.device) -> int:
    stream: int = torch.cuda.current_stream(device).cuda_stream
    return stream
