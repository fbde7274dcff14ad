"""One life of a coordinator: the shell that carries out what `core.coordinator` decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftrain.core import coordinator, journal, run_state
from ftrain.core import messages as m
from ftrain.core.journal import History
from ftrain.core.run_state import Phase
from tests.simulator.network import Link

if TYPE_CHECKING:
    from tests.simulator.world import World


class Coordinator:
    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.paused_until = 0.0
        self.deferred: list[run_state.Event] = []
        self.links: list[Link] = []
        self.peers: dict[str, Link] = {}
        self.state: run_state.State | None = None
        self.tick_at = float("inf")
        world.after(world.uniform(0.05, 0.5), self._open)

    @property
    def over(self) -> bool:
        return self.state is not None and self.state.phase is Phase.OVER

    @property
    def running(self) -> bool:
        return self.alive and not self.over

    # ----------------------------------------------------------------------------------------------------- the machine

    def _open(self) -> None:
        """Read the journal; take over a little later, when somebody else may have continued it."""
        if not self.alive:
            return
        history = History()
        for path, data in self.world.storage.records():
            history = history.after(journal.decode(data, path), journal.digest(data))
        if self.world.sweeps_unfenced:
            self._sweep(frozenset(history.needed), history.head.sequence + 1)
        self.world.after(self.world.uniform(0.0, 0.2), self._begin, history)

    def _begin(self, history: History) -> None:
        if self.alive:
            self.state = coordinator.initial(self.world.plan.policy, history, self.name)
            self.feed(run_state.Begin())
            self._resume()

    def feed(self, event: run_state.Event) -> None:
        world = self.world
        if not self.alive:
            return
        before = self.state
        if before is None or world.now < self.paused_until:
            self.deferred.append(event)
            return
        if before.phase is Phase.OVER:
            return
        if world.tracing and not isinstance(event, run_state.Tick):
            world.say(self.name, event)
        self.state, actions = coordinator.step(before, event, world.now, world.now)
        world.truth.coordinator_stepped(self, before, self.state, actions)
        for action in actions:
            if world.tracing and not isinstance(action, run_state.Send):
                world.say(self.name, action, "  does")
            self._carry_out(action)
        if not world.healed:
            for action in actions:
                world.did(_act(action))
        if self.over:
            self._close()
        elif self.alive:
            self._follow_up(self.state)

    def _follow_up(self, state: run_state.State) -> None:
        for name, link in list(self.peers.items()):
            if name not in state.nodes:
                del self.peers[name]
                link.finish()
        self._set_timer()

    def _carry_out(self, action: run_state.Action) -> None:
        storage = self.world.storage
        match action:
            case run_state.Send(name, message):
                self.world.truth.told_again(self, name, message)
                if name in self.peers:
                    self.peers[name].down(message)
            case run_state.Store(journal.Create(path, data)):
                storage.create_record(path, data, lambda created: self.feed(run_state.Stored(created)))
            case run_state.Store(journal.Read(path)):
                storage.read_record(path, lambda read: self.feed(run_state.Stored(read)))
            case run_state.Publish(attempt, world_size, packs):
                ranks = tuple(sorted(pack.rank for pack in packs))
                manifest = (world_size, ranks)
                storage.write(attempt, "manifest", manifest, lambda cause: self._published(attempt, cause))
            case run_state.Discard(attempt):
                storage.delete(attempt)
            case run_state.Sweep(needed, newest):
                self._sweep(needed, newest)
            case _:
                pass

    def _published(self, attempt: m.Attempt, cause: str) -> None:
        self.feed(run_state.Published(attempt, "" if cause else "0" * 64, cause))

    def _sweep(self, needed: frozenset[m.Attempt], newest: int) -> None:
        """Delete what generations before the newest left unfinished: nobody can commit that any more."""
        for attempt in self.world.truth.leftovers():
            if attempt not in needed and attempt.generation < newest:
                self.world.storage.delete(attempt)

    def _set_timer(self) -> None:
        assert self.state is not None
        due = coordinator.wake_at(self.state, self.world.now)
        if due != float("inf") and (due < self.tick_at or self.tick_at <= self.world.now):
            self.tick_at = due
            self.world.at(due, self._tick, due)

    def _tick(self, due: float) -> None:
        if self.alive and self.tick_at == due:
            self.tick_at = float("inf")
            self.feed(run_state.Tick())

    # ----------------------------------------------------------------------------------------------------- the channels

    def receive(self, link: Link, message: m.FromAgent) -> None:
        if not self.alive:
            return
        name = link.agent.name
        if isinstance(message, m.Hello) and link.open:
            self.peers[name] = link
        self.feed(run_state.Received(name, message))

    def link_closed(self, link: Link) -> None:
        if link in self.links:
            self.links.remove(link)
        if self.alive and self.peers.get(link.agent.name) is link:
            del self.peers[link.agent.name]
            self.feed(run_state.Disconnected(link.agent.name))

    # ------------------------------------------------------------------------------------------------------------ ends

    def resume(self) -> None:
        if self.alive and self.state is not None and self.world.now >= self.paused_until:
            self._resume()

    def _resume(self) -> None:
        events, self.deferred = self.deferred, []
        for event in events:
            self.feed(event)

    def die(self) -> None:
        self.alive = False
        self._close()

    def _close(self) -> None:
        for link in list(self.links):
            link.close()
        if self in self.world.coordinators:
            self.world.coordinator_ended(self)


def _act(action: run_state.Action) -> str:
    """What `Plan.aimed` calls this action, "" for what it does not aim at."""
    match action:
        case run_state.Send(_, message):
            return type(message).__name__.lower()
        case run_state.Publish():
            return "publish"
        case run_state.Store(journal.Create(path, data)):
            return type(journal.decode(data, path).body).__name__.removesuffix("Body").lower()
    return ""
