"""Tensors into memory that outlives them: at once, or while the next forward and backward run.

What training changes only in an optimizer's step (parameters, optimizer state) is copied *late*, by threads or by the
device, beside the training. Every optimizer waits, by a hook, until nothing of it is needed any more. Everything else
is copied before `Stager.begin` returns. A tensor that was changed behind the hook's back shows by its version counter:
then what was staged is refused, and that tensor is copied at once from then on.

Of very many tensors the training thread reads the counters and no more. Where each lies is looked at by a thread before
it begins to copy: one that was given other memory in between shows by that, and refuses what was staged as well. That
thread compares the counters, too, where it can before an optimizer comes.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from array import array
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ftrain import _native
from ftrain.checkpoint.staging.arena import Image
from ftrain.checkpoint.staging.host import all_lie_in_host_memory, in_host_memory, lies_in_host_memory
from ftrain.checkpoint.staging.look import MANY, Look, is_unchanged, look, recalled_versions, versions
from ftrain.errors import MismatchedState

if TYPE_CHECKING:
    from ftrain.checkpoint.staging.device import DeviceCopies, DeviceTicket

AT_A_TIME = 2048  # tensors that a thread looks at before it lets others have the interpreter


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
        self._is_looked_at_first = False
        self._is_all_late_on_host = False
        self._forms: list[tuple[torch.Size, torch.dtype]] = []

    def copy_at_once(self, changed: Sequence[int]) -> None:
        """These change outside of optimizers. Numbers count the tensors, here and below."""
        for number in changed:
            self._late[number] = False
        self.seen = None

    def look_first(self) -> None:
        """These are given other memory now and then: look at them before anything else may happen."""
        self._is_looked_at_first = True
        self.seen = None

    @property
    def may_be_looked_at_later(self) -> bool:
        """Whether all is late, in host memory and, the last time, where it was before."""
        return self.seen is not None and self._is_all_late_on_host and not self._is_looked_at_first

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
        self._is_all_late_on_host = len(self.guarded) == len(host) == len(tensors)
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
        self.begun: Future[None] | None = None  # where the copies begin later than this object
        self.job: _native.CopyJob | None = None
        self.ticket: DeviceTicket | None = None
        self.moved: list[str] = []  # keys of what was given other memory before it could be copied
        self._lock = threading.Lock()
        self._checked = False
        self._fence = _native.Fence()
        self._changed: list[int] = []
        self._wait_began = 0.0
        self._waited = 0.0
        self.boundary_seconds = 0.0

    @property
    def stall_seconds(self) -> float:
        """What the training thread has waited so far."""
        began = self._wait_began
        return self.boundary_seconds + self._waited + (time.perf_counter() - began if began else 0.0)

    def taken_seconds(self) -> float:
        """Processor time that copying took from others, once it is finished: nearly none where processors idle."""
        return self.job.taken_seconds() if self.job is not None else 0.0

    def watch(self, counted: bytes | None = None) -> None:
        """From here on what is copied late must not change. May be called when the copies have begun already.

        `counted` are the `versions` where they are known.
        """
        self._versions = versions(self._guarded, self._seen) if counted is None else counted

    def wait(self) -> None:
        """Wait for the copies."""
        if self.begun is not None:
            self.begun.result()
        if self.job is not None:
            self.job.wait()
        if self.ticket is not None:
            self.ticket.wait()

    def before_write(self) -> None:
        """To be called before what is copied late may change: waits for it, on the device where it is there."""
        self._wait_began = time.perf_counter()
        self._fence.drop()
        try:
            if self.begun is not None:
                self.begun.exception()  # raised by `finish`
            if self.job is not None:
                self.job.wait()
            self._check(at_a_time=0)
            if self.ticket is not None:
                self.ticket.order()
        finally:
            self._waited += time.perf_counter() - self._wait_began
            self._wait_began = 0.0

    def settle_beside(self) -> None:
        """Compare the versions in this thread, once and for all, so that the training thread need not.

        A change counts when it is done, and one may have been in progress when the copies ended: so the comparison
        comes after the main thread, which is the one that trains, has come out of all that it was in by then.
        """
        if self.job is None:
            return
        self.job.wait()
        if self._fence.set() and self._fence.wait():
            self._check()

    def finish(self, *, for_now: bool = False) -> None:
        """Wait until everything is in its place. Raises `MismatchedState` where a tensor changed under the copy.

        Called by another thread than the one that trains, it may come in the middle of a change, which counts when it
        is done: then `for_now`, and `settle` later on.
        """
        try:
            self.wait()
            self._check(for_now=for_now)
        finally:
            if not for_now:
                self.release()
        self._raise()
        self._image = None

    def settle(self) -> None:
        """The last word after `finish`, some time later: raises `MismatchedState` as that does."""
        self._check()
        self.release()
        self._raise()

    def release(self) -> None:
        """Nobody waits for this any more."""
        _in_flight.discard(self)
        self._fence.drop()
        self._tensors, self._guarded, self._checked = [], [], True

    def _raise(self) -> None:
        if self.moved:
            self._plan.look_first()
            raise MismatchedState(
                f"{', '.join(self.moved[:5])} got other memory while being copied: wait until what is saved is staged "
                "before that; from the next time on this is looked at first"
            )
        if self._changed:
            self._plan.copy_at_once([self._plan.guarded[place] for place in self._changed])
            keys = [self._plan.keys[self._plan.guarded[place]] for place in self._changed[:5]]
            raise MismatchedState(
                f"{', '.join(keys)} changed outside of an optimizer's step while being copied; "
                "from the next time on this is copied at once"
            )

    def _check(self, *, for_now: bool = False, at_a_time: int = AT_A_TIME) -> None:
        """Compare the version counters: once and for all, since after that the tensors may change, or only for now."""
        with self._lock:
            if self._checked:
                return
            now = versions(self._guarded, self._seen, at_a_time)
            if now != self._versions:
                pairs = enumerate(zip(array("q", self._versions), array("q", now), strict=True))
                self._changed = [place for place, (before, after) in pairs if before != after]
            if not for_now or self._changed:
                self._checked = True
                self._guarded, self._seen = [], None


class Stager:
    """Stages plans, with threads of its own for what is copied late. Belongs to the process that made it."""

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._copier: _native.Copier | None = None
        self._looker: ThreadPoolExecutor | None = None
        self._device: DeviceCopies | None = None
        self._pid = os.getpid()

    def begin(
        self,
        plan: StagePlan,
        tensors: list[torch.Tensor],
        image: Image,
        seen: Look | None = None,
        counted: bytes | None = None,
    ) -> Staging:
        """Copy the plan's tensors to their places in `image`. `Staging.finish` says when they are all there.

        `seen` is a look at the tensors of just now, `counted` are the versions of tensors that were recalled, where
        there is one of them. Raises as `StagePlan.prepare`.
        """
        began = time.perf_counter()
        if self._pid != os.getpid():
            self._copier, self._looker, self._pid = None, None, os.getpid()
        self._copier = self._copier or _native.Copier(self._threads)
        if plan.may_be_looked_at_later and seen is None and len(tensors) >= MANY:
            counted = recalled_versions(tensors, plan.seen) if counted is None else counted
            if counted is not None:
                staging = self._begin_later(plan, tensors, image, counted)
                staging.boundary_seconds = time.perf_counter() - began
                return staging
        plan.prepare(tensors, seen)
        staging = Staging(plan, tensors, image)
        base = image.address
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

    def pin(self, images: Sequence[Image], tensors: Sequence[torch.Tensor]) -> str:
        """Pin what tensors on devices will be copied to, so that no snapshot waits for that.

        Returns in one line what keeps such copies from being as fast as they can be.
        """
        devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
        if not devices:
            return ""
        return [self._copies_of_devices().pin_image(image, devices) for image in images][-1]

    def _begin_later(self, plan: StagePlan, tensors: list[torch.Tensor], image: Image, counted: bytes) -> Staging:
        """The copies begin in a thread, once it has seen that the tensors lie where the plan knows them."""
        copier, copies, before = self._copier, plan.late_plan, plan.seen
        assert copier is not None and copies is not None
        staging = Staging(plan, tensors, image)
        staging.watch(counted)

        def look_and_begin() -> None:
            now = look(tensors, before, AT_A_TIME)
            if now != before:
                staging.moved = _moved(plan.keys, now, before)
                return
            staging.job = copier.begin(copies, image.address)
            if by_main_thread:
                with contextlib.suppress(RuntimeError):  # the interpreter ends: then those who wait compare
                    looker.submit(staging.settle_beside)

        _in_flight.add(staging)
        by_main_thread = threading.current_thread() is threading.main_thread()
        looker = self._looker = self._looker or ThreadPoolExecutor(1, "ftrain-look", _native.wake_politely)
        staging.begun = looker.submit(look_and_begin)
        return staging

    def _begin_on_device(self, plan: StagePlan, tensors: Sequence[torch.Tensor], image: Image) -> DeviceTicket:
        pairs = [(image.address + plan.offset(number), tensors[number]) for number in plan.device]
        return self._copies_of_devices().begin(pairs, image)

    def _copies_of_devices(self) -> DeviceCopies:
        if self._device is None:
            from ftrain.checkpoint.staging.device import DeviceCopies

            self._device = DeviceCopies()
        return self._device


_in_flight: set[Staging] = set()


def _before_optimizer_step(*_: Any) -> None:
    for staging in tuple(_in_flight):
        staging.before_write()
        _in_flight.discard(staging)


register_optimizer_step_pre_hook(_before_optimizer_step)
os.register_at_fork(after_in_child=_in_flight.clear)  # a child has none of the threads that copy


def _moved(keys: Sequence[str], now: Look, before: Look | None) -> list[str]:
    if not isinstance(now, _native.Look) or not isinstance(before, _native.Look):
        return ["a tensor"]  # of a kind that the look before this one did not find
    pairs = zip(keys, array("Q", now.addresses()), array("Q", before.addresses()), strict=True)
    return [key for key, address, known in pairs if address != known] or ["a tensor"]


def _copy_odd(tensor: torch.Tensor, address: int) -> None:
    source = in_host_memory(tensor)
    _native.copy_batch([(address, source.data_ptr(), source.nbytes)])
