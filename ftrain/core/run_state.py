"""The coordinator's vocabulary: its state, what can happen to it, what it can ask for.

`core.coordinator` decides over generations, `core.rounds` over checkpoint attempts; both work on one `Turn`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import msgspec

from ftrain.core import commit, journal
from ftrain.core import messages as m
from ftrain.core.journal import History
from ftrain.core.membership import FormationPolicy, Generation, Node
from ftrain.core.schedule import Cadence, CheckpointPolicy
from ftrain.core.supervision import Budget, Failure, RestartPolicy
from ftrain.errors import ExitCode


class Phase(Enum):
    OPENING = "opening the journal"
    ADOPTING = "looking for a running generation"
    FORMING = "waiting for nodes"
    STARTING = "starting workers"
    RUNNING = "running"
    HALTING = "halting workers"
    STOPPING = "stopping workers"
    SETTLING = "waiting for a checkpoint to settle"
    PAUSING = "pausing before a restart"
    CLOSING = "recording the end"
    LEAVING = "letting the nodes go"
    OVER = "over"


@dataclass(frozen=True, slots=True)
class RunPolicy:
    """What the user asked for, as far as the coordinator needs it."""

    run_id: str
    version: str
    formation: FormationPolicy
    restart: RestartPolicy = RestartPolicy()
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    lease_seconds: float = 10.0
    heartbeat_seconds: float = 1.0
    settle_seconds: float = 60.0  # how long a restart waits for a checkpoint that may still commit
    halt_seconds: float = 20.0  # for workers to stand still; agents kill those of theirs that do not
    stop_grace_seconds: float = 30.0  # for scripts that never joined: what torchrun gives them
    goodbye_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class Drain:
    """Nodes have been told to leave: the last finished step is to be committed first."""

    why: str  # "SIGTERM" or "SIGINT"
    nodes: frozenset[str]
    deadline: float
    decided: bool = False  # the workers have been told to leave
    saved: bool = False


class State(msgspec.Struct, frozen=True):  # not a dataclass: it is replaced many times an event, and this one is quick
    policy: RunPolicy
    history: History
    appender: journal.Appender
    phase: Phase = Phase.OPENING
    until: float = float("inf")  # when the present phase runs out of time
    term: int = 0
    job_sha256: str = ""
    nodes: Mapping[str, Node] = {}
    reports: Mapping[str, m.Report] = {}
    # The generation.
    generation: Generation | None = None
    number: int = 0  # highest generation number ever used
    recorded: bool = False  # the generation is in the journal
    store: tuple[str, int] | None = None
    resume: m.Resume | None = None
    line: m.Line | None = None  # what it goes on from in place; None where all of its ranks are new
    survivors: frozenset[int] = frozenset()  # its ranks that were not forked for it
    fetches: Mapping[str, m.Fetch] = {}  # node -> what it has to get from another one first
    exits: Mapping[int, tuple[str, m.RankExit]] = {}
    gone: frozenset[str] = frozenset()  # its members that were lost
    # The attempts.
    barrier: commit.Barrier | None = None  # whose snapshot is being taken
    writing: commit.Barrier | None = None  # whose snapshot is being written to storage
    attempts: int = 0  # highest attempt number used in this generation
    held: m.Attempt | None = None  # the newest snapshot that all ranks have sealed, as far as arenas have it still
    copying: m.Attempt | None = None  # the newest of those that other nodes are sent
    copied_at: float = 0.0  # when that was sealed
    cost: m.Cost = m.Cost()  # of the snapshot that is being taken, on the rank where it was dearest
    cadence: Cadence = Cadence()
    logged: Mapping[str, m.Logged] = {}  # each metric's newest value, at the step of the snapshot that is being taken
    logged_after: Mapping[str, m.Logged] = {}  # what came of later steps meanwhile
    suspects: frozenset[m.Attempt] = frozenset()  # commits that a restore found damaged
    spoiled: frozenset[m.Attempt] = frozenset()  # snapshots in memory that one found damaged
    # Failure and leaving.
    drain: Drain | None = None
    budget: Budget = Budget()
    failure: Failure | None = None
    failed_at: float = 0.0
    started_at: float = 0.0
    looping_since: float = 0.0  # all ranks are in their loop
    stumbles: int = 0  # generations in a row that were to go on in place, and did not come to that
    hangs: int = 0  # that brought no new step, in a row
    hung_step: int = -1  # where the newest of them was
    hangs_due: float = 0.0  # when to look for one next
    afresh: bool = False  # the next generation is one of new processes only
    scrapped: bool = False  # all workers of the present generation were told to stop
    judged: bool = False  # the failure that ended the present generation
    judged_commit: int = 0  # sequence number of the newest commit when a failure was last judged
    judged_step: int = 0  # where the run came to before that failure
    waiting_since: float = 0.0
    probe_at: float = 0.0  # when a coordinator that waits for nodes next looks whether it is still the newest
    exit_code: int = 0
    summary: str = ""
    looked_at: float = float("-inf")  # when it was last looked at what follows from all this
    looks_at: float = float("inf")  # when to look next at the latest, for something was said since that can wait

    @property
    def newest_commit(self) -> int:
        return self.history.commits[-1][0] if self.history.commits else 0

    @property
    def attempts_under_way(self) -> tuple[commit.Barrier, ...]:
        """Those that may still become a commit, or a snapshot to go on from; the older one first."""
        return tuple(one for one in (self.writing, self.barrier) if one is not None)

    @property
    def furthest(self) -> int:
        """The most steps that any rank of the generation is known to have finished."""
        steps = [rank.step for name in self.members for rank in self.report(name).ranks]
        return max(steps, default=-1)

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(member.node for member in self.generation.members) if self.generation else ()

    def report(self, node: str) -> m.Report:
        """The node's newest report about the present generation; an empty one if it has made none."""
        report = self.reports.get(node)
        if report is None or self.generation is None or report.generation != self.generation.number:
            return m.Report()
        return report


