"""At which step the next checkpoint is."""

from __future__ import annotations

import pytest

from ftrain.core import schedule
from ftrain.core.schedule import Cadence, CheckpointPolicy

STEPS = CheckpointPolicy(every_steps=10, every_seconds=0.0)
SECONDS = CheckpointPolicy(every_seconds=60.0)


def next_step(policy: CheckpointPolicy, cadence: Cadence, furthest: int, total: int) -> int | None:
    found = schedule.next_proposal(policy, cadence, furthest, total, now=1e9)
    return found.step if found is not None else None


@pytest.mark.parametrize(
    ("furthest", "step"),
    [(0, 10), (8, 10), (9, 10), (10, 20), (-1, 10)],
)
def test_period_in_steps_proposes_the_next_multiple(furthest: int, step: int) -> None:
    assert next_step(STEPS, Cadence(), furthest, total=0) == step


def test_period_in_seconds_looks_a_little_ahead_and_further_after_each_refusal() -> None:
    cadence, steps = Cadence(), []
    for refused_at in (102, 104, 108, 116):
        steps.append(next_step(SECONDS, cadence, furthest=100, total=0))
        cadence = schedule.after_refusal(cadence, refused_at)
    # The first time it was known too late how far the ranks were; from then on they are too quick for the guess.
    assert steps == [102, 104, 108, 116]


def test_step_that_was_refused_is_not_proposed_again() -> None:
    assert next_step(STEPS, schedule.after_refusal(Cadence(), 25), furthest=9, total=0) == 30


def test_step_that_was_committed_is_not_proposed_again() -> None:
    cadence = schedule.after_commit(STEPS, Cadence(failures=3), 20, now=7.0)
    assert (cadence.failures, cadence.beyond) == (0, 20)
    assert next_step(STEPS, cadence, furthest=15, total=0) == 30


def test_last_step_is_always_worth_a_commit() -> None:
    assert next_step(STEPS, Cadence(), furthest=12, total=15) == 15
    assert next_step(STEPS, Cadence(), furthest=15, total=15) is None


def test_failures_pause_longer_and_longer() -> None:
    cadence, pauses = Cadence(), []
    for _ in range(5):
        cadence = schedule.after_failure(cadence, 100.0, "disk full")
        pauses.append(cadence.retry_at - 100.0)
    assert pauses == [1.0, 5.0, 20.0, 60.0, 60.0]


def test_lookahead_has_a_bound() -> None:
    cadence = Cadence()
    for _ in range(100):
        cadence = schedule.after_refusal(cadence, 5)
    assert cadence.lookahead == schedule.LOOKAHEAD_MAX


def test_lookahead_comes_down_again_with_each_snapshot_that_was_taken() -> None:
    cadence, seen = Cadence(lookahead=16), []
    for _ in range(16):
        cadence = schedule.after_snapshot(STEPS, cadence, now=0.0)
        seen.append(cadence.lookahead)
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == 14
    assert seen[-1] == schedule.LOOKAHEAD


def test_guess_that_came_too_late_once_does_not_keep_snapshots_away_between_commits() -> None:
    """A snapshot every step, a commit every fifth: after one refusal there was room for commits alone, for ever."""
    policy = CheckpointPolicy(every_steps=5, every_seconds=0.0, snapshot_steps=1)
    cadence, furthest, held = schedule.after_refusal(Cadence(), 6), 6, []
    while furthest < 39:
        found = schedule.next_proposal(policy, cadence, furthest, 0, now=1e9)
        assert found is not None
        furthest = found.step
        cadence = schedule.after_snapshot(policy, cadence, now=0.0)
        if found.persist:
            cadence = schedule.after_commit(policy, cadence, furthest, now=0.0)
        else:
            cadence = schedule.after_taken(cadence, furthest)
            held.append(furthest)
    assert held[-6:] == [31, 32, 33, 36, 37, 38]  # what is nearer to a commit than arming takes is left out


def test_steps_that_are_done_again_are_snapshotted_again() -> None:
    """Three snapshots and the wait for a commit were before a failure that took all ranks back to step 25."""
    policy = CheckpointPolicy(every_steps=5, every_seconds=0.0, snapshot_steps=1)
    before = Cadence(beyond=28, put_off=30, refused=True, failures=2, retry_at=2e9, commit_at=2e9, lookahead=2)
    found = schedule.next_proposal(policy, schedule.after_return(before, 25), furthest=25, total=0, now=1e9)
    assert found == schedule.Proposal(26, persist=False, put_off=30)
    assert schedule.after_return(before, 40).beyond == 28, "nothing was taken of the steps between"


@pytest.mark.parametrize("instead", [None, schedule.Proposal(30, persist=True), schedule.Proposal(12, persist=False)])
def test_commit_gives_way_to_a_snapshot_and_to_nothing_else(instead: schedule.Proposal | None) -> None:
    given = schedule.gives_way(Cadence(), 30, 11.0, instead)
    assert given == (instead is not None and not instead.persist)
    assert not schedule.gives_way(Cadence(), 15, 11.0, instead), "so near that the snapshot would be in its way"


def test_policy_without_a_period_is_off() -> None:
    assert CheckpointPolicy(every_steps=0, every_seconds=0.0).off
    assert not STEPS.off
    assert not SECONDS.off
