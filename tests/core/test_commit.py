"""The barrier's table: docs/protocol.md, "One attempt"."""

from __future__ import annotations

import pytest

from ftrain.core import commit
from ftrain.core.commit import Barrier, Stage
from ftrain.core.messages import Attempt, PackRecord

ATTEMPT = Attempt(generation=1, step=30, number=2)
EVENTS: tuple[commit.Event, ...] = (
    commit.Accepted("a"),
    commit.Refused("a", 31, "too late"),
    commit.RanksSealed(frozenset({0})),
    commit.RankPrepared(PackRecord(0, "packs/00000", "packs/00000.json", "0" * 64, 1, 1, 1)),
    commit.RankFailed(0, "disk full"),
    commit.WorkersLost(frozenset({0}), "rank 0 died"),
    commit.ArenasLost(frozenset({0}), "node a is gone"),
    commit.Published("f" * 64),
    commit.PublishFailed("disk full"),
    commit.Recorded(),
    commit.Expired("out of time"),
)


def barrier(hold: bool = False) -> Barrier:
    return Barrier(ATTEMPT, frozenset({"a", "b"}), frozenset({0, 1}), hold)


def prepared(rank: int) -> commit.RankPrepared:
    return commit.RankPrepared(PackRecord(rank, f"packs/{rank:05d}", "", "0" * 64, 1, 1, 1))


def play(state: Barrier, *events: commit.Event) -> tuple[Barrier, list[str]]:
    """The barrier after these events, and a transcript of what it asked for."""
    asked = []
    for event in events:
        state, actions = commit.step(state, event)
        asked += [type(action).__name__ for action in actions]
    return state, asked


def test_attempt_that_goes_well_commits_in_order() -> None:
    state, asked = play(barrier(), commit.Accepted("a"), commit.Accepted("b"))
    assert (state.stage, asked) == (Stage.ARMED, ["AllArmed"])
    state, asked = play(state, commit.RanksSealed(frozenset({0})), commit.RanksSealed(frozenset({1})))
    assert (state.stage, asked) == (Stage.SEALED, ["AllSealed"])
    state, asked = play(state, prepared(1), prepared(0))
    assert (state.stage, asked) == (Stage.PREPARED, ["Publish"])
    state, asked = play(state, commit.Published("f" * 64))
    assert (state.stage, asked) == (Stage.RECORDING, ["WriteCommit"])
    state, asked = play(state, commit.Recorded())
    assert (state.stage, asked) == (Stage.COMMITTED, ["AnnounceCommit"])


def test_one_rank_prepared_twice_is_not_two_ranks() -> None:
    state, asked = play(barrier(), commit.Accepted("a"), commit.Accepted("b"), prepared(0), prepared(0))
    assert (state.stage, asked) == (Stage.ARMED, ["AllArmed"])
    assert state.missing == {1}


def test_stranger_changes_nothing() -> None:
    state, asked = play(barrier(), commit.Accepted("c"), commit.RanksSealed(frozenset({7})), prepared(7))
    assert (state, asked) == (barrier(), [])


def test_packs_that_are_there_before_the_last_node_accepted_wait_for_it() -> None:
    state, asked = play(barrier(), commit.Accepted("a"), prepared(0), prepared(1))
    assert (state.stage, asked) == (Stage.PROPOSED, [])
    state, asked = play(state, commit.Accepted("b"))
    assert (state.stage, asked) == (Stage.PREPARED, ["AllArmed", "AllSealed", "Publish"])


def test_refusal_aborts_and_says_how_far_that_node_is() -> None:
    state, asked = play(barrier(), commit.Accepted("b"), commit.Refused("a", 31, "too late"))
    assert (state.stage, state.refused_step, asked) == (Stage.ABORTED, 31, ["AnnounceAbort"])
    assert state.cause == "node a refused: too late"


@pytest.mark.parametrize(("sealed", "stage"), [((), Stage.ABORTED), ((0,), Stage.ARMED), ((7,), Stage.ABORTED)])
def test_worker_lost_before_its_seal_aborts_and_after_it_does_not(sealed: tuple[int, ...], stage: Stage) -> None:
    events: list[commit.Event] = [
        commit.Accepted("a"),
        commit.Accepted("b"),
        commit.RanksSealed(frozenset(sealed)),
    ]
    state, _ = play(barrier(), *events, commit.WorkersLost(frozenset({0}), "rank 0 died"))
    assert state.stage is stage


def test_arena_lost_before_its_pack_is_durable_aborts() -> None:
    armed: list[commit.Event] = [
        commit.Accepted("a"),
        commit.Accepted("b"),
        commit.RanksSealed(frozenset({0})),
        commit.RanksSealed(frozenset({1})),
        prepared(0),
    ]
    gone = commit.ArenasLost(frozenset({1}), "node b is gone")
    assert play(barrier(), *armed, gone)[0].stage is Stage.ABORTED
    assert play(barrier(), *armed, commit.ArenasLost(frozenset({0}), "node a is gone"))[0].stage is Stage.SEALED
    assert play(barrier(), *armed, prepared(1), gone)[0].stage is Stage.PREPARED


@pytest.mark.parametrize(
    "event", [event for event in EVENTS if (Stage.RECORDING, type(event)) in commit.TABLE], ids=str
)
def test_nothing_aborts_an_attempt_whose_record_is_being_written(event: commit.Event) -> None:
    steps: list[commit.Event] = [
        commit.Accepted("a"),
        commit.Accepted("b"),
        prepared(0),
        prepared(1),
        commit.Published("f" * 64),
    ]
    state, _ = play(barrier(), *steps)
    assert play(state, event)[0].stage in (Stage.RECORDING, Stage.COMMITTED)


@pytest.mark.parametrize("stage", list(Stage))
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_pair_that_the_table_does_not_list_raises(stage: Stage, event: commit.Event) -> None:
    state = Barrier(ATTEMPT, frozenset({"a", "b"}), frozenset({0, 1}), stage=stage)
    if (stage, type(event)) in commit.TABLE:
        assert commit.step(state, event)[0].stage in Stage
    else:
        with pytest.raises(AssertionError, match="cannot happen"):
            commit.step(state, event)


def test_final_stages_list_nothing() -> None:
    assert not [stage for stage, _ in commit.TABLE if stage in commit.FINAL]
