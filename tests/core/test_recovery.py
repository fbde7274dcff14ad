"""The recovery line, on every small world."""

from __future__ import annotations

import itertools

import pytest

from ftrain.core.messages import Attempt, Line, Resume, Tier
from ftrain.core.recovery import Holder, plan

COMMIT = Resume(Attempt(1, 4, 1), 2, 9, "")
HELD = Attempt(1, 6, 2)


def living(rank: int, step: int, shard: str = "all") -> Holder:
    return Holder(rank, shard, step, (step - 1, step), True)


def gone(rank: int, *kept: int, shard: str = "all", replays: bool = True) -> Holder:
    return Holder(rank, shard, -1, kept, replays)


def test_replica_of_a_lost_rank_gives_its_state_and_no_step_is_lost() -> None:
    assert plan([living(0, 8), gone(1, 7, 8)], [HELD], COMMIT) == Line(8, Tier.LIVE, None, ((0, 1),))


def test_rank_that_was_behind_copies_and_replays_what_is_its_own() -> None:
    line = plan([living(0, 9), living(1, 8), gone(2, 7, 8)], [], None)
    assert line == Line(9, Tier.LIVE, None, ((0, 1), (0, 2)), (1, 2))


def test_rank_that_was_ahead_goes_back_where_the_others_cannot_follow() -> None:
    line = plan([living(0, 9), living(1, 8), gone(2, 7, 8, replays=False)], [], None)
    assert line == Line(8, Tier.LIVE, None, ((1, 0), (1, 2)))


def test_shard_that_no_living_rank_has_comes_from_memory_then_from_storage() -> None:
    ranks = [living(0, 8, "a"), gone(1, 7, 8, shard="b")]
    assert plan(ranks, [HELD], COMMIT) == Line(6, Tier.ARENA, HELD)
    assert plan(ranks, [], COMMIT) == Line(4, Tier.STORAGE)
    assert plan(ranks, [], None) is None


def test_half_written_rank_takes_from_its_replica() -> None:
    ranks = [Holder(0, "a", -1, (7, 8), True), living(1, 8, "a"), gone(2, 8, shard="b"), living(3, 8, "b")]
    assert plan(ranks, [HELD], None) == Line(8, Tier.LIVE, None, ((1, 0), (3, 2)))


def test_rank_without_a_record_of_its_own_state_cannot_go_on_live() -> None:
    assert plan([living(0, 8), gone(1, 3, 4)], [HELD], None) == Line(6, Tier.ARENA, HELD)
    assert plan([living(0, 8), Holder(1)], [], COMMIT) == Line(4, Tier.STORAGE)


def test_before_anything_was_planned_nobody_knows_what_a_rank_holds() -> None:
    assert plan([Holder(0, "", 1, (0, 1)), Holder(1, "", -1, (0, 1))], [], None) is None


def test_newest_line_wins_and_of_two_at_one_step_the_nearer_one() -> None:
    ranks = [living(0, 6), gone(1, 6)]
    assert plan(ranks, [HELD], COMMIT) == Line(6, Tier.LIVE, None, ((0, 1),))
    assert plan(ranks, [Attempt(1, 7, 3), HELD], COMMIT) == Line(7, Tier.ARENA, Attempt(1, 7, 3))
    assert plan([living(0, 2), gone(1, 2)], [], COMMIT) == Line(4, Tier.STORAGE)


def test_givers_of_one_shard_share_the_work() -> None:
    line = plan([living(0, 8), living(1, 8), gone(2, 8), gone(3, 8)], [], None)
    assert line is not None
    assert {giver for giver, _ in line.copies} == {0, 1}


HOLDERS = [
    (shard, live, kept, replays)
    for shard in ("a", "b")
    for live, kept in (
        (-1, ()),
        (-1, (1, 2)),
        (-1, (2, 3)),
        (2, (1, 2)),
        (3, (2, 3)),
    )
    for replays in (False, True)
]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_line_of_every_small_world_can_be_reached_by_every_rank(size: int) -> None:
    seen = 0
    for world in itertools.product(HOLDERS, repeat=size):
        ranks = [Holder(rank, *one) for rank, one in enumerate(world)]
        line = plan(ranks, [], None)
        if line is None:
            continue
        seen += 1
        assert line.step in {holder.live for holder in ranks}
        given = {taker: giver for giver, taker in line.copies}
        assert len(given) == len(line.copies)
        for holder in ranks:
            if holder.rank in given:
                assert ranks[given[holder.rank]].live == line.step
                assert ranks[given[holder.rank]].shard == holder.shard
            else:
                assert holder.live == line.step
            if holder.rank in line.replay:
                assert holder.replays
                assert line.step - 1 in holder.kept
                assert holder.rank in given  # what it replays with is overwritten
            else:
                assert line.step in holder.kept
    assert seen


def test_newest_reachable_line_is_never_passed_over() -> None:
    for world in itertools.product(HOLDERS, repeat=2):
        ranks = [Holder(rank, *one) for rank, one in enumerate(world)]
        line = plan(ranks, [], None)
        for step in (2, 3):
            reachable = all(
                any(other.live == step and other.shard == holder.shard for other in ranks)
                and (step in holder.kept or (step - 1 in holder.kept and holder.replays and holder.live != step))
                for holder in ranks
            )
            if reachable:
                assert line is not None
                assert line.step >= step
