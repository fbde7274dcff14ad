"""What a keeper has of another node's ranks, through boundaries, snapshots and generations; and who goes on from it."""

from __future__ import annotations

import msgspec
import pytest

from ftrain.core import journal, keeping, node
from ftrain.core import messages as m
from ftrain.core.keeping import Kept
from ftrain.core.membership import Generation, Member, Node
from ftrain.core.run_state import Begin, Phase, Stored
from tests.core.scene import Scene, successor
from tests.core.test_in_place import in_loop, rank_of
from tests.core.test_node import start

SIX, NINE, TWELVE = (m.Attempt(1, step, step) for step in (6, 9, 12))
LINE = m.Line(6, m.Tier.ARENA, SIX)


def boundary(kept: Kept, step: int, generation: int = 1, rank: int = 3) -> Kept:
    return keeping.took_boundary(kept, generation, rank, step, "all", True)


def steps(kept: Kept, rank: int = 3) -> tuple[int, ...]:
    return kept.ranks[rank].steps if rank in kept.ranks else ()


def test_two_newest_boundaries_are_kept() -> None:
    kept = boundary(boundary(boundary(Kept(1), 4), 5), 7)
    assert keeping.report(kept) == (m.Kept(3, (5, 7), (), "all", True),)


def test_older_step_that_comes_again_ends_the_later_ones() -> None:
    kept = boundary(boundary(boundary(Kept(1), 7), 8), 7, generation=2)
    assert kept.ranks[3].boundaries == ((7, 2),)


def test_generation_that_goes_on_from_a_step_gives_up_what_came_after_it() -> None:
    kept = boundary(boundary(Kept(1), 6), 7)
    assert steps(keeping.began(kept, 2, LINE)) == (6,)
    assert steps(keeping.began(kept, 2, m.Line(7, m.Tier.LIVE))) == (6, 7)
    assert steps(keeping.began(kept, 2, None)) == ()


def test_what_was_sent_before_we_heard_of_the_generation_stays() -> None:
    kept = boundary(boundary(Kept(1), 6), 8, generation=2)
    assert steps(keeping.began(kept, 2, LINE)) == (6, 8)
    assert steps(keeping.began(kept, 2, None)) == (8,)


def test_generation_that_began_twice_is_not_begun_again() -> None:
    kept = boundary(keeping.began(Kept(), 2, LINE), 8, generation=2)
    assert keeping.began(kept, 2, LINE) is kept
    assert keeping.began(kept, 1, None) is kept


def test_what_an_ended_generation_sends_is_an_error_of_the_shell() -> None:
    with pytest.raises(AssertionError):
        boundary(Kept(2), 8, generation=1)


def test_snapshot_that_its_node_still_holds_stays_while_the_next_one_comes() -> None:
    kept = keeping.took_snapshot(keeping.makes_room(Kept(1), 3, SIX, ()), 3, SIX)
    kept = keeping.took_snapshot(keeping.makes_room(kept, 3, NINE, (SIX, NINE)), 3, NINE)
    assert kept.ranks[3].snapshots == (SIX, NINE)
    # The attempt of step 9 was given up elsewhere: its node holds that of step 6, for all have it.
    assert keeping.makes_room(kept, 3, TWELVE, (SIX, TWELVE)).ranks[3].snapshots == (SIX,)
    assert keeping.makes_room(kept, 3, TWELVE, (NINE, TWELVE)).ranks[3].snapshots == (NINE,)


def test_snapshots_outlive_a_generation_in_place_and_no_other() -> None:
    kept = keeping.took_snapshot(Kept(1), 3, SIX)
    assert keeping.began(kept, 2, LINE).ranks[3].snapshots == (SIX,)
    assert keeping.began(kept, 2, None).ranks == {}
    assert keeping.began(keeping.took_snapshot(Kept(0), 3, SIX), 1, None).ranks[3].snapshots == (SIX,)


def test_damaged_copy_is_not_reported_any_more() -> None:
    kept = keeping.took_snapshot(boundary(boundary(Kept(1), 6), 7), 3, SIX)
    kept = keeping.lost(keeping.lost(kept, 3, 7), 3, attempt=SIX)
    assert keeping.report(kept) == (m.Kept(3, (6,), (), "all", True),)


