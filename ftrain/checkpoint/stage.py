"""Tensors into memory that outlives them: at once, or while the next forward and backward run.

What training changes only in an optimizer's step (parameters, optimizer state) is copied *late*, by threads or by the
device, beside the training. Every optimizer waits, by a hook, until nothing of it is needed any more. Everything else
is copied before `Stager.begin` returns. A tensor that was changed behind the hook's back shows by its version counter:
then what was staged is refused, and that tensor is copied at once from then on.
"""

from __future__ import annotations

import operator
import os
import threading
import time
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ftrain import _native
from ftrain.checkpoint.arena import Image
from ftrain.checkpoint.host import in_host_memory, lies_in_host_memory
from ftrain.errors import MismatchedState

if TYPE_CHECKING:
    from ftrain.checkpoint.device import DeviceCopies, DeviceTicket

_data_ptr = torch.Tensor.data_ptr
_version = operator.attrgetter("_version")  # counts what was done to a tensor in place


class StagePlan:
    """Where tensors go, again and again: `keys` name them, `offsets` are in bytes from the base.

    The tensors themselves come with each `Stager.begin`. They may change their memory in between, not their shape.
    `late` says for each whether it may be copied late.
    """

    def __init__(self, keys: Sequence[str], offsets: Sequence[int], late: Sequence[bool]) -> None:
        self.keys = keys
        self._offsets = offsets
        self._late = list(late)
        self._pointers: list[int] | None = None
        self._forms: list[tuple[torch.Size, tuple[int, ...]]] = []

    def copy_at_once(self, changed: Sequence[int]) -> None:
        """These change outside of optimizers. Numbers count the tensors, here and below."""
        for number in changed:
            self._late[number] = False
        self._pointers = None

    def prepare(self, tensors: Sequence[torch.Tensor]) -> None:
        """Look where the tensors are now, and sort them by how they are to be copied."""
        pointers = list(map(_data_ptr, tensors))
        if pointers == self._pointers:
            return
        self._forms = [(tensor.shape, tensor.stride()) for tensor in tensors]
        full = [number for number, tensor in enumerate(tensors) if tensor.numel()]
        host = [number for number in full if lies_in_host_memory(tensors[number])]
        self.device = [number for number in full if tensors[number].device.type == "cuda"]
        self.odd = sorted(set(full) - set(host) - set(self.device))
        # Tensors made in inference mode count no versions: nothing would show that they changed.
        late = [number for number in full if self._late[number] and not tensors[number].is_inference()]
        odd = set(self.odd)
        self.guarded = [number for number in late if number not in odd]
        guarded = set(self.guarded)
        self.all_device_is_late = guarded.issuperset(self.device)
        self.late_plan = self._copy_plan([number for number in host if number in guarded], tensors, pointers)
        self.early_plan = self._copy_plan([number for number in host if number not in guarded], tensors, pointers)
        self._pointers = pointers

    def check_forms(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raises `MismatchedState` where a tensor has not the shape and strides that it was copied with."""
        for number, (tensor, form) in enumerate(zip(tensors, self._forms, strict=True)):
            if (tensor.shape, tensor.stride()) != form:
                raise MismatchedState(
                    f"{self.keys[number]} had the shape {list(form[0])} and has {list(tensor.shape)}: plan again"
                )

    def offset(self, number: int) -> int:
        return self._offsets[number]

    def _copy_plan(
        self, numbers: Sequence[int], tensors: Sequence[torch.Tensor], pointers: Sequence[int]
    ) -> _native.CopyPlan | None:
        if not numbers:
            return None
        return _native.CopyPlan(
            array("Q", [self._offsets[number] for number in numbers]),
            array("Q", [pointers[number] for number in numbers]),
            array("Q", [tensors[number].nbytes for number in numbers]),
        )


class Staging:
    """Copies in flight. Made by `Stager.begin`."""

    def __init__(self, plan: StagePlan, tensors: Sequence[torch.Tensor], image: Image) -> None:
        self._plan = plan
        self._tensors = tensors
        self._image = image  # stays mapped for as long as something may be copied to it
        self._guarded = [tensors[number] for number in plan.guarded]
        self._versions = list(map(_version, self._guarded))
        self._job: _native.CopyJob | None = None
        self._ticket: DeviceTicket | None = None
        self._lock = threading.Lock()
        self._checked = False
        self._changed: list[int] = []
        self._wait_began = 0.0
        self._waited = 0.0
        self.boundary_seconds = 0.0

    @property
    def stall_seconds(self) -> float:
        """What the training thread has waited so far."""
        began = self._wait_began
        return self.boundary_seconds + self._waited + (time.perf_counter() - began if began else 0.0)

    def fly(self, job: _native.CopyJob | None, ticket: DeviceTicket | None) -> None:
        """What is in flight."""
        self._job, self._ticket = job, ticket

    def before_write(self) -> None:
        """To be called before what is copied late may change: waits for it, on the device where it is there."""
        self._wait_began = time.perf_counter()
        try:
            if self._job is not None:
                self._job.wait()
            self._check()
            if self._ticket is not None:
                self._ticket.order()
        finally:
            self._waited += time.perf_counter() - self._wait_began
            self._wait_began = 0.0

    def finish(self) -> None:
        """Wait until everything is in its place. Raises `MismatchedState` where a tensor changed under the copy."""
        try:
            if self._job is not None:
                self._job.wait()
            if self._ticket is not None:
                self._ticket.wait()
            self._check()
        finally:
            _in_flight.discard(self)
        if self._changed:
            self._plan.copy_at_once([self._plan.guarded[place] for place in self._changed])
            keys = [self._plan.keys[self._plan.guarded[place]] for place in self._changed[:5]]
            raise MismatchedState(
                f"{', '.join(keys)} changed outside of an optimizer's step while being copied; "
                "from the next time on this is copied at once"
            )
        self._plan.check_forms(self._tensors)

    def _check(self) -> None:
        """Compare the version counters, once: after the first time the tensors may change."""
        with self._lock:
            if self._checked:
                return
            self._checked = True
            now = list(map(_version, self._guarded))
            if now != self._versions:
                pairs = enumerate(zip(self._versions, now, strict=True))
                self._changed = [place for place, (before, after) in pairs if before != after]


class Stager:
    """Stages plans, with threads of its own for what is copied late. Belongs to the process that made it."""

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._copier: _native.Copier | None = None
        self._device: DeviceCopies | None = None
        self._pid = os.getpid()

    def begin(self, plan: StagePlan, tensors: Sequence[torch.Tensor], image: Image) -> Staging:
        """Copy the plan's tensors to their places in `image`. `Staging.finish` says when they are all there."""
        began = time.perf_counter()
        plan.prepare(tensors)
        if self._copier is None or self._pid != os.getpid():
            self._copier, self._pid = _native.Copier(self._threads), os.getpid()
        base = image.address
        staging = Staging(plan, tensors, image)
        job = self._copier.begin(plan.late_plan, base) if plan.late_plan is not None else None
        ticket = self._begin_on_device(plan, tensors, image) if plan.device else None
        staging.fly(job, ticket)
        if plan.early_plan is not None:
            self._copier.begin(plan.early_plan, base).wait()
        for number in plan.odd:
            _copy_odd(tensors[number], base + plan.offset(number))
        if ticket is not None and not plan.all_device_is_late:
            ticket.order()  # some of what is on the device may change right away
        if job is not None or ticket is not None:
            _in_flight.add(staging)
        staging.boundary_seconds = time.perf_counter() - began
        return staging

    def _begin_on_device(self, plan: StagePlan, tensors: Sequence[torch.Tensor], image: Image) -> DeviceTicket:
        if self._device is None:
            from ftrain.checkpoint.device import DeviceCopies

            self._device = DeviceCopies()
        pairs = [(image.address + plan.offset(number), tensors[number]) for number in plan.device]
        return self._device.begin(pairs, image)


_in_flight: set[Staging] = set()


def _before_optimizer_step(*_: Any) -> None:
    for staging in tuple(_in_flight):
        staging.before_write()
        _in_flight.discard(staging)


register_optimizer_step_pre_hook(_before_optimizer_step)
os.register_at_fork(after_in_child=_in_flight.clear)  # a child has none of the threads that copy


def _copy_odd(tensor: torch.Tensor, address: int) -> None:
    source = in_host_memory(tensor)
    _native.copy_batch([(address, source.data_ptr(), source.nbytes)])
