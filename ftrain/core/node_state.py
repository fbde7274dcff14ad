"""An agent's vocabulary: its state, what can happen to it, what it can ask for. `core.node` decides on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import msgspec

from ftrain.core import local
from ftrain.core import messages as m
from ftrain.core.hangs import Look, Watch

SLOTS_MIN = 2  # of an arena: one holds what the run would go on from, one is being filled
Pages = Mapping[int, tuple[int, int]]  # rank -> (steps finished, phase), read just now


@dataclass(frozen=True, slots=True)
class Worker:
    rank: int
    local_rank: int
    generation: int = 0  # the one that it was last told to take part in
    pid: int = 0
    joined: bool = False
    looping: local.WorkerLooping | None = None  # in the present generation
    looped: bool = False  # in this one or in an earlier one
    halted: local.WorkerHalted | None = None
    shard: str = ""
    replays: bool = False
    at_end: bool = False
    cost: m.Cost = m.Cost()  # of the newest snapshot
    slots: int = 0  # of its arena, 0 until it has memory for snapshots
    error: m.ErrorReport | None = None
    killed: bool = False  # by its agent: how it ends says nothing
    hung: m.Hang | None = None  # it is being ended for this
    exit: m.RankExit | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """This node's part of one attempt."""

    attempt: m.Attempt
    slot: int
    hold: bool
    persist: bool = True
    base: m.Attempt | None = None
    sealed: frozenset[int] = frozenset()
    packs: tuple[m.PackRecord, ...] = ()
    failures: tuple[m.AttemptFailed, ...] = ()
    armed: bool = False
    decided: bool = False  # holding workers have their verdict


class State(msgspec.Struct, frozen=True):  # not a dataclass: it is replaced many times an event, and this one is quick
    hello: m.Hello
    grace_seconds: float = 25.0
    halt_seconds: float = 10.0
    coordinator_wait_seconds: float = 600.0
    term: int = 0
    connected: bool = False
    lost_at: float = 0.0
    lease_seconds: float = float("inf")  # both as the coordinator says
    heartbeat_seconds: float = 1.0
    leased_at: float = 0.0  # the coordinator has counted this node's lease from then on, or from later
    unanswered: Mapping[int, float] = {}  # heartbeats of this channel, 0 for the Hello: when each was sent
    version: int = 0
    beat: int = 0
    generation: int = 0
    start: m.Start | None = None
    stopping: bool = False
    halting: bool = False  # the generation is over, but what can go on in place is alive
    halt_until: float = float("inf")  # workers that do not stand still by then are killed
    workers: Mapping[int, Worker] = {}
    watches: Mapping[int, Watch] = {}  # the living workers, as they have been seen
    snapshot: Snapshot | None = None  # of the newest attempt
    saving: Snapshot | None = None  # of the one before, where that is being written to storage still
    held: Mapping[int, m.Attempt] = {}  # slot -> the snapshot that is sealed in it for all local ranks
    copied: Mapping[int, m.Attempt] = {}  # those of them that a keeper is to have
    keeps: tuple[m.Kept, ...] = ()  # for another node
    sending_seconds: float = 0.0  # as `messages.Report` has it
    attempt_seen: int = 0
    committed: int = 0  # the step of the newest commit that this node has heard of, 0 for none
    # Ranks that may still write the snapshot of a dead attempt: rank -> (that attempt's step, slot).
    filling: Mapping[int, tuple[int, int]] = {}
    writing: Mapping[tuple[m.Attempt, int], int] = {}  # (attempt, rank) -> slot being persisted
    store: StoreUp | None = None  # of the coming or present generation; port 0 while it is being started
    notice: str = ""
    notice_until: float = float("inf")
    leave: m.Leave | None = None
    alone: bool = False  # it leaves without the coordinator's word
    over: bool = False

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        return tuple(one for one in (self.saving, self.snapshot) if one is not None)

    @property
    def alive(self) -> tuple[Worker, ...]:
        return tuple(worker for worker in self.workers.values() if worker.exit is None)

    @property
    def all_looping(self) -> bool:
        """Every worker is alive and in its loop."""
        return all(worker.exit is None and worker.looping is not None for worker in self.workers.values())


