"""Who is here: nodes that join, keep their lease or lose it, and the generation that is formed of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ftrain.core.messages import Hello


@dataclass(frozen=True, slots=True)
class Node:
    """One agent, from its Hello to its loss. `lease_until` is pushed on by everything that it says."""

    hello: Hello
    joined_at: float
    lease_until: float
    connected: bool = True
    busy_generation: int = 0  # the generation whose workers it still runs, 0 when it runs none

    @property
    def name(self) -> str:
        return self.hello.node


@dataclass(frozen=True, slots=True)
class Member:
    """A node's place in a generation. Its ranks are `first_rank … first_rank + processes - 1`."""

    node: str
    node_rank: int
    group_rank: int
    first_rank: int
    processes: int

    @property
    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.processes)


@dataclass(frozen=True, slots=True)
class Generation:
    """One membership. Every failure starts the next one; numbers only grow."""

    number: int
    members: tuple[Member, ...]

    @property
    def world_size(self) -> int:
        return sum(member.processes for member in self.members)

    @property
    def nodes(self) -> frozenset[str]:
        return frozenset(member.node for member in self.members)

    @property
    def ranks(self) -> frozenset[int]:
        return frozenset(range(self.world_size))

    def member(self, node: str) -> Member | None:
        return next((member for member in self.members if member.node == node), None)


@dataclass(frozen=True, slots=True)
class FormationPolicy:
    """How many nodes a generation takes, and how long to wait for them."""

    nodes_min: int
    nodes_max: int
    wait_seconds: float = 600.0  # for the minimum
    last_call_seconds: float = 5.0  # for more, once the minimum is there


@dataclass(frozen=True, slots=True)
class Wait:
    """Not yet. Ask again at `until` unless something happens first."""

    until: float
    have: int
    need: int


@dataclass(frozen=True, slots=True)
class TimedOut:
    have: int
    need: int


def form(
    policy: FormationPolicy, nodes: Iterable[Node], previous: Generation | None, number: int, since: float, now: float
) -> Generation | Wait | TimedOut:
    """Form generation `number` of the nodes that are connected and idle, or say what it waits for.

    Nodes that were asked for by rank keep that order; others keep the order they had, newcomers come last.
    """
    present = [node for node in nodes if node.connected and node.lease_until > now]
    ready = _one_for_each_rank([node for node in present if node.busy_generation == 0])
    if len(ready) < policy.nodes_min:
        if now >= since + policy.wait_seconds:
            return TimedOut(len(ready), policy.nodes_min)
        return Wait(since + policy.wait_seconds, len(ready), policy.nodes_min)
    if len(ready) < policy.nodes_max:
        last_call = max(since, *(node.joined_at for node in ready)) + policy.last_call_seconds
        if now < last_call:
            return Wait(last_call, len(ready), policy.nodes_max)
    places = {member.node: member.group_rank for member in previous.members} if previous else {}
    unplaced = len(ready) + len(places)

    def order(node: Node) -> tuple[int, int, float, str]:
        asked = node.hello.node_rank if node.hello.node_rank >= 0 else policy.nodes_max
        return (asked, places.get(node.name, unplaced), node.joined_at, node.name)

    # Whoever was there may have state that a newcomer would have to be given.
    chosen = sorted(ready, key=lambda node: (node.name not in places, order(node)))[: policy.nodes_max]
    chosen.sort(key=order)
    members: list[Member] = []
    first_rank = 0
    for group_rank, node in enumerate(_in_their_places(chosen, previous) or chosen):
        hello = node.hello
        members.append(Member(node.name, hello.node_rank, group_rank, first_rank, hello.processes))
        first_rank += hello.processes
    return Generation(number, tuple(members))


def _in_their_places(nodes: list[Node], previous: Generation | None) -> list[Node] | None:
    """The nodes in the order in which each stays where it was, and a newcomer takes the place of one that is gone.

    None where that cannot be. With it, no rank that is alive has to become another.
    """
    if previous is None or len(nodes) != len(previous.members):
        return None
    by_name = {node.name: node for node in nodes}
    newcomers = [node for node in nodes if previous.member(node.name) is None]
    places: list[Node] = []
    for member in previous.members:
        node = by_name.get(member.node)
        if node is None:
            fitting = [one for one in newcomers if one.hello.processes == member.processes]
            # Whoever asked for this very place, else whoever asked for none.
            asked = [one for one in fitting if one.hello.node_rank == member.node_rank]
            any_place = [one for one in fitting if one.hello.node_rank < 0]
            node = next(iter((*asked, *any_place)), None)
            if node is None:
                return None
            newcomers.remove(node)
        places.append(node)
    return places


def same_places(one: Generation, other: Generation) -> bool:
    """Whether each rank is on the same place in both: its node, or the node that follows that one."""
    return [(member.first_rank, member.processes) for member in one.members] == [
        (member.first_rank, member.processes) for member in other.members
    ] and all(
        before.node == after.node or (before.node not in other.nodes and after.node not in one.nodes)
        for before, after in zip(one.members, other.members, strict=True)
    )


def replaces(newcomer: Hello, nodes: Iterable[Node]) -> Node | None:
    """The older life of the same node, if this Hello is its successor: two agents cannot both be node rank I."""
    if newcomer.node_rank < 0:
        return None
    same = (node for node in nodes if node.hello.node_rank == newcomer.node_rank and node.name != newcomer.node)
    return next(same, None)


def successor(node: Node, nodes: Iterable[Node]) -> Node | None:
    """A later life of the same node, that waits for this one to end."""
    rank = node.hello.node_rank
    same = (other for other in nodes if rank >= 0 and other.hello.node_rank == rank and other.name != node.name)
    return next(same, None)


def _one_for_each_rank(nodes: list[Node]) -> list[Node]:
    """Of launchers that claim the same node rank, the one that came first."""
    taken: dict[int, Node] = {}
    for node in sorted(nodes, key=lambda node: (node.joined_at, node.name)):
        if node.hello.node_rank >= 0:
            taken.setdefault(node.hello.node_rank, node)
    return [node for node in nodes if taken.get(node.hello.node_rank, node) is node]


def renewed(node: Node, now: float, lease_seconds: float) -> Node:
    return replace(node, lease_until=now + lease_seconds)
