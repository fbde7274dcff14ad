"""One attempt to checkpoint one step, as the coordinator sees it: propose, arm, seal, prepare, commit or abort.

Safety rests on three rules, each of which the simulator tries to break: an attempt commits only when every rank
*named* at its proposal has prepared (never a count); the manifest is durable before the journal record that makes it
a commit; and from the moment that record is being written nothing can abort the attempt any more, because it may
already stand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from ftrain.core.messages import Attempt, Logged, PackRecord


class Stage(Enum):
    PROPOSED = "proposed"  # asked every node to arm
    ARMED = "armed"  # every node accepted: all ranks will snapshot at the same boundary
    SEALED = "sealed"  # every rank's snapshot is in its agent's arena
    HELD = "held"  # sealed, and that is all that was wanted: it stays in the arenas
    PREPARED = "prepared"  # every rank's pack is durable; the manifest is being written
    RECORDING = "recording"  # the manifest is durable; the journal record is being written
    COMMITTED = "committed"
    ABORTED = "aborted"


FINAL = frozenset({Stage.HELD, Stage.COMMITTED, Stage.ABORTED})
TAKEN = frozenset({Stage.SEALED, Stage.PREPARED, Stage.RECORDING})


@dataclass(frozen=True, slots=True)
class Barrier:
    """The attempt's state. `nodes` and `ranks` are those named at the proposal."""

    attempt: Attempt
    nodes: frozenset[str]
    ranks: frozenset[int]
    hold: bool = False  # workers wait at the boundary for a verdict
    persist: bool = True  # False: it is over once it is sealed
    stays: tuple[Attempt, ...] = ()  # snapshots whose slots are not to be taken for it
    metrics: Mapping[str, Logged] = field(default_factory=dict)  # each one's newest value at the step, once sealed
    stage: Stage = Stage.PROPOSED
    accepted: frozenset[str] = frozenset()
    sealed: frozenset[int] = frozenset()
    prepared: frozenset[int] = frozenset()
    packs: tuple[PackRecord, ...] = ()  # of those that prepared
    manifest_sha256: str = ""
    cause: str = ""
    refused: bool = False  # by a node: it was aborted before it began
    refused_step: int = -1  # the furthest step that the refusing node had finished, where that is why
    deadline: float = float("inf")

    @property
    def is_over(self) -> bool:
        return self.stage in FINAL

    @property
    def is_taken(self) -> bool:
        """Every rank's snapshot is sealed: nothing more is wanted of the workers."""
        return self.stage in TAKEN

    @property
    def missing(self) -> frozenset[int]:
        """The ranks that the attempt waits for."""
        return self.ranks - (self.prepared if self.stage is Stage.SEALED else self.sealed)


# -------------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Accepted:
    node: str


@dataclass(frozen=True, slots=True)
class Refused:
    node: str
    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class RanksSealed:
    ranks: frozenset[int]


@dataclass(frozen=True, slots=True)
class RankPrepared:
    pack: PackRecord


@dataclass(frozen=True, slots=True)
class RankFailed:
    rank: int
    cause: str


@dataclass(frozen=True, slots=True)
class WorkersLost:
    """These ranks' processes are gone; what they sealed is still in their agents' arenas."""

    ranks: frozenset[int]
    cause: str


@dataclass(frozen=True, slots=True)
class ArenasLost:
    """These ranks' agents are gone, with their arenas. What they had prepared stays durable."""

    ranks: frozenset[int]
    cause: str


@dataclass(frozen=True, slots=True)
class Published:
    manifest_sha256: str


@dataclass(frozen=True, slots=True)
class PublishFailed:
    cause: str


@dataclass(frozen=True, slots=True)
class Recorded:
    pass


@dataclass(frozen=True, slots=True)
class Expired:
    cause: str


Event = (
    Accepted
    | Refused
    | RanksSealed
    | RankPrepared
    | RankFailed
    | WorkersLost
    | ArenasLost
    | Published
    | PublishFailed
    | Recorded
    | Expired
)

# ------------------------------------------------------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class AllArmed:
    """Every node armed: no rank can miss the boundary any more. Holding workers may be given their verdict."""


@dataclass(frozen=True, slots=True)
class AllSealed:
    """Every rank's snapshot is in its agent's arena: the run can go on from it for as long as the arenas are there."""


@dataclass(frozen=True, slots=True)
class Publish:
    """Write the manifest durably, then answer with `Published`."""


@dataclass(frozen=True, slots=True)
class WriteCommit:
    """Append the commit record to the journal, then answer with `Recorded`."""


@dataclass(frozen=True, slots=True)
class AnnounceCommit:
    pass


@dataclass(frozen=True, slots=True)
class AnnounceAbort:
    pass


Action = AllArmed | AllSealed | Publish | WriteCommit | AnnounceCommit | AnnounceAbort
Result = tuple[Barrier, tuple[Action, ...]]


def step(state: Barrier, event: Event) -> Result:
    """Advance the attempt. An event that its stage does not list is a broken caller and raises."""
    handler = TABLE.get((state.stage, type(event)))
    if handler is None:
        raise AssertionError(f"{state.attempt}: {type(event).__name__} cannot happen when {state.stage.value}")
    return handler(state, event)


def _ignore(state: Barrier, event: Event) -> Result:
    del event  # it says nothing new here
    return state, ()


def _accept(state: Barrier, event: Accepted) -> Result:
    if event.node not in state.nodes:
        return state, ()
    state = replace(state, accepted=state.accepted | {event.node})
    if state.accepted != state.nodes:
        return state, ()
    state, actions = _seal_if_complete(replace(state, stage=Stage.ARMED))
    return state, (AllArmed(), *actions)