# -------------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Begin:
    """The service listens and the journal is read."""


@dataclass(frozen=True, slots=True)
class Received:
    node: str
    message: m.FromAgent


@dataclass(frozen=True, slots=True)
class Disconnected:
    node: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; `wake_at` said when it is worth looking."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Storage answered a journal request."""

    reply: journal.Created | journal.ReadBack


@dataclass(frozen=True, slots=True)
class Published:
    attempt: m.Attempt
    manifest_sha256: str
    cause: str = ""  # why it failed, when manifest_sha256 is empty


Event = Begin | Received | Disconnected | Tick | Stored | Published

# ------------------------------------------------------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class Send:
    node: str
    message: m.FromCoordinator


@dataclass(frozen=True, slots=True)
class Store:
    """Do this to the journal and answer with `Stored`."""

    request: journal.Create | journal.Read


@dataclass(frozen=True, slots=True)
class Publish:
    """Write the attempt's manifest durably and answer with `Published`."""

    attempt: m.Attempt
    world_size: int
    packs: tuple[m.PackRecord, ...]


@dataclass(frozen=True, slots=True)
class Discard:
    """Delete the files of an attempt that no commit refers to (any more)."""

    attempt: m.Attempt


@dataclass(frozen=True, slots=True)
class Sweep:
    """Delete what attempts of generations before this one left, but for `needed`.

    Only once the history is ours: until then a former coordinator may commit what looks unfinished. A generation that
    goes on in place does not wait for the last attempt of the one before.
    """

    needed: frozenset[m.Attempt]
    before_generation: int


@dataclass(frozen=True, slots=True)
class Log:
    text: str
    level: str = "info"  # info, warning, error


@dataclass(frozen=True, slots=True)
class Interrupted:
    """One interruption, explained, for the log and `ftrain status`."""

    failure: Failure
    generation: int
    furthest: int  # steps finished by the front rank


@dataclass(frozen=True, slots=True)
class Continues:
    """A generation that follows an interrupted one is formed."""

    generation: int
    step: int  # that it goes on from, 0 for the beginning
    furthest: int  # steps that the front rank had finished
    tier: m.Tier | None  # where the state comes from; None for the beginning
    survivors: int  # ranks that keep their processes
    forked: int  # ranks that are forked anew


@dataclass(frozen=True, slots=True)
class Resumed:
    """All ranks are in their loop again, `seconds` after the failure was noticed."""

    generation: int
    step: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Metrics that the run logged."""

    metrics: m.Metrics


@dataclass(frozen=True, slots=True)
class Exit:
    code: int
    summary: str


Action = Send | Store | Publish | Discard | Sweep | Log | Interrupted | Continues | Resumed | Measured | Exit


class Turn:
    """One call of `step`: the state as it changes, and the actions so far."""

    __slots__ = ("actions", "now", "state", "wall")

    def __init__(self, state: State, now: float, wall: float) -> None:
        self.state = state
        self.now = now
        self.wall = wall
        self.actions: list[Action] = []

    def set(self, **changes: object) -> None:
        self.state = msgspec.structs.replace(self.state, **changes)

    def enter(self, phase: Phase, until: float = float("inf")) -> None:
        self.set(phase=phase, until=until)

    def do(self, action: Action) -> None:
        self.actions.append(action)

    def log(self, text: str, level: str = "info") -> None:
        self.actions.append(Log(text, level))

    def send(self, node: str, message: m.FromCoordinator) -> None:
        known = self.state.nodes.get(node)
        if known is not None and known.connected:
            self.actions.append(Send(node, message))

    def to_members(self, message: m.FromCoordinator) -> None:
        for node in self.state.members:
            self.send(node, message)

    def append(self, body: journal.Body) -> None:
        self.record(journal.Append(body))

    def record(self, event: journal.Event) -> tuple[journal.Record, ...]:
        """Feed the journal's own machine. What it asks of storage is passed on; returns what is durable now."""
        appender, actions = journal.step(self.state.appender, event, self.now, self.wall)
        if appender is not self.state.appender:
            self.set(appender=appender)
        done: list[journal.Record] = []
        for action in actions:
            match action:
                case journal.Create() | journal.Read():
                    self.do(Store(action))
                case journal.Appended(record, digest):
                    self.set(history=self.state.history.after(record, digest))
                    done.append(record)
                case journal.Stalled(path, cause, _):
                    self.log(f"the journal cannot be written ({path}): {cause}; trying again", "warning")
                case journal.Lost(path):
                    text = f"another coordinator continued this run: {path} is not ours; this one stops"
                    self.over(ExitCode.FAILED, text)
        return tuple(done)

    def over(self, code: int, summary: str) -> None:
        """Stop deciding, at once. Nothing of what was asked for in this turn but not yet done is taken back."""
        self.set(phase=Phase.OVER, exit_code=int(code), summary=summary)
        self.do(Exit(int(code), summary))
