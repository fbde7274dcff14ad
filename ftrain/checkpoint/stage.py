"""Tensors into memory that outlives them: at once, or while the next forward and backward run.

What training changes only in an optimizer's step (parameters, optimizer state) is copied *late*, by threads or by the
device, beside the training. Every optimizer waits, by a hook, until nothing of it is needed any more. Everything else
is copied before `Stager.begin` returns. A tensor that was changed behind the hook's back shows by its version counter:
then what was staged is refused, and that tensor is copied at once from then on.
"""

from __future__ import annotations

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
from ftrain.checkpoint.host import all_lie_in_host_memory, in_host_memory, lies_in_host_memory
from ftrain.checkpoint.look import Look, is_unchanged, look, versions
from ftrain.errors import MismatchedState

if TYPE_CHECKING:
    from ftrain.checkpoint.device import DeviceCopies, DeviceTicket


class StagePlan:
    """Where tensors go, again and again: `keys` name them, `offsets` are in bytes from the base.

    The tensors themselves come with each `Stager.begin`. They may change their memory in between, not shape and type.
    `late` says for each whether it may be copied late.
    """

    def __init__(self, keys: Sequence[str], offsets: Sequence[int], late: Sequence[bool]) -> None:
        self.keys = keys
        self._offsets = offsets
        self._late = list(late)
        self.seen: Look | None = None
        self._forms: list[tuple[torch.Size, torch.dtype]] = []

    def copy_at_once(self, changed: Sequence[int]) -> None:
        """These change outside of optimizers. Numbers count the tensors, here and below."""
        for number in changed:
            self._late[number] = False
        self.seen = None

    def prepare(self, tensors: list[torch.Tensor], seen: Look | None = None) -> None:
        """Look where the tensors are now, and sort them by how they are to be copied.

        `seen` is the look at them where there was one. Raises `MismatchedState` where shape or type is another one.
        """
        seen = look(tensors, self.seen) if seen is None else seen
        if is_unchanged(tensors, seen, self.seen):
            return
        self._check_forms(tensors)
        full = [number for number, tensor in enumerate(tensors) if tensor.numel()]
        all_host = all_lie_in_host_memory(tensors)
        host = full if all_host else [number for number in full if lies_in_host_memory(tensors[number])]
        self.device = [number for number in full if tensors[number].device.type == "cuda"]
        self.odd = sorted(set(full) - set(host) - set(self.device))
        # Tensors made in inference mode count no versions: nothing would show that they changed.
        late = [number for number in full if self._late[number] and not tensors[number].is_inference()]
        odd = set(self.odd)
        self.guarded = [number for number in late if number not in odd]
        guarded = set(self.guarded)
        self.all_device_is_late = guarded.issuperset(self.device)
        self.late_plan = self._copy_plan([number for number in host if number in guarded], tensors)
        self.early_plan = self._copy_plan([number for number in host if number not in guarded], tensors)
        self.seen = seen

    def offset(self, number: int) -> int:
        return self._offsets[number]

    def _check_forms(self, tensors: Sequence[torch.Tensor]) -> None:
        forms = [(tensor.shape, tensor.dtype) for tensor in tensors]
        self._forms = self._forms or forms
        for key, (shape, dtype), (shape_now, dtype_now) in zip(self.keys, self._forms, forms, strict=True):
            if (shape, dtype) != (shape_now, dtype_now):
                raise MismatchedState(
                    f"{key} had the shape {list(shape)} and has {list(shape_now)}, "
                    f"was of {dtype} and is of {dtype_now}: plan again"
                )

    def _copy_plan(self, numbers: Sequence[int], tensors: Sequence[torch.Tensor]) -> _native.CopyPlan | None:
        if not numbers:
            return None
        return _native.CopyPlan(
            array("Q", [self._offsets[number] for number in numbers]),
            array("Q", [tensors[number].data_ptr() for number in numbers]),
            array("Q", [tensors[number].nbytes for number in numbers]),
        )