# -------------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Connected:
    pass


@dataclass(frozen=True, slots=True)
class Disconnected:
    pass


@dataclass(frozen=True, slots=True)
class Said:
    message: m.FromCoordinator


@dataclass(frozen=True, slots=True)
class Forked:
    rank: int
    pid: int


@dataclass(frozen=True, slots=True)
class WorkerSaid:
    rank: int
    message: local.FromWorker


@dataclass(frozen=True, slots=True)
class WorkerExited:
    exit: m.RankExit


@dataclass(frozen=True, slots=True)
class Armed:
    """The answer to `ArmPages`. When not ok, `reached` are ranks that may have begun the snapshot all the same."""

    attempt: m.Attempt
    ok: bool
    furthest: int
    reached: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Disarmed:
    attempt: m.Attempt
    reached: frozenset[int]


@dataclass(frozen=True, slots=True)
class Persisted:
    attempt: m.Attempt
    pack: m.PackRecord


@dataclass(frozen=True, slots=True)
class PersistFailed:
    attempt: m.Attempt
    rank: int
    cause: str  # "" when it was cancelled


@dataclass(frozen=True, slots=True)
class StoreUp:
    generation: int
    address: str
    port: int


@dataclass(frozen=True, slots=True)
class StoreDown:
    """The store of that generation could not be started, or has ended."""

    generation: int


@dataclass(frozen=True, slots=True)
class Keeps:
    """What is kept here for another node is this now."""

    kept: tuple[m.Kept, ...]


@dataclass(frozen=True, slots=True)
class Sent:
    """A snapshot has gone to this node's keeper."""

    seconds: float  # of a processor, while others wanted it


@dataclass(frozen=True, slots=True)
class Fetched:
    """The snapshot that the generation goes on from has come from another node, into this slot of each rank."""

    generation: int
    slot: int
    attempt: m.Attempt


@dataclass(frozen=True, slots=True)
class Signalled:
    why: str  # SIGTERM or SIGINT


@dataclass(frozen=True, slots=True)
class Looked:
    """Several times a second: how each living worker looks."""

    looks: Mapping[int, Look]


@dataclass(frozen=True, slots=True)
class Dumped:
    """The answer to `DumpStack`. `stack` is "" where the worker could not say."""

    rank: int
    pid: int
    stack: str


@dataclass(frozen=True, slots=True)
class Beat:
    """Once every heartbeat interval, connected or not."""


Event = (
    Connected
    | Disconnected
    | Said
    | Forked
    | WorkerSaid
    | WorkerExited
    | Armed
    | Disarmed
    | Persisted
    | PersistFailed
    | StoreUp
    | StoreDown
    | Keeps
    | Sent
    | Fetched
    | Signalled
    | Looked
    | Dumped
    | Beat
)

# ------------------------------------------------------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class Send:
    message: m.FromAgent


@dataclass(frozen=True, slots=True)
class Reconnect:
    """Drop the channel and look again: whoever answered is not the newest coordinator."""


@dataclass(frozen=True, slots=True)
class Fork:
    """Fork workers for these ranks of the generation, answer each with `Forked`, later with `WorkerExited`."""

    start: m.Start
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Continue:
    """Tell these living ranks that they go on in the generation of `start`."""

    start: m.Start
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RevokePages:
    """The generation is over: these ranks are to stand still, wherever they are."""

    generation: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KillRanks:
    """End these workers at once."""

    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DumpStack:
    """Have this worker write where it is; answer with `Dumped`."""

    rank: int


@dataclass(frozen=True, slots=True)
class Kill:
    """End all workers: those that joined at once, others by SIGTERM and, `grace_seconds` later, SIGKILL."""

    grace_seconds: float


@dataclass(frozen=True, slots=True)
class ArmPages:
    attempt: m.Attempt
    slot: int
    hold: bool
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DisarmPages:
    attempt: m.Attempt
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SetVerdict:
    attempt: m.Attempt
    leave: bool
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReleasePages:
    generation: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Persist:
    attempt: m.Attempt
    rank: int
    slot: int
    base: m.Attempt | None = None  # a commit whose packs may be referred to


