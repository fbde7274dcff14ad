"""`async_save`: the copy overlaps what follows, a thread writes it and commits."""

from __future__ import annotations

import dataclasses
import os
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ftrain import _native
from ftrain.checkpoint.peers import Peers, peers, together
from ftrain.checkpoint.staging.arena import Arena, Image
from ftrain.checkpoint.staging.stage import StagePlan, Stager, Staging
from ftrain.checkpoint.writing.agreement import Agreed, Plans
from ftrain.checkpoint.writing.job import Job, Jobs, State
from ftrain.checkpoint.writing.pack_plan import CleanSlots, PackPlan
from ftrain.checkpoint.writing.persist import beside_training
from ftrain.checkpoint.writing.target import Target
from ftrain.core.layout import TensorSpec
from ftrain.errors import MismatchedState, UsageError
from ftrain.storage import Opener
from ftrain.storage.base import Effort
from ftrain.storage.neighbours import Neighbours

SLOTS = 2  # of the arena: one being written, one being filled


def async_save(
    path: str | Path,
    state: State,
    *,
    step: int = 0,
    keep: str | None = None,
    compress: str | None = None,
    bytes_per_second_max: int = 0,
) -> Saving:
    """Save a state while training goes on: returns at once, the copy overlaps what follows.

    As `save`, except that `Saving.result` says what became of it. Optimizers wait by themselves until what they change
    is copied; whoever changes tensors in another way calls `Saving.staged` before. A tensor that was changed all the
    same makes this save fail, never the checkpoint wrong. The memory for the copy is kept for the next call, with room
    for two: a third save waits for the first. `bytes_per_second_max` bounds how fast this rank writes (0: no bound):
    for storage that training needs, too.
    """
    began = time.perf_counter()
    if bytes_per_second_max < 0:
        raise UsageError(f"bytes_per_second_max={bytes_per_second_max}: give a number of bytes, or 0 for no bound")
    group, engine = peers(), _engine()
    effort = engine.effort
    if bytes_per_second_max != effort.bytes_per_second_max:
        effort = dataclasses.replace(effort, bytes_per_second_max=bytes_per_second_max)
    try:
        target, job = Target(path, step, keep, compress, engine.opener), engine.jobs.job(state)
    except Exception:
        with together(group, f"saving {path}"):  # the other ranks are about to ask how it went
            raise
    saving = engine.begin(target, job, group, effort)
    saving.called(time.perf_counter() - began)
    return saving


