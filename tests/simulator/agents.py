"""One life of an agent: the shell that carries out what `core.node` decides, on a node that may be paused or die."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftrain.core import local, node, node_attempts
from ftrain.core import messages as m
from ftrain.core.page import verdict_on
from tests.simulator.keepers import Peers
from tests.simulator.network import Link
from tests.simulator.workers import Memory, Worker

if TYPE_CHECKING:
    from tests.simulator.world import World


class Agent:
    def __init__(self, world: World, place: int, name: str, processes: int) -> None:
        self.world = world
        self.place = place
        self.name = name
        self.alive = True
        self.exit: node.Exit | None = None
        self.link: Link | None = None
        self.workers: dict[int, Worker] = {}
        self.forking: dict[int, Worker] = {}
        self.memory: dict[int, Memory] = {}  # by local rank
        self.cancelled: set[m.Attempt] = set()
        self.refers: dict[tuple[m.Attempt, int], tuple[m.Attempt, ...]] = {}  # of the packs that this agent wrote
        self.paused_until = 0.0
        self.deferred: list[node.Event] = []
        self.arming = False
        self.events: list[node.Event] = []
        self.busy = False
        hello = m.Hello(
            name,
            place,
            processes,
            f"10.0.0.{place}",
            f"host{place}",
            1,
            world.plan.policy.run_id,
            "job",
            "0",
            0,
            joins=world.plan.joins,
            peer_port=7000 if world.plan.peers and world.plan.nodes > 1 else 0,
        )
        self.state = node.State(
            hello, grace_seconds=6.0, halt_seconds=4.0, coordinator_wait_seconds=90.0, lost_at=world.now
        )
        self.peers = Peers(self)
        world.after(world.uniform(0.0, 0.3), self._connect)
        world.after(world.uniform(0.0, 1.0), self._beat)

    # ----------------------------------------------------------------------------------------------------- the machine

    def feed(self, event: node.Event) -> None:
        world = self.world
        if not self.alive:
            return
        if self.arming or world.now < self.paused_until:
            self.deferred.append(event)
            return
        self.events.append(event)
        if self.busy:
            return
        self.busy = True
        while self.events and self.alive:
            self._step(self.events.pop(0))
        self.busy = False

    def _step(self, event: node.Event) -> None:
        world = self.world
        before = self.state
        if world.tracing:
            world.say(self.name, event)
        self.state, actions = node.step(before, event, world.now, self.pages())
        world.truth.agent_stepped(self, before, event, actions)
        for action in actions:
            if world.tracing and not isinstance(action, node.Send):
                world.say(self.name, action, "  does")
            self._carry_out(action)

    def resume(self) -> None:
        """Take in what came while this agent could not."""
        if self.alive and not self.arming and self.world.now >= self.paused_until:
            events, self.deferred = self.deferred, []
            for event in events:
                self.feed(event)

    def pages(self) -> dict[int, tuple[int, int]]:
        return {rank: (worker.page.step, worker.page.phase) for rank, worker in self.workers.items()}

    def _carry_out(self, action: node.Action) -> None:
        match action:
            case node.Send(message):
                if self.link is not None:
                    self.link.up(message)
            case node.Reconnect():
                self._drop()
            case node.Fork(start, ranks):
                self.peers.begin(start)
                self._fork(start, ranks)
            case node.Continue(start, ranks):
                self.peers.begin(start)
                for rank in ranks:
                    self.world.after(0.01 * self.world.random(), self.workers[rank].go_on_in, start)
            case node.RevokePages(generation, ranks):
                for rank in ranks:
                    self.workers[rank].revoke(generation)
            case node.KillRanks(ranks):
                for rank in ranks:
                    if rank in self.workers and self.workers[rank].pid not in self.forking:
                        self.world.after(0.05 * self.world.random(), self.workers[rank].end, 0, 9)
            case node.Kill(grace_seconds):
                self._kill(grace_seconds)
            case node.ArmPages():
                self._arm(action)
            case node.DisarmPages(attempt, ranks):
                self.feed(node.Disarmed(attempt, self._disarm(attempt, ranks)))
            case node.SetVerdict(attempt, leave, ranks):
                for rank in ranks:
                    self.workers[rank].page.verdict = verdict_on(attempt.generation, attempt.number, leave=leave)
                self._notify(ranks)
            case node.ReleasePages(generation, ranks):
                for rank in ranks:
                    self.workers[rank].page.release = generation
                self._notify(ranks)
            case node.Persist(attempt, rank, slot, base):
                self.refers[attempt, rank] = self._refers(attempt, rank, base)
                self.world.after(
                    0.01 * self.world.random(), self._persist, attempt, rank, slot, self.workers[rank].memory
                )
            case node.CancelPersist(attempt):
                self.cancelled.add(attempt)
            case node.HostStore(generation):
                self.world.after(self.world.uniform(0.05, 0.3), self._store_up, generation)
            case node.Show():
                pass
            case node.Exit():
                self._exit(action)

    def _notify(self, ranks: tuple[int, ...]) -> None:
        for rank in ranks:
            self.world.after(0.002 * self.world.random(), self.workers[rank].notified)

    # ------------------------------------------------------------------------------------------------------ the channel

    def _connect(self) -> None:
        if not self.alive or self.link is not None:
            return
        coordinator = self.world.answering(self)
        if coordinator is None:
            self.world.after(self.world.uniform(0.2, 0.8), self._connect)
            return
        self.link = Link(self.world, self, coordinator)
        self.link.up(node.hello(self.state, self.pages()))
        self.feed(node.Connected())

    def receive(self, message: m.FromCoordinator) -> None:
        self.feed(node.Said(message))

    def link_closed(self, link: Link) -> None:
        if self.link is link and self.alive:
            self.link = None
            self.feed(node.Disconnected())
            self.world.after(self.world.uniform(0.05, 0.6), self._connect)

    def _drop(self) -> None:
        if self.link is not None:
            self.link.close()

    def _beat(self) -> None:
        if self.alive:
            self.world.after(self.world.plan.policy.heartbeat_seconds, self._beat)
            self.feed(node.Beat())

    # ------------------------------------------------------------------------------------------------------- workers

    def _fork(self, start: m.Start, ranks: tuple[int, ...]) -> None:
        self.workers = {rank: worker for rank, worker in self.workers.items() if rank in start.survivors}
        gets_snapshot = start.fetch is not None and start.line is not None and start.line.attempt is not None
        for rank in ranks:
            local_rank = rank - start.first_rank
            in_use = start.line is None and any(writer == rank for _, writer in self.state.writing)
            if local_rank not in self.memory or in_use or gets_snapshot:
                self.memory[local_rank] = Memory()
        made = [self._make(start, rank) for rank in ranks]
        if start.fetch is not None:
            self.world.after(self.world.random(), self._fetch, start, made)

    def _fetch(self, start: m.Start, made: list[Worker]) -> None:
        if not self.alive:
            return
        state = self.state
        wanted = state.start is start and not (state.stopping or state.halting) and state.leave is None
        is_there = wanted and self.peers.fetch(start)
        for worker in made:
            if is_there:
                worker.fetched()
            else:
                worker.raises("ftrain.errors.PeerLost", "it cannot be had")

    def _make(self, start: m.Start, rank: int) -> Worker:
        local_rank = rank - start.first_rank
        worker = Worker(self.world, self, start, rank, local_rank, self.memory[local_rank])
        self.workers[rank] = worker
        self.forking[worker.pid] = worker
        self.world.after(0.03 * self.world.random(), self._forked, worker)
        return worker

    def _forked(self, worker: Worker) -> None:
        if not self.alive:
            return
        self.forking.pop(worker.pid, None)
        self.feed(node.Forked(worker.rank, worker.pid))
        now = self.state.workers.get(worker.rank)
        if self.state.stopping or self.state.leave is not None or now is None or now.killed:
            worker.end(0, 9)

    def _kill(self, grace_seconds: float) -> None:
        for worker in self.workers.values():
            known = self.state.workers.get(worker.rank)
            if not worker.alive or known is None or worker.pid in self.forking:
                continue
            wait = 0.0 if known.joined or grace_seconds <= 0 else grace_seconds * self.world.random()
            self.world.after(wait + 0.05 * self.world.random(), worker.end, 0, 9)

    def worker_said(self, worker: Worker, message: local.FromWorker) -> None:
        if worker.pid in self.forking:  # the agent starts to read when the fork is known
            self.world.after(0.03, self.worker_said, worker, message)
        else:
            self.feed(node.WorkerSaid(worker.rank, message))

    def worker_exited(self, worker: Worker, exit: m.RankExit) -> None:
        if worker.pid in self.forking:
            self.world.after(0.06, self.worker_exited, worker, exit)
        else:
            self.feed(node.WorkerExited(exit))

    def _store_up(self, generation: int) -> None:
        if self.world.healed or self.world.random() > 0.03:
            self.feed(node.StoreUp(generation, f"10.0.0.{self.place}", 29400))
        else:
            self.feed(node.StoreDown(generation))

    # ------------------------------------------------------------------------------------------------------ snapshots

    def _arm(self, action: node.ArmPages) -> None:
        """Store ARMED on all pages; load STEP a moment later: workers run in between, the agent's own events do not."""
        attempt = action.attempt
        for rank in action.ranks:
            page = self.workers[rank].page
            page.armed_slot = action.slot
            page.armed_attempt = attempt.number
            page.armed_hold = int(action.hold)
            page.armed = attempt.step
        self._notify(action.ranks)
        self.arming = True
        self.world.after(0.005 * self.world.random(), self._armed, action)

    def _armed(self, action: node.ArmPages) -> None:
        if not self.alive:
            return
        self.arming = False
        attempt = action.attempt
        pages = [self.workers[rank].page for rank in action.ranks]
        furthest = max(page.step for page in pages)
        # Whoever is done with its last step still sees ARMED, however late.
        if all(page.step < attempt.step or page.step == attempt.step == page.total_steps for page in pages):
            event = node.Armed(attempt, True, furthest)
        else:
            event = node.Armed(attempt, False, furthest, self._disarm(attempt, action.ranks))
        deferred, self.deferred = self.deferred, []
        self.feed(event)
        self.deferred += deferred
        self.resume()

    def _disarm(self, attempt: m.Attempt, ranks: tuple[int, ...]) -> frozenset[int]:
        for rank in ranks:
            page = self.workers[rank].page
            if page.armed_attempt == attempt.number:
                page.armed = 0
        where = self.pages()
        return frozenset(rank for rank in ranks if node_attempts.may_fill(where[rank], attempt.step))

    def _refers(self, attempt: m.Attempt, rank: int, base: m.Attempt | None) -> tuple[m.Attempt, ...]:
        """What did not change since the base: some of what the base has, as this agent remembers it."""
        if base is None or (base, rank) not in self.refers:
            return ()
        owners = {base, *self.refers[base, rank]}
        return tuple(sorted(one for one in owners if (attempt.number + one.number + rank) % 3))

    def _persist(self, attempt: m.Attempt, rank: int, slot: int, memory: Memory) -> None:
        if not self.alive:
            return
        if attempt in self.cancelled:
            self._persisted(attempt, rank, "cancelled")
            return
        begun = memory.slots[slot]
        self.world.after(0.05 * self.world.random(), self._read_slot, attempt, rank, slot, memory, begun)

    def _read_slot(self, attempt: m.Attempt, rank: int, slot: int, memory: Memory, begun: object) -> None:
        if self.alive:
            content = begun if memory.slots[slot] == begun else "torn"
            self.world.storage.write(
                attempt, f"packs/{rank}", content, lambda cause: self._persisted(attempt, rank, cause)
            )

    def _persisted(self, attempt: m.Attempt, rank: int, cause: str) -> None:
        if attempt in self.cancelled:
            self.feed(node.PersistFailed(attempt, rank, ""))
        elif cause:
            self.feed(node.PersistFailed(attempt, rank, cause))
        else:
            name = f"packs/{rank}"
            refers = self.refers[attempt, rank]
            self.feed(node.Persisted(attempt, m.PackRecord(rank, name, f"{name}.json", "0" * 64, 8, 16, 1, refers)))

    # ---------------------------------------------------------------------------------------------------------- ends

    def _exit(self, exit: node.Exit) -> None:
        self.exit = exit
        self.world.truth.agent_left(self)
        self.die()

    def die(self) -> None:
        """The agent's process ends, whatever the reason: its workers end with it, and its channel breaks."""
        self.alive = False
        for worker in self.workers.values():
            worker.vanish()
        if self.link is not None:
            self.link.close()
        self.world.agent_ended(self)
