"""One schedule: agents, coordinators, workers, network and storage in one thread, with virtual time and a seed.

Everything random comes from one generator, everything that happens is one entry of one queue, and nothing depends on
the order of a set or on a hash of text: the same seed gives the same trace, in any process.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar

from ftrain.core import messages as m
from tests.simulator import faults
from tests.simulator.agents import Agent
from tests.simulator.coordinators import Coordinator
from tests.simulator.invariants import Truth, Violation
from tests.simulator.plan import FAULT_SECONDS, Network, Plan
from tests.simulator.storage import Storage
from tests.simulator.workers import Group

T = TypeVar("T")
LIVENESS_SECONDS = 300.0  # virtual, from the last fault to the next commit, or to the end of the run
ENDING_SECONDS = 200.0  # virtual, from the end of the run to the end of its last agent


@dataclass(slots=True)
class Outcome:
    """How a schedule went."""

    seed: int
    events: int = 0
    seconds: float = 0.0  # virtual
    commits: int = 0
    finished: bool = False
    faults: Counter[str] = field(default_factory=Counter)
    violation: str = ""
    trace_sha256: str = ""
    lines: list[str] = field(default_factory=list)


class World:
    def __init__(self, plan: Plan, tracing: bool = False, prepare: Callable[[World], None] | None = None) -> None:
        self.plan = plan
        self.tracing = tracing
        self.lines: list[str] = []
        self.rng = Random(plan.seed * 2 + 1)
        self.random = self.rng.random
        self.now = 0.0
        self.events = 0
        self.counted: Counter[str] = Counter()
        self.network: Network = plan.network
        self.healed = False
        self.sweeps_unfenced = False  # a planted bug of the coordinator's shell
        self.deadline = float("inf")
        self.baseline = 0
        self.unreachable: dict[int, float] = {}
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0
        self._pid = 100
        self._lives = 0
        self._terms = 0
        self._acts: Counter[str] = Counter()
        self._groups: dict[int, Group] = {}
        self._finished_at = float("inf")
        self.storage = Storage(self)
        self.truth = Truth(self)
        self.agents: list[Agent] = []
        self.coordinators: list[Coordinator] = []
        if prepare is not None:
            prepare(self)
        self.start_coordinator()
        for place in range(plan.nodes):
            self.start_agent(place)
        for _ in range(plan.spares):
            self.start_agent(-1)

    # ---------------------------------------------------------------------------------------------- time and chance

    def at(self, time: float, function: Callable[..., None], *arguments: Any) -> None:
        self._number += 1
        heapq.heappush(self._queue, (time, self._number, function, arguments))

    def after(self, seconds: float, function: Callable[..., None], *arguments: Any) -> None:
        self._number += 1
        heapq.heappush(self._queue, (self.now + seconds, self._number, function, arguments))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def flip(self) -> bool:
        return self.random() < 0.5

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.random() * len(items))]

    def did(self, act: str) -> None:
        """A coordinator did this: time for a fault that was aimed at it."""
        if act:
            self._acts[act] += 1
            kind = self.plan.aimed.get((act, self._acts[act]))
            if kind is not None:
                faults.strike(self, kind)

    def count(self, what: str) -> None:
        self.counted[what] += 1

    def ghosts(self) -> bool:
        """Whether a message still arrives over a channel that is closed."""
        return not self.healed and self.random() < 0.2

    def seal_fails(self) -> bool:
        return not self.healed and self.random() < 0.01

    def hangs(self) -> bool:
        """Whether a worker that is to stand still is stuck in native code."""
        return not self.healed and self.random() < 0.03

    def half_written(self) -> bool:
        """Whether a step that is given up had begun to write parameters."""
        return self.random() < 0.2

    def outside_of_steps(self) -> bool:
        """Whether a lost peer is noticed where nothing of ours can catch it."""
        return self.random() < 0.1

    # --------------------------------------------------------------------------------------------------- who is there

    def next_pid(self) -> int:
        self._pid += 1
        return self._pid

    def group(self, start: m.Start) -> Group:
        return self._groups.setdefault(start.generation, Group(start.world_size))

    def start_coordinator(self) -> None:
        if self.truth.history.finish is None:
            self._terms += 1
            self.coordinators.append(Coordinator(self, f"c{self._terms}"))

    def start_agent(self, place: int) -> None:
        self._lives += 1
        name = f"n{place}.{self._lives}" if place >= 0 else f"spare.{self._lives}"
        self.agents.append(Agent(self, place, name, self.plan.processes))

    def answering(self, agent: Agent) -> Coordinator | None:
        """The coordinator that a new channel of this agent reaches: the newest, or an older one that is still there."""
        if self.unreachable.get(agent.place, 0.0) > self.now:
            return None
        found = [one for one in self.coordinators if one.running and one.paused_until <= self.now]
        if not found:
            return None
        return found[-1] if self.random() < 0.8 else self.pick(found)

    def agent_ended(self, agent: Agent) -> None:
        """Its launcher is started again, by whoever runs the cluster."""
        self.agents.remove(agent)
        self.after(0.5 if self.healed else self.uniform(0.2, 8.0), self._replace_agent, agent.place)

    def _replace_agent(self, place: int) -> None:
        if self.truth.history.finish is None and not any(agent.place == place >= 0 for agent in self.agents):
            self.start_agent(place)

    def coordinator_ended(self, coordinator: Coordinator) -> None:
        self.coordinators.remove(coordinator)
        self.after(0.5 if self.healed else self.uniform(0.2, 8.0), self._replace_coordinator)

    def _replace_coordinator(self) -> None:
        if not any(one.running and one.paused_until <= self.now for one in self.coordinators):
            self.start_coordinator()

    # ------------------------------------------------------------------------------------------------------ the run

    def run(self) -> Outcome:
        outcome = Outcome(self.plan.seed)
        try:
            self._run()
            self.storage.power_cut()
        except (Violation, AssertionError, KeyError, TypeError, ValueError) as error:
            outcome.violation = f"{type(error).__name__}: {error}"
            if self.tracing:
                self.say("violation", outcome.violation)
                if not isinstance(error, Violation):
                    raise
        outcome.events = self.events
        outcome.seconds = self.now
        outcome.commits = self.truth.commits
        outcome.finished = self.truth.history.finish is not None
        outcome.faults = self.counted
        outcome.lines = self.lines
        if self.tracing:
            outcome.trace_sha256 = hashlib.sha256("\n".join(self.lines).encode()).hexdigest()
        return outcome

    def _run(self) -> None:
        queue, plan = self._queue, self.plan
        strikes = list(plan.faults)
        while queue:
            time, _, function, arguments = heapq.heappop(queue)
            self.now = time
            self.events += 1
            function(*arguments)
            while strikes and strikes[0][0] <= self.events:
                faults.strike(self, strikes.pop(0)[1])
            if not self.healed and (self.events >= plan.fault_events or time >= FAULT_SECONDS):
                self._heal()
            if self._over():
                return
        raise Violation("nothing is going to happen any more")

    def _heal(self) -> None:
        """From here on everything works: the run has to go on, or to end."""
        self.healed = True
        if self.tracing:
            self.say("faults", "stop here")
        self.network = Network()
        self.unreachable.clear()
        self.storage.heal()
        self.baseline = self.truth.commits
        self.deadline = self.now + LIVENESS_SECONDS
        everybody: list[Agent | Coordinator] = [*self.agents, *self.coordinators]
        for someone in everybody:
            if someone.paused_until > self.now:
                someone.paused_until = self.now
                self.after(0.0, someone.resume)
            if isinstance(someone, Agent) and someone.link is not None:
                someone.link.blocked_until = {True: 0.0, False: 0.0}
        self.after(0.1, self._replace_coordinator)
        for place in range(self.plan.nodes):
            self.after(0.1, self._replace_agent, place)

    def _over(self) -> bool:
        if self.truth.history.finish is not None:
            if self._finished_at == float("inf"):
                self._finished_at = self.now
                self.truth.ended()
            if not self.agents:
                return True
            if self.now > self._finished_at + ENDING_SECONDS and self.healed:
                raise Violation(f"the run is over, but {self.agents[0].name} does not end")
            return False
        self._finished_at = float("inf")
        if not self.healed:
            return False
        if self.truth.commits > self.baseline and not (self.plan.to_the_end and self.plan.total_steps):
            return True
        if self.now > self.deadline and self.truth.commits == self.baseline:
            raise Violation(f"no commit in the {LIVENESS_SECONDS:.0f} s after the last fault")
        if self.truth.commits > self.baseline:
            self.baseline = self.truth.commits
            self.deadline = self.now + LIVENESS_SECONDS
        return False

    # ----------------------------------------------------------------------------------------------------- transcript

    def say(self, who: str, what: object, how: str = "") -> None:
        if self.tracing:
            self.lines.append(f"{self.now:9.4f} {who:10s} {how} {what}")


def simulate(plan: Plan, tracing: bool = False, prepare: Callable[[World], None] | None = None) -> Outcome:
    """Run one schedule to its end."""
    return World(plan, tracing, prepare).run()