def test_newer_boundaries_and_snapshots_are_due_and_older_ones_never() -> None:
    assert keeping.boundaries_due(5, (7, 6)) == (6, 7)
    assert keeping.boundaries_due(7, (6, 7)) == ()
    assert keeping.snapshot_due(None, {}) is None
    assert keeping.snapshot_due(None, {0: SIX, 1: NINE}) == (1, NINE)
    assert keeping.snapshot_due(NINE, {0: SIX, 1: NINE}) is None
    assert keeping.snapshot_due(NINE, {0: SIX}) is None
    assert keeping.snapshot_due(NINE, {0: TWELVE, 1: NINE}) == (0, TWELVE)


def node_at(name: str, port: int) -> Node:
    return Node(m.Hello(name, -1, 2, f"10.0.0.{name}", name, 1, "run", "job", "1", 0, peer_port=port), 0.0, 0.0)


def test_next_node_in_the_ring_that_takes_copies_is_the_keeper() -> None:
    members = tuple(Member(name, -1, place, 2 * place, 2) for place, name in enumerate("123"))
    generation = Generation(1, members)
    nodes = {name: node_at(name, 7000 + int(name)) for name in "123"}
    found = [keeping.keeper(generation, nodes, member) for member in members]
    assert [peer.node if peer else "" for peer in found] == ["2", "3", "1"]
    assert found[0] == m.Peer("2", "10.0.0.2", 7002)
    nodes["2"] = node_at("2", 0)
    found = [keeping.keeper(generation, nodes, member) for member in members]
    assert [peer.node if peer else "" for peer in found] == ["3", "", "1"]
    del nodes["3"], nodes["1"]
    assert keeping.keeper(generation, nodes, members[0]) is None


def test_node_that_has_copies_of_more_ranks_is_the_holder_and_only_common_snapshots_count() -> None:
    member = Member("1", -1, 0, 0, 2)
    old = m.Report(keeps=(m.Kept(0, (8, 9), (SIX,)),))
    new = m.Report(keeps=(m.Kept(0, (7, 8), (SIX, NINE)), m.Kept(1, (8,), (SIX,)), m.Kept(2, (9,))))
    name, kept = keeping.holder_of(member, keeping.by_rank({"1": new, "2": old, "3": new}))
    assert (name, sorted(kept)) == ("3", [0, 1])
    assert keeping.snapshots_of(member, kept) == {SIX}
    assert keeping.snapshots_of(member, {0: kept[0]}) == frozenset()


# ------------------------------------------------------------------------------------------- the coordinator, the node


def lost_b(kept: tuple[m.Kept, ...], held: tuple[m.Attempt, ...] = (), shard: str = "all") -> tuple[Scene, list[str]]:
    """Both are after step 8 when node b is lost; a stands still, and keeps this of b's rank."""
    scene = in_loop(Scene().started(), 8)
    scene.say("b", m.Goodbye("its machine is gone"))
    rank = msgspec.structs.replace(rank_of("a", 8, halted=True, live=8, kept=(7, 8)), shard=shard)
    scene.report("a", ranks=(rank,), halted=True, keeps=kept, held=held)
    assert scene.state.phase is Phase.FORMING
    scene.do(Stored(journal.ReadBack(scene.requests.pop(0).path, None)))  # nobody else continued the run
    hello = m.Hello("b2", 1, 1, "10.0.0.9", "b", 1, "run", "job", "1", 0, peer_port=7009)
    own = scene.state.nodes["a"]
    keeper = Node(msgspec.structs.replace(own.hello, peer_port=7001), own.joined_at, own.lease_until)
    scene.state = msgspec.structs.replace(scene.state, nodes={**scene.state.nodes, "a": keeper})
    return scene, scene.say("b2", hello)


def started(scene: Scene) -> dict[str, m.Start]:
    """The Starts of the generation that was formed."""
    sent: dict[str, m.Start] = {}
    real = scene._line

    def line(action: object) -> str:
        message = getattr(action, "message", None)
        if isinstance(message, m.Start):
            sent[action.node] = message  # type: ignore[attr-defined]
        return real(action)  # type: ignore[arg-type]

    scene._line = line  # type: ignore[method-assign]
    scene.stored()
    scene.say("a", m.StoreReady(scene.state.number, "10.0.0.1", 29400))
    return sent


def test_lost_nodes_rank_goes_on_with_the_private_state_that_its_keeper_has() -> None:
    scene, lines = lost_b((m.Kept(1, (7, 8), (), "all", True),))
    assert "continues at 8 from live, 1 kept, 1 new" in lines
    starts = started(scene)
    keeper = m.Peer("a", "10.0.0.1", 7001)
    assert starts["b2"].fetch == m.Fetch(keeper, (1,))
    assert starts["b2"].keeper == keeper
    assert starts["a"].fetch is None
    assert starts["a"].keeper == m.Peer("b2", "10.0.0.9", 7009)


