"""Peer copies in the simulator: what an agent's neighbour has of its ranks, some time after they had it.

What is kept is `core.keeping`'s to say, as in an agent; copies are late, are passed over now and then, and go with the
node that keeps them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftrain.core import keeping, node
from ftrain.core import messages as m
from ftrain.core.keeping import Kept

if TYPE_CHECKING:
    from tests.simulator.agents import Agent

LOOK_SECONDS = 0.1


class Peers:
    """One agent's part: keeper of another's, sender of its own, fetcher of a lost one's."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.world = agent.world
        self.kept = Kept()
        self.boxes: dict[tuple[int, int], int] = {}  # (rank, step) -> which history it is of
        self.slots: dict[tuple[int, m.Attempt], object] = {}
        self.start: m.Start | None = None
        self.looped: set[int] = set()
        self.steps: dict[int, int] = {}
        self.snapshot: m.Attempt | None = None

    # ------------------------------------------------------------------------------------------------------ a keeper

    def begin(self, start: m.Start) -> None:
        if self.start is not None and start.generation <= self.start.generation:
            return
        self.start = start
        self.looped, self.steps, self.snapshot = set(), {}, None
        self._become(keeping.began(self.kept, start.generation, start.line))
        if start.keeper is not None:
            self.world.after(LOOK_SECONDS * self.world.random(), self._look, start)

    def take_boundary(self, generation: int, rank: int, step: int, history: int) -> None:
        if self.agent.alive and generation >= self.kept.generation:
            plan = self.world.plan
            shard = "all" if plan.replicated else f"rank {rank}"
            self.boxes[rank, step] = history
            self._become(keeping.took_boundary(self.kept, generation, rank, step, shard, plan.replays))

    def take_snapshot(self, sender: Peers, slot: int, attempt: m.Attempt, start: m.Start) -> None:
        """All that was sent has come, unless the slot was wanted again meanwhile."""
        held = sender.agent.state.copied
        if not (self.agent.alive and sender.agent.alive) or sender.start is not start or held.get(slot) != attempt:
            return
        for rank, worker in sorted(sender.agent.workers.items()):
            if start.generation >= self.kept.generation:
                self._become(keeping.makes_room(self.kept, rank, attempt, held.values()))
                self.slots[rank, attempt] = worker.memory.slots[slot]
                self._become(keeping.took_snapshot(self.kept, rank, attempt))

    def _become(self, kept: Kept) -> None:
        self.kept = kept
        self.agent.feed(node.Keeps(keeping.report(kept)))

    # ------------------------------------------------------------------------------------------------------ a sender

    def _look(self, start: m.Start) -> None:
        world, agent = self.world, self.agent
        if not agent.alive or self.start is not start:
            return
        world.after(LOOK_SECONDS, self._look, start)
        assert start.keeper is not None
        keeper = self._at(start.keeper)
        if keeper is None or world.now < agent.paused_until or world.random() < 0.1:
            return
        for rank, worker in sorted(agent.workers.items()):
            known = agent.state.workers.get(rank)
            if known is not None and known.looping is not None:
                self.looped.add(rank)
            newest = self.steps.get(rank, -1)
            if rank not in self.looped or worker.page.step <= newest:
                continue
            box = worker.memory.box
            self.steps[rank] = max(worker.page.step, newest, *box)
            for step in keeping.boundaries_due(newest, box):
                world.after(0.01, keeper.take_boundary, start.generation, rank, step, worker.memory.histories[step])
        due = keeping.snapshot_due(self.snapshot, agent.state.copied)
        if due is not None:
            self.snapshot = due[1]
            world.after(0.5 * world.random(), keeper.take_snapshot, self, *due, start)

    def _at(self, peer: m.Peer) -> Peers | None:
        return next((agent.peers for agent in self.world.agents if agent.name == peer.node), None)

    # ----------------------------------------------------------------------------------------------------- a fetcher

    def fetch(self, start: m.Start) -> bool:
        """Bring what the new ranks go on from; False where it cannot be had."""
        assert start.fetch is not None and start.line is not None
        keeper = self._at(start.fetch.peer)
        if keeper is None or (not self.world.healed and self.world.random() < 0.1):
            return False
        attempt = start.line.attempt
        for rank in start.fetch.ranks:
            memory = self.agent.memory[rank - start.first_rank]
            copies = keeper.kept.ranks.get(rank, keeping.Copies())
            if attempt is None:
                for step in copies.steps:
                    memory.keep(step, keeper.boxes[rank, step])
            elif attempt not in copies.snapshots:
                return False
            else:
                memory.slots[0] = keeper.slots[rank, attempt]
        if attempt is not None:
            self.agent.feed(node.Fetched(start.generation, 0, attempt))
        self.world.count(f"fetched for {start.line.tier.value}")
        return True
