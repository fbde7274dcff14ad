"""A coordinator with two nodes and a storage, to be scripted: what the tests of its decisions share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ftrain.core import coordinator, journal, rounds, run_state
from ftrain.core import messages as m
from ftrain.core.journal import History, Outcome
from ftrain.core.membership import FormationPolicy
from ftrain.core.page import Phase as WorkerPhase
from ftrain.core.retention import RetentionPolicy
from ftrain.core.run_state import Received, RunPolicy, Stored
from ftrain.core.schedule import CheckpointPolicy

NODES = ("a", "b")
POLICY = RunPolicy(
    "run", "1", FormationPolicy(2, 2),
    checkpoint=CheckpointPolicy(every_steps=10, every_seconds=0.0, keep=RetentionPolicy(1)),
    lease_seconds=10.0, stop_grace_seconds=3.0,
)  # fmt: skip


class Scene:
    """A coordinator with two nodes of one rank each, and storage that does what it is told to, in order."""

    def __init__(self, policy: RunPolicy = POLICY, history: History | None = None, writer: str = "c1") -> None:
        self.state = coordinator.initial(policy, history or History(), writer)
        self.now = 100.0
        self.requests: list[journal.Create | journal.Read] = []
        self.versions = dict.fromkeys(NODES, 0)
        self.log: list[str] = []
        self.told: list[str] = []  # log lines for people
        self.joins = False
        self.peer_port = 0  # where the nodes take peer copies

    def do(self, event: run_state.Event) -> list[str]:
        """Feed one event; returns a transcript of the actions, of those included that can wait a moment."""
        self.state, actions = coordinator.step(self.state, event, self.now, self.now)
        if self.state.looks_at < float("inf"):
            self.now = self.state.looks_at
            self.state, more = coordinator.step(self.state, run_state.Tick(), self.now, self.now)
            actions += more
        lines = [line for line in map(self._line, actions) if line]
        self.log += lines
        return lines

    def _line(self, action: run_state.Action) -> str:
        match action:
            case run_state.Send(_, m.Heard()):
                return ""  # the answer to every heartbeat
            case run_state.Send(node, message):
                return f"{node} <- {describe(message)}"
            case run_state.Store(request):
                self.requests.append(request)
                if isinstance(request, journal.Read):
                    return "read"
                return f"append {describe(journal.decode(request.data, request.path).body)}"
            case run_state.Publish(attempt):
                return f"publish {attempt.step}"
            case run_state.Discard(attempt):
                return f"discard {attempt.step}.{attempt.number}"
            case run_state.Interrupted(failure, _, furthest):
                return f"interrupted at {furthest}: {failure.summary}"
            case run_state.Continues(_, step, _, tier, survivors, forked):
                return f"continues at {step} from {tier.value if tier else 'nothing'}, {survivors} kept, {forked} new"
            case run_state.Exit(code, _):
                return f"exit {code}"
            case run_state.Log(text):
                self.told.append(text)
        return ""

    def stored(self, outcome: Outcome = Outcome.CREATED) -> list[str]:
        """Storage answers the oldest create."""
        return self.do(Stored(journal.Created(self.requests.pop(0).path, outcome)))

    def wait(self, seconds: float) -> list[str]:
        self.now += seconds
        return self.do(run_state.Tick())

    def hello(self, node: str, report: m.Report | None = None, life: str = "", term_seen: int = 0) -> list[str]:
        rank = NODES.index(node)
        return self.do(
            Received(
                node + life,
                m.Hello(
                    node + life,
                    rank,
                    1,
                    "10.0.0.1",
                    node,
                    1,
                    "run",
                    "job",
                    "1",
                    term_seen,
                    report or m.Report(),
                    self.joins,
                    self.peer_port,
                ),
            )
        )

    def report(self, node: str, **fields: object) -> list[str]:
        """The node reports; a fresh version each time."""
        self.versions[node] += 1
        base = m.Report(version=self.versions[node], generation=self.state.number, stopped=False)
        return self.do(Received(node, m.Changed(msgspec.structs.replace(base, **fields))))

    def steps(self, node: str, step: int, **fields: object) -> list[str]:
        """The node's worker is in its loop and has finished so many steps."""
        rank = m.RunningRank(NODES.index(node), 0, 7, step, 3, joined=True)
        return self.report(node, ranks=(rank,), looping=True, first_step=0, **fields)

    def died(
        self,
        node: str,
        signal: int = 9,
        code: int = 0,
        ordered: bool = False,
        step: int = 12,
        phase: WorkerPhase = WorkerPhase.BOOT,
        **fields: Any,
    ) -> list[str]:
        exit = m.RankExit(
            NODES.index(node), 0, 7, code, signal, step, int(phase), unix_seconds=self.now, ordered=ordered
        )
        return self.report(node, exits=(exit,), **fields)

    def say(self, node: str, message: m.FromAgent) -> list[str]:
        return self.do(Received(node, message))

    def started(self, joins: bool = False) -> Scene:
        """As far as generation 1 with both workers on their way. `joins`: their script is one that does."""
        self.joins = joins
        self.do(run_state.Begin())
        self.hello("a")
        self.hello("b")
        self.stored()
        self.stored()
        self.say("a", m.StoreReady(self.state.number, "10.0.0.1", 29400))
        return self

    def running(self) -> Scene:
        """As far as generation 1 with both workers in their loops."""
        self.started()
        self.steps("a", 0)
        self.steps("b", 0)
        return self

    def at_end(self, step: int) -> list[str]:
        """Both nodes report that all steps are done."""
        return [line for node in NODES for line in self.steps(node, step, total_steps=step, at_end=True)]

    def gave_up(self, cause: str) -> None:
        """The attempt under way fails while its manifest is written, and its pause is over."""
        self.do(run_state.Published(self.prepared(), "", cause))
        self.rest()

    def rest(self) -> None:
        """Until the next attempt may be proposed, the nodes say what they said last."""
        until = max(self.state.cadence.retry_at, self.state.cadence.commit_at)
        while self.now < until:
            self.now = min(self.now + 9.0, until)
            for node in NODES:
                self.say(node, m.Heartbeat(1, self.state.reports[node]))

    def armed(self) -> m.Attempt:
        """Both nodes accept the attempt under way."""
        assert self.state.barrier is not None
        attempt = self.state.barrier.attempt
        for node in NODES:
            self.say(node, m.ArmReply(attempt, True))
        return attempt

    def prepared(self, refers: Mapping[int, tuple[m.Attempt, ...]] | None = None) -> m.Attempt:
        attempt = self.armed()
        for rank, node in enumerate(NODES):
            there = (refers or {}).get(rank, ())
            self.say(node, m.Prepared(attempt, m.PackRecord(rank, f"packs/{rank}", "", "0" * 64, 1, 1, 1, there)))
        return attempt

    def arm_sent(self) -> m.Arm:
        """What nodes are told of the attempt under way."""
        assert self.state.barrier is not None
        return rounds.arm(self.state, self.state.barrier)

    def committed(self, refers: Mapping[int, tuple[m.Attempt, ...]] | None = None) -> m.Attempt:
        attempt = self.prepared(refers)
        self.do(run_state.Published(attempt, "f" * 64))
        self.stored()
        return attempt


def describe(message: object) -> str:
    match message:
        case m.Arm(attempt=attempt, hold=hold):
            return f"Arm {attempt.step}.{attempt.number}{' hold' if hold else ''}"
        case m.Abort(attempt=attempt) | m.Committed(attempt=attempt):
            return f"{type(message).__name__} {attempt.step}.{attempt.number}"
        case m.Verdict(leave=leave):
            return f"Verdict {'leave' if leave else 'go on'}"
        case m.Start(generation=generation) | m.Stop(generation=generation) | m.Prepare(generation=generation):
            return f"{type(message).__name__} {generation}"
        case m.Leave(exit_code=code) | m.Declined(exit_code=code):
            return f"{type(message).__name__} {int(code)}"
    return (
        type(message).__name__.removesuffix("Body").lower()
        if "Body" in type(message).__name__
        else type(message).__name__
    )


def successor(scene: Scene, writer: str = "c2") -> Scene:
    """Another coordinator that has read the same journal."""
    return Scene(history=scene.state.history, writer=writer)
