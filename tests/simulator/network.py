"""Channels between a life of an agent and a life of a coordinator. They break, lose, double, delay and reorder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftrain.core import messages as m

if TYPE_CHECKING:
    from tests.simulator.agents import Agent
    from tests.simulator.coordinators import Coordinator
    from tests.simulator.world import World

UNANSWERED_SECONDS = 3.0  # after which an end that hears nothing closes its channel


class Link:
    """One channel. `up` is towards the coordinator. A blocked direction swallows what is sent."""

    __slots__ = ("agent", "arrives_down", "arrives_up", "blocked_until", "coordinator", "open", "world")

    def __init__(self, world: World, agent: Agent, coordinator: Coordinator) -> None:
        self.world = world
        self.agent = agent
        self.coordinator = coordinator
        self.open = True
        coordinator.links.append(self)
        self.arrives_up = 0.0
        self.arrives_down = 0.0
        self.blocked_until = {True: 0.0, False: 0.0}

    def up(self, message: m.FromAgent) -> None:
        if self.open:
            self.arrives_up = self._carry(True, message, self.arrives_up, isinstance(message, m.Hello))

    def down(self, message: m.FromCoordinator) -> None:
        if isinstance(message, m.Heard):
            # As often as heartbeats, and alike: it takes part in no race but that with the lease, and is no event.
            if self.open and self.world.now >= self.blocked_until[False]:
                self._arrive_down(message)
        elif self.open:
            self.arrives_down = self._carry(False, message, self.arrives_down, False)

    def _carry(self, up: bool, message: Any, after: float, certain: bool) -> float:
        world = self.world
        network = world.network
        delay = 0.002 + 0.02 * world.random()
        copies = 1
        if world.now < self.blocked_until[up]:
            world.count("message swallowed")
            return after
        if network.drop and not certain and world.random() < network.drop:
            world.count("message dropped")
            return after
        if network.duplicate and world.random() < network.duplicate:
            world.count("message doubled")
            copies = 2
        if network.late and world.random() < network.late:
            world.count("message late")
            delay += 4.0 * world.random()
        overtakes = bool(network.reorder) and world.random() < network.reorder
        arrives = world.now + delay
        if not overtakes:
            arrives = after = max(after, arrives)
        elif arrives < after:
            world.count("message reordered")
        for copy in range(copies):
            world.at(arrives + copy * 2.0 * world.random(), self._arrive_up if up else self._arrive_down, message)
        return after

    def _arrive_up(self, message: m.FromAgent) -> None:
        # A broken channel still delivers what was on its way, now and then.
        if self.open or self.world.ghosts():
            self.coordinator.receive(self, message)

    def _arrive_down(self, message: m.FromCoordinator) -> None:
        if self.open or self.world.ghosts():
            self.agent.receive(message)

    def finish(self) -> None:
        """Close it once what was sent down has arrived."""
        self.world.at(max(self.world.now, self.arrives_down) + 0.001, self.close)

    def close(self) -> None:
        """Both ends learn of it, each in its own time."""
        if self.open:
            self.open = False
            self.world.after(0.001 + 0.3 * self.world.random(), self.agent.link_closed, self)
            self.world.after(0.001 + 0.3 * self.world.random(), self.coordinator.link_closed, self)

    def block(self, up: bool, seconds: float) -> None:
        until = self.world.now + seconds
        self.blocked_until[up] = until
        if seconds > UNANSWERED_SECONDS:
            self.world.after(UNANSWERED_SECONDS, self._unanswered, up, until)

    def _unanswered(self, up: bool, until: float) -> None:
        if self.blocked_until[up] == until:
            self.close()
