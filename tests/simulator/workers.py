"""Simulated workers: their control pages, arenas, collectives, snapshots and deaths."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ftrain.core import local
from ftrain.core import messages as m
from ftrain.core.page import NO_STEP, Phase
from ftrain.errors import ExitCode

if TYPE_CHECKING:
    from tests.simulator.agents import Agent
    from tests.simulator.world import World

PEER_GONE = "Connection closed by peer"


@dataclass(slots=True)
class Page:
    """The control page's fields, word by word."""

    step: int = NO_STEP
    phase: int = Phase.BOOT
    armed: int = 0
    armed_attempt: int = 0
    armed_slot: int = 0
    armed_hold: int = 0
    verdict: int = 0
    release: int = 0
    total_steps: int = 0


@dataclass(slots=True)
class Arena:
    """One local rank's slots. Content is (generation, attempt, step, rank), or "torn" while it is being written."""

    slots: list[object] = field(default_factory=lambda: [None, None])


class Group:
    """One generation's process group: nobody finishes step k+1 before everybody has entered it."""

    __slots__ = ("broken", "entered", "joined", "members", "ready", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.members: dict[int, Worker] = {}
        self.joined: set[int] = set()
        self.entered: dict[int, int] = {}
        self.ready: dict[int, Worker] = {}
        self.broken = False

    def left(self, worker: Worker) -> None:
        """A member is gone: whoever waits for it in a collective learns of it."""
        self.members.pop(worker.rank, None)
        self.broken = True
        for other in list(self.members.values()):
            if other.waiting:
                other.peer_gone()


class Worker:
    """One process, from its fork to its end."""

    __slots__ = (
        "agent",
        "alive",
        "arena",
        "group",
        "last_number",
        "local_rank",
        "page",
        "pid",
        "rank",
        "said_at",
        "start",
        "waiting",
        "world",
    )

    def __init__(self, world: World, agent: Agent, start: m.Start, rank: int, local_rank: int, arena: Arena) -> None:
        self.world = world
        self.agent = agent
        self.start = start
        self.rank = rank
        self.local_rank = local_rank
        self.arena = arena
        self.pid = world.next_pid()
        self.page = Page()
        self.alive = True
        self.waiting = False  # for a peer, in a collective
        self.said_at = 0.0
        self.last_number = 0  # the attempt that the last snapshot was for
        self.group = world.group(start)
        world.truth.worker_born(self)
        self.group.members[rank] = self
        if world.plan.joins:
            world.after(world.uniform(0.05, 0.3), self._boot)
        else:
            world.after(world.uniform(2.0, 4.0), self._plain_end)

    # ------------------------------------------------------------------------------------------------------- its life

    def _plain_end(self) -> None:
        if self.alive and self.group.broken and self.group.members and len(self.group.members) < self.group.size:
            self.peer_gone()
        elif self.alive:
            self.end(0)

    def _boot(self) -> None:
        if not self.alive:
            return
        self.page.phase = Phase.JOINED
        self.say(local.WorkerJoined())
        if self.group.broken:
            self.peer_gone()
            return
        self.group.joined.add(self.rank)
        self.waiting = True
        if len(self.group.joined) == self.group.size:
            for worker in list(self.group.members.values()):
                worker.waiting = False
                self.world.after(self.world.uniform(0.02, 0.2), worker._restore)

    def _restore(self) -> None:
        if not self.alive:
            return
        self.page.phase = Phase.RESTORING
        resume = self.start.resume
        step = 0
        if resume is not None:
            cause = self.world.truth.restored(self, resume)
            if cause:
                self.raises("ftrain.errors.CorruptCheckpoint", cause)
                return
            step = resume.attempt.step
        self.page.total_steps = self.world.plan.total_steps
        self.page.step = step
        self.page.phase = Phase.BOUNDARY
        self.say(local.WorkerLooping(step, self.page.total_steps))
        self._go_on()

    def _go_on(self) -> None:
        """Leave the boundary: for the next step, or for the end of the loop."""
        page = self.page
        if page.total_steps and page.step >= page.total_steps:
            page.phase = Phase.LAST
            self.say(local.WorkerAtEnd(page.step))
            self.notified()
            return
        page.phase = Phase.STEP
        group = self.group
        group.entered[self.rank] = page.step + 1
        if group.broken:
            self.peer_gone()
            return
        if len(group.entered) == group.size and min(group.entered.values()) == page.step + 1:
            for worker in group.ready.values():
                worker.waiting = False
                self.world.after(self.world.uniform(0.0, 0.02), worker._boundary)
            group.ready.clear()
        self.world.after(self.world.plan.step_seconds * self.world.uniform(0.5, 1.5), self._computed)

    def _computed(self) -> None:
        if not self.alive:
            return
        group = self.group
        if len(group.entered) == group.size and min(group.entered.values()) > self.page.step:
            self._boundary()
        elif group.broken:
            self.peer_gone()
        else:
            self.waiting = True
            group.ready[self.rank] = self

    def _boundary(self) -> None:
        if not self.alive:
            return
        self.page.phase = Phase.BOUNDARY
        self.page.step += 1
        self.world.after(0.01 * self.world.random(), self._look)

    def _look(self) -> None:
        """STEP was stored; now ARMED is loaded. The agent may do what it likes in between."""
        if not self.alive:
            return
        if self.page.armed == self.page.step:
            self.world.after(0.005 * self.world.random(), self._snapshot)
        else:
            self._go_on()

    # ---------------------------------------------------------------------------------------------------- snapshots

    def _snapshot(self) -> None:
        page = self.page
        if not self.alive:
            return
        if page.armed != page.step:  # disarmed between the two loads
            self._go_on()
            return
        page.phase = Phase.SNAPSHOT
        self.arena.slots[page.armed_slot] = "torn"
        number, slot, hold = page.armed_attempt, page.armed_slot, page.armed_hold
        self.last_number = number
        self.world.after(0.1 * self.world.random(), self._sealed, number, slot, hold)

    def _sealed(self, number: int, slot: int, hold: int) -> None:
        if not self.alive:
            return
        content = (self.start.generation, number, self.page.step, self.rank)
        self.arena.slots[slot] = content
        if self.world.seal_fails():
            self.say(local.WorkerSealFailed(number, "a tensor could not be copied"))
        else:
            self.say(local.WorkerSealed(number, 0.0))
        if hold:
            self.page.phase = Phase.HOLD
            self.notified()
        else:
            self.page.phase = Phase.BOUNDARY
            self._go_on()

    def notified(self) -> None:
        """The agent changed the page: what a worker that waits for it does about that."""
        page = self.page
        if not self.alive:
            return
        if page.phase == Phase.HOLD:
            if page.verdict == self.last_number:
                page.phase = Phase.BOUNDARY
                self._go_on()
            elif page.verdict == -self.last_number:
                self.end(int(ExitCode.PREEMPTED))
        elif page.phase == Phase.LAST:
            if page.armed == page.step and page.armed_attempt != self.last_number:
                page.phase = Phase.BOUNDARY
                self.world.after(0.005 * self.world.random(), self._snapshot)
            elif page.release:
                page.phase = Phase.DONE
                self.end(0)

    # --------------------------------------------------------------------------------------------------------- ends

    def say(self, message: local.FromWorker) -> None:
        self.said_at = max(self.said_at, self.world.now + 0.01 * self.world.random())
        self.world.at(self.said_at, self.agent.worker_said, self, message)

    def peer_gone(self) -> None:
        self.waiting = False
        self.world.after(self.world.uniform(0.02, 0.6), self.raises, "DistBackendError", PEER_GONE)

    def raises(self, kind: str, text: str) -> None:
        if not self.alive:
            return
        error = m.ErrorReport(kind, text, f"{kind}: {text}", "train.py:1", self.world.now)
        self.say(local.WorkerError(error))
        self.end(1)

    def end(self, code: int, signal: int = 0) -> None:
        """The process ends. What it said before is still heard, then its end."""
        if not self.alive:
            return
        self.alive = False
        if code == 0 and not signal:
            self.group.members.pop(self.rank, None)
        else:
            self.group.left(self)
        page = self.page
        exit = m.RankExit(
            self.rank, self.local_rank, self.pid, code, signal, page.step, int(page.phase), None, self.world.now
        )
        self.said_at = max(self.said_at, self.world.now + 0.02 * self.world.random())
        self.world.at(self.said_at, self.agent.worker_exited, self, exit)

    def vanish(self) -> None:
        """Its agent died, and it with it: nobody is left to be told but its peers."""
        if self.alive:
            self.alive = False
            self.group.left(self)