class Saving:
    """A save under way. Made by `async_save`."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._call_seconds = 0.0
        self._waited_seconds = 0.0
        self._staged: Future[None] = Future()
        self._result: Future[None] = Future()

    @property
    def stall_seconds(self) -> float:
        """How long the training thread has waited for this save so far."""
        hook_seconds = self._staging.stall_seconds - self._staging.boundary_seconds
        return self._call_seconds + self._waited_seconds + hook_seconds

    def staged(self, timeout: float | None = None) -> None:
        """Wait until everything is copied, so that it may change. Raises what went wrong; TimeoutError."""
        began = time.perf_counter()
        try:
            self._staged.result(timeout)
            self._staging.before_write()  # from here on it may change
        finally:
            self._waited_seconds += time.perf_counter() - began

    def done(self) -> bool:
        """Whether `result` would answer at once."""
        return self._result.done()

    def result(self, timeout: float | None = None) -> None:
        """Wait until the checkpoint is committed and durable. Raises what kept it from that; TimeoutError."""
        self._result.result(timeout)

    # ------------------------------------------------------------------------------------------- for the engine only

    def wait(self) -> None:
        """As `result`, whatever became of it."""
        self._result.exception()

    def settle(self) -> None:
        """The last word on what was copied. Raises `MismatchedState`."""
        self._staging.settle()

    def called(self, seconds: float) -> None:
        self._call_seconds = seconds

    def run(self, write: Callable[[Callable[[], None]], None]) -> None:
        """Do the work, in a thread. `write` is given what waits for the copies."""

        def finish() -> None:
            self._staging.finish(for_now=True)
            self._staged.set_result(None)

        try:
            write(finish)
        except BaseException as error:  # noqa: BLE001 - a thread's edge: whoever asks for the result gets it
            if not self._staged.done():
                self._staged.set_exception(error)
            self._result.set_exception(error)
        else:
            self._result.set_result(None)
        finally:
            self._staging.release()


class _Engine:
    """The memory and the threads of this process's asynchronous saves."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.jobs = Jobs()
        self.opener = Opener()
        self.effort = beside_training(Neighbours.of_environment().ranks)
        self._plans = Plans()
        self._arena = Arena(_native.memory_file("ftrain-save"))
        self._stager = Stager()
        self._writer = ThreadPoolExecutor(1, "ftrain-async-save", _native.wake_politely)
        self._users: list[Saving | None] = []  # of each slot, the last
        self._order: dict[int, int] = {}  # by slot, the number of the save that filled it
        self._count = 0
        self._slots = CleanSlots(self._arena)
        self._stage_plan: tuple[Agreed, StagePlan] | None = None

    def begin(self, target: Target, job: Job, group: Peers, effort: Effort) -> Saving:
        what = f"saving {target}"
        agreed = self._plans.known(job.specs, group)
        is_checked = agreed is None or group.world_size == 1
        if agreed is None:
            with together(group, what):
                pass
            agreed = self._plans.agree(job.specs, group)
        slot, image = self._take_slot(agreed.pack)
        if self._stage_plan is None or self._stage_plan[0] is not agreed:
            keys = [write.spec.key for write in agreed.pack.writes]
            self._stage_plan = agreed, StagePlan(keys, agreed.pack.offsets, job.written_late(agreed.pack))
        seen = job.seen if job.writes_all(agreed.pack) else None
        counted = job.versions if job.writes_all(agreed.pack) else None
        saving = Saving(self._stager.begin(self._stage_plan[1], job.written(agreed.pack), image, seen, counted))
        self._users[slot], self._order[slot] = saving, self._count
        self._count += 1
        specs, plain = job.specs, job.plain

        def write(finish: Callable[[], None]) -> None:
            if not is_checked:
                with together(group, what):
                    pass
                self._check(specs, agreed, group)

            def find() -> array[int]:
                finish()
                return array("Q", [image.address + offset for offset in agreed.pack.offsets])

            try:
                target.commit(agreed, group, find, plain, effort, image.address, saving.settle)
            except MismatchedState:
                self.jobs.forget()
                raise

        self._writer.submit(saving.run, write)
        return saving

    def _check(self, specs: Sequence[TensorSpec], agreed: Agreed, group: Peers) -> None:
        """What was copied by the plan of last time has to be by that of all ranks now."""
        if self._plans.agree(specs, group) is not agreed:
            raise MismatchedState("another rank's tensors are not those of its last save: this one is void, save again")

    def _take_slot(self, pack: PackPlan) -> tuple[int, Image]:
        """A slot that is free and large enough, with zeros between the boxes. Waits for a save where there is none."""
        slot = next((slot for slot, user in enumerate(self._users) if user is None or user.done()), None)
        if slot is None and len(self._users) < SLOTS:
            slot = len(self._users)
            self._users.append(None)
        if slot is None:
            # They are written one after the other: the one that began first is done first.
            slot = min(range(SLOTS), key=lambda slot: self._order[slot])
            user = self._users[slot]
            assert user is not None
            user.wait()
        if self._arena.slots <= slot:
            self._arena.reserve(slot + 1, pack.layout.image_bytes, 0, 0)
        elif self._arena.image_bytes(slot) < pack.layout.image_bytes:
            self._arena.grow(slot, pack.layout.image_bytes, 0, 0)
        return slot, self._slots.image(slot, pack)


_engines: list[_Engine] = []


def _engine() -> _Engine:
    """This process's own: a forked child begins anew."""
    if not _engines or _engines[-1].pid != os.getpid():
        _engines[:] = [_Engine()]
    return _engines[-1]