class Staging:
    """Copies in flight. Made by `Stager.begin`."""

    def __init__(self, plan: StagePlan, tensors: list[torch.Tensor], image: Image) -> None:
        self._plan = plan
        self._tensors = tensors  # held, as the image is, for as long as something may be copied
        self._image: Image | None = image
        all_guarded = len(plan.guarded) == len(tensors)
        self._guarded = tensors if all_guarded else [tensors[number] for number in plan.guarded]
        self._seen = plan.seen if all_guarded else None
        self._versions = b""
        self.job: _native.CopyJob | None = None
        self.ticket: DeviceTicket | None = None
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

    def watch(self) -> None:
        """From here on what is copied late must not change. May be called when the copies have begun already."""
        self._versions = versions(self._guarded, self._seen)

    def wait(self) -> None:
        """Wait for the copies."""
        if self.job is not None:
            self.job.wait()
        if self.ticket is not None:
            self.ticket.wait()

    def before_write(self) -> None:
        """To be called before what is copied late may change: waits for it, on the device where it is there."""
        self._wait_began = time.perf_counter()
        try:
            if self.job is not None:
                self.job.wait()
            self._check()
            if self.ticket is not None:
                self.ticket.order()
        finally:
            self._waited += time.perf_counter() - self._wait_began
            self._wait_began = 0.0

    def finish(self) -> None:
        """Wait until everything is in its place. Raises `MismatchedState` where a tensor changed under the copy."""
        try:
            self.wait()
            self._check()
        finally:
            _in_flight.discard(self)
        self._tensors, self._image = [], None
        if self._changed:
            self._plan.copy_at_once([self._plan.guarded[place] for place in self._changed])
            keys = [self._plan.keys[self._plan.guarded[place]] for place in self._changed[:5]]
            raise MismatchedState(
                f"{', '.join(keys)} changed outside of an optimizer's step while being copied; "
                "from the next time on this is copied at once"
            )

    def _check(self) -> None:
        """Compare the version counters, once: after the first time the tensors may change."""
        with self._lock:
            if self._checked:
                return
            self._checked = True
            now = versions(self._guarded, self._seen)
            if now != self._versions:
                pairs = enumerate(zip(array("q", self._versions), array("q", now), strict=True))
                self._changed = [place for place, (before, after) in pairs if before != after]
            self._guarded, self._seen = [], None


class Stager:
    """Stages plans, with threads of its own for what is copied late. Belongs to the process that made it."""

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._copier: _native.Copier | None = None
        self._device: DeviceCopies | None = None
        self._pid = os.getpid()

    def begin(self, plan: StagePlan, tensors: list[torch.Tensor], image: Image, seen: Look | None = None) -> Staging:
        """Copy the plan's tensors to their places in `image`. `Staging.finish` says when they are all there.

        `seen` is the look at the tensors where there was one. Raises as `StagePlan.prepare`.
        """
        began = time.perf_counter()
        plan.prepare(tensors, seen)
        if self._copier is None or self._pid != os.getpid():
            self._copier, self._pid = _native.Copier(self._threads), os.getpid()
        base = image.address
        staging = Staging(plan, tensors, image)
        try:
            if plan.late_plan is not None:
                staging.job = self._copier.begin(plan.late_plan, base)
            if plan.device:
                staging.ticket = self._begin_on_device(plan, tensors, image)
            staging.watch()
            if plan.early_plan is not None:
                self._copier.begin(plan.early_plan, base).wait()
            for number in plan.odd:
                _copy_odd(tensors[number], base + plan.offset(number))
            if staging.ticket is not None and not plan.all_device_is_late:
                staging.ticket.order()  # some of what is on the device may change right away
        except BaseException:
            staging.wait()  # before the tensors are let go
            raise
        if staging.job is not None or staging.ticket is not None:
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
