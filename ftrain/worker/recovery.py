"""How this rank gets into a generation in which other ranks are alive: as one of them, or as a newcomer.

    survivor   halt ──► tell ───┐
                                ├──► (replay) ──► meet and come to the line ──► next step
    newcomer           learn ───┘

*Halt*: the step in the middle is given up, and the agent is told what is still whole here. *Tell*, *learn*: a newcomer
takes the layout of the survivors' DDP buckets, for in another one sums add in another order, to other bits. *Replay*:
this rank does one step by itself, for what the step leaves behind that is its own, because the line lies one step
ahead of what it has.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from torch.distributed import PrefixStore, Store

from ftrain.checkpoint.reading.arena_restore import restore_from_arenas
from ftrain.checkpoint.reading.live_copy import copy_live
from ftrain.checkpoint.state.tracked import Tracked
from ftrain.core.local import Recover
from ftrain.core.manifest import decode_index
from ftrain.core.messages import Attempt, Line, Resume, Tier
from ftrain.core.supervision import sounds_like_a_lost_peer
from ftrain.errors import CorruptCheckpoint, FtrainError, PeerLost
from ftrain.worker import after_failure, groups
from ftrain.worker.boundary import Boundary
from ftrain.worker.link import Link
from ftrain.worker.patience import wait_for

LAYOUTS = "ftrain/layouts"
CAUSES_MAX = 20  # of one exception, that are looked at
RENEWED_SECONDS = 1.0  # between two looks; the event comes at once
LEAVE_LOOK_SECONDS = 0.01


@dataclass(slots=True)
class Coming:
    """A generation that this rank is on its way into."""

    line: Line
    generation: int
    store: Store
    replays: bool  # the step before the line, by itself, first
    began: bool = False  # with that


class Recovery:
    """One for each worker of a run that takes snapshots.

    `restore_commit` restores everything from the commit to resume from, `take_plain` what a snapshot has beside what
    is tracked.
    """

    def __init__(
        self,
        link: Link,
        tracked: Tracked,
        boundary: Boundary,
        restore_commit: Callable[[Resume | None], int],
        take_plain: Callable[[dict[str, Any]], None],
    ) -> None:
        self._link = link
        self._tracked = tracked
        self._boundary = boundary
        self._restore_commit = restore_commit
        self._take_plain = take_plain
        self._live = -1  # the step whose shared state is in the tensors of this process
        self._private: bytes | None = None  # this rank's own state at the line, once it has replayed
        self._renewed = threading.Event()  # the training thread is on its way into another generation
        self._leaving = False
        self._watcher = threading.Thread(target=self._watch, name="ftrain-revoke", daemon=True)
        self._watcher.start()
        atexit.register(self._leave)

    def reached(self, step: int) -> None:
        """At each boundary: all state is of this step. Keeps what is private to this rank where it outlives us."""
        private = self._boundary.capture()
        if private is not None:
            self._link.box.write(step, private)
        else:
            self._link.box.forget_after(step - 1)  # too large to keep, and an older one is of another past
        self._live = step

    def is_lost_peer(self, error: BaseException) -> bool:
        """Whether an exception in a step came of a lost peer, rather than of the user's own code."""
        if not isinstance(error, Exception) or (isinstance(error, FtrainError) and not isinstance(error, PeerLost)):
            return False
        return self._link.revoked or groups.is_revoked() or any(map(_comes_of_a_peer, _chain(error)))

    def halt(self, first_step: bool) -> Recover:
        """Give up the step in the middle, stand still, and wait for the generation to go on in.

        `first_step` says that this process has not done any yet. Raises `Unrecoverable`.
        """
        groups.revoke(self._link.generation)
        if not self._boundary.live():
            self._live = -1
        after_failure.check_recoverable(self._tracked.modules)
        # What was lost is begun anew from here on, so the rest of the way to a standstill costs nobody time.
        self._link.halted(self._live)
        groups.rehearse()
        after_failure.recover_modules(self._tracked.modules, first_step)
        recover = self._link.wait_recover()
        self._renewed.set()
        return recover

    def survivor(self, line: Line, store: Store) -> Coming:
        """The way into the generation that `halt` was told of. Its ranks meet in the store."""
        layouts = after_failure.bucket_layouts(self._tracked.modules)
        store.set(LAYOUTS, msgspec.json.encode(layouts))  # type: ignore[arg-type]  # bytes are taken as they are
        return self._coming(line, store)

    def newcomer(self, line: Line, store: Store) -> Coming:
        """The way of a process that was forked for this generation, in which others are alive. Raises `PeerLost`."""
        wait_for(store, [LAYOUTS], self._link.check, self._link.boot.world_size)
        layouts = msgspec.json.decode(store.get(LAYOUTS), type=list[list[list[int]] | None])
        after_failure.lay_out_buckets(self._tracked.modules, layouts)
        self._link.wait_fetched()
        return self._coming(line, store)

    def prepare_replay(self, coming: Coming) -> None:
        """What is private to this rank is as it was before the step that it does again."""
        self._boundary.roll_back(self._kept(coming.line.step - 1))

    def did_replay(self) -> None:
        if not self._boundary.live():
            self._live = -1  # for an optimizer wrote: should the line be lost, nobody goes on from this
        self._private = self._boundary.capture()

    def bring(self, coming: Coming, resume: Resume | None) -> Store:
        """Meet the peers and come to the line with them. Returns where they plan their snapshots.

        `resume` is the commit that the line may be. Raises `PeerLost` when it is revoked meanwhile: then `halt` again.
        """
        line, rank = coming.line, self._link.boot.rank
        groups.reform(PrefixStore("ftrain/group", coming.store), coming.generation)
        match line.tier:
            case Tier.LIVE:
                self._bring_live(line, rank)
            case Tier.ARENA:
                assert line.attempt is not None
                self._live = -1
                arena, world_size = self._link.arena, self._link.boot.world_size
                slot = self._slot(line.attempt)
                plain = restore_from_arenas(self._tracked, arena, slot, line.attempt, rank, world_size)
                self._take_plain(plain)
            case Tier.STORAGE:
                self._live = -1
                self._restore_commit(resume)
        self.reached(line.step)
        return PrefixStore(f"ftrain/exchange/{coming.generation}", coming.store)

    def _bring_live(self, line: Line, rank: int) -> None:
        private = self._private if self._private is not None else self._kept(line.step)
        gives = any(rank == giver for giver, _ in line.copies)
        if gives:
            self._boundary.roll_back(private)  # who receives learns from us how the optimizer stands
        if any(rank == taker for _, taker in line.copies):
            self._live = -1
        copy_live(self._tracked, rank, line.copies)
        if not gives:
            self._boundary.roll_back(private)

    def _coming(self, line: Line, store: Store) -> Coming:
        self._private = None  # what was replayed for a line that is lost is of no other one
        return Coming(line, self._link.generation, store, replays=self._link.boot.rank in line.replay)

    def _kept(self, step: int) -> bytes:
        private = self._link.box.read(step)
        if private is None:
            raise CorruptCheckpoint(
                f"rank {self._link.boot.rank}: the black box has no whole record of step {step}, though it was to"
            )
        return private

    def _slot(self, attempt: Attempt) -> int:
        arena = self._link.arena
        arena.attach()
        for slot in range(arena.slots):
            if arena.is_sealed(slot):
                sealed = decode_index(arena.read_index(slot), f"slot {slot} of the arena", sealed=True)
                if sealed.attempt == attempt:
                    return slot
        raise CorruptCheckpoint(f"rank {self._link.boot.rank}: no slot of the arena holds the snapshot of {attempt}")

    def _watch(self) -> None:
        """Wakes whatever collective the training thread is in, once its generation is over."""
        while not self._leaving:
            if not self._link.wait_revoked(lambda: self._leaving):
                return
            generation = self._link.generation
            if not self._link.revoked:
                continue  # the training thread was faster: this is the next one already, which is not over
            groups.revoke(generation)
            while self._link.generation == generation and not self._leaving:
                if not self._renewed.wait(RENEWED_SECONDS):
                    groups.wake(generation)
                self._renewed.clear()

    def _leave(self) -> None:
        """End the watcher: a thread that comes back from native code while Python ends would take the process down."""
        self._leaving = True
        self._renewed.set()
        while self._watcher.is_alive():
            self._link.wake()
            self._watcher.join(LEAVE_LOOK_SECONDS)


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    now: BaseException | None = error
    while now is not None and len(found) < CAUSES_MAX:
        found.append(now)
        now = now.__cause__ or now.__context__
    return found


def _comes_of_a_peer(error: BaseException) -> bool:
    return isinstance(error, PeerLost) or (
        isinstance(error, RuntimeError) and sounds_like_a_lost_peer(f"{type(error).__name__}: {error}")
    )