def _refuse(state: Barrier, event: Refused) -> Result:
    return _abort(replace(state, refused=True, refused_step=event.step), f"node {event.node} refused: {event.reason}")


def _seal(state: Barrier, event: RanksSealed) -> Result:
    return _seal_if_complete(replace(state, sealed=state.sealed | (event.ranks & state.ranks)))


def _seal_if_complete(state: Barrier) -> Result:
    if state.stage is not Stage.ARMED or state.sealed != state.ranks:
        return state, ()
    if not state.persist:
        return replace(state, stage=Stage.HELD), (AllSealed(),)
    state, actions = _prepare_if_complete(replace(state, stage=Stage.SEALED))
    return state, (AllSealed(), *actions)


def _prepare(state: Barrier, event: RankPrepared) -> Result:
    rank = event.pack.rank
    if rank not in state.ranks or rank in state.prepared:
        return state, ()
    # A durable pack implies a sealed snapshot, even if the message that said so was lost.
    sealed = state.sealed if rank in state.sealed else state.sealed | {rank}
    state = replace(state, packs=(*state.packs, event.pack), prepared=state.prepared | {rank}, sealed=sealed)
    if state.stage is Stage.ARMED:
        return _seal_if_complete(state)
    return _prepare_if_complete(state)


def _prepare_if_complete(state: Barrier) -> Result:
    if state.stage is not Stage.SEALED or state.prepared != state.ranks:
        return state, ()
    return replace(state, stage=Stage.PREPARED), (Publish(),)


def _rank_failed(state: Barrier, event: RankFailed) -> Result:
    return _abort(state, f"rank {event.rank}: {event.cause}")


def _workers_lost(state: Barrier, event: WorkersLost) -> Result:
    if (event.ranks & state.ranks) <= state.sealed:
        return state, ()
    return _abort(state, event.cause)


def _arenas_lost(state: Barrier, event: ArenasLost) -> Result:
    if (event.ranks & state.ranks) <= state.prepared:
        return state, ()
    return _abort(state, event.cause)


def _published(state: Barrier, event: Published) -> Result:
    return replace(state, stage=Stage.RECORDING, manifest_sha256=event.manifest_sha256), (WriteCommit(),)


def _cause(state: Barrier, event: PublishFailed | Expired) -> Result:
    return _abort(state, event.cause)


def _recorded(state: Barrier, event: Recorded) -> Result:
    del event
    return replace(state, stage=Stage.COMMITTED), (AnnounceCommit(),)


def _abort(state: Barrier, cause: str) -> Result:
    return replace(state, stage=Stage.ABORTED, cause=cause), (AnnounceAbort(),)


_Handler = Callable[[Barrier, Any], Result]

# The protocol. What a stage does not list cannot happen there; a duplicate or late message is `_ignore`d by name.
TABLE: dict[tuple[Stage, type[Event]], _Handler] = {
    (Stage.PROPOSED, Accepted): _accept,
    (Stage.PROPOSED, Refused): _refuse,
    (Stage.PROPOSED, RanksSealed): _seal,
    (Stage.PROPOSED, RankPrepared): _prepare,
    (Stage.PROPOSED, RankFailed): _rank_failed,
    (Stage.PROPOSED, WorkersLost): _workers_lost,
    (Stage.PROPOSED, ArenasLost): _arenas_lost,
    (Stage.PROPOSED, Expired): _cause,
    (Stage.ARMED, Accepted): _ignore,
    (Stage.ARMED, Refused): _refuse,
    (Stage.ARMED, RanksSealed): _seal,
    (Stage.ARMED, RankPrepared): _prepare,
    (Stage.ARMED, RankFailed): _rank_failed,
    (Stage.ARMED, WorkersLost): _workers_lost,
    (Stage.ARMED, ArenasLost): _arenas_lost,
    (Stage.ARMED, Expired): _cause,
    (Stage.SEALED, Accepted): _ignore,
    (Stage.SEALED, Refused): _ignore,
    (Stage.SEALED, RanksSealed): _ignore,
    (Stage.SEALED, RankPrepared): _prepare,
    (Stage.SEALED, RankFailed): _rank_failed,
    (Stage.SEALED, WorkersLost): _ignore,
    (Stage.SEALED, ArenasLost): _arenas_lost,
    (Stage.SEALED, Expired): _cause,
    (Stage.PREPARED, Accepted): _ignore,
    (Stage.PREPARED, Refused): _ignore,
    (Stage.PREPARED, RanksSealed): _ignore,
    (Stage.PREPARED, RankPrepared): _ignore,
    (Stage.PREPARED, RankFailed): _ignore,
    (Stage.PREPARED, WorkersLost): _ignore,
    (Stage.PREPARED, ArenasLost): _ignore,
    (Stage.PREPARED, Published): _published,
    (Stage.PREPARED, PublishFailed): _cause,
    (Stage.PREPARED, Expired): _ignore,
    (Stage.RECORDING, Accepted): _ignore,
    (Stage.RECORDING, Refused): _ignore,
    (Stage.RECORDING, RanksSealed): _ignore,
    (Stage.RECORDING, RankPrepared): _ignore,
    (Stage.RECORDING, RankFailed): _ignore,
    (Stage.RECORDING, WorkersLost): _ignore,
    (Stage.RECORDING, ArenasLost): _ignore,
    (Stage.RECORDING, Expired): _ignore,
    (Stage.RECORDING, Recorded): _recorded,
}