@dataclass(frozen=True, slots=True)
class CancelPersist:
    attempt: m.Attempt


@dataclass(frozen=True, slots=True)
class HostStore:
    generation: int


@dataclass(frozen=True, slots=True)
class Show:
    text: str
    level: str = "info"


@dataclass(frozen=True, slots=True)
class Exit:
    code: int
    summary: str


Action = (
    Send
    | Reconnect
    | Fork
    | Continue
    | RevokePages
    | KillRanks
    | DumpStack
    | Kill
    | ArmPages
    | DisarmPages
    | SetVerdict
    | ReleasePages
    | Persist
    | CancelPersist
    | HostStore
    | Show
    | Exit
)


class Turn:
    """One call of `step`: the state as it changes, and the actions so far."""

    __slots__ = ("actions", "now", "pages", "state")

    def __init__(self, state: State, now: float, pages: Pages) -> None:
        self.state = state
        self.now = now
        self.pages = pages
        self.actions: list[Action] = []

    def set(self, **changes: object) -> None:
        self.state = msgspec.structs.replace(self.state, **changes)

    def do(self, action: Action) -> None:
        self.actions.append(action)

    def send(self, message: m.FromAgent) -> None:
        if self.state.connected and self.state.term:
            self.actions.append(Send(message))

    def changed(self) -> None:
        self.send(m.Changed(self.report()))

    def report(self) -> m.Report:
        self.set(version=self.state.version + 1)
        return report(self.state, self.pages)

    def worker(self, rank: int, **changes: object) -> None:
        worker = replace(self.state.workers[rank], **changes)  # type: ignore[arg-type]
        self.set(workers={**self.state.workers, rank: worker})


def report(state: State, pages: Pages) -> m.Report:
    """What this node runs at this moment."""
    workers = state.workers.values()
    loops = [worker.looping for worker in workers if worker.looping is not None]
    alive = state.alive
    ranks = tuple(
        _running(worker, *pages.get(worker.rank, (-1, 0)), state.watches.get(worker.rank)) for worker in alive
    )
    return m.Report(
        version=state.version,
        generation=state.generation,
        stopped=not alive and (state.stopping or state.halting or state.start is None),
        attempt_seen=state.attempt_seen,
        ranks=ranks,
        exits=tuple(worker.exit for worker in workers if worker.exit is not None),
        looping=bool(alive) and len(loops) == len(state.workers),
        first_step=min((loop.step for loop in loops), default=-1),
        total_steps=max((loop.total_steps for loop in loops), default=0),
        at_end=bool(workers) and all(worker.at_end for worker in workers),
        halted=state.halting and bool(alive) and all(worker.halted for worker in alive),
        held=tuple(sorted(state.held.values())),
        keeps=state.keeps,
        sending_seconds=state.sending_seconds,
    )


def _running(worker: Worker, step: int, phase: int, watch: Watch | None) -> m.RunningRank:
    halted = worker.halted
    return m.RunningRank(
        worker.rank,
        worker.local_rank,
        worker.pid,
        step,
        phase,
        worker.joined,
        worker.cost.stall_seconds,
        worker.looped,
        halted is not None,
        halted.live if halted is not None else -1,
        halted.kept if halted is not None else (),
        worker.shard,
        worker.replays,
        watch.progress if watch is not None else None,
        worker.slots,
    )


def hello(state: State, pages: Pages) -> m.Hello:
    """The introduction to whichever coordinator answers."""
    return m.Hello(
        node=state.hello.node,
        node_rank=state.hello.node_rank,
        processes=state.hello.processes,
        address=state.hello.address,
        host=state.hello.host,
        pid=state.hello.pid,
        run_id=state.hello.run_id,
        job_sha256=state.hello.job_sha256,
        version=state.hello.version,
        term_seen=state.term,
        report=report(state, pages),
        joins=state.hello.joins,
        peer_port=state.hello.peer_port,
    )
