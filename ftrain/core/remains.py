"""What is left of the present generation: who has reported, who stands still, and what they can go on from."""

from __future__ import annotations

from collections.abc import Mapping

from ftrain.core import keeping, recovery
from ftrain.core import messages as m
from ftrain.core.membership import Generation, Member
from ftrain.core.run_state import State

Copies = Mapping[int, Mapping[str, m.Kept]]  # rank -> node -> what it keeps of that rank


def connected_nodes(state: State) -> frozenset[str]:
    return frozenset(name for name, node in state.nodes.items() if node.connected)


def recovery_line(state: State, nodes: frozenset[str]) -> m.Line | None:
    """What ranks on these nodes, that are left of the present generation, can go on from in place; None without any."""
    generation = state.generation
    if generation is None or not survivors(state, nodes):
        return None
    copies = _copies(state, nodes)
    holders = [holder for member in generation.members for holder in _holders(state, member, nodes, copies)]
    commit_of_run = recovery.recovery_line(state.history, state.suspects)
    return recovery.plan(holders, held_by_all(state, nodes), commit_of_run)


def survivors(state: State, nodes: frozenset[str]) -> frozenset[int]:
    """The ranks on these nodes that stand still and may go on in place."""
    if state.scrapped:
        return frozenset()
    reports = [state.report(name) for name in state.members if name in nodes]
    return frozenset(rank.rank for report in reports for rank in report.ranks if rank.halted)


def held_by_all(state: State, nodes: frozenset[str]) -> frozenset[m.Attempt]:
    """The snapshots that there are of every member of the generation, in its own arenas or at its keeper."""
    members = state.generation.members if state.generation is not None else ()
    copies = _copies(state, nodes)
    each = [_held(state, member, nodes, copies) for member in members]
    return frozenset.intersection(*each) - state.spoiled


def fetches(
    state: State, generation: Generation, line: m.Line | None, survivors: frozenset[int]
) -> Mapping[str, m.Fetch]:
    """What members of the generation that goes on from `line` have to get from others, before they fork any rank."""
    if line is None or line.tier is m.Tier.STORAGE or state.generation is None:
        return {}
    copies = _copies(state, generation.nodes)
    found: dict[str, m.Fetch] = {}
    for before, member in zip(state.generation.members, generation.members, strict=True):
        own = state.report(member.node) if member.node == before.node else m.Report()
        if line.tier is m.Tier.ARENA:
            lacking = () if line.attempt in own.held else tuple(member.ranks)
        else:
            has = {exit.rank for exit in own.exits if exit.kept}
            lacking = tuple(rank for rank in member.ranks if rank not in survivors and rank not in has)
        keeper = state.nodes.get(keeping.holder_of(before, copies)[0])
        if lacking and keeper is not None:
            found[member.node] = m.Fetch(keeping.peer(keeper), lacking)
    return found


def _holders(state: State, member: Member, nodes: frozenset[str], copies: Copies) -> list[recovery.Holder]:
    """What is left of each of a member's ranks: of itself, in its node's memory, or else at its keeper."""
    report = state.report(member.node) if member.node in nodes else m.Report()
    alive = {rank.rank: rank for rank in report.ranks if rank.halted}
    ended = {exit.rank: exit for exit in report.exits}
    _, kept = keeping.holder_of(member, copies)
    found: list[recovery.Holder] = []
    for rank in member.ranks:
        gone, copy = ended.get(rank), kept.get(rank)
        if (one := alive.get(rank)) is not None:
            found.append(recovery.Holder(rank, one.shard, one.live, one.kept, one.replays))
        elif gone is not None and (gone.kept or copy is None):
            found.append(recovery.Holder(rank, gone.shard, -1, gone.kept, gone.replays))
        elif copy is not None:
            found.append(recovery.Holder(rank, copy.shard, -1, copy.boundaries, copy.replays))
        else:
            found.append(recovery.Holder(rank))
    return found


def _held(state: State, member: Member, nodes: frozenset[str], copies: Copies) -> frozenset[m.Attempt]:
    report = state.report(member.node) if member.node in nodes else m.Report()
    own = frozenset(report.held)
    if report.ranks:
        return own  # a copy would have to come into arenas that living ranks have
    return own | keeping.snapshots_of(member, keeping.holder_of(member, copies)[1])


def _copies(state: State, nodes: frozenset[str]) -> Copies:
    return keeping.by_rank({name: state.report(name) for name in state.members if name in nodes})


def knows(state: State, node: str) -> bool:
    """The node has reported about the present generation."""
    return state.report(node).generation == state.number


def is_over(report: m.Report) -> bool:
    """Nothing of the report's generation trains any more."""
    return report.stopped or report.halted


def furthest(state: State) -> int:
    return max([state.furthest, *(exit.step for _, exit in state.exits.values())])
