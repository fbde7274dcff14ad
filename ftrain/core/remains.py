"""What is left of the present generation: who has reported, who stands still, and what they can go on from."""

from __future__ import annotations

from ftrain.core import messages as m
from ftrain.core import recovery
from ftrain.core.run_state import State


def connected_nodes(state: State) -> frozenset[str]:
    return frozenset(name for name, node in state.nodes.items() if node.connected)


def recovery_line(state: State, nodes: frozenset[str]) -> m.Line | None:
    """What ranks on these nodes, that are left of the present generation, can go on from in place; None without any."""
    generation = state.generation
    if generation is None or not survivors(state, nodes):
        return None
    holders: list[recovery.Holder] = []
    for member in generation.members:
        report = state.report(member.node) if member.node in nodes else m.Report()
        alive = {rank.rank: rank for rank in report.ranks if rank.halted}
        ended = {exit.rank: exit for exit in report.exits}
        for rank in member.ranks:
            if (one := alive.get(rank)) is not None:
                holders.append(recovery.Holder(rank, one.shard, one.live, one.kept, one.replays))
            elif (gone := ended.get(rank)) is not None:
                holders.append(recovery.Holder(rank, gone.shard, -1, gone.kept, gone.replays))
            else:
                holders.append(recovery.Holder(rank))
    commit_of_run = recovery.recovery_line(state.history, state.suspects)
    return recovery.plan(holders, held_by_all(state, nodes), commit_of_run)


def survivors(state: State, nodes: frozenset[str]) -> frozenset[int]:
    """The ranks on these nodes that stand still and may go on in place."""
    if state.scrapped:
        return frozenset()
    reports = [state.report(name) for name in state.members if name in nodes]
    return frozenset(rank.rank for report in reports for rank in report.ranks if rank.halted)


def held_by_all(state: State, nodes: frozenset[str]) -> frozenset[m.Attempt]:
    """The snapshots that every member of the generation still has in its arenas, as far as these are the nodes left."""
    each = [frozenset(state.report(name).held) if name in nodes else frozenset() for name in state.members]
    return frozenset.intersection(*each) - state.spoiled


def knows(state: State, node: str) -> bool:
    """The node has reported about the present generation."""
    return state.report(node).generation == state.number


def is_over(report: m.Report) -> bool:
    """Nothing of the report's generation trains any more."""
    return report.stopped or report.halted


def furthest(state: State) -> int:
    return max([state.furthest, *(exit.step for _, exit in state.exits.values())])
