"""Who forms a generation, in what order, and how long it waits."""

from __future__ import annotations

from dataclasses import replace

from ftrain.core import membership
from ftrain.core.membership import FormationPolicy, Generation, Node
from ftrain.core.messages import Hello

POLICY = FormationPolicy(nodes_min=2, nodes_max=3, wait_seconds=60.0, last_call_seconds=5.0)


def node(name: str, node_rank: int = -1, joined_at: float = 0.0, processes: int = 2) -> Node:
    hello = Hello(name, node_rank, processes, "10.0.0.1", name, 1, "run", "job", "1", 0)
    return Node(hello, joined_at, lease_until=1000.0)


def form(*nodes: Node, now: float, previous: Generation | None = None) -> object:
    return membership.form(POLICY, nodes, previous, 4, since=0.0, now=now)


def names(found: object) -> list[str]:
    assert isinstance(found, Generation)
    return [member.node for member in found.members]


def test_too_few_nodes_wait_for_the_minimum_then_time_out() -> None:
    assert form(node("a"), now=59.0) == membership.Wait(60.0, 1, 2)
    assert form(node("a"), now=60.0) == membership.TimedOut(1, 2)


def test_minimum_waits_for_a_last_call_after_the_newest_node() -> None:
    assert form(node("a"), node("b", joined_at=7.0), now=11.0) == membership.Wait(12.0, 2, 3)
    assert names(form(node("a"), node("b", joined_at=7.0), now=12.0)) == ["a", "b"]


def test_maximum_starts_at_once_and_leaves_the_rest_out() -> None:
    nodes = [node(name, joined_at=float(place)) for place, name in enumerate("abcd")]
    assert names(form(*nodes, now=3.0)) == ["a", "b", "c"]


def test_ranks_are_given_out_in_order() -> None:
    found = form(node("a", processes=2), node("b", processes=1), node("c", processes=4), now=0.0)
    assert isinstance(found, Generation)
    assert [list(member.ranks) for member in found.members] == [[0, 1], [2], [3, 4, 5, 6]]
    assert (found.world_size, found.number) == (7, 4)


def test_asked_node_ranks_come_first() -> None:
    assert names(form(node("a", 2), node("b", 0), node("c", 1), now=0.0)) == ["b", "c", "a"]


def test_nodes_keep_their_places_and_newcomers_come_last() -> None:
    previous = form(node("x"), node("b"), node("c"), now=0.0)
    assert isinstance(previous, Generation)
    kept = [member.node for member in previous.members if member.node != "x"]
    assert names(form(node("new"), node("c", joined_at=3.0), node("b", joined_at=2.0), now=9.0, previous=previous)) == [
        *kept,
        "new",
    ]


def test_node_that_is_gone_or_busy_does_not_count() -> None:
    gone = replace(node("b"), connected=False)
    busy = replace(node("c"), busy_generation=3)
    late = replace(node("d"), lease_until=5.0)
    assert form(node("a"), gone, busy, late, now=6.0) == membership.Wait(60.0, 1, 2)


def test_newcomer_with_the_same_node_rank_replaces_the_older_life() -> None:
    older = node("a.1", node_rank=0)
    assert membership.replaces(node("a.2", node_rank=0).hello, [older]) is older
    assert membership.replaces(older.hello, [older]) is None
    assert membership.replaces(node("b", node_rank=1).hello, [older]) is None
    assert membership.replaces(node("any").hello, [node("other")]) is None


def test_lease_is_pushed_on() -> None:
    assert membership.renewed(node("a"), now=7.0, lease_seconds=10.0).lease_until == 17.0
