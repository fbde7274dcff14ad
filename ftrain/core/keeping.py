"""Peer copies: what a node keeps in its memory for the ranks of another one, so that a lost node's state is not lost.

Each node of a generation has a *keeper*, the next one in the ring. It is sent the private state of each rank at its
boundaries, and the snapshots that are sealed for all of the node's ranks. A copy counts as long as what it is of is
part of the run's one history: a generation that goes on in place from some step gives up what came after that step,
and one whose ranks are all new gives up everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ftrain.core import messages as m
from ftrain.core.membership import Generation, Member, Node

BOUNDARIES_MAX = 2  # of one rank, as in its black box
SNAPSHOTS_MAX = 2  # of one rank, as in its arena


@dataclass(frozen=True, slots=True)
class Copies:
    """What is kept of one rank. Boundaries are (step, the generation that sent it), in ascending order."""

    shard: str = ""
    replays: bool = False
    boundaries: tuple[tuple[int, int], ...] = ()
    snapshots: tuple[m.Attempt, ...] = ()  # whole ones only

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(step for step, _ in self.boundaries)


@dataclass(frozen=True, slots=True)
class Kept:
    """All that a node keeps, by rank."""

    generation: int = 0
    ranks: Mapping[int, Copies] = field(default_factory=dict)


def began(kept: Kept, generation: int, line: m.Line | None) -> Kept:
    """A generation has begun. What its node sent before we heard of it stays; older things as far as it goes on."""
    if generation <= kept.generation:
        return kept
    ranks: dict[int, Copies] = {}
    for rank, copies in kept.ranks.items():
        boundaries = tuple(
            (step, max(sent_in, generation))
            for step, sent_in in copies.boundaries
            if sent_in >= generation or (line is not None and step <= line.step)
        )
        snapshots = tuple(one for one in copies.snapshots if line is not None or one.generation >= generation)
        if boundaries or snapshots:
            ranks[rank] = replace(copies, boundaries=boundaries, snapshots=snapshots)
    return Kept(generation, ranks)


def took_boundary(kept: Kept, generation: int, rank: int, step: int, shard: str, replays: bool) -> Kept:
    """A rank's private state has come. It is the newest there is: what is of later steps was given up."""
    assert generation >= kept.generation, "what a generation before sends is not taken"
    copies = kept.ranks.get(rank, Copies())
    before = tuple(one for one in copies.boundaries if one[0] < step)[-(BOUNDARIES_MAX - 1) :]
    return _with(kept, rank, replace(copies, shard=shard, replays=replays, boundaries=(*before, (step, generation))))


def makes_room(kept: Kept, rank: int, attempt: m.Attempt, held: Iterable[m.Attempt]) -> Kept:
    """A snapshot begins to come. Of those before it one stays, the newest that its own node holds still."""
    copies = kept.ranks.get(rank, Copies())
    still = sorted((one for one in copies.snapshots if one != attempt and one in held), key=_age)
    return _with(kept, rank, replace(copies, snapshots=tuple(still[-(SNAPSHOTS_MAX - 1) :])))


def took_snapshot(kept: Kept, rank: int, attempt: m.Attempt) -> Kept:
    """The snapshot has come whole."""
    copies = kept.ranks.get(rank, Copies())
    return _with(kept, rank, replace(copies, snapshots=(*copies.snapshots, attempt)))


def lost(kept: Kept, rank: int, step: int = -1, attempt: m.Attempt | None = None) -> Kept:
    """A copy turned out to be damaged."""
    copies = kept.ranks.get(rank, Copies())
    boundaries = tuple(one for one in copies.boundaries if one[0] != step)
    snapshots = tuple(one for one in copies.snapshots if one != attempt)
    return _with(kept, rank, replace(copies, boundaries=boundaries, snapshots=snapshots))


def report(kept: Kept) -> tuple[m.Kept, ...]:
    """For the coordinator."""
    return tuple(
        m.Kept(rank, copies.steps, tuple(sorted(copies.snapshots)), copies.shard, copies.replays)
        for rank, copies in sorted(kept.ranks.items())
    )


def _with(kept: Kept, rank: int, copies: Copies) -> Kept:
    return replace(kept, ranks={**kept.ranks, rank: copies})


def _age(attempt: m.Attempt) -> tuple[int, m.Attempt]:
    return attempt.step, attempt


# --------------------------------------------------------------------------------------------------------- what to send


def boundaries_due(sent: int, steps: Iterable[int]) -> tuple[int, ...]:
    """Of the steps in a black box those that are newer than the newest one sent, the oldest first."""
    return tuple(sorted(step for step in steps if step > sent))


def snapshot_due(sent: m.Attempt | None, held: Mapping[int, m.Attempt]) -> tuple[int, m.Attempt] | None:
    """The newest snapshot that is held, and its slot, unless it or a newer one was sent before."""
    slot, newest = max(held.items(), key=lambda item: _age(item[1]), default=(-1, None))
    if newest is None or (sent is not None and _age(newest) <= _age(sent)):
        return None
    return slot, newest


# --------------------------------------------------------------------------------------------------- who keeps, who has


def keeper(generation: Generation, nodes: Mapping[str, Node], member: Member) -> m.Peer | None:
    """Where the copies of a member go: to the next one in the ring that takes any. None where it makes none itself."""
    own = nodes.get(member.node)
    if own is None or not own.hello.peer_port:
        return None
    count = len(generation.members)
    for distance in range(1, count):
        other = nodes.get(generation.members[(member.group_rank + distance) % count].node)
        if other is not None and other.hello.peer_port:
            return peer(other)
    return None


def peer(node: Node) -> m.Peer:
    return m.Peer(node.name, node.hello.address, node.hello.peer_port)


def by_rank(reports: Mapping[str, m.Report]) -> dict[int, dict[str, m.Kept]]:
    """rank -> node -> what the node keeps of it."""
    found: dict[int, dict[str, m.Kept]] = {}
    for name, one in reports.items():
        for kept in one.keeps:
            found.setdefault(kept.rank, {})[name] = kept
    return found


def holder_of(member: Member, copies: Mapping[int, Mapping[str, m.Kept]]) -> tuple[str, Mapping[int, m.Kept]]:
    """Which other node has the best copies of a member's ranks, and what; ("", {}) where nobody has any."""
    best: tuple[str, Mapping[int, m.Kept]] = ("", {})
    worth: tuple[int, int] = (0, -1)
    for name in sorted({name for rank in member.ranks for name in copies.get(rank, {})} - {member.node}):
        found = {rank: copies[rank][name] for rank in member.ranks if name in copies.get(rank, {})}
        newest = max((step for kept in found.values() for step in kept.boundaries), default=-1)
        if (len(found), newest) > worth:
            best, worth = (name, found), (len(found), newest)
    return best


def snapshots_of(member: Member, kept: Mapping[int, m.Kept]) -> frozenset[m.Attempt]:
    """The snapshots that are there of all of the member's ranks."""
    return snapshots_of_all([kept.get(rank, m.Kept(rank)) for rank in member.ranks])


def snapshots_of_all(kept: Sequence[m.Kept]) -> frozenset[m.Attempt]:
    """The snapshots that are there of each of these ranks."""
    return frozenset.intersection(*(frozenset(one.attempts) for one in kept)) if kept else frozenset()