def test_lost_shard_goes_on_from_the_snapshot_that_its_keeper_has() -> None:
    scene, lines = lost_b((m.Kept(1, (7, 8), (SIX,), "other", True),), held=(SIX,), shard="one")
    assert "continues at 6 from arena, 1 kept, 1 new" in lines
    assert started(scene)["b2"].fetch == m.Fetch(m.Peer("a", "10.0.0.1", 7001), (1,))


def test_lost_node_of_which_nothing_is_kept_starts_all_ranks_again() -> None:
    scene, lines = lost_b(())
    assert not any("kept" in line for line in lines)
    assert "a <- Stop 1" in [*lines, *scene.log]


def test_coordinator_that_was_lost_with_its_node_hears_the_others_before_it_gives_their_ranks_up() -> None:
    scene = successor(in_loop(Scene().started(), 8))
    scene.do(Begin())
    scene.stored()
    assert "b <- Stop 1" not in scene.hello("a", life="2")
    assert scene.state.phase is Phase.ADOPTING
    rank = rank_of("b", 8, halted=True, live=8, kept=(7, 8))
    report = m.Report(3, 1, False, ranks=(rank,), halted=True, keeps=(m.Kept(0, (7, 8), (), "all", True),))
    scene.hello("b", report, term_seen=1)
    scene.report("b", ranks=(rank,), halted=True, keeps=report.keeps)
    assert "b <- Stop 1" not in scene.log
    assert "continues at 8 from live, 1 kept, 1 new" in scene.log


def test_keeper_says_at_once_what_it_keeps_while_what_to_go_on_from_is_decided() -> None:
    state = node.State(m.Hello("a", 0, 1, "10.0.0.1", "a", 1, "run", "job", "1", 0), term=1, connected=True)
    state, _ = node.step(state, node.Said(start(1)), 1.0, {})
    kept = (m.Kept(3, (7, 8)),)
    state, actions = node.step(state, node.Keeps(kept), 1.0, {})
    assert actions == ()
    assert node.report(state, {}).keeps == kept
    state, _ = node.step(state, node.Said(m.Halt(1, 1, "")), 1.0, {})
    state, actions = node.step(state, node.Keeps(()), 1.0, {})
    assert [type(action.message) for action in actions if isinstance(action, node.Send)] == [m.Changed]


def test_keeper_says_at_once_that_a_snapshot_is_there_of_all_ranks() -> None:
    state = node.State(m.Hello("a", 0, 1, "10.0.0.1", "a", 1, "run", "job", "1", 0), term=1, connected=True)
    state, _ = node.step(state, node.Said(start(1)), 1.0, {})

    def messages(*kept: m.Kept) -> list[type]:
        nonlocal state
        state, actions = node.step(state, node.Keeps(kept), 1.0, {})
        return [type(action.message) for action in actions if isinstance(action, node.Send)]

    assert messages(m.Kept(2, (5,), (SIX,)), m.Kept(3, (5,))) == []
    assert messages(m.Kept(2, (5, 6), (SIX,)), m.Kept(3, (5, 6), (SIX,))) == [m.Changed]
    assert messages(m.Kept(2, (6, 7), (SIX,)), m.Kept(3, (6, 7), (SIX,))) == []
    assert messages(m.Kept(2, (6, 7), (SIX, NINE)), m.Kept(3, (6, 7), (SIX,))) == []
    assert messages(m.Kept(2, (6, 7), (NINE,)), m.Kept(3, (6, 7), (NINE,))) == [m.Changed]


def test_fetched_snapshot_is_held() -> None:
    state = node.State(m.Hello("b2", 1, 1, "10.0.0.1", "b", 1, "run", "job", "1", 0), term=1, connected=True)
    fetch = m.Fetch(m.Peer("a", "10.0.0.1", 7001), (0,))
    state, _ = node.step(state, node.Said(msgspec.structs.replace(start(2), line=LINE, fetch=fetch)), 1.0, {})
    state, _ = node.step(state, node.Fetched(1, 0, NINE), 1.0, {})
    assert state.held == {}
    state, _ = node.step(state, node.Fetched(2, 0, SIX), 1.0, {})
    assert node.report(state, {}).held == (SIX,)
