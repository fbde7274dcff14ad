"""Simulated workers: their control pages, arenas, collectives, snapshots and deaths."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ftrain.core import local
from ftrain.core import messages as m
from ftrain.core.copying import SLOTS
from ftrain.core.node_state import SLOTS_MIN
from ftrain.core.page import NO_STEP, Phase, verdict_on
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
class Memory:
    """One local rank's slots and black box, which outlive its process.

    A slot's content is (generation, attempt, step, rank), or "torn" while it is being written. The box has the two
    newest boundaries, and of each the history that it is of: the generation in which that step was done.
    """

    slots: list[object] = field(default_factory=lambda: [None] * (SLOTS + 1))
    box: list[int] = field(default_factory=list)
    histories: dict[int, int] = field(default_factory=dict)

    def keep(self, step: int, history: int) -> None:
        self.box = [*[one for one in self.box if one < step][-1:], step]
        self.histories = {one: self.histories.get(one, 0) for one in self.box} | {step: history}


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
        "fetches",
        "generation",
        "group",
        "halted",
        "halting",
        "history",
        "hung",
        "last_number",
        "live",
        "local_rank",
        "looped",
        "memory",
        "page",
        "pid",
        "rank",
        "said_at",
        "start",
        "waiting",
        "world",
    )

    def __init__(self, world: World, agent: Agent, start: m.Start, rank: int, local_rank: int, memory: Memory) -> None:
        self.world = world
        self.agent = agent
        self.start = start
        self.rank = rank
        self.local_rank = local_rank
        self.memory = memory
        self.pid = world.next_pid()
        self.page = Page()
        self.alive = True
        self.fetches = start.fetch is not None  # what it goes on from is on its way
        self.waiting = False  # for a peer, in a collective
        self.said_at = 0.0
        self.last_number = 0  # the attempt that the last snapshot was for
        self.generation = start.generation  # that it takes part in
        self.live = -1  # the step that its tensors are of
        self.history = 0  # the generation in which that step was done
        self.looped = False
        self.halted = False
        self.halting = False  # it will, once the snapshot that it takes is sealed
        self.hung = False  # in native code: it stands still, but never says so
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
        self._meet()

    def fetched(self) -> None:
        """What it goes on from is in its memory."""
        self.fetches = False
        if self.alive and self.page.phase == Phase.JOINED:
            self._meet()

    def _meet(self) -> None:
        """Wait for all ranks of the generation, then get the state to go on from."""
        if self.fetches:
            return
        self.group.joined.add(self.rank)
        self.waiting = True
        if len(self.group.joined) == self.group.size:
            for worker in list(self.group.members.values()):
                worker.waiting = False
                self.world.after(self.world.uniform(0.02, 0.2), worker._restore, worker.generation)

    def _restore(self, generation: int) -> None:
        if not self.alive or self.generation != generation or self.halted:
            return
        if self.group.broken:
            self.peer_gone()
            return
        self.page.phase = Phase.RESTORING
        line, resume = self.start.line, self.start.resume
        step = 0
        if line is not None and line.tier is not m.Tier.STORAGE:
            cause = self.world.truth.brought(self, line)
            step = line.step
        else:
            cause = self.world.truth.restored(self, resume) if resume is not None else ""
            step = resume.attempt.step if resume is not None else 0
        if cause:
            self.raises("ftrain.errors.CorruptCheckpoint", cause)
            return
        self.page.total_steps = self.world.plan.total_steps
        self.page.step = step
        self.page.phase = Phase.BOUNDARY
        self.live = step
        self.looped = True
        self.history = self.world.truth.history_of(self, line, resume)
        self.memory.keep(step, self.history)
        self.world.truth.loops(self, step)
        self.say(local.WorkerLooping(step, self.page.total_steps, 0.0, generation))
        self._go_on()

    # -------------------------------------------------------------------------------------------- going on in place

    def revoke(self, generation: int) -> None:
        """The agent has said on the page that the generation is over."""
        if self.alive and generation >= self.generation and not self.halted:
            self.world.after(0.05 * self.world.random(), self.halt, self.generation)

    def halt(self, generation: int) -> None:
        if not self.alive or self.halted or generation != self.generation or self.hung:
            return
        if self.page.phase == Phase.SNAPSHOT:
            self.halting = True
            return
        if self.world.hangs():
            self.hung = True
            return
        self.halted, self.halting, self.waiting = True, False, False
        if self.page.phase == Phase.RESTORING or (self.page.phase == Phase.STEP and self.world.half_written()):
            self.live = -1
        self.page.phase = Phase.HALTED
        self.group.left(self)
        self.say(local.WorkerHalted(self.generation, self.live, tuple(self.memory.box)))

    def go_on_in(self, start: m.Start) -> None:
        """The agent has told of the generation to go on in."""
        if self.alive and self.halted:
            self.start, self.generation, self.halted = start, start.generation, False
            self.page.phase = Phase.RESTORING
            self.page.armed = 0
            self.group = self.world.group(start)
            self.group.members[self.rank] = self
            self.world.after(self.world.uniform(0.01, 0.1), self._arrive, start.generation)

    def _arrive(self, generation: int) -> None:
        if not self.alive or self.halted or self.generation != generation:
            return
        if self.group.broken:
            self.peer_gone()
        else:
            # What it has is untouched until everybody is there.
            self.page.phase = Phase.BOUNDARY
            self._meet()

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
        if self.halted:
            return
        group.entered[self.rank] = page.step + 1
        if group.broken:
            self.peer_gone()
            return
        if len(group.entered) == group.size and min(group.entered.values()) == page.step + 1:
            for worker in group.ready.values():
                worker.waiting = False
                self.world.after(self.world.uniform(0.0, 0.02), worker._boundary, self.generation)
            group.ready.clear()
        seconds = self.world.plan.step_seconds * self.world.uniform(0.5, 1.5)
        self.world.after(seconds, self._computed, self.generation)

    def _computed(self, generation: int) -> None:
        if not self.alive or self.halted or self.hung or generation != self.generation:
            return
        group = self.group
        if len(group.entered) == group.size and min(group.entered.values()) > self.page.step:
            self._boundary(generation)
        elif group.broken:
            self.peer_gone()
        else:
            self.waiting = True
            group.ready[self.rank] = self

    def _boundary(self, generation: int) -> None:
        if not self.alive or self.halted or self.hung or generation != self.generation:
            return
        self.page.phase = Phase.BOUNDARY
        self.page.step += 1
        self.live = self.page.step
        self.history = self.generation
        self.memory.keep(self.page.step, self.history)
        if self.world.truth.planned(self):
            shard = "all" if self.world.plan.replicated else f"rank {self.rank}"
            slots = self.start.slots if self.world.plan.roomy and not self.world.plan.replicated else SLOTS_MIN
            self.say(local.WorkerPlanned(shard, self.world.plan.replays, slots))
        self.world.after(0.01 * self.world.random(), self._look, generation)

    def _look(self, generation: int) -> None:
        """STEP was stored; now ARMED is loaded. The agent may do what it likes in between."""
        if not self.alive or self.halted or self.hung or generation != self.generation:
            return
        if self.page.armed == self.page.step:
            self.world.after(0.005 * self.world.random(), self._snapshot, generation)
        else:
            self._go_on()

    # ---------------------------------------------------------------------------------------------------- snapshots

    def _snapshot(self, generation: int) -> None:
        page = self.page
        if not self.alive or self.halted or self.hung or generation != self.generation:
            return
        if page.armed != page.step:  # disarmed between the two loads
            self._go_on()
            return
        page.phase = Phase.SNAPSHOT
        self.memory.slots[page.armed_slot] = "torn"
        number, slot, hold = page.armed_attempt, page.armed_slot, page.armed_hold
        self.last_number = number
        self.world.after(0.1 * self.world.random(), self._sealed, number, slot, hold)

    def _sealed(self, number: int, slot: int, hold: int) -> None:
        if not self.alive:
            return
        content = (self.start.generation, number, self.page.step, self.rank)
        self.memory.slots[slot] = content
        self.world.truth.sealed(self, m.Attempt(self.start.generation, self.page.step, number))
        if self.world.seal_fails():
            self.say(local.WorkerSealFailed(number, "a tensor could not be copied"))
        else:
            self.say(local.WorkerSealed(number, m.Cost(0.0, 0.05)))
        if self.halting:
            self.page.phase = Phase.BOUNDARY
            self.halt(self.generation)
            return
        if hold:
            self.page.phase = Phase.HOLD
            self.notified()
        else:
            self.page.phase = Phase.BOUNDARY
            self._go_on()

    def notified(self) -> None:
        """The agent changed the page: what a worker that waits for it does about that."""
        page = self.page
        if not self.alive or self.halted or self.hung:
            return
        if page.phase == Phase.HOLD:
            mine = verdict_on(self.generation, self.last_number, leave=False)
            if page.verdict == -mine:
                self.end(int(ExitCode.PREEMPTED))
            elif abs(page.verdict) >= mine:
                page.phase = Phase.BOUNDARY
                self._go_on()
        elif page.phase == Phase.LAST:
            if page.armed == page.step and page.armed_attempt != self.last_number:
                page.phase = Phase.BOUNDARY
                self.world.after(0.005 * self.world.random(), self._snapshot, self.generation)
            elif page.release >= self.generation:
                page.phase = Phase.DONE
                self.end(0)

    # --------------------------------------------------------------------------------------------------------- ends

    def say(self, message: local.FromWorker) -> None:
        self.said_at = max(self.said_at, self.world.now + 0.01 * self.world.random())
        self.world.at(self.said_at, self.agent.worker_said, self, message)

    def peer_gone(self) -> None:
        self.waiting = False
        seconds = self.world.uniform(0.02, 0.6)
        if self.looped and not self.world.outside_of_steps():
            self.world.after(seconds, self.halt, self.generation)
        else:
            self.world.after(seconds, self._raises_in, self.generation)

    def _raises_in(self, generation: int) -> None:
        if generation == self.generation and not self.halted:
            self.raises("DistBackendError", PEER_GONE)

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
            self.rank,
            self.local_rank,
            self.pid,
            code,
            signal,
            page.step,
            int(page.phase),
            None,
            self.world.now,
            kept=tuple(self.memory.box),
        )
        self.said_at = max(self.said_at, self.world.now + 0.02 * self.world.random())
        self.world.at(self.said_at, self.agent.worker_exited, self, exit)

    def vanish(self) -> None:
        """Its agent died, and it with it: nobody is left to be told but its peers."""
        if self.alive:
            self.alive = False
            self.group.left(self)
